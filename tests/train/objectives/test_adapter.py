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
from dsvl2_jax.train.adapter import LEAVES, adaptable, with_adapter
from dsvl2_jax.train.loss import LossOptions, loss_fn, step_totals
from dsvl2_jax.train.objectives.adapter import AdapterTrainer
from dsvl2_jax.train.settings.schema import AdapterStage

_spec = importlib.util.spec_from_file_location("language_steps", Path(__file__).with_name("test_language.py"))
steps = importlib.util.module_from_spec(_spec)
sys.modules[_spec.name] = steps
_spec.loader.exec_module(steps)

TOLERANCE = 2e-5
EVERYWHERE = (r"^language/.*(self_attn|mlp)/", "^vision/", "^projector/")
HALF = np.full(3, 0.5, np.float32)


@pytest.fixture(autouse=True)
def split_small_parameters(monkeypatch):
    """So that these too are split over ``data``."""
    monkeypatch.setattr(sharding, "MIN_SPLIT_SIZE", 64)


def stage(kind: str = "lora", **fields) -> AdapterStage:
    return AdapterStage(**{"kind": kind, "rank": 3, "alpha": 6.0, "targets": EVERYWHERE} | fields)


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


def stepped(variant, chosen, batch, mesh=None, kind=None):
    """One step: the state before, the metrics, and the gradient of every leaf of the adapter."""
    base = base_params(variant, kind)
    stored = {path: leaf.shape for path, leaf in flatten_dict(base).items()}
    trainer = AdapterTrainer(steps.config(variant), chosen, HALF, HALF, mesh, stored)
    state = trainer.init(with_adapter(base, unflatten_dict(adapter_of(variant, chosen.adapter))))
    state, metrics = trainer.step(state, batch)
    moment = next(s for s in jax.tree.leaves(state.optimizer, is_leaf=steps._is_adam) if steps._is_adam(s)).mu
    gradient = dataclasses.replace(state, trained={path: leaf / (1 - 0.9) for path, leaf in moment.items()})
    return trainer, metrics, flatten_dict(jax.device_get(trainer.adapter(gradient)))


@functools.cache
def reference(variant: str, adapter: AdapterStage, kind: str | None = None):
    """Of weights merged beforehand, plain arrays all, differentiated by `jax.grad` on one device."""
    config = steps.config(variant)
    config = dataclasses.replace(config, language=dataclasses.replace(config.language, aux_loss_alpha=0.02))
    base, able = base_params(variant, kind), adaptable(config)
    batch = steps.batch_of(steps.packed())
    totals = step_totals(batch)

    def loss(drawn):
        flat = flatten_dict(with_adapter(jax.tree.map(lambda x: x, base), unflatten_dict(drawn)))
        nested = unflatten_dict(flat)
        whole = {}
        for path, leaf in able.items():
            weight = functools.reduce(lambda tree, name: tree[name], path, nested)
            if isinstance(weight, dict) and "lora_b" in weight:
                weight = {
                    **weight,
                    "lora_b": weight["lora_b"] * scale_factor(adapter.alpha, adapter.rank, adapter.rslora),
                }
            axis = leaf.inputs[-1] - len(leaf.shape)
            whole[path] = merged(weight_of(weight, axis), axis)
        rest = {path: leaf for path, leaf in flat.items() if not any(path[: len(w)] == w for w in whole)}
        params = unflatten_dict(rest | whole)
        return loss_fn(params, config, batch.micro(0), totals, HALF, HALF, LossOptions(5, 1000, "float32", "none"))

    return jax.jit(jax.value_and_grad(loss, has_aux=True))(adapter_of(variant, adapter))


def assert_same(found, expected) -> None:
    (_, metrics, gradient), ((_, sums), true) = found, expected
    np.testing.assert_allclose(metrics.loss, sums.loss / sums.supervised_tokens, rtol=TOLERANCE)
    assert gradient.keys() == true.keys()
    for path, value in true.items():
        difference = np.linalg.norm(gradient[path] - value)
        assert np.linalg.norm(value) > 0 or "layers_0" not in path, path
        assert difference <= TOLERANCE * np.linalg.norm(value) + 1e-9, (path_name(path), difference)


MESH = {"data": 2, "tensor": 2, "expert": 2}
CASES = {
    "base, lora, one device": ("base", stage(), None, {"remat": "full"}, None),
    "base, dora, mesh": ("base", stage("dora", rslora=True), None, {"remat": "full"}, MESH),
    "base, lora on int8, expert=8": ("base", stage(), "int8", {"remat": "full"}, {"expert": 8}),
    "base, lora on int4, mesh": ("base", stage(), "int4", {"remat": "full"}, MESH),
    "tiny, lora, one device": ("tiny", stage(), None, {"remat": "dots"}, None),
}


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_those_of_the_merged_weights(case):
    variant, adapter, kind, compute, sizes = CASES[case]
    rows = steps.ROWS // math.prod((sizes or {}).get(axis, 1) for axis in ("data", "expert"))
    mesh = make_mesh(**sizes) if sizes else None
    found = stepped(variant, settings(adapter, rows, **compute), steps.batch_of(steps.packed()), mesh, kind)
    assert_same(found, reference(variant, adapter, kind))
