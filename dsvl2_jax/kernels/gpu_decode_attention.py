"""Attention of a decode step on NVIDIA GPUs, split over the cache's length (Flash-Decoding): Pallas Triton kernels.

One new token a row gives too few programs to read a cache with all multiprocessors, so that the positions that a row
sees are split among several: `attend_splits` gives each split's output and log-sum-exp, `combine` or
`combine_latent` their sum. Splits follow from the row's own length and the number of rows alone, so that what a row
computes depends neither on other rows nor on how much longer the cache is; positions beyond the last cost nothing.

Tested in tests/model/test_gpu_decode.py and tests/kernels/test_gpu_decode.py; `dsvl2_jax.model.gpu_decode` calls them.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from dsvl2_jax.kernels.gpu_attention import MASKED
from dsvl2_jax.kernels.gpu_few_rows import (
    MIN_ROWS,
    Tile,
    compiler_params,
    depth_step,
    load_tile,
    multiply,
    row_count,
    row_mask,
)
from dsvl2_jax.kernels.precision import matmul_precision
from dsvl2_jax.kernels.quantized import Quantized
from dsvl2_jax.kernels.quantized_cache import Entries, QuantizedEntries
from dsvl2_jax.kernels.triton import cost_metadata
from dsvl2_jax.runtime.lazy import LazyModule

# Only what traces these kernels needs them.
pl = LazyModule("jax.experimental.pallas")
plgpu = LazyModule("jax.experimental.pallas.triton")

TILE_BYTES = 40 << 10  # of the keys that a program holds at a time, twice
PROGRAMS = 256  # two for each multiprocessor
MAX_SPLITS = 32


def splits(rows: int) -> int:
    """How many parts a row's positions are taken in: the fewer, the more rows and heads there are."""
    return max(1, min(MAX_SPLITS, 1 << max(1, PROGRAMS // rows).bit_length() - 1))


@functools.partial(jax.jit, static_argnames=("scale", "interpret"))
def attend_splits(
    queries: Sequence[jax.Array],
    keys: Sequence[Entries],
    values: Entries | None,
    last_b: jax.Array,
    *,
    scale: float,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Softmax attention of one token a row to parts of the positions that it sees.

    Args:
      queries: parts [B, H, width_i], widths powers of two from 16 on.
      keys: parts [B, S, G, width_i], of G key heads which as many consecutive query heads each share; they and the
        values are all in int8, or none is.
      values: [B, S, G, Dv]; None: the first part of the keys.
      last_b: i32[B], the last position that a row sees, from 0 on.
      scale: factor on the scores.

    Returns:
      out, f32[B, splits, H, Dv], and lse, f32[B, splits, H], the log-sum-exp of the scaled scores, to base 2; zero and
      `MASKED` where a split has no position.
    """
    (b, heads, _), (_, length, groups, _) = queries[0].shape, keys[0].shape
    shared = heads // groups
    rows, parts = max(MIN_ROWS, 1 << (shared - 1).bit_length()), splits(b * groups)
    widths, value_width = [k.shape[-1] for k in keys], (keys[0] if values is None else values).shape[-1]
    cache = [*keys, *([] if values is None else [values])]
    arrays = [x.values if isinstance(x, QuantizedEntries) else x for x in cache]
    scales = [x.scale for x in cache if isinstance(x, QuantizedEntries)]
    dtype = queries[0].dtype
    position_bytes = sum(a.shape[-1] * dtype.itemsize for a in arrays)  # as they are multiplied
    most = max(MIN_ROWS, min(64, TILE_BYTES // position_bytes))
    block = 1 << most.bit_length() - 1
    precision = matmul_precision(dtype)

    def kernel(*refs):
        *refs, last_ref, out_ref, lse_ref = refs
        q_refs, refs = refs[: len(queries)], refs[len(queries) :]
        cache_refs, scale_refs = refs[: len(arrays)], refs[len(arrays) :]
        k_refs, v_refs = cache_refs[: len(keys)], cache_refs[len(keys) :]
        part, group, row = (pl.program_id(axis) for axis in range(3))
        heads_here = pl.ds(group * shared, rows)
        last = last_ref[row]
        blocks = last // block + 1
        each = pl.cdiv(blocks, parts)
        first, end = part * each, jnp.minimum(part * each + each, blocks)
        q = [
            load_tile(ref, (row, heads_here, pl.ds(0, width)), row_mask(shared, rows, width))
            for ref, width in zip(q_refs, widths, strict=True)
        ]

        def load(ref, start: jax.Array) -> jax.Array:
            width, mask = ref.shape[-1], None
            if length % block:
                mask = jnp.broadcast_to((start + jnp.arange(block) < length)[:, None], (block, width))
            return load_tile(ref, (row, pl.ds(start, block), group, pl.ds(0, width)), mask).astype(dtype)

        def scaled(x: jax.Array, number: int, start: jax.Array) -> jax.Array:  # f32[rows, block], of the cache's arrays
            if not scale_refs:
                return x
            mask = start + jnp.arange(block) < length if length % block else None
            return x * load_tile(scale_refs[number], (row, pl.ds(start, block), group), mask)[None, :]

        def body(j: jax.Array, carry: tuple[jax.Array, jax.Array, jax.Array]):
            m, l, acc = carry  # noqa: E741  f32[rows], f32[rows], f32[rows, Dv]
            start = j * block
            tiles = [load(ref, start) for ref in k_refs]
            parts = [plgpu.dot(a, k, trans_b=True, precision=precision) for a, k in zip(q, tiles, strict=True)]
            scores = sum(scaled(part, number, start) for number, part in enumerate(parts))
            visible = (start + jnp.arange(block) <= last)[None, :]
            scores = jnp.where(visible, scores * (scale * math.log2(math.e)), MASKED)
            m_new = jnp.maximum(m, jnp.max(scores, axis=1))
            p, alpha = jnp.exp2(scores - m_new[:, None]), jnp.exp2(m - m_new)
            value = load(v_refs[0], start) if v_refs else tiles[0]
            weights = scaled(p, len(keys) if v_refs else 0, start).astype(dtype)
            pv = plgpu.dot(weights, value, precision=precision)
            return m_new, l * alpha + jnp.sum(p, axis=1), acc * alpha[:, None] + pv

        start = jnp.full(rows, MASKED), jnp.zeros(rows), jnp.zeros((rows, value_width))
        m, l, acc = lax.fori_loop(first, end, body, tuple(x.astype(jnp.float32) for x in start))  # noqa: E741
        total = jnp.where(l > 0, l, 1)
        mask = row_mask(shared, rows, value_width)
        plgpu.store(out_ref.at[row, part, heads_here, pl.ds(0, value_width)], acc / total[:, None], mask=mask)
        inside = None if mask is None else jnp.arange(rows) < shared
        plgpu.store(lse_ref.at[row, part, heads_here], m + jnp.log2(total), mask=inside)

    outs = [
        jax.ShapeDtypeStruct((b, parts, heads, value_width), jnp.float32),
        jax.ShapeDtypeStruct((b, parts, heads), jnp.float32),
    ]
    return pl.pallas_call(
        kernel,
        grid=(parts, groups, b),
        out_shape=outs,
        compiler_params=plgpu.CompilerParams(num_warps=8 if rows * value_width > 8192 else 4, num_stages=2),
        interpret=interpret,
        metadata=cost_metadata(
            2.0 * b * heads * length * (sum(widths) + value_width), [*queries, *arrays, *scales, *outs]
        ),
        name="attend_splits",
    )(*queries, *arrays, *scales, last_b)


@functools.partial(jax.jit, static_argnames=("dtype", "interpret"))
def combine(out_bshd: jax.Array, lse_bsh: jax.Array, *, dtype: jnp.dtype, interpret: bool = False) -> jax.Array:
    """The attention of all splits: f32[B, splits, H, Dv] and f32[B, splits, H] → [B, H, Dv] in ``dtype``."""
    b, parts, heads, width = out_bshd.shape

    def kernel(out_ref, lse_ref, combined_ref):
        row, head = pl.program_id(0), pl.program_id(1)
        lse = lse_ref[row, pl.ds(0, parts), head]
        share = jnp.exp2(lse - jnp.max(lse))
        outs = out_ref[row, pl.ds(0, parts), head, pl.ds(0, width)]
        combined = jnp.sum(outs * (share / jnp.sum(share))[:, None], axis=0)
        combined_ref[row, head, pl.ds(0, width)] = combined.astype(dtype)

    combined = jax.ShapeDtypeStruct((b, heads, width), dtype)
    return pl.pallas_call(
        kernel,
        grid=(b, heads),
        out_shape=combined,
        compiler_params=plgpu.CompilerParams(num_warps=4),
        interpret=interpret,
        metadata=cost_metadata(0.0, [out_bshd, lse_bsh, combined]),
        name="combine_splits",
    )(out_bshd, lse_bsh)


@functools.partial(jax.jit, static_argnames=("first_row", "dtype", "interpret"))
def combine_latent(
    out_bshr: jax.Array, lse_bsh: jax.Array, kv_b_hor: Any, *, first_row: int, dtype: jnp.dtype, interpret: bool = False
) -> jax.Array:
    """`combine`, and each head's sum taken from the latent space to its values.

    Args:
      out_bshr: f32[B, splits, H, R] and lse_bsh: f32[B, splits, H] of `attend_splits`.
      kv_b_hor: [H, O, R], plain or `Quantized`, of whose rows those of a head's values begin at ``first_row``; as many
        as a multiple of 16.

    Returns:
      [B, H, Dv] in ``dtype``.
    """
    (b, parts, heads, rank), width = out_bshr.shape, kv_b_hor.shape[1] - first_row
    rows, block = row_count(b), min(32, width & -width)
    step = min(64, depth_step(rank, rows, block, 2, kv_b_hor))
    flat, form = jax.tree.flatten(kv_b_hor)

    def kernel(out_ref, lse_ref, *refs):
        *w_refs, made_ref = refs
        weight = jax.tree.unflatten(form, w_refs)
        column, head = pl.program_id(0) * block, pl.program_id(1)
        all_rows = pl.ds(0, rows)
        mask = row_mask(b, rows, step)
        inside = None if mask is None else jnp.arange(rows) < b

        def lse_of(part: jax.Array) -> jax.Array:
            return load_tile(lse_ref, (all_rows, part, head), inside)

        largest = lax.fori_loop(0, parts, lambda s, m: jnp.maximum(m, lse_of(s)), jnp.full(rows, MASKED, jnp.float32))
        total = lax.fori_loop(0, parts, lambda s, t: t + jnp.exp2(lse_of(s) - largest), jnp.zeros(rows, jnp.float32))

        def load_x(start: jax.Array) -> jax.Array:
            def add(s: jax.Array, x: jax.Array) -> jax.Array:
                part = load_tile(out_ref, (all_rows, s, head, pl.ds(start, step)), mask)
                return x + part * (jnp.exp2(lse_of(s) - largest) / total)[:, None]

            return lax.fori_loop(0, parts, add, jnp.zeros((rows, step), jnp.float32)).astype(dtype)

        mine = pl.ds(first_row + column, block)

        def load_w(start: jax.Array) -> jax.Array:
            stored = weight.values if isinstance(weight, Quantized) else weight
            return stored[head, mine, pl.ds(start, step)].T

        if isinstance(weight, Quantized):
            tile = Tile(load_w, weight.kind, lambda group: weight.scale[head, mine, group], weight.scale.shape[2])
        else:
            tile = Tile(load_w)
        (out,) = multiply(load_x, [tile], rank, step, (rows, block))
        stored = row_mask(b, rows, block)
        plgpu.store(made_ref.at[all_rows, head, pl.ds(column, block)], out.astype(made_ref.dtype), mask=stored)

    made = jax.ShapeDtypeStruct((b, heads, width), dtype)
    weight_bytes = sum(a.size * a.dtype.itemsize for a in flat) * width / kv_b_hor.shape[1]
    return pl.pallas_call(
        kernel,
        grid=(width // block, heads),
        out_shape=made,
        compiler_params=compiler_params((step, rows, block, jnp.dtype(dtype).itemsize)),
        interpret=interpret,
        metadata=cost_metadata(2.0 * b * heads * width * rank, [out_bshr, lse_bsh, made], weight_bytes),
        name="combine_latent",
    )(out_bshr, lse_bsh, *flat)
