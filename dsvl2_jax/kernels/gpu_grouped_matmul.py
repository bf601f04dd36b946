"""Grouped matmul on NVIDIA GPUs: two Pallas Triton kernels, the product and its gradient for the weights.

XLA lowers ``jax.lax.ragged_dot`` on GPU to dense products over all groups, [G, M, O] of memory and G times the work.
Here the rows of a group are cut into blocks, each of which reads its own group's matrix: the work of the rows that are
there, and no memory besides the result. `dsvl2_jax.kernels.grouped_matmul` calls them; the FLOPs that they declare
are read by `dsvl2_jax.apps.plan.hlo_walk`.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from dsvl2_jax.kernels.precision import matmul_precision

BLOCK_OUT = 128  # columns of a result that a program makes
MIN_BLOCK = 16  # the least that a tensor core's product takes
MAX_BLOCK = 128  # rows


def declared(flops: float) -> dict[str, str]:
    """What a kernel's call carries for those who read the compiled program: XLA keeps no cost of Triton kernels."""
    return {"flops": f"{flops:.0f}"}


def _tuning(dtype: jnp.dtype, rows: int) -> tuple[int, plgpu.CompilerParams]:
    """Depth of a product's step, and warps and stages such that the stages fit a multiprocessor's shared memory."""
    wide = jnp.dtype(dtype).itemsize > 2
    params = plgpu.CompilerParams(num_warps=8 if rows >= 128 else 4, num_stages=2 if wide else 4)
    return (32 if wide else 64), params


def addressable(*arrays: jax.Array) -> bool:
    """Whether the kernels reach all of the arrays: their offsets have 32 bits."""
    return all(array.size < 2**31 for array in arrays)


def row_block(rows: int, groups: int) -> int:
    """A power of two near the mean group, within what the hardware likes."""
    mean = max(1, rows // groups)
    return min(MAX_BLOCK, max(MIN_BLOCK, 1 << (mean - 1).bit_length()))


# Jitted, so that the layers of a model trace a kernel once, also where it is lowered for another platform.
@functools.partial(jax.jit, static_argnames=("transposed", "interpret"))
def grouped_product(
    rows: jax.Array,
    weights: jax.Array,
    group_sizes: jax.Array,
    *,
    transposed: bool = False,
    interpret: bool = False,
) -> jax.Array:
    """Multiplies each group of rows by its matrix.

    Args:
      rows: [M, I], sorted by group.
      weights: [G, I, O], or [G, O, I] when ``transposed``.
      group_sizes: i32[G], with a sum ≤ M.
      interpret: run on the CPU, for tests.

    Returns:
      [M, O] in the dtype of ``rows``, summed in float32; rows beyond the last group are undefined.
    """
    count, inner = rows.shape
    groups, width = weights.shape[0], weights.shape[1 if transposed else 2]
    block = row_block(count, groups)
    step, params = _tuning(rows.dtype, block)
    group, start, stop = _blocks(group_sizes, block, pl.cdiv(count, block) + groups)
    kernel = functools.partial(
        _product_kernel, block=block, step=step, transposed=transposed, exact=matmul_precision(rows.dtype)
    )
    return pl.pallas_call(
        kernel,
        # Neighbouring programs share their rows, and the blocks of a group its matrix, while these are in the cache.
        grid=(pl.cdiv(width, BLOCK_OUT), group.shape[0]),
        out_shape=jax.ShapeDtypeStruct((count, width), rows.dtype),
        compiler_params=params,
        interpret=interpret,
        metadata=declared(2.0 * count * inner * width),
        name="grouped_product",
    )(rows, weights, group, start, stop)


@functools.partial(jax.jit, static_argnames="interpret")
def grouped_outer(
    rows: jax.Array, cotangent: jax.Array, group_sizes: jax.Array, *, interpret: bool = False
) -> jax.Array:
    """Per group, rowsᵀ · cotangent: the gradient of `grouped_product` for its weights.

    Args:
      rows: [M, I]; cotangent: [M, O], both sorted by group.
      group_sizes: i32[G], with a sum ≤ M.

    Returns:
      [G, I, O] in the dtype of ``rows``, summed in float32; zero where a group has no rows.
    """
    (count, inner), width, groups = rows.shape, cotangent.shape[1], group_sizes.shape[0]
    step, params = _tuning(rows.dtype, BLOCK_OUT)
    stop = jnp.cumsum(group_sizes, dtype=jnp.int32)
    return pl.pallas_call(
        functools.partial(_outer_kernel, step=step, exact=matmul_precision(rows.dtype)),
        grid=(pl.cdiv(width, BLOCK_OUT), pl.cdiv(inner, BLOCK_OUT), groups),
        out_shape=jax.ShapeDtypeStruct((groups, inner, width), rows.dtype),
        compiler_params=params,
        interpret=interpret,
        metadata=declared(2.0 * count * inner * width),
        name="grouped_outer",
    )(rows, cotangent, stop - group_sizes, stop)


def _blocks(group_sizes: jax.Array, block: int, most: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Cuts every group into blocks: i32[most] each block's group, first row and end; unused blocks are empty."""
    counts = -(-group_sizes // block)
    group = jnp.repeat(jnp.arange(group_sizes.shape[0], dtype=jnp.int32), counts, total_repeat_length=most)
    ends = jnp.cumsum(group_sizes, dtype=jnp.int32)
    first_block = jnp.cumsum(counts) - counts
    start = (ends - group_sizes)[group] + (jnp.arange(most, dtype=jnp.int32) - first_block[group]) * block
    stop = jnp.minimum(start + block, ends[group])
    used = jnp.arange(most) < counts.sum()
    return group, jnp.where(used, start, 0).astype(jnp.int32), jnp.where(used, stop, 0).astype(jnp.int32)


def _loaded(ref, rows: pl.Slice, columns: pl.Slice, stop: jax.Array | int | None, *lead) -> jax.Array:
    """A tile of a matrix, zero from row ``stop`` on and beyond its width. None: all rows are there."""
    mask = None
    if stop is not None:
        mask = (rows.start + jnp.arange(rows.size) < stop)[:, None]
    if ref.shape[-1] % columns.size:
        inside = (columns.start + jnp.arange(columns.size) < ref.shape[-1])[None, :]
        mask = inside if mask is None else mask & inside
    if mask is None:
        return ref[(*lead, rows, columns)]
    mask = jnp.broadcast_to(mask, (rows.size, columns.size))
    return plgpu.load(ref.at[(*lead, rows, columns)], mask=mask, other=0)


def _product_kernel(rows, weights, group, start, stop, out, *, block, step, transposed, exact):
    column, index = pl.program_id(0), pl.program_id(1)
    own, first, last = group[index], start[index], stop[index]
    inner, width = rows.shape[1], out.shape[1]
    here, columns = pl.ds(first, block), pl.ds(column * BLOCK_OUT, BLOCK_OUT)

    def body(k, total):
        depth = pl.ds(k * step, step)
        x = _loaded(rows, here, depth, last)
        high, wide = (columns, depth) if transposed else (depth, columns)
        w = _loaded(weights, high, wide, None if weights.shape[1] % high.size == 0 else weights.shape[1], own)
        return total + plgpu.dot(x, w.astype(x.dtype), trans_b=transposed, precision=exact)

    turns = (last > first).astype(jnp.int32) * pl.cdiv(inner, step)
    total = lax.fori_loop(0, turns, body, jnp.zeros((block, BLOCK_OUT), jnp.float32))
    mask = (first + jnp.arange(block) < last)[:, None]
    mask &= (column * BLOCK_OUT + jnp.arange(BLOCK_OUT) < width)[None, :]
    plgpu.store(out.at[here, columns], total.astype(out.dtype), mask=mask)


def _outer_kernel(rows, cotangent, start, stop, out, *, step, exact):
    column, line, group = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    first, last = start[group], stop[group]
    _, inner, width = out.shape
    lines, columns = pl.ds(line * BLOCK_OUT, BLOCK_OUT), pl.ds(column * BLOCK_OUT, BLOCK_OUT)

    def body(k, total):
        here = pl.ds(first + k * step, step)
        x, g = _loaded(rows, here, lines, last), _loaded(cotangent, here, columns, last)
        return total + plgpu.dot(x, g.astype(x.dtype), trans_a=True, precision=exact)

    turns = pl.cdiv(last - first, step)
    total = lax.fori_loop(0, turns, body, jnp.zeros((BLOCK_OUT, BLOCK_OUT), jnp.float32))
    mask = (line * BLOCK_OUT + jnp.arange(BLOCK_OUT) < inner)[:, None]
    mask &= (column * BLOCK_OUT + jnp.arange(BLOCK_OUT) < width)[None, :]
    plgpu.store(out.at[group, lines, columns], total.astype(out.dtype), mask=mask)
