"""Prefill, decode and encode, lowered for devices that need not be here.

Tested in tests/apps/plan/test_planner_tpu.py.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import unflatten_dict
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from dsvl2_jax.infer.buckets import TILE_BUCKETS
from dsvl2_jax.infer.slots import PAGE, SlotState, init_slots, next_state, prefill_chunk
from dsvl2_jax.infer.speculation import speculative_group
from dsvl2_jax.model import deepseek_vl2 as model
from dsvl2_jax.model.attention import cache_axes
from dsvl2_jax.model.cache import init_cache
from dsvl2_jax.model.config import Config
from dsvl2_jax.model.parameter_paths import stays_float32
from dsvl2_jax.model.quantization import Quantization, leaves_of, quantized_weights, stored_shardings
from dsvl2_jax.sharding import ACTIVATION_RULES, partition_spec

DRAFTS = 4  # of "speculate"


def lower_inference(
    job: str,
    config: Config,
    mesh: Mesh,
    *,
    batch: int,
    sequence: int,
    dtype: DTypeLike = jnp.bfloat16,
    quantization: Quantization | None = None,
    cache_dtype: DTypeLike | None = None,
) -> jax.stages.Lowered:
    """Lowers a job for a mesh.

    Args:
      job: "prefill" (``batch`` prompts of ``sequence`` tokens into an empty cache), "chunk" (the last chunk of one such
        prompt, as the engine prefills it), "decode" (one token for each of
        ``batch`` slots with a cache of ``sequence``), "speculate" (a group of such steps, with `DRAFTS` drafts or
        without), or "encode" (``batch`` tiles).
      quantization: of the weights; what is not quantized is of ``dtype``.
      cache_dtype: of the cache; None: ``dtype``.
    """
    with jax.set_mesh(mesh):
        parameters = abstract_parameters(config, mesh, dtype, quantization)
        if job == "encode":
            return _encode(config, mesh, batch, parameters)
        jobs: dict[str, Callable[..., jax.stages.Lowered]] = {
            "prefill": _prefill,
            "chunk": _chunk,
            "decode": _decode,
            "speculate": _speculate,
        }
        dtypes = dtype, dtype if cache_dtype is None else cache_dtype
        return jobs[job](config, mesh, batch, sequence, *dtypes, parameters)


def abstract_parameters(
    config: Config, mesh: Mesh, dtype: DTypeLike, quantization: Quantization | None = None
) -> model.Params:
    """What `load` puts on a mesh, as shapes."""
    leaves = leaves_of(config, quantized_weights(config, quantization))
    shardings = stored_shardings(config, mesh, {path: shape for path, (shape, _) in leaves.items()})
    flat = {}
    for path, (shape, stored) in leaves.items():
        kind = stored if stored is not None else jnp.float32 if stays_float32(path) else dtype
        flat[path] = jax.ShapeDtypeStruct(shape, kind, sharding=shardings[path])
    return unflatten_dict(flat)


def _array(mesh: Mesh, dtype: DTypeLike, shape: tuple[int, ...], *axes: str | None) -> jax.ShapeDtypeStruct:
    spec = partition_spec(shape, axes, dict(mesh.shape), ACTIVATION_RULES)
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))


def _cache(config: Config, mesh: Mesh, slots: int, cache_length: int, dtype: DTypeLike) -> Any:
    def placed(name: str, x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return _array(mesh, x.dtype, x.shape, *cache_axes(name, x))

    layers = jax.eval_shape(lambda: init_cache(config, slots, cache_length, dtype))
    return [
        {name: jax.tree.map(functools.partial(placed, name), entries) for name, entries in layer.items()}
        for layer in layers
    ]


def _prefill(
    config: Config,
    mesh: Mesh,
    batch: int,
    sequence: int,
    dtype: DTypeLike,
    cache_dtype: DTypeLike,
    params: model.Params,
) -> jax.stages.Lowered:
    embeddings = _array(mesh, dtype, (batch, sequence, config.language.hidden_size), "batch", "length", None)
    function = jax.jit(model.prefill, static_argnums=1, donate_argnums=4)
    cache = _cache(config, mesh, batch, sequence, cache_dtype)
    lengths = _array(mesh, jnp.int32, (batch,), "batch")
    return function.lower(params, config, embeddings, lengths, cache)


def _chunk(
    config: Config,
    mesh: Mesh,
    batch: int,
    sequence: int,
    dtype: DTypeLike,
    cache_dtype: DTypeLike,
    params: model.Params,
) -> jax.stages.Lowered:
    per_tile, tokens = config.tokens_per_tile, min(PAGE, sequence)
    table = (-(-sequence // per_tile) + TILE_BUCKETS[0], per_tile, config.language.hidden_size)
    arrays = {
        "params": params,
        "features": _array(mesh, dtype, table, None, None, "features"),
        "row": _cache(config, mesh, 1, sequence, cache_dtype),
        **{name: _array(mesh, jnp.int32, (1, tokens), None, None) for name in ("ids_bt", "image_index_bt")},
        **{name: _array(mesh, jnp.int32, ()) for name in ("length", "start", "total")},
    }
    static = {"config": config, "read_length": None if tokens == sequence else sequence}
    return jax.jit(prefill_chunk, static_argnames=tuple(static), donate_argnames="row").lower(**arrays, **static)


def _whole(mesh: Mesh, x: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, PartitionSpec()))


def _state(
    config: Config, mesh: Mesh, batch: int, sequence: int, dtype: DTypeLike, *, drafts: bool = False
) -> SlotState:
    def by_token(dtype: DTypeLike) -> jax.ShapeDtypeStruct:
        return _array(mesh, dtype, (batch, config.language.vocab_size), "slots", "vocab")

    shapes = jax.eval_shape(lambda: init_slots(config, batch, sequence, dtype, drafts=drafts))
    return dataclasses.replace(
        jax.tree.map(functools.partial(_whole, mesh), shapes),
        cache=_cache(config, mesh, batch, sequence, dtype),
        seen=by_token(jnp.bool_),
        counts=by_token(jnp.int32),
    )


def _decode(
    config: Config,
    mesh: Mesh,
    batch: int,
    sequence: int,
    dtype: DTypeLike,
    cache_dtype: DTypeLike,
    params: model.Params,
) -> jax.stages.Lowered:
    state = _state(config, mesh, batch, sequence, cache_dtype)
    active = _whole(mesh, jax.ShapeDtypeStruct((batch,), jnp.bool_))
    function = jax.jit(next_state, static_argnames=("config", "eos", "top", "greedy"), donate_argnames="state")
    # On GPUs tokens that nobody draws have a program of their own.
    static = {"eos": 1, "top": False, "greedy": mesh.devices.flat[0].platform in ("gpu", "cuda")}
    return function.lower(params, config, state, active, None, **static)


def _speculate(
    config: Config,
    mesh: Mesh,
    batch: int,
    sequence: int,
    dtype: DTypeLike,
    cache_dtype: DTypeLike,
    params: model.Params,
) -> jax.stages.Lowered:
    state = _state(config, mesh, batch, sequence, cache_dtype, drafts=True)
    rows = [_whole(mesh, jax.ShapeDtypeStruct((batch,), kind)) for kind in (jnp.int32, jnp.bool_)]
    static = {"eos": 1, "cache_length": sequence, "top": False, "drafts": DRAFTS}
    function = jax.jit(speculative_group, static_argnames=("config", *static), donate_argnames="state")
    return function.lower(params, config, state, *rows, None, **static)


def _encode(config: Config, mesh: Mesh, batch: int, params: model.Params) -> jax.stages.Lowered:
    side = config.vision.image_size
    tiles = _array(mesh, jnp.uint8, (batch, side, side, 3), "tiles", None, None, None)
    unit = _array(mesh, jnp.float32, (3,), None)
    function = jax.jit(model.adapt_tiles, static_argnums=1)
    return function.lower(params, config, tiles, unit, unit)
