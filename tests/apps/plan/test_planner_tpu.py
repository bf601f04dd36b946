"""What the TPU compiler makes of prefill, decode, encode and training steps: real widths, few layers."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import math
import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec

from dsvl2_jax.apps.plan.hlo_text import instructions
from dsvl2_jax.apps.plan.hlo_walk import walk
from dsvl2_jax.apps.plan.inference_step import lower_inference
from dsvl2_jax.apps.plan.job import Job, least_work, parse_job
from dsvl2_jax.apps.plan.mesh_choice import choose_mesh, meshes
from dsvl2_jax.apps.plan.planner import mean_trip_count, program_memory
from dsvl2_jax.apps.plan.table import TABLE_TOPOLOGIES
from dsvl2_jax.apps.plan.training_step import lower_training_step
from dsvl2_jax.errors import UsageError
from dsvl2_jax.kernels.grouped_matmul import tgmm
from dsvl2_jax.model.config import Config
from dsvl2_jax.model.released import released_config
from dsvl2_jax.runtime.hardware import compile_devices, topology
from dsvl2_jax.sharding import make_mesh

pytestmark = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs the tpu extra")


@functools.cache
def shortened(size: str, kind: str) -> Config:
    """A released size with two layers, a dense one and one of experts, and two of the encoder's.

    Four to decode, where choosing a token costs much.
    """
    config = Config.from_dict(released_config(size))
    language = dataclasses.replace(config.language, num_hidden_layers=4 if kind == "decode" else 2)
    return dataclasses.replace(config, language=language, vision=dataclasses.replace(config.vision, layers=2))


@functools.cache
def compiled(size: str, name: str, job: Job) -> str:
    """The optimized program."""
    config, place = shortened(size, job.kind), topology(name)
    sizes, _ = choose_mesh(Config.from_dict(released_config(size)), job, place)
    mesh = make_mesh(**sizes, devices=compile_devices(place))
    return lower_inference(job.kind, config, mesh, batch=job.batch, sequence=job.sequence).compile().as_text()


def ratios(size: str, name: str, job: Job) -> tuple[float, float]:
    """FLOPs and bytes of all devices together, as parts of the least."""
    place, full = topology(name), Config.from_dict(released_config(size))
    trip_count = mean_trip_count(full, job, choose_mesh(full, job, place)[0])
    cost, least = walk(compiled(size, name, job), trip_count), least_work(shortened(size, job.kind), job)
    devices = place.devices
    return cost.flops * devices / least.flops, cost.bytes * devices / least.bytes


@pytest.mark.parametrize("name", [name for name in TABLE_TOPOLOGIES if topology(name).platform == "tpu"])
def test_every_mesh_can_be_laid_on_a_slice(name):
    # jax.make_mesh refuses data=8, expert=2 on 4 x 4 chips of v6e.
    place = topology(name)
    devices = compile_devices(place)
    for sizes in meshes(place.devices):
        mesh = make_mesh(**sizes, devices=devices)
        assert dict(mesh.shape) == sizes and set(mesh.devices.flat) == set(devices)


def test_slices_share_the_data_axis():
    devices = list(topologies.get_topology_desc(platform="tpu", topology_name="v6e:2x4", num_slices=2).devices)
    mesh = make_mesh(data=4, tensor=2, expert=2, devices=devices)
    assert [{device.slice_index for device in part.flat} for part in mesh.devices] == [{0}, {0}, {1}, {1}]
    with pytest.raises(UsageError, match="data must be a multiple of 2"):
        make_mesh(data=1, tensor=4, expert=4, devices=devices)


# A case costs the compiler a minute or so of processor time. `make test` has one or two of a kind, latent attention and
# tiny's multi-head attention among them; `make test-pods` has all.
def cases(kept: Sequence[tuple], *others: tuple) -> list[Any]:
    """Parameters of a test, of which ``others`` wait for `make test-pods`."""
    return [*kept, *(pytest.param(*case, marks=pytest.mark.pods) for case in others)]


@pytest.mark.parametrize(
    ("size", "name"),
    cases(
        [("tiny", "v5p-8"), ("small", "v5e-16")],
        ("tiny", "v5e-16"),
        ("small", "v5p-8"),
        ("base", "v5e-16"),
        ("base", "v5p-8"),
    ),
)
def test_a_prefill_computes_no_product_twice(size, name):
    assert ratios(size, name, Job("prefill", 8, 4096))[0] <= 1.10


@pytest.mark.pods
def test_a_prefill_on_v5e_is_bound_by_compute():
    place = topology("v5e-8")
    cost = walk(compiled("small", "v5e-8", Job("prefill", 8, 4096)))
    assert cost.flops / place.flops > 1.1 * cost.bytes / place.bandwidth


# Of the encoder only the adaptor's width differs between sizes.
@pytest.mark.parametrize(
    ("size", "name"),
    cases(
        [("base", "v5p-8")],
        *((size, "v5e-16") for size in ("tiny", "small", "base")),
        *((s, "v5p-8") for s in ("tiny", "small")),
    ),
)
def test_an_encoder_computes_no_product_twice(size, name):
    assert ratios(size, name, Job("encode", 32, 0))[0] <= 1.10


# The TPU compiler takes minutes for each.
@pytest.mark.pods
@pytest.mark.parametrize(
    ("size", "stage", "name"),
    [("base", "sft", "v5p-8"), ("tiny", "align", "v5p-8"), ("small", "pretrain", "v5e-16")],
)
def test_a_training_step_computes_no_product_twice(size, stage, name):
    config, place = shortened(size, stage), topology(name)
    job = parse_job(stage, 2 * place.devices, 1024, None, model=size, micro=1, overrides=["data.tiles_per_sequence=1"])
    mesh = make_mesh(data=place.devices // 4, tensor=1, expert=4, devices=compile_devices(place))
    program = lower_training_step(config, job.settings, mesh).compile()
    assert 0.9 <= walk(program.as_text()).flops * place.devices / least_work(config, job).flops <= 1.10


@pytest.mark.parametrize(
    ("size", "name", "slots"),
    cases(
        [("small", "v5e-16", 64), ("base", "v5e-16", 1)],
        *(("small", "v5e-16", slots) for slots in (1, 16)),
        *(("base", "v5e-16", slots) for slots in (16, 64)),
        *((size, "v5p-8", slots) for size in ("small", "base") for slots in (1, 16, 64)),
        # Tiny's ten heads divide by neither 4 nor 8; TPU7x would keep experts in another layout for XLA's own products.
        *(("tiny", name, 64) for name in ("v5e-4", "v5e-8", "v5e-16", "v6e-8", "tpu7x-8")),
        *((size, "tpu7x-8", 64) for size in ("small", "base")),
    ),
)
def test_a_decode_step_reads_each_weight_and_the_cache_once(size, name, slots):
    job = Job("decode", slots, 4096)
    flops, read = ratios(size, name, job)
    assert flops <= 1.10 and read <= 1.3


@pytest.mark.parametrize("size", cases(["small"], ("base",)))
def test_a_decode_step_gathers_no_weight_and_makes_no_keys(size):
    text, cfg = compiled(size, "v5e-16", Job("decode", 64, 4096)), shortened(size, "decode").language
    smallest = cfg.hidden_size * (cfg.kv_lora_rank + cfg.qk_rope_head_dim)  # kv_a_proj_with_mqa
    heads = {cfg.qk_nope_head_dim, cfg.qk_nope_head_dim + cfg.qk_rope_head_dim, cfg.v_head_dim}
    for opcode, shape, _ in instructions(text):
        assert not (opcode.startswith("all-gather") and math.prod(shape) >= smallest), shape
        assert not (4096 in shape and heads & set(shape) and math.prod(shape) > 4096 * max(heads)), shape


@pytest.mark.parametrize(
    ("size", "name"),
    cases(
        [("base", "v5e-1")],
        *((size, "v6e-1") for size in ("tiny", "small", "base")),
        ("tiny", "v5e-1"),
        ("small", "v5e-1"),
    ),
)
def test_gradients_of_experts_fit_into_fast_memory(size, name):
    cfg = shortened(size, "sft").language
    mesh = make_mesh(data=1, tensor=1, expert=1, devices=compile_devices(topology(name)))

    def array(dtype: str, *shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec()))

    for inputs, outputs in ((cfg.hidden_size, cfg.moe_intermediate_size), (cfg.moe_intermediate_size, cfg.hidden_size)):
        rows, bars = array("bfloat16", 24576, inputs), array("bfloat16", 24576, outputs)
        total = array("bfloat16", 16, inputs, outputs)
        program = jax.jit(tgmm, donate_argnums=3).lower(rows, bars, array("int32", 16), total).compile()
        assert re.search(r"%tgmm\S* = .*tpu_custom_call", program.as_text())


def test_the_compilers_limit_is_on_the_peak():
    # What trains a stack of layers: temp_size_in_bytes counts the gradients twice.
    place = topology("v5e-1")
    mesh = make_mesh(data=1, tensor=1, expert=1, devices=compile_devices(place))

    def array(dtype: str, *shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec()))

    def loss(weights: list[jax.Array], x: jax.Array) -> jax.Array:
        def layer(x: jax.Array, own: list[jax.Array]) -> tuple[jax.Array, None]:
            return jnp.tanh(x @ own[0]) @ own[1].T, None

        x, _ = lax.scan(jax.checkpoint(layer), x, weights)
        return jnp.square(x.astype(jnp.float32)).sum()

    def step(weights: list[jax.Array], x: jax.Array, unused: jax.Array) -> tuple[list[jax.Array], jax.Array]:
        gradients = jax.grad(loss)([w.astype(jnp.bfloat16) for w in weights], x)
        return [w - g.astype(w.dtype) for w, g in zip(weights, gradients, strict=True)], unused

    weights = [array("float32", 26, 8192, 1408)] * 2
    given = weights, array("bfloat16", 4096, 8192), array("bfloat16", 4_500_000, 1024)
    program = jax.jit(step, donate_argnums=(0, 2)).lower(*given).compile()
    taken, found = program_memory(program, "tpu"), program.memory_analysis()
    assert taken["arguments"] == found.argument_size_in_bytes and taken["output"] < 1e4
    assert sum(taken.values()) < place.memory < taken["arguments"] + found.temp_size_in_bytes
