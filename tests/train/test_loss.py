"""The training loss and its gradients against the official implementation's."""

import dataclasses
import functools
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from golden import DATA
from safetensors.numpy import load_file

from dsvl2_jax.checkpoint import rules
from dsvl2_jax.checkpoint.load import load_params
from dsvl2_jax.errors import UsageError
from dsvl2_jax.inputs.batch import Batch, collate
from dsvl2_jax.inputs.processor import ModelInputs, Processor
from dsvl2_jax.kernels import attention
from dsvl2_jax.model import deepseek_vl2 as model
from dsvl2_jax.model.config import IGNORED_LABEL, TEXT_POSITION, Config, LanguageConfig
from dsvl2_jax.model.moe import Routing
from dsvl2_jax.train.data.batch import one_sample_a_row
from dsvl2_jax.train.loss import LossOptions, Sums, balance_loss, cross_entropy, loss_fn, step_totals, targets

CASES = json.loads((DATA / "processor_mini.json").read_text())
TRAINED = ("mini-tiny", "mini-small")

# ‖Δ‖/‖g‖. On the router the balance loss is a small part, which only a tighter bound sees.
GRADIENT_TOLERANCE, ROUTER_TOLERANCE = 1e-4, 1e-5

OPTIONS = LossOptions(max_segments=1, chunk=128)


def whole_loss(params, config, batch, mean, std) -> tuple[jax.Array, Sums]:
    """The loss of a step of one accumulation step."""
    return loss_fn(params, config, batch.micro(0), step_totals(batch), mean, std, OPTIONS)


loss_of = jax.jit(whole_loss, static_argnums=1)
gradient_of = jax.jit(jax.value_and_grad(whole_loss, has_aux=True), static_argnums=1)
balance_of = jax.jit(
    jax.value_and_grad(lambda scores, experts, *rest: balance_loss(Routing(experts, None, scores), *rest)),
    static_argnums=(3, 4),
)


def mean_loss(sums: Sums) -> jax.Array:
    return sums.loss / sums.supervised_tokens


@dataclasses.dataclass(frozen=True)
class Trained:
    """A mini checkpoint, and what the official implementation computed with it."""

    config: Config
    params: dict
    processor: Processor
    golden: dict[str, np.ndarray]

    def sample(self, case: str) -> ModelInputs:
        turns = [
            turn | {"images": [DATA / "images" / name for name in turn.get("images", [])]}
            for turn in CASES[case]["case"]["conversations"]
        ]
        return self.processor(turns, inference=False, mask_prompt=True)

    @property
    def pixels(self) -> tuple[np.ndarray, np.ndarray]:
        return tuple(np.float32(v) for v in (self.processor.config.image_mean, self.processor.config.image_std))

    def expected(self, case: str) -> dict[str, np.ndarray]:
        return {name.removeprefix(case + "/"): v for name, v in self.golden.items() if name.startswith(case + "/")}


@functools.cache
def trained(name: str) -> Trained:
    directory = DATA / "checkpoints" / name
    config = Config.from_file(directory)
    return Trained(
        config,
        load_params(directory, config, dtype="float32"),
        Processor.from_dir(directory),
        load_file(DATA / "model" / f"{name}.f32.safetensors"),
    )


@functools.cache
def gradient(name: str, case: str) -> tuple[jax.Array, Sums, dict[str, np.ndarray]]:
    """The differentiated total, the metrics, and the gradient under the released tensor names."""
    mini = trained(name)
    # Both cases have the shape of the larger one: one program serves them, and padding shows to have no effect.
    dialog = mini.sample("train_dialog")
    batch = collate([mini.sample(case)], mini.config, length=len(dialog.input_ids), tile_count=len(dialog.tiles))
    (total, metrics), tree = gradient_of(mini.params, mini.config, one_sample_a_row(batch), *mini.pixels)
    leaves = flatten_dict(jax.device_get(tree))
    named = (leaf.parts(leaves[leaf.path]) for leaf in rules.expand(mini.config))
    return total, metrics, dict(itertools.chain.from_iterable(named))


def tolerance(name: str) -> float:
    return ROUTER_TOLERANCE if name.endswith("mlp.gate.weight") else GRADIENT_TOLERANCE


def spread(flat: np.ndarray) -> np.ndarray:
    """The entries that the golden files sample."""
    return flat[np.round(np.linspace(0, flat.size - 1, min(16, flat.size))).astype(int)]


@pytest.mark.parametrize("case", ["train_dialog", "train_text"])
@pytest.mark.parametrize("name", TRAINED)
def test_loss_and_balance_losses_are_the_golden_ones_and_the_total_is_their_sum(name, case):
    golden = trained(name).expected(case)
    total, metrics, _ = gradient(name, case)
    assert mean_loss(metrics) == pytest.approx(golden["loss"].item(), rel=1e-6)
    balance = [golden[f"layer{i}.aux_loss"].item() for i in (1, 2)]
    np.testing.assert_allclose(metrics.balance_losses, balance, rtol=1e-5)
    assert total == pytest.approx(golden["loss"].item() + sum(balance), rel=1e-6)


@pytest.mark.parametrize("case", ["train_dialog", "train_text"])
@pytest.mark.parametrize("name", TRAINED)
def test_every_gradient_has_the_golden_norm_and_entries(name, case):
    golden = trained(name).expected(case)
    _, _, found = gradient(name, case)
    for tensor, part in found.items():
        norm = golden.get(f"grad.{tensor}.norm", np.zeros(1)).item()
        if norm == 0.0:  # attn_pool; without an image the encoder and the adaptor; experts that no token chose
            assert not part.any(), tensor
            continue
        assert np.linalg.norm(part) == pytest.approx(norm, rel=tolerance(tensor)), tensor
        # An entry is held to the tensor's root mean square: a small one carries the rounding of large ones.
        bound = 10 * tolerance(tensor) * norm / part.size**0.5
        entries = spread(part.reshape(-1))
        np.testing.assert_allclose(entries, golden[f"grad.{tensor}.s"], rtol=0, atol=bound, err_msg=tensor)
    assert {key[5:-5] for key in golden if key.startswith("grad.") and key.endswith(".norm")} <= found.keys()


def test_whole_gradients_equal_the_golden_ones_and_the_pooling_head_has_none():
    golden = load_file(DATA / "model/full/mini-small.train_dialog.safetensors")
    expected = {name.removeprefix("grad."): value for name, value in golden.items() if name.startswith("grad.")}
    _, _, found = gradient("mini-small", "train_dialog")
    for tensor, value in expected.items():
        assert np.linalg.norm(found[tensor] - value) <= tolerance(tensor) * np.linalg.norm(value), tensor
    without = {tensor for tensor in found if tensor not in expected}
    assert without == {tensor for tensor in found if tensor.startswith("vision.attn_pool.")}
    assert not any(found[tensor].any() for tensor in without)


def test_loss_of_a_batch_is_divided_by_the_supervised_tokens_of_all_rows():
    mini = trained("mini-tiny")
    cases = ("train_dialog", "train_text")
    batch = collate([mini.sample(case) for case in cases], mini.config)
    _, metrics = loss_of(mini.params, mini.config, one_sample_a_row(batch), *mini.pixels)
    tokens = (batch.labels[:, 1:] != IGNORED_LABEL).sum(1)
    losses = [mini.expected(case)["loss"].item() for case in cases]
    assert metrics.supervised_tokens == tokens.sum()
    assert mean_loss(metrics) == pytest.approx(np.average(losses, weights=tokens), rel=1e-6)
    balance = [[mini.expected(case)[f"layer{i}.aux_loss"].item() for i in (1, 2)] for case in cases]
    np.testing.assert_allclose(metrics.balance_losses, np.mean(balance, axis=0), rtol=1e-5)


def test_official_left_padded_batch_differs_by_its_bos_after_padding_alone(monkeypatch):
    """The official batch is padded at the left, so that the shorter row's bos is a target too, of a padding token.

    That token may see nothing, which the official mask turns into seeing all positions alike.
    """
    mini = trained("mini-small")
    config = mini.config
    batch = collate([mini.sample(case) for case in ("train_dialog", "train_text")], config)
    length = batch.ids.shape[1]
    padding = length - batch.lengths

    def moved_right(rows: np.ndarray, fill: int) -> np.ndarray:
        return np.stack(
            [np.pad(r[: length - p], (p, 0), constant_values=fill) for r, p in zip(rows, padding, strict=True)]
        )

    def attend(queries, keys, values, seen, scale):
        products = (
            jnp.einsum("bthd,bshd->bhts" if key.ndim == 4 else "bthd,bsd->bhts", query, key)
            for query, key in zip(queries, keys, strict=True)
        )
        visible = np.tri(length, dtype=bool) & (np.arange(length) >= padding[:, None, None])
        weights = jax.nn.softmax(
            jnp.where(visible[:, None], sum(products) * scale, jnp.finfo(jnp.float32).min), axis=-1
        )
        return jnp.einsum("bhts,bshd->bthd", weights, values)

    monkeypatch.setattr(attention, "attend", attend)
    ids = moved_right(batch.ids, mini.processor.tokenizer.pad_id)
    index, labels = moved_right(batch.image_index, TEXT_POSITION), moved_right(batch.labels, IGNORED_LABEL)

    @jax.jit
    def left_padded_loss(params):
        features = model.adapt_tiles(params, config, batch.tiles, *mini.pixels)
        merged = model.merge(params, config, ids, index, features)
        hidden = model.forward(params, config, merged)
        wanted = jnp.pad(labels[:, 1:], ((0, 0), (0, 1)), constant_values=IGNORED_LABEL)
        return cross_entropy(hidden, params["language"]["lm_head"]["kernel"], wanted, jnp.ones(wanted.shape), 128)[0]

    loss = left_padded_loss(mini.params) / ((batch.labels[:, 1:] != IGNORED_LABEL).sum() + 1)
    assert loss == pytest.approx(mini.expected("train_batch_leftpad")["loss"].item(), rel=1e-6)


def test_a_batch_without_tiles_has_the_loss_of_its_padded_twin():
    mini = trained("mini-tiny")
    batch = collate([mini.sample("train_text")], mini.config)
    assert batch.tiles.shape[0] == 0
    total, metrics = loss_of(mini.params, mini.config, one_sample_a_row(batch), *mini.pixels)
    padded_total, padded, _ = gradient("mini-tiny", "train_text")
    assert total == pytest.approx(padded_total.item(), rel=1e-6)
    np.testing.assert_allclose(metrics.balance_losses, padded.balance_losses, rtol=1e-5)


def head_inputs(rng: np.random.Generator):
    hidden = rng.normal(size=(2, 5, 3)).astype(np.float32)
    kernel = rng.normal(size=(3, 7)).astype(np.float32)
    wanted = np.array([[1, IGNORED_LABEL, 2, 0, 6], [IGNORED_LABEL, 6, 0, IGNORED_LABEL, 3]], np.int32)
    return hidden, kernel, wanted


@pytest.mark.parametrize("chunk", [2, 5, 64])
def test_chunked_cross_entropy_and_its_gradients_are_those_of_whole_logits(chunk):
    hidden, kernel, wanted = head_inputs(np.random.default_rng(0))
    weights = np.where(wanted >= 0, 0.1 + np.arange(10).reshape(2, 5), 0).astype(np.float32)

    def plain(hidden, kernel):
        log_p = jax.nn.log_softmax(hidden @ kernel)
        return -3 * (jnp.take_along_axis(log_p, jnp.maximum(wanted, 0)[..., None], -1)[..., 0] * weights).sum()

    def chunked(hidden, kernel):
        return 3 * cross_entropy(hidden, kernel, wanted, weights, chunk)[0]

    expected, expected_bars = jax.value_and_grad(plain, argnums=(0, 1))(hidden, kernel)
    found, bars = jax.jit(jax.value_and_grad(chunked, argnums=(0, 1)))(hidden, kernel)
    assert found == pytest.approx(expected.item(), rel=1e-6)
    for bar, want in zip(bars, expected_bars, strict=True):
        np.testing.assert_allclose(bar, want, rtol=1e-5, atol=1e-6)
    _, losses = cross_entropy(hidden, kernel, wanted, weights, chunk)
    assert 3 * (losses * weights).sum() == pytest.approx(expected.item(), rel=1e-6)
    assert not np.asarray(losses)[wanted < 0].any()


def test_nothing_supervised_gives_no_loss_and_no_gradient():
    hidden, kernel, wanted = head_inputs(np.random.default_rng(0))
    wanted, weights = np.full_like(wanted, IGNORED_LABEL), np.zeros(wanted.shape, np.float32)
    loss, bars = jax.value_and_grad(lambda h: cross_entropy(h, kernel, wanted, weights, 2)[0])(hidden)
    assert loss == 0.0
    assert not np.any(bars)


def test_targets_are_shifted_and_never_cross_into_the_next_sample():
    batch = one_sample_a_row(Batch(*(np.zeros((1, 6), np.int32),) * 3, np.array([6], np.int32), np.zeros((0, 1, 1, 3))))
    labels = np.array([[[9, 5, IGNORED_LABEL, 7, 8, IGNORED_LABEL]]], np.int32)
    positions, segments = np.array([[[0, 1, 2, 0, 1, 0]]], np.int32), np.array([[[1, 1, 1, 2, 2, 0]]], np.int32)
    batch = dataclasses.replace(batch, labels=labels, positions=positions, segments=segments)
    ignored = IGNORED_LABEL
    assert targets(batch).tolist() == [[[5, ignored, ignored, 8, ignored, ignored]]]
    assert [total.item() for total in step_totals(batch)] == [2.0, 2.0]


def reference_balance(routing: Routing, lengths: list[int], config: LanguageConfig) -> float:
    """The official balance loss, token by token."""
    experts, top_k = config.n_routed_experts, config.num_experts_per_tok
    rows = [(np.float64(routing.scores[b, :n]), np.array(routing.experts[b, :n])) for b, n in enumerate(lengths) if n]
    if not config.seq_aux:
        rows = [tuple(np.concatenate(parts) for parts in zip(*rows, strict=True))]
    losses = []
    for scores, chosen in rows:
        if config.scoring_func == "sigmoid":
            scores = scores / scores.sum(-1, keepdims=True)
        counts = np.bincount(chosen.reshape(-1), minlength=experts)
        losses.append((counts * experts / (len(chosen) * top_k) * scores.mean(0)).sum())
    return config.aux_loss_alpha * np.mean(losses)


@pytest.mark.parametrize("seq_aux", [True, False])
@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
def test_balance_loss_excludes_padding_and_empty_rows(scoring, seq_aux):
    config = LanguageConfig(
        n_routed_experts=6, num_experts_per_tok=2, scoring_func=scoring, seq_aux=seq_aux, aux_loss_alpha=0.01
    )
    rng = np.random.default_rng(1)
    scores = rng.uniform(0.01, 1, size=(3, 8, 6)).astype(np.float32)
    if scoring == "softmax":
        scores /= scores.sum(-1, keepdims=True)
    # The chosen ones are not those of the highest scores: a bias may have chosen.
    experts = rng.permuted(np.tile(np.arange(6, dtype=np.int32), (3, 8, 1)), axis=-1)[..., :2]
    routing, lengths = Routing(experts, None, scores), [8, 5, 0]
    valid = np.arange(8) < np.array(lengths)[:, None]
    expected = reference_balance(routing, lengths, config)
    found, by_scores = balance_of(scores, experts, valid.astype(np.int32), 2, config)
    assert found / 2 == pytest.approx(expected, rel=1e-6)  # of two segments
    assert np.any(by_scores)
    assert not np.asarray(by_scores)[~valid].any()


def test_balance_loss_of_even_experts_is_alpha():
    config = LanguageConfig(n_routed_experts=4, num_experts_per_tok=2, aux_loss_alpha=0.25)
    experts = np.array([[[0, 1], [2, 3]]], np.int32)
    routing = Routing(experts, None, np.full((1, 2, 4), 0.25, np.float32))
    assert balance_loss(routing, np.ones((1, 2), np.int32), 3, config) == pytest.approx(0.25)


def test_collate_rebases_image_rows_to_the_tiles_of_the_batch():
    mini = trained("mini-tiny")
    dialog, text = mini.sample("train_dialog"), mini.sample("train_text")
    batch = collate([dialog, text, dialog], mini.config, length=600, tile_count=8)
    tokens, rows = len(dialog.input_ids), len(dialog.tiles) * mini.config.tokens_per_tile
    assert batch.ids.shape == batch.labels.shape == batch.image_index.shape == (3, 600)
    assert batch.lengths.tolist() == [tokens, len(text.input_ids), tokens]
    first, third = batch.image_index[0, :tokens], batch.image_index[2, :tokens]
    np.testing.assert_array_equal(third, np.where(first >= 0, first + rows, first))
    np.testing.assert_array_equal(batch.tiles[:4], np.concatenate([dialog.tiles, dialog.tiles]))
    assert not batch.tiles[4:].any()
    assert (batch.labels[:, tokens:] == IGNORED_LABEL).all()


def test_collate_refuses_samples_that_do_not_fit():
    mini = trained("mini-tiny")
    dialog = mini.sample("train_dialog")
    with pytest.raises(UsageError, match=r"sample 0 of the batch has \d+ tokens, but rows have 100"):
        collate([dialog], mini.config, length=100)
    with pytest.raises(UsageError, match="2 tiles, but room for 1"):
        collate([dialog], mini.config, tile_count=1)
