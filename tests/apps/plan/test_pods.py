"""Whole models compiled for TPU pods; `make test-pods` runs these, which take minutes each."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util

import pytest

from dsvl2_jax.apps.plan.hlo_walk import walk
from dsvl2_jax.apps.plan.inference_step import lower_inference
from dsvl2_jax.apps.plan.job import Job, parse_job
from dsvl2_jax.apps.plan.least_work import decode_work
from dsvl2_jax.apps.plan.planner import plan
from dsvl2_jax.model.config import Config
from dsvl2_jax.model.quantization import Quantization
from dsvl2_jax.model.released import released_config
from dsvl2_jax.runtime.hardware import compile_devices, topology
from dsvl2_jax.sharding import make_mesh

pytestmark = [
    pytest.mark.pods,
    pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs the TPU compiler: make test-pods"),
]

PREFILL, DECODE, ENCODE = Job("prefill", 8, 4096), Job("decode", 64, 4096), Job("encode", 32, 0)


def planned(size: str, job: Job, name: str, mesh: dict[str, int] | None = None) -> dict:
    found = plan(Config.from_dict(released_config(size)), job, topology(name), mesh)
    assert found["compiled"] and found["fits"], found
    # Loops over the experts' shares have as many turns as routing asks for, and are counted as if it were even.
    assert not found["unknown_loops"] or found["mesh"]["expert"] > 1, found
    return found


@pytest.mark.parametrize("job", [PREFILL, DECODE, ENCODE], ids=lambda job: job.kind)
@pytest.mark.parametrize(
    ("size", "name"), [("base", "v5e-16"), ("base", "v5p-8"), ("base", "v6e-8"), ("small", "v5e-8")]
)
def test_models_fit_and_do_little_more_than_they_must(size, name, job):
    found = planned(size, job, name)
    assert found["flops_ratio"] <= 1.10
    assert job.kind != "decode" or found["bytes_ratio"] <= 1.3


@pytest.mark.parametrize("slots", [1, 16])
@pytest.mark.parametrize(("size", "name"), [("base", "v5e-16"), ("small", "v5e-8")])
def test_a_step_of_few_slots_reads_the_experts_that_it_visits(size, name, slots):
    assert planned(size, Job("decode", slots, 4096), name)["bytes_ratio"] <= 1.3


def test_a_cache_in_int8_is_read_as_it_lies():
    found = planned("small", Job("decode", 64, 4096, cache_dtype="int8"), "v5e-8")
    assert found["bytes_ratio"] <= 1.3


@pytest.mark.parametrize("kind", ["chunk", "decode"])
@pytest.mark.parametrize(("name", "tokens", "slots"), [("v5e-16", 32768, 8), ("v6e-16", 131072, 4)])
def test_base_has_room_for_long_contexts(name, tokens, slots, kind):
    """The cache is split along its length; what a prompt's chunk holds beside it does not depend on that length."""
    found = planned("base", Job(kind, 1 if kind == "chunk" else slots, tokens), name)
    assert found["bytes_per_device"]["temporaries"] <= 1e9


@pytest.mark.parametrize("job", [Job("prefill", 1, 4096), Job("decode", 16, 4096), Job("encode", 8, 0)], ids=str)
def test_tiny_fits_one_chip(job):
    assert planned("tiny", job, "v5e-1")["flops_ratio"] <= 1.10


# 16 sequences of 4096 tokens a step, one at a time on a device.
PICTURES = ["data.tiles_per_sequence=1"]
LANGUAGE_MODEL = [
    "data.tiles_per_sequence=0",
    'stage.parameters=[{match="^(vision|projector|image_newline|view_seperator)",train=false},'
    '{match="scale$",decay=false},{match="^language/"}]',
]


@pytest.mark.parametrize(
    ("name", "settings", "moments", "arguments"),
    [
        ("v6e-16", LANGUAGE_MODEL, "float32", 11.9e9),  # 11.78 of state; layouts pad the rest
        ("v6e-16", PICTURES, "float32", 12.25e9),
        ("v5e-16", PICTURES, "bfloat16", 8.2e9),
    ],
    ids=["v6e-16, language model", "v6e-16", "v5e-16, bfloat16 moments"],
)
def test_small_is_trained_on_sixteen_chips(name, settings, moments, arguments):
    settings = [*settings, "compute.remat=full", f"optimizer.state_dtype={moments}"]
    job = parse_job("pretrain", 16, None, None, model="small", micro=1, overrides=settings)
    found = planned("small", job, name, {"data": 4, "tensor": 1, "expert": 4})
    assert found["bytes_per_device"]["arguments"] <= arguments
    assert found["bytes_per_device"]["temporaries"] <= 7.0e9
    assert found["flops_ratio"] <= 1.10


@pytest.mark.parametrize(("size", "name", "kind"), [("small", "v6e-1", "int8"), ("tiny", "v5e-1", None)])
def test_adapters_are_trained_on_one_chip(size, name, kind):
    job = parse_job("lora", 1, None, None, model=size, quantization=kind and Quantization(kind))
    assert planned(size, job, name)["flops_ratio"] <= 1.10


@functools.cache
def bytes_beyond_the_least(kind: str | None) -> float:
    """That a decode step of two layers of small moves on one chip, in bfloat16 or quantized."""
    config, quantization = Config.from_dict(released_config("small")), kind and Quantization(kind)
    config = dataclasses.replace(config, language=dataclasses.replace(config.language, num_hidden_layers=2))
    mesh = make_mesh(devices=compile_devices(topology("v5e-1")))
    job = {"batch": 16, "sequence": 2176, "quantization": quantization}
    text = lower_inference("decode", config, mesh, **job).compile().as_text()
    return walk(text).bytes - decode_work(config, 16, 2176, quantization=quantization).bytes


@pytest.mark.parametrize("kind", ["int8", "int4", "float8"])
def test_a_decode_step_reads_quantized_weights_as_they_lie(kind):
    """What the compiler converts, it converts where a product takes it: sampling and small copies are all the rest."""
    assert bytes_beyond_the_least(kind) <= 1.05 * bytes_beyond_the_least(None)
