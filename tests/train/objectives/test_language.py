"""The training step: packed = alone, accumulated = at once, scanned = looped, sharded = one device; and what moves."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from dsvl2_jax import sharding
from dsvl2_jax.errors import SettingsError
from dsvl2_jax.inputs.processor import ModelInputs, image_positions
from dsvl2_jax.model import deepseek_vl2 as model
from dsvl2_jax.model.config import IGNORED_LABEL, TEXT_POSITION, Config
from dsvl2_jax.model.parameter_paths import path_name
from dsvl2_jax.sharding import make_mesh
from dsvl2_jax.train.data.batch import TrainBatch
from dsvl2_jax.train.data.packing import RowShape, assemble
from dsvl2_jax.train.objectives.language import LanguageMetrics, LanguageTrainer, TrainState
from dsvl2_jax.train.parameter_rules import assign
from dsvl2_jax.train.settings.schema import (
    BatchSettings,
    ComputeSettings,
    DataSettings,
    OptimizerSettings,
    ParameterRule,
    Settings,
    StageSettings,
)

# ‖Δ‖/‖g‖ of gradients, and of losses.
TOLERANCE = 2e-5

LANGUAGE = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "n_shared_experts": 1,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 16,
    "q_lora_rank": None,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "n_group": 1,
    "topk_group": 1,
    "initializer_range": 0.2,
}
VARIANTS = {
    "base": {"topk_method": "noaux_tc", "scoring_func": "sigmoid", "norm_topk_prob": True},
    "small": {"topk_method": "greedy"},
    "tiny": {"use_mla": False, "topk_method": "greedy", "hidden_size": 36, "num_attention_heads": 6}
    | {"num_key_value_heads": 6},
}
SHAPE = RowShape(tokens=56, tiles=3, segments=5)
ROWS = 8
ALL = (
    ParameterRule("attn_pool|correction_bias", False),
    ParameterRule("vision/", lr_multiplier=0.1),
    ParameterRule(""),
)
ALIGN = (ParameterRule("attn_pool|language/", False), ParameterRule(""))


def config(variant: str) -> Config:
    language = LANGUAGE | VARIANTS[variant]
    return Config.from_dict(
        {
            "language_config": language,
            "vision_config": {"image_size": 28, "patch_size": 7, "width": 16, "layers": 2, "heads": 2},
            "projector_config": {"input_dim": 16, "n_embed": language["hidden_size"]},
            "tile_tag": "2D",
        }
    )


def settings(rules=ALL, rows: int = ROWS, **compute) -> Settings:
    return Settings(
        data=DataSettings(sequence_length=SHAPE.tokens, max_segments=SHAPE.segments),
        batch=BatchSettings(microbatch_size=rows),
        stage=StageSettings(rules, balance_loss_weight=0.02, bias_update_speed=0.01),
        optimizer=OptimizerSettings(learning_rate=1e-2, clip_norm=0.0),
        compute=ComputeSettings(**{"dtype": "float32", "loss_chunk": 20} | compute),
    )


def sample(rng: np.random.Generator, text: int, images: int) -> ModelInputs:
    """``images`` images of one local tile each, then ``text`` tokens; the model has 4 tokens a tile."""
    merge = [image_positions(1, 1, 2, 2 * i) for i in range(images)]
    merge = np.concatenate([[TEXT_POSITION], *merge, np.full(text, TEXT_POSITION)]).astype(np.int32)
    ids = rng.integers(0, 64, len(merge), dtype=np.int32)
    supervised = (merge == TEXT_POSITION) & (rng.random(len(merge)) < 0.8)
    return ModelInputs(
        input_ids=ids,
        labels=np.where(supervised, ids, IGNORED_LABEL).astype(np.int32),
        image_mask=merge != TEXT_POSITION,
        image_index=merge,
        tiles=rng.integers(0, 256, (2 * images, 28, 28, 3), np.uint8),
        tile_grid=np.ones((images, 2), np.int32),
        image_sizes=np.ones((images, 2), np.int32),
        prompt="",
    )


@pytest.fixture(autouse=True)
def split_small_parameters(monkeypatch):
    """So that these too are split over ``data``."""
    monkeypatch.setattr(sharding, "MIN_SPLIT_SIZE", 64)


@functools.cache
def packed() -> list[list[ModelInputs]]:
    """The samples of each row: full rows, text alone, one long sample, an empty row."""
    rng = np.random.default_rng(0)
    lengths = ([(9, 1), (12, 0)], [(5, 0), (30, 0), (3, 0)], [(30, 1)], [(20, 1), (8, 0)], [(50, 0)], [], [(7, 1)], [])
    return [[sample(rng, *length) for length in row] for row in lengths]


def batch_of(rows: list[list[ModelInputs]], accumulation: int = 1) -> TrainBatch:
    def packed_row(samples: list[ModelInputs]) -> dict:
        columns = np.tile(np.array([0, IGNORED_LABEL, TEXT_POSITION, 0, 0], np.int32), (SHAPE.tokens, 1))
        start = 0
        for number, one in enumerate(samples, start=1):
            stop = start + len(one.input_ids)
            values = (
                one.input_ids,
                one.labels,
                one.image_index,
                np.arange(stop - start),
                np.full(stop - start, number),
            )
            columns[start:stop] = np.stack(values, axis=1)
            start = stop
        tiles = [one.tiles for one in samples]
        return {
            "tokens": columns[:, :3],
            "tokens_positions": columns[:, 3],
            "tokens_segment_ids": columns[:, 4],
            "tiles": tiles,
        }

    found = [packed_row(samples) if samples else None for samples in rows]
    return assemble(found, SHAPE, accumulation=accumulation, tile_size=28, tokens_per_tile=4)


@functools.cache
def weights(variant: str) -> dict:
    rng = np.random.default_rng(1)
    flat = flatten_dict(model.init_params(config(variant), jax.random.key(0)))
    for path, leaf in flat.items():
        if path[-1] == "correction_bias":
            flat[path] = rng.normal(0, 0.05, leaf.shape).astype(np.float32)
        elif leaf.ndim == 1:  # norms and biases too are seen only when they are not ones and zeros
            flat[path] = np.asarray(leaf) + rng.normal(0, 0.1, leaf.shape).astype(np.float32)
    return flat


def parameters(variant: str) -> dict:
    return unflatten_dict({path: jnp.asarray(leaf) for path, leaf in weights(variant).items()})


def stepped(variant: str, chosen: Settings, batch: TrainBatch, mesh=None) -> tuple[TrainState, LanguageMetrics, dict]:
    """One step from the same weights: the state, the metrics, and the gradient of every separate parameter."""
    half = np.full(3, 0.5)
    trainer = LanguageTrainer(config(variant), chosen, half, half, mesh)
    state, metrics = trainer.step(trainer.init(parameters(variant)), batch)
    # The first moment after one unclipped step is (1 − β1) · gradient.
    moment = next(s for s in jax.tree.leaves(state.optimizer, is_leaf=_is_adam) if _is_adam(s)).mu
    gradient = dataclasses.replace(state, trained={path: leaf / (1 - 0.9) for path, leaf in moment.items()})
    found = flatten_dict(jax.device_get(trainer.params(gradient)))
    rules = assign(map(path_name, found), chosen.stage.parameters)
    return state, metrics, {path: leaf for path, leaf in found.items() if rules[path_name(path)].train}


def _is_adam(state) -> bool:
    return isinstance(state, optax.ScaleByAdamState)


@functools.cache
def reference(variant: str):
    """One device, a loop over layers, nothing made twice, every sample in a row of its own."""
    alone = [[one] for row in packed() for one in row]
    alone += [[]] * (-len(alone) % ROWS)
    chosen = settings(scan_layers=False, remat="none", loss_chunk=1000)
    return stepped(variant, chosen, batch_of(alone, len(alone) // ROWS))


def assert_same(found, expected) -> None:
    (_, metrics, gradient), (_, want, true) = found, expected
    for name in ("loss", "text_loss", "image_loss", "gradient_norm", "balance_losses"):
        np.testing.assert_allclose(getattr(metrics, name), getattr(want, name), rtol=TOLERANCE, err_msg=name)
    for name in ("supervised_tokens", "image_supervised_tokens", "tokens", "load"):
        np.testing.assert_array_equal(getattr(metrics, name), getattr(want, name), err_msg=name)
    assert gradient.keys() == true.keys()
    for path, value in true.items():
        difference = np.linalg.norm(gradient[path] - value)
        assert difference <= TOLERANCE * np.linalg.norm(value) + 1e-9, (path_name(path), difference)


CASES = {
    "packed, scanned, remat full": (ROWS, 1, {"remat": "full"}, None),
    "accumulated, remat dots": (2, 4, {"remat": "dots"}, None),
    "data=2,tensor=2,expert=2, accumulated": (1, 2, {"remat": "full"}, {"data": 2, "tensor": 2, "expert": 2}),
}
MESHES = (
    {"data": 2, "tensor": 2, "expert": 2},
    {"tensor": 2, "expert": 4},
    {"data": 8},
    {"tensor": 8},
    {"sequence": 8},
    {"tensor": 2, "expert": 2, "sequence": 2},
)


@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradients_are_those_of_samples_alone_on_one_device(case):
    rows, accumulation, compute, mesh = CASES[case]
    mesh = make_mesh(**mesh) if mesh else None
    found = stepped("base", settings(rows=rows, **compute), batch_of(packed(), accumulation), mesh)
    assert_same(found, reference("base"))


# Tiny where its heads do not divide, base where most is split (and on the first mesh above); the rest is exhaustive.
USUAL = {"tiny": (MESHES[3],), "small": (MESHES[2],), "base": (MESHES[1],)}


@pytest.mark.parametrize(
    ("variant", "sizes"),
    [
        pytest.param(
            variant,
            sizes,
            id=f"{variant}-" + ",".join(f"{axis}={size}" for axis, size in sizes.items()),
            marks=[] if sizes in usual else pytest.mark.exhaustive,
        )
        for variant, usual in USUAL.items()
        for sizes in MESHES
    ],
)
def test_loss_and_gradients_on_a_mesh_are_those_of_one_device(variant, sizes):
    """Of tiny's 6 heads neither 4 nor 8 devices take an even share."""
    rows = ROWS // (sizes.get("data", 1) * sizes.get("expert", 1))
    found = stepped(variant, settings(rows=rows, remat="full"), batch_of(packed()), make_mesh(**sizes))
    assert_same(found, reference(variant))


def test_large_parameters_and_their_moments_are_split_over_data():
    trainer = LanguageTrainer(config("base"), settings(rows=1), [0.5] * 3, [0.5] * 3, make_mesh(data=8))
    state = trainer.abstract_state()
    experts = "language/layers_1_to_2/mlp/experts/gate_proj"
    moments = next(s for s in jax.tree.leaves(state.optimizer, is_leaf=_is_adam) if _is_adam(s))
    for leaf in (state.trained[experts], moments.mu[experts], moments.nu[experts]):
        assert leaf.sharding.shard_shape(leaf.shape) == (2, 8, 4, 16)
    norm = state.trained["language/norm/scale"]
    assert norm.sharding.is_fully_replicated


def test_router_biases_move_by_the_speed_towards_the_idle_experts():
    state, metrics, _ = reference("base")
    load = np.asarray(metrics.load)
    assert (load.sum(1) == 2 * metrics.tokens).all()
    for layer, own in enumerate(load, start=1):
        path = ("language", f"layers_{layer}", "mlp", "router", "correction_bias")
        expected = weights("base")[path] + np.float32(0.01) * np.sign(own.mean() - own)
        np.testing.assert_allclose(state.biases[path_name(path)], expected, rtol=1e-6)


def test_a_frozen_language_model_keeps_every_bit_and_costs_no_optimizer_state():
    state, metrics, gradient = stepped("base", settings(ALIGN, remat="full"), batch_of(packed()))
    _, want, true = reference("base")
    np.testing.assert_allclose(metrics.loss, want.loss, rtol=TOLERANCE)
    assert {path[0] for path in gradient} == {"vision", "projector", "image_newline", "view_seperator"}
    for path, value in gradient.items():
        assert np.linalg.norm(value - true[path]) <= TOLERANCE * np.linalg.norm(true[path]) + 1e-9, path
    trainer = LanguageTrainer(config("base"), settings(ALIGN), [0.5] * 3, [0.5] * 3)
    after = flatten_dict(jax.device_get(trainer.params(state)))
    for path, value in weights("base").items():
        same = np.array_equal(np.asarray(value).view(np.uint8), after[path].view(np.uint8))
        moved = path in gradient or path[-1] == "correction_bias"
        assert same != moved, path
    sizes = {path: leaf.size for path, leaf in state.trained.items()}
    optimizer = sum(leaf.size for leaf in jax.tree.leaves(state.optimizer) if leaf.ndim)
    assert optimizer == 2 * sum(sizes.values())


def test_bfloat16_computes_near_float32_and_trains_float32_parameters():
    state, metrics, gradient = stepped("base", settings(dtype="bfloat16", remat="full"), batch_of(packed()))
    _, want, true = reference("base")
    np.testing.assert_allclose(metrics.loss, want.loss, rtol=2e-2)
    assert all(leaf.dtype == jnp.float32 for leaf in state.trained.values())
    head = ("language", "lm_head", "kernel")
    assert 0 < np.linalg.norm(gradient[head] - true[head]) < 0.1 * np.linalg.norm(true[head])


def test_parameters_come_out_as_they_went_in_and_outlive_the_donated_state():
    trainer = LanguageTrainer(config("base"), settings(remat="full"), [0.5] * 3, [0.5] * 3)
    negative_zero = weights("base")[("image_newline",)].copy()
    negative_zero[:3] = -0.0
    given = {**weights("base"), ("image_newline",): negative_zero}
    state = trainer.init(unflatten_dict({path: jnp.asarray(leaf) for path, leaf in given.items()}))
    out = trainer.params(state)
    trainer.step(state, batch_of(packed()))
    found = flatten_dict(jax.device_get(out))
    assert found.keys() == given.keys()
    for path, value in given.items():
        assert np.array_equal(np.asarray(value).view(np.uint8), found[path].view(np.uint8)), path


def test_evaluation_gives_the_losses_of_the_step_and_changes_nothing():
    trainer = LanguageTrainer(config("base"), settings(rows=2), [0.5] * 3, [0.5] * 3)
    state = trainer.init(parameters("base"))
    metrics = trainer.evaluate(state, batch_of(packed(), 4))
    _, want, _ = reference("base")
    for name in ("loss", "text_loss", "image_loss"):
        np.testing.assert_allclose(getattr(metrics, name), getattr(want, name), rtol=TOLERANCE)
    assert not state.trained["language/lm_head/kernel"].is_deleted()


def test_rules_that_differ_within_a_stack_are_refused():
    rules = (ParameterRule("attn_pool|correction_bias|layers_2", False), ParameterRule(""))
    with pytest.raises(SettingsError, match=r"layers_1/.*layers_2/.* follow different rules.*scan_layers"):
        LanguageTrainer(config("base"), settings(rules), [0.5] * 3, [0.5] * 3)
    LanguageTrainer(config("base"), settings(rules, scan_layers=False), [0.5] * 3, [0.5] * 3)
