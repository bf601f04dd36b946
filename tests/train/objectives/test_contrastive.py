"""Contrastive training of the encoder: its loss, towers, step and runs."""

from __future__ import annotations

import dataclasses
import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy_run
from flax.traverse_util import flatten_dict

from dsvl2_jax.checkpoint import locate
from dsvl2_jax.checkpoint.load import load_params
from dsvl2_jax.checkpoint.locate import resolve
from dsvl2_jax.errors import SettingsError
from dsvl2_jax.inputs.processor import Processor
from dsvl2_jax.model.config import Config, VisionConfig
from dsvl2_jax.model.deepseek_vl2 import init_params
from dsvl2_jax.model.vision import AttentionPool
from dsvl2_jax.sharding import make_mesh
from dsvl2_jax.train.data.batch import TrainBatch
from dsvl2_jax.train.data.pipeline import BatchShard, open_training
from dsvl2_jax.train.flops import contrastive_flops
from dsvl2_jax.train.objectives.contrastive import (
    ContrastiveMetrics,
    ContrastiveTrainer,
    TextTower,
    same_captions,
    sigmoid_loss,
)
from dsvl2_jax.train.parameter_rules import assign
from dsvl2_jax.train.run import batch_shard, train
from dsvl2_jax.train.settings.load import differences, load, to_toml
from dsvl2_jax.train.settings.schema import ContrastiveSettings, ParameterRule

RULES = (ParameterRule("^vision/"), ParameterRule(".", train=False))
IMAGES = 8  # of a batch


# The pieces, against references of their own.


def tanh_gelu(x):
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def test_attention_pool_is_that_of_timm():
    """AttentionPoolLatent.forward with one latent and ``pool="token"``, written out head by head in numpy."""
    config = VisionConfig(image_size=21, patch_size=4, width=12, heads=3, mlp_ratio=2.0)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 25, 12))
    shapes = jax.eval_shape(AttentionPool(config, jnp.float32).init, jax.random.key(0), x)["params"]
    p = {name: rng.normal(0, 0.5, box.value.shape) for name, box in shapes.items()}
    expected = []
    for features in x:
        q = p["latent"] @ p["q_kernel"] + p["q_bias"]
        kv = features @ p["kv_kernel"] + p["kv_bias"]
        heads = []
        for h in range(3):  # kv's columns: those of k, then those of v, each head by head
            mine = slice(4 * h, 4 * h + 4)
            k, v = kv[:, :12][:, mine], kv[:, 12:][:, mine]
            scores = np.exp(k @ q[mine] / math.sqrt(4))
            heads.append(scores / scores.sum() @ v)
        out = np.concatenate(heads) @ p["proj_kernel"] + p["proj_bias"]
        normed = (out - out.mean()) / np.sqrt(out.var() + 1e-6) * p["norm_scale"] + p["norm_bias"]
        hidden = tanh_gelu(normed @ p["mlp_fc1_kernel"] + p["mlp_fc1_bias"])
        expected.append(out + hidden @ p["mlp_fc2_kernel"] + p["mlp_fc2_bias"])
    params = {name: jnp.float32(value) for name, value in p.items()}
    found = AttentionPool(config, jnp.float32).apply({"params": params}, jnp.float32(x))
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-5)


def test_the_loss_is_siglips_without_pairs_of_equal_captions_and_empty_rows():
    rng = np.random.default_rng(1)
    x, y = (rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in rng.normal(size=(2, 6, 5)))
    y[3] = y[1]
    ids = rng.integers(0, 50, (6, 4))
    ids[3] = ids[1]
    valid = np.ones((6, 4), bool)
    valid[4, 2:] = False
    valid[5] = False  # a row that holds nothing
    total, found = 0.0, 0
    for i in range(5):
        scores = {}
        for j in range(5):
            if i != j and {i, j} == {1, 3}:
                continue
            z = 1 if i == j else -1
            total += math.log1p(math.exp(-z * (7.0 * x[i] @ y[j] - 4.0)))
            scores[j] = x[i] @ y[j]
        found += max(scores, key=scores.get) == i
    same = same_captions(jnp.asarray(ids), jnp.asarray(valid))
    np.testing.assert_array_equal(np.argwhere(same & ~np.eye(6, dtype=bool)), [[1, 3], [3, 1]])
    args = (jnp.float32(x), jnp.float32(y), jnp.float32(math.log(7.0)), jnp.float32(-4.0), same)
    loss, accuracy = sigmoid_loss(*args, jnp.asarray(valid.any(1)))
    np.testing.assert_allclose(loss, total / 5, rtol=1e-5)
    np.testing.assert_allclose(accuracy, found / 5)


def test_what_pads_a_caption_changes_no_bit_of_what_it_says():
    rng = np.random.default_rng(2)
    config = VisionConfig(width=16, heads=2, mlp_ratio=2.0)
    tower = TextTower(config, ContrastiveSettings(text_layers=2, text_length=9), 40, jnp.float32, False)
    ids = rng.integers(0, 40, (3, 9))
    valid = np.arange(9) < np.array([[4], [9], [0]])
    params = tower.init(jax.random.key(0), ids, valid)
    before, after = tower.apply(params, ids, valid), tower.apply(params, np.where(valid, ids, 39), valid)
    np.testing.assert_array_equal(before[:2], after[:2])
    assert np.isfinite(before).all()  # of the empty one too
    assert not np.allclose(before[0], before[1])


def test_a_row_is_a_caption_that_ends_in_eos_and_its_image_in_one_tile(toy):
    config, processor = open_model(toy)
    found = load(toy / "config.toml", ["contrastive.text_length=6", "data.shuffle=false"])
    pipeline = open_training(found, processor, config, BatchShard(rows=IMAGES))
    step = next(pipeline)
    pipeline.close()
    ids, segments = step.batch.ids[0], step.batch.segments[0]
    eos = processor.tokenizer.eos_id
    for row, segment in zip(ids, segments, strict=True):
        assert (row == eos).sum() == 1 and row[segment > 0][-1] == eos
    assert segments.all() and step.stats.truncated == IMAGES  # all have more than 6 tokens
    assert step.batch.tiles.shape == (1, IMAGES, 126, 126, 3) and step.stats.tiles == IMAGES
    assert step.stats.skipped == {"no image": step.stats.skipped["no image"]}
    # The same pixels as the global view that the language model sees.
    whole = processor(prompt="<image>", images=[toy / "train-0.png"], inference=False)
    np.testing.assert_array_equal(step.batch.tiles[0, 0], whole.tiles[0])


# Steps.


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """A directory with ``model``, 24 captioned images, as many texts, and ``config.toml``."""
    directory = tmp_path_factory.mktemp("toy")
    config = toy_run.make_model(directory / "model") / "config.json"
    content = json.loads(config.read_text())
    content["vision_config"]["layers"] = 2  # one stack, and not more to compile than that
    content["language_config"]["num_hidden_layers"] = 2
    config.write_text(json.dumps(content))
    toy_run.make_data(directory, samples=72)
    toy_run.make_data(directory, "held.jsonl", samples=36, seed=1)
    write(directory, directory / "run")
    return directory


def write(toy, run):
    content = {
        "model": {"checkpoint": str(toy / "model"), "random_init": True},
        "data.train.toy": {"path": str(toy / "train.jsonl")},
        "data.validation.held": {"path": str(toy / "held.jsonl")},
        "batch": {"sequences": IMAGES, "microbatch_size": IMAGES // 8},
        "stage": {"objective": "contrastive"},
        "contrastive": {"text_layers": 1, "text_length": 40},
        "optimizer": {"learning_rate": 0.003},
        "compute": {"dtype": "float32", "remat": "none", "mesh": "data=8"},
        "run": {"directory": str(run), "steps": 6, "checkpoint_every": 2, "validate_every": 3},
    }
    lines = []
    for name, table in content.items():
        lines += [f"[{name}]", *(f"{key} = {json.dumps(value)}" for key, value in table.items())]
    for rule in RULES:
        lines += ["[[stage.parameters]]", f"match = '{rule.match}'", f"train = {json.dumps(rule.train)}"]
    path = run.parent / "config.toml"
    path.write_text("\n".join(lines) + "\n")
    return path


def open_model(toy) -> tuple[Config, Processor]:
    return locate.open_model(toy / "model")


def trainer(toy, mesh=None, **compute) -> ContrastiveTrainer:
    config, processor = open_model(toy)
    found = load(toy / "config.toml")
    shards = 1 if mesh is None else mesh.shape["data"]
    batch = dataclasses.replace(found.batch, microbatch_size=IMAGES // shards)
    compute = dataclasses.replace(found.compute, **compute)
    found = dataclasses.replace(found, batch=batch, compute=compute)
    return ContrastiveTrainer(config, found, processor.config.image_mean, processor.config.image_std, mesh)


@functools.cache
def batch() -> TrainBatch:
    """Two captions are equal, and the last row is empty."""
    rng = np.random.default_rng(3)
    ids = rng.integers(0, 512, (1, IMAGES, 40), dtype=np.int32)
    segments = (np.arange(40) < rng.integers(5, 40, (1, IMAGES, 1))).astype(np.int32)
    ids[:, 4], segments[:, 4] = ids[:, 2], segments[:, 2]
    segments[:, -1] = 0
    tiles = rng.integers(0, 256, (1, IMAGES, 126, 126, 3), np.uint8)
    index = np.full_like(ids, -1)
    return TrainBatch(ids, ids, index, np.zeros_like(ids), segments, segments > 0, tiles)


def stepped(own: ContrastiveTrainer, steps: int):
    """State, metrics of every step, and the parameters before and after."""
    params = init_params(own.config, jax.random.key(0))
    before = flatten_dict(jax.device_get(params))
    state, found = own.init(params), []
    for _ in range(steps):
        state, metrics = own.step(state, batch())
        found.append(jax.device_get(metrics))
    return state, found, before, flatten_dict(jax.device_get(own.params(state)))


@pytest.fixture(scope="module")
def one_device(toy):
    return stepped(trainer(toy), 30)


def test_a_fixed_batch_is_learnt_and_the_rest_of_the_model_keeps_every_bit(toy, one_device):
    state, metrics, before, after = one_device
    assert metrics[0].images == IMAGES - 1 and metrics[0].tokens == (batch().segments > 0).sum()
    assert metrics[0].accuracy < 0.6 and metrics[-1].accuracy == 1.0
    assert metrics[-1].loss < 0.25 * metrics[0].loss
    assert (metrics[0].scale, metrics[0].bias) == (pytest.approx(10.0), -10.0) and metrics[-1].bias != -10.0
    for path, value in before.items():
        same = np.array_equal(value.view(np.uint8), after[path].view(np.uint8))
        assert same == (path[0] != "vision"), path
    again = trainer(toy).evaluate(state, batch())
    assert again.accuracy == 1.0 and again.loss < metrics[-1].loss and np.isnan(again.gradient_norm)
    assert {path.split("/")[0] for path in state.optimizer["auxiliary"]} == {"text", "log_scale", "bias"}


# Three devices do not divide a data shard's four images: two padding tiles go along.
@pytest.mark.parametrize("sizes", [pytest.param({"data": 2}, marks=pytest.mark.exhaustive), {"data": 2, "tensor": 3}])
def test_a_mesh_computes_what_one_device_does(toy, one_device, sizes):
    mesh = make_mesh(**sizes, devices=jax.devices()[: math.prod(sizes.values())])
    state, metrics, _, _ = stepped(trainer(toy, mesh), 3)
    for found, expected in zip(metrics, one_device[1], strict=False):
        for name in ("loss", "gradient_norm", "accuracy"):
            np.testing.assert_allclose(getattr(found, name), getattr(expected, name), rtol=2e-5)
    tokens = state.optimizer["auxiliary"]["text/embed_tokens"]
    assert tokens.sharding.shard_shape(tokens.shape) != tokens.shape  # divided as the model's are


def test_how_a_step_is_computed_changes_no_result(toy, one_device):
    _, metrics, _, _ = stepped(trainer(toy, scan_layers=False, remat="full"), 2)
    for found, expected in zip(metrics, one_device[1], strict=False):
        np.testing.assert_allclose(found.loss, expected.loss, rtol=2e-5)


def test_a_head_that_the_checkpoint_lacks_is_drawn_and_the_encoder_stays(toy, capsys):
    own = trainer(toy)
    given = init_params(own.config, jax.random.key(0))
    pool = jax.tree.map(jnp.zeros_like, given["vision"]["attn_pool"])
    found = own.begin(given | {"vision": given["vision"] | {"attn_pool": pool}})
    assert "no pooling head" in capsys.readouterr().err
    for path, value in flatten_dict(given).items():
        assert (flatten_dict(found)[path] is value) == ("attn_pool" not in path), path
    assert np.ptp(found["vision"]["attn_pool"]["latent"]) > 0
    np.testing.assert_array_equal(found["vision"]["attn_pool"]["norm_scale"], 1)


def test_a_fresh_encoder_is_drawn_by_its_number_of_inputs_and_the_rest_is_kept(toy):
    own = trainer(toy)
    given = init_params(own.config, jax.random.key(0))
    assert own.begin(given) is given
    contrastive = dataclasses.replace(own.settings.contrastive, fresh_encoder=True)
    own.settings = dataclasses.replace(own.settings, contrastive=contrastive)
    before, after = flatten_dict(given), flatten_dict(own.begin(given))
    assert before.keys() == after.keys()
    for path, value in before.items():
        assert (after[path] is value) == (path[0] != "vision"), path
        assert after[path].shape == value.shape and after[path].dtype == jnp.float32
        if path[0] == "vision" and path[-1].endswith("kernel"):
            heads = value.shape[1] if path[-2:] == ("proj", "kernel") else 1
            inputs = value.shape[0] * heads
            assert 0.8 < float(after[path].std()) * inputs**0.5 < 1.2, path
        elif path[0] == "vision" and path[-1].endswith(("scale", "bias")):
            np.testing.assert_array_equal(after[path], value)


def test_batches_are_averaged_by_their_images():
    zero = np.float32(0)

    def part(loss, images):
        return ContrastiveMetrics(
            np.float32(loss), np.float32(loss / 4), np.int32(images), np.int32(7), zero, zero, zero
        )

    found = ContrastiveMetrics.average([part(1.0, 6), part(3.0, 2), part(np.nan, 0)])
    assert found == {"loss": 1.5, "accuracy": 0.375, "images": 8, "tokens": 21}
    assert math.isnan(ContrastiveMetrics.average([])["loss"])


def test_flops_agree_with_xla(toy):
    own = trainer(toy, scan_layers=False)
    rules = own.parameter_rules
    flops = contrastive_flops(own.config, rules, own.settings.contrastive)
    state = jax.eval_shape(lambda: own.init(init_params(own.config, jax.random.key(0))))
    counted = own._step.lower(state, batch()).cost_analysis()["flops"]
    # The program computes the captions' padding, scores all of its pairs, and has norms, softmax and the like.
    whole = flops.per_token * IMAGES * 40 + flops.per_pair / 2 * IMAGES * 40**2 + flops.per_tile * IMAGES
    assert 1.0 < counted / whole < 1.3


# Runs.


def lines(run, kind="step"):
    found = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    clock = ("time", "tokens_per_second", "step_seconds", "seconds")
    return [{k: v for k, v in line.items() if k not in clock} for line in found if line["kind"] == kind]


def arrays(run):
    """The parameters of the run's newest checkpoint."""
    newest = resolve(str(run))
    config, _ = locate.open_model(newest)
    return flatten_dict(jax.device_get(load_params(newest, config)))


def test_a_run_that_is_stopped_goes_on_bit_for_bit_and_leaves_an_ordinary_checkpoint(toy, tmp_path, capfd):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    whole, parts = tmp_path / "a" / "run", tmp_path / "b" / "run"
    train(write(toy, whole))
    train(write(toy, parts), ["run.steps=4"])
    train(write(toy, parts))
    assert lines(whole) == lines(parts)
    assert lines(whole, "validation") == lines(parts, "validation")
    first = lines(whole)[0]
    assert first["images"] == first["tiles"] == first["samples"] == IMAGES and "load_max_over_mean" not in first
    assert lines(whole, "validation")[-1]["images"] == 12
    assert "(accuracy 0." in capfd.readouterr().err
    one, other = arrays(whole), arrays(parts)
    assert one.keys() == other.keys()
    for path, value in one.items():
        np.testing.assert_array_equal(value, other[path])
    # As any checkpoint, it has all of the model and nothing else, the language model as it was drawn.
    config, _ = open_model(toy)
    drawn = flatten_dict(jax.device_get(init_params(config, jax.random.key(0))))
    assert one.keys() == drawn.keys()
    for path, value in drawn.items():
        assert np.array_equal(one[path], value) == (path[0] != "vision"), path


# What is refused.


def test_rules_that_train_what_the_objective_does_not_reach_are_named():
    paths = ["vision/attn_pool/latent", "vision/norm/scale", "projector/layers_0/kernel", "language/norm/scale"]
    assert assign(paths, RULES, "contrastive")["vision/attn_pool/latent"].train
    with pytest.raises(SettingsError) as caught:
        assign(paths, (ParameterRule("projector|^vision/"), ParameterRule(".", train=True)), "contrastive")
    text = str(caught.value)
    assert "no gradient from the contrastive objective" in text
    assert (
        "projector/layers_0/kernel" in text and "language/norm/scale" in text and "vision" not in text.split("\n")[-1]
    )
    with pytest.raises(SettingsError, match="attn_pool"):
        assign(paths, (ParameterRule("."),))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "stage.objective=contrast",
            r"stage\.objective: 'contrast' is none of language, contrastive, regions; did you mean contr",
        ),
        ("contrastive.text_layers=0", r"contrastive\.text_layers: must be positive"),
        ("contrastive.text_length=1", r"contrastive\.text_length: must be 2 or more"),
        ("contrastive.initial_scale=0", r"contrastive\.initial_scale: must be positive"),
        ("contrastive.layers=3", r"contrastive\.layers: unknown key; did you mean text_layers"),
    ],
)
def test_settings_that_make_no_sense_are_named(toy, override, message):
    with pytest.raises(SettingsError, match=message):
        load(toy / "config.toml", [override])


def test_settings_survive_and_are_compared(toy, tmp_path):
    found = load(toy / "config.toml", ["contrastive.initial_bias=-5"])
    (tmp_path / "again.toml").write_text(to_toml(found))
    again = load(tmp_path / "again.toml")
    assert again == found
    other = load(toy / "config.toml", ["contrastive.text_length=50", "stage.objective=language"])
    names = [line.split(":")[0] for line in differences(found, other)]
    assert names == ["stage.objective", "contrastive.text_length", "contrastive.initial_bias"]


def test_accumulation_is_refused(toy):
    found = load(toy / "config.toml", ["compute.mesh=", "batch.microbatch_size=4"])
    with pytest.raises(
        SettingsError, match=r"batch\.microbatch_size = 4 × 1 data shards = 4, but batch\.sequences = 8"
    ):
        batch_shard(found, None)
