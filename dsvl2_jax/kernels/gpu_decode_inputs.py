"""What a decode step's attention needs of its new tokens, on NVIDIA GPUs: Pallas Triton kernels.

`heads_into_cache` (multi-head attention) makes queries, keys and values of the residual stream in one launch: norm,
products, rotary, and the new entries written into the cache in place. `latent_into_cache` (latent attention) does what
follows the projections: it takes queries into the latent space, norms and rotates, and writes the cache.

Tested in tests/model/test_gpu_decode.py; `dsvl2_jax.model.gpu_decode` calls them.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from dsvl2_jax.kernels.gpu_few_rows import (
    Tile,
    compiler_params,
    depth_step,
    load_tile,
    multiply,
    row_count,
    row_mask,
    stored_size,
    values_of,
)
from dsvl2_jax.kernels.quantized import Quantized
from dsvl2_jax.kernels.quantized_cache import LARGEST, Entries, QuantizedEntries, in_steps
from dsvl2_jax.kernels.triton import cost_metadata
from dsvl2_jax.runtime.lazy import LazyModule

# Only what traces these kernels needs them.
pl = LazyModule("jax.experimental.pallas")
plgpu = LazyModule("jax.experimental.pallas.triton")

PAIR_BLOCK = 16  # pairs of columns that a program of `heads_into_cache` makes


@functools.partial(jax.jit, static_argnames=("eps", "interpret"))
def heads_into_cache(
    x_md: jax.Array,
    scale_d: jax.Array,
    weights: tuple[Any, Any, Any],
    rotary: tuple[jax.Array, jax.Array],
    positions_m: jax.Array,
    cache: tuple[jax.Array, jax.Array],
    *,
    eps: float,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Queries, keys and values of one token a row after an RMS norm; keys and values go into the cache.

    Args:
      x_md: [M, D], D a multiple of 16. scale_d: [D], the norm's weight. eps: its epsilon.
      weights: of queries [D, H, w], keys and values [D, G, w], plain or `Quantized`; w is a multiple of 32.
      rotary: cos and sin, f32[M, w/2], by which queries and keys are rotated, in pairs (i, i + w/2).
      positions_m: i32[M], where in the cache a row's entry goes.
      cache: keys and values, [M, S, G, w] each.

    Returns:
      Queries [M, H, w], and the cache, changed in place.
    """
    (m, d), (_, heads, width), groups = x_md.shape, weights[0].shape, weights[1].shape[1]
    half, rows = width // 2, row_count(x_md.shape[0])
    of_head = half // PAIR_BLOCK
    sizes = rows, 2 * PAIR_BLOCK, stored_size(weights[0])
    step = min(depth_step(d, *sizes, weight) for weight in weights)
    flat, form = jax.tree.flatten(weights)

    def kernel(x_ref, scale_ref, cos_ref, sin_ref, at_ref, _keys, _values, *refs):
        q_w, k_w, v_w = jax.tree.unflatten(form, refs[: len(flat)])
        q_ref, k_ref, v_ref = refs[len(flat) :]
        program, all_rows = pl.program_id(0), pl.ds(0, rows)
        inside = row_mask(m, rows, PAIR_BLOCK)

        def load_x(start: jax.Array) -> jax.Array:
            return load_tile(x_ref, (all_rows, pl.ds(start, step)), row_mask(m, rows, step))

        def tile(weight: Any, head: jax.Array, at: jax.Array) -> Tile:
            columns = head, pl.ds(at, PAIR_BLOCK)
            if not isinstance(weight, Quantized):
                return Tile(lambda start: weight[(pl.ds(start, step), *columns)])
            return Tile(
                lambda start: weight.values[(pl.ds(start, step), *columns)],
                weight.kind,
                lambda group: weight.scale[(group, *columns)],
                weight.scale.shape[0],
            )

        def halves(weight: Any, head: jax.Array, pair: jax.Array) -> list[jax.Array]:
            tiles = [tile(weight, head, at) for at in (pair, half + pair)]
            return multiply(load_x, tiles, d, step, (rows, PAIR_BLOCK), norm=(scale_ref, eps))

        def rotated(first: jax.Array, second: jax.Array, pair: jax.Array) -> tuple[jax.Array, jax.Array]:
            cos, sin = (load_tile(ref, (all_rows, pl.ds(pair, PAIR_BLOCK)), inside) for ref in (cos_ref, sin_ref))
            return first * cos - second * sin, second * cos + first * sin

        def place(begin: jax.Array) -> tuple[jax.Array, jax.Array]:
            return begin // of_head, begin % of_head * PAIR_BLOCK

        @pl.when(program < heads * of_head)
        def _():
            head, pair = place(program)
            for at, value in zip((pair, half + pair), rotated(*halves(q_w, head, pair), pair), strict=True):
                where = q_ref.at[all_rows, head, pl.ds(at, PAIR_BLOCK)]
                plgpu.store(where, value.astype(q_ref.dtype), mask=inside)

        for number, (w_ref, out_ref) in enumerate(((k_w, k_ref), (v_w, v_ref))):
            begin = program - (heads + number * groups) * of_head

            @pl.when((begin >= 0) & (begin < groups * of_head))
            def _(w_ref=w_ref, out_ref=out_ref, begin=begin, number=number):
                head, pair = place(begin)
                values = halves(w_ref, head, pair)
                if not number:
                    values = rotated(*values, pair)
                row = jnp.arange(rows)
                there = row < m
                position = plgpu.load(at_ref.at[all_rows], mask=there, other=0)
                for at, value in zip((pair, half + pair), values, strict=True):
                    column = at + jnp.arange(PAIR_BLOCK)
                    index = (row[:, None], position[:, None], head, column[None, :])
                    index = jnp.broadcast_arrays(*(jnp.asarray(i) for i in index))
                    mask = jnp.broadcast_to(there[:, None], (rows, PAIR_BLOCK))
                    plgpu.store(out_ref.at[tuple(index)], value.astype(out_ref.dtype), mask=mask)

    q = jax.ShapeDtypeStruct((m, heads, width), x_md.dtype)
    moved = [x_md, scale_d, *flat, *rotary, q]
    entries = 2 * m * groups * width * cache[0].dtype.itemsize
    return pl.pallas_call(
        kernel,
        grid=((heads + 2 * groups) * of_head,),
        out_shape=(q, *(jax.ShapeDtypeStruct(a.shape, a.dtype) for a in cache)),
        input_output_aliases={5: 1, 6: 2},
        compiler_params=compiler_params((step, *sizes)),
        interpret=interpret,
        metadata=cost_metadata(2.0 * m * sum(math.prod(w.shape) for w in weights), moved, entries),
        name="heads_into_cache",
    )(x_md, scale_d, *rotary, positions_m, *cache, *flat)


@functools.partial(jax.jit, static_argnames=("eps", "interpret"))
def latent_into_cache(
    q_mhd: jax.Array,
    compressed_mc: jax.Array,
    scale_r: jax.Array,
    kv_b_hor: Any,
    rotary: tuple[jax.Array, jax.Array],
    positions_m: jax.Array,
    cache: tuple[Entries, Entries],
    *,
    eps: float,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array, Entries, Entries]:
    """Queries for the latent cache, and the cache with the new tokens' entries.

    Args:
      q_mhd: [M, H, nope + rope], rope and the latent's R powers of two, nope a multiple of 16.
      compressed_mc: [M, R + rope], latents before their norm, and keys before rotation.
      scale_r: [R], weight of the latents' norm. eps: its epsilon.
      kv_b_hor: [H, O, R], plain or `Quantized`, whose first ``nope`` rows of a head take its queries into the latent
        space.
      rotary: cos and sin, f32[M, rope/2]; pairs (2i, 2i + 1) are rotated, and written as halves.
      positions_m: i32[M], where in the cache a row's entry goes.
      cache: latents [M, S, R] and rotated keys [M, S, rope], both in int8 or neither.

    Returns:
      Queries in the latent space [M, H, R] and rotated ones [M, H, rope], and the cache, changed in place.
    """
    (m, heads, _), rank, half = q_mhd.shape, kv_b_hor.shape[2], rotary[0].shape[1]
    kind = kv_b_hor.kind if isinstance(kv_b_hor, Quantized) else None
    group = rank // kv_b_hor.scale.shape[2] if kind else rank  # columns that share a scale
    rope, rows = 2 * half, row_count(m)
    nope, head_rows = q_mhd.shape[2] - rope, row_count(heads)
    block, parts = _latent_block(kv_b_hor)
    columns = rank // (block * parts)
    step = depth_step(nope, rows, block * parts, q_mhd.dtype.itemsize)
    flat, form = jax.tree.flatten(kv_b_hor)
    kept, tree = jax.tree.flatten(cache)

    def kernel(q_ref, new_ref, scale_ref, cos_ref, sin_ref, at_ref, *refs):
        weight = jax.tree.unflatten(form, refs[len(kept) : len(kept) + len(flat)])
        latent_q_ref, rope_q_ref, *cache_refs = refs[len(kept) + len(flat) :]
        latent_ref, key_ref = jax.tree.unflatten(tree, cache_refs)
        program = pl.program_id(0)

        def write(ref, row: jax.Array, position: jax.Array, parts: Sequence[jax.Array]) -> None:
            """An entry, which is one vector of consecutive parts."""
            into = ref
            if isinstance(ref, QuantizedEntries):
                parts, into = [part.astype(q_mhd.dtype).astype(jnp.float32) for part in parts], ref.values
                scale = functools.reduce(jnp.maximum, [jnp.max(jnp.abs(part)) for part in parts]) / LARGEST
                parts = [in_steps(part, scale) for part in parts]
                ref.scale[row, position] = scale
            for number, part in enumerate(parts):
                into[row, position, pl.ds(number * part.size, part.size)] = part.astype(into.dtype)

        @pl.when(program < heads * columns)
        def _():
            head, number = program // columns, program % columns

            def load_q(start: jax.Array) -> jax.Array:
                q = load_tile(q_ref, (pl.ds(0, rows), head, pl.ds(start, step)), row_mask(m, rows, step))
                if not isinstance(weight, Quantized):
                    return q
                # The scales are of rows, which are inputs here, and of the group of columns.
                scale = weight.scale[head, pl.ds(start, step), number * parts * block // group]
                return (q.astype(jnp.float32) * scale[None, :]).astype(q.dtype)

            def load_w(part: int, start: jax.Array) -> jax.Array:
                stored = weight.values if isinstance(weight, Quantized) else weight
                tile = stored[head, pl.ds(start, step), pl.ds(number * block, block)]
                return values_of(tile, kind, q_ref.dtype)[part]

            tiles = [Tile(functools.partial(load_w, part)) for part in range(parts)]
            for part, out in enumerate(multiply(load_q, tiles, nope, step, (rows, block))):
                # Of int4 a block is a group, its low values the first half of the columns.
                where = latent_q_ref.at[pl.ds(0, rows), head, pl.ds((number * parts + part) * block, block)]
                plgpu.store(where, out.astype(latent_q_ref.dtype), mask=row_mask(m, rows, block))

        @pl.when(program >= heads * columns)
        def _():
            row = program - heads * columns
            position, pairs = at_ref[row], jnp.arange(half)
            cos, sin = cos_ref[row, pl.ds(0, half)], sin_ref[row, pl.ds(0, half)]
            latent = new_ref[row, pl.ds(0, rank)].astype(jnp.float32)
            latent = latent * lax.rsqrt(jnp.sum(latent * latent) / rank + eps)
            latent = latent.astype(new_ref.dtype) * scale_ref[pl.ds(0, rank)].astype(new_ref.dtype)
            write(latent_ref, row, position, [latent])
            at = jnp.broadcast_to(row, (half,))
            first, second = (new_ref[at, rank + 2 * pairs + odd].astype(jnp.float32) for odd in (0, 1))
            write(key_ref, row, position, [first * cos - second * sin, second * cos + first * sin])

            head = jnp.broadcast_to(jnp.arange(head_rows)[:, None], (head_rows, half))
            there = head < heads
            at = jnp.broadcast_to(row, (head_rows, half))
            first, second = (
                plgpu.load(
                    q_ref.at[at, head, jnp.broadcast_to((nope + 2 * pairs + odd)[None, :], (head_rows, half))],
                    mask=there,
                    other=0,
                ).astype(jnp.float32)
                for odd in (0, 1)
            )
            rotated = first * cos[None, :] - second * sin[None, :], second * cos[None, :] + first * sin[None, :]
            for begin, value in zip((0, half), rotated, strict=True):
                where = rope_q_ref.at[row, pl.ds(0, head_rows), pl.ds(begin, half)]
                plgpu.store(where, value.astype(rope_q_ref.dtype), mask=there)

    made = [jax.ShapeDtypeStruct((m, heads, width), q_mhd.dtype) for width in (rank, rope)]
    of_rows = sum(a.size * a.dtype.itemsize for a in flat) * nope / kv_b_hor.shape[1]
    entries = sum(a.nbytes // a.shape[1] for a in kept) + of_rows
    outs = pl.pallas_call(
        kernel,
        grid=(heads * columns + m,),
        out_shape=(*made, *(jax.ShapeDtypeStruct(a.shape, a.dtype) for a in kept)),
        input_output_aliases={6 + number: 2 + number for number in range(len(kept))},
        compiler_params=compiler_params((step, rows, block * parts, q_mhd.dtype.itemsize)),
        interpret=interpret,
        metadata=cost_metadata(2.0 * m * heads * nope * rank, [q_mhd, compressed_mc, *made], entries),
        name="latent_into_cache",
    )(q_mhd, compressed_mc, scale_r, *rotary, positions_m, *kept, *flat)
    return *outs[:2], *jax.tree.unflatten(tree, outs[2:])


def _latent_block(kv_b_hor: Any) -> tuple[int, int]:
    """Columns of what is stored that a program reads, and how many columns of the latent each of them is."""
    rank = kv_b_hor.shape[2]
    if not isinstance(kv_b_hor, Quantized) or kv_b_hor.kind != "int4":
        return min(128, rank), 1
    return rank // kv_b_hor.scale.shape[2] // 2, 2
