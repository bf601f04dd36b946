"""Training an adapter: gradients as of the merged weights, on one device and on meshes; what stays; what moves."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import math
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from dsvl2_jax import sharding
from dsvl2_jax.checkpoint.adapter_tensors import scale_factor
from dsvl2_jax.kernels.quantized import quantize
from dsvl2_jax.model.deepseek_vl2 import weight_inputs
from dsvl2_jax.model.parameter_paths import path_name
from dsvl2_jax.model.quantization import Quantization, quantized_weights
from dsvl2_jax.model.weights import merged, weight_of
from dsvl2_jax.sharding import make_mesh
from dsvl2_jax.train.adapter import LEAVES, adaptable, init_adapter, with_adapter
from dsvl2_jax.train.loss import LossOptions, loss_fn, step_totals
from dsvl2_jax.train.objectives.adapter import AdapterTrainer
from dsvl2_jax.train.settings.schema import AdapterStage

_spec = importlib.util.spec_from_file_location("language_steps", Path(__file__).with_name("test_language.py"))
steps = importlib.util.module_from_spec(_spec)
sys.modules[_spec.name] = steps
_spec.loader.exec_module(steps)

TOLERANCE = 2e-5
LANGUAGE = (r"^language/.*(self_attn|mlp)/",)
EVERYWHERE = (*LANGUAGE, "^vision/", "^projector/")
HALF = np.full(3, 0.5, np.float32)


@pytest.fixture(autouse=True)
def split_small_parameters(monkeypatch):
    """So that these too are split over ``data``."""
    monkeypatch.setattr(sharding, "MIN_SPLIT_SIZE", 64)


def stage(kind: str = "lora", **fields) -> AdapterStage:
    return AdapterStage(**{"kind": kind, "rank": 3, "alpha": 6.0, "targets": LANGUAGE} | fields)


def settings(adapter: AdapterStage, rows: int = steps.ROWS, **compute):
    chosen = steps.settings((), rows, **compute)
    chosen = dataclasses.replace(chosen, stage=dataclasses.replace(chosen.stage, bias_update_speed=0.0))
    return dataclasses.replace(chosen, adapter=adapter)


@functools.cache
def adapter_of(variant: str, adapter: AdapterStage) -> dict:
    """Random, B too, so that every gradient is seen; magnitudes near the norms."""
    trainer = AdapterTrainer(steps.config(variant), settings(adapter), HALF, HALF)
    rng = np.random.default_rng(5)
    flat = flatten_dict(trainer.begin(steps.parameters(variant)))
    drawn = {}
    for path, leaf in flat.items():
        if path[-1] in LEAVES:
            scale = 0.2 if path[-1] != "magnitude" else 0.1 * np.asarray(leaf)
            drawn[path] = np.asarray(leaf) + (rng.normal(0, 1, leaf.shape) * scale).astype(np.float32)
    return drawn


def base_params(variant: str, kind: str | None) -> dict:
    """The parameters, of whose weights all are quantized if ``kind`` is given."""
    flat = flatten_dict(steps.parameters(variant))
    if kind is None:
        return unflatten_dict(flat)
    kinds = quantized_weights(steps.config(variant), Quantization(kind))
    inputs = weight_inputs(steps.config(variant))
    return unflatten_dict(
        {path: quantize(leaf, kinds[path], inputs[path]) if path in kinds else leaf for path, leaf in flat.items()}
    )


def batch_of(images: bool, accumulation: int = 1, *, packed: bool = True):
    """Rows of samples, or of one sample each; without images, of text alone and without places for tiles."""
    rng = np.random.default_rng(0)
    lengths = ((9, 30, 12), (5, 30, 3), (50,), (20, 8), (), (7,), (40, 9), (3,))
    rows = steps.packed() if images else [[steps.sample(rng, length, 0) for length in row] for row in lengths]
    batch = steps.batch_of(rows if packed else [[one] for row in rows for one in row], accumulation)
    return batch if images else dataclasses.replace(batch, tiles=batch.tiles[:, :0])


def trainer_and_state(variant, chosen, mesh=None, kind=None):
    base = base_params(variant, kind)
    stored = {path: leaf.shape for path, leaf in flatten_dict(base).items()}
    trainer = AdapterTrainer(steps.config(variant), chosen, HALF, HALF, mesh, stored)
    return trainer, trainer.init(with_adapter(base, unflatten_dict(adapter_of(variant, chosen.adapter))))


def stepped(trainer, state, batch):
    """One step: the metrics, and the gradient of every leaf of the adapter, layers apart."""
    state, metrics = trainer.step(state, batch)
    moment = next(s for s in jax.tree.leaves(state.optimizer, is_leaf=steps._is_adam) if steps._is_adam(s)).mu
    gradient = dataclasses.replace(state, trained={path: leaf / (1 - 0.9) for path, leaf in moment.items()})
    return metrics, flatten_dict(jax.device_get(trainer.adapter(gradient)))


def reference(variant: str, adapter: AdapterStage, batch, kind: str | None = None):
    """Of weights merged beforehand, plain arrays all, and samples apart, differentiated by `jax.grad` on one device."""
    config = steps.config(variant)
    config = dataclasses.replace(config, language=dataclasses.replace(config.language, aux_loss_alpha=0.02))
    base, able = base_params(variant, kind), adaptable(config)
    totals = step_totals(batch)

    def loss(drawn):
        nested = with_adapter(jax.tree.map(lambda x: x, base), unflatten_dict(drawn))
        whole = {}
        for path, leaf in able.items():
            weight = functools.reduce(lambda tree, name: tree[name], path, nested)
            if isinstance(weight, dict) and "lora_b" in weight:
                factor = scale_factor(adapter.alpha, adapter.rank, adapter.rslora)
                weight = {**weight, "lora_b": weight["lora_b"] * factor}
            axis = leaf.inputs[-1] - len(leaf.shape)
            whole[path] = merged(weight_of(weight, axis), axis)
        flat = flatten_dict(nested)
        rest = {path: leaf for path, leaf in flat.items() if not any(path[: len(w)] == w for w in whole)}
        options = LossOptions(5, 1000, "float32", "none")
        return loss_fn(unflatten_dict(rest | whole), config, batch.micro(0), totals, HALF, HALF, options)

    return jax.jit(jax.value_and_grad(loss, has_aux=True))(adapter_of(variant, adapter))


def assert_same(found, expected) -> None:
    (metrics, gradient), ((_, sums), true) = found, expected
    np.testing.assert_allclose(metrics.loss, sums.loss / sums.supervised_tokens, rtol=TOLERANCE)
    assert gradient.keys() == true.keys()
    for path, value in true.items():
        difference = np.linalg.norm(gradient[path] - value)
        assert np.linalg.norm(value) > 0, path
        assert difference <= TOLERANCE * np.linalg.norm(value) + 1e-9, (path_name(path), difference)


MESH = {"data": 2, "tensor": 2, "expert": 2}
# Variant, adapter, how the base is quantized, mesh, whether there are images, accumulation steps.
CASES = {
    "short, dora on int4, mesh": ("short", stage("dora", rslora=True), "int4", MESH, False, 1),
    "tiny, accumulated": ("tiny", stage(), None, None, False, 2),
    "base, dora on int4, mesh": ("base", stage("dora", rslora=True), "int4", MESH, False, 1),
    "base, encoder and adaptor too": ("base", stage(targets=EVERYWHERE), None, None, True, 1),
    "base, dora, mesh, with images": ("base", stage("dora", targets=EVERYWHERE), None, MESH, True, 1),
    "base, on int8, expert=8": ("base", stage(targets=EVERYWHERE), "int8", {"expert": 8}, True, 1),
}
USUAL = "short, dora on int4, mesh"
steps.VARIANTS["short"] = steps.VARIANTS["base"] | {"num_hidden_layers": 2}


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=[] if case == USUAL else pytest.mark.exhaustive) for case in CASES]
)
def test_gradients_are_those_of_the_merged_weights(case):
    variant, adapter, kind, sizes, images, accumulation = CASES[case]
    rows = steps.ROWS // accumulation // math.prod((sizes or {}).get(axis, 1) for axis in ("data", "expert"))
    mesh = make_mesh(**sizes) if sizes else None
    found = stepped(
        *trainer_and_state(variant, settings(adapter, rows, remat="full"), mesh, kind), batch_of(images, accumulation)
    )
    assert_same(found, reference(variant, adapter, batch_of(images, packed=False), kind))


def test_of_the_frozen_model_no_gradient_is_computed():
    """The experts' products have gradients of matrices by name, `tgmm`; without adapters there, none is left."""
    adapter = AdapterStage("lora", rank=2, alpha=4.0)
    trainer, state = trainer_and_state("tiny", settings(adapter, steps.ROWS, remat="full"))
    moments = next(s for s in jax.tree.leaves(state.optimizer, is_leaf=steps._is_adam) if steps._is_adam(s))
    assert moments.mu.keys() == moments.nu.keys() == state.trained.keys()
    batch = batch_of(False)
    program = trainer.lower(state, batch).compile().as_text()
    assert "grouped_matmul" in program and "tgmm" not in program
    found = stepped(trainer, state, batch)
    assert_same(found, reference("tiny", adapter, batch_of(False, packed=False)))


def test_a_fresh_adapter_is_as_peft_begins_whatever_else_is_adapted():
    params, config = steps.parameters("base"), steps.config("base")
    adapter = stage("dora", rank=64)
    fresh = flatten_dict(init_adapter(params, config, adapter, seed=3))
    weight = ("language", "layers_1", "mlp", "experts", "down_proj")
    bound = 1 / np.sqrt(16)  # of as many inputs
    assert 0.98 * bound < np.abs(fresh[(*weight, "lora_a")]).max() <= bound and not fresh[(*weight, "lora_b")].any()
    norms = np.linalg.norm(steps.weights("base")[weight], axis=1)
    np.testing.assert_allclose(fresh[(*weight, "magnitude")], norms, rtol=1e-6)
    fewer = flatten_dict(init_adapter(params, config, stage(rank=64, targets=("down_proj",)), seed=3))
    np.testing.assert_array_equal(fewer[(*weight, "lora_a")], fresh[(*weight, "lora_a")])


def test_dropout_differs_by_step_accumulation_step_weight_and_layer_and_repeats():
    trainer, state = trainer_and_state("base", settings(stage(dropout=0.5)))
    params = {**state.trained, **state.frozen}

    def keys(*turn):
        joined = flatten_dict(trainer._joined(params, turn))
        return {path: np.asarray(leaf) for path, leaf in joined.items() if path[-1] == "dropout_key"}

    first, again, other, later = keys(0, 0), keys(0, 0), keys(0, 1), keys(1, 0)
    drawn = np.concatenate([leaf.reshape(-1, 2) for leaf in first.values()])
    assert len(np.unique(drawn, axis=0)) == len(drawn) > len(first)  # stacked layers have one each
    for path, leaf in first.items():
        np.testing.assert_array_equal(leaf, again[path])
        assert (leaf != other[path]).any() and (leaf != later[path]).any()
    assert not any(path[-1] == "dropout_key" for path in flatten_dict(trainer._joined(params)))
