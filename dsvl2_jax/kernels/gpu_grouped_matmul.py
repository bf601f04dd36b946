"""Grouped matmul on NVIDIA GPUs: two Pallas Triton kernels, `gmm` and its gradient for the weights, `tgmm`.

XLA lowers ``jax.lax.ragged_dot`` on GPU to dense products over all groups, [G, M, O] of memory and G times the work.
Here the rows of a group are cut into blocks, each of which reads its own group's matrix (as MegaBlocks does,
arXiv 2211.15841): only the rows that exist cost work, and nothing but the result takes memory.
`dsvl2_jax.kernels.grouped_matmul` calls them; `dsvl2_jax.apps.plan.hlo_walk` reads the FLOPs in their metadata.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax

from dsvl2_jax.kernels.block_sizes import TritonProduct
from dsvl2_jax.kernels.blocks import cut_groups, row_block
from dsvl2_jax.kernels.precision import matmul_precision
from dsvl2_jax.kernels.triton import cost_metadata, fewer_stages, fits_shared_memory
from dsvl2_jax.runtime.lazy import LazyModule

# Only what traces these kernels needs them.
pl = LazyModule("jax.experimental.pallas")
plgpu = LazyModule("jax.experimental.pallas.triton")

COLUMNS = 128  # of a result that a program makes, where nothing was measured; of a gradient, rows too
MIN_ROW_BLOCK = 16  # the least that a tensor core's product takes


def _default(dtype: jnp.dtype, rows: int) -> TritonProduct:
    """What runs where nothing was measured: warps and stages such that the stages fit in shared memory."""
    step, stages = (32, 2) if jnp.dtype(dtype).itemsize > 2 else (64, 4)
    blocks = TritonProduct(rows, COLUMNS, step, 8 if rows >= 128 else 4, stages)
    return fewer_stages(blocks, lambda blocks: blocks.shared_memory(jnp.dtype(dtype).itemsize))


def default_blocks(operation: str, rows: int, groups: int) -> TritonProduct:
    """What runs for bfloat16 where nothing was measured. ``operation``: tgmm, or another."""
    block = COLUMNS if operation == "tgmm" else row_block(rows, groups, least=MIN_ROW_BLOCK)
    return _default(jnp.bfloat16, block)


def _params(blocks: TritonProduct, dtype: jnp.dtype) -> plgpu.CompilerParams:
    fits_shared_memory(blocks, blocks.shared_memory(jnp.dtype(dtype).itemsize))
    return plgpu.CompilerParams(num_warps=blocks.warps, num_stages=blocks.stages)


# Jitted, so that the layers of a model trace a kernel once, also where it is lowered for another platform.
@functools.partial(jax.jit, static_argnames=("blocks", "transposed", "interpret"))
def gmm(
    x_mk: jax.Array,
    w_gkn: jax.Array,
    group_sizes_g: jax.Array,
    *,
    blocks: TritonProduct | None = None,
    transposed: bool = False,
    interpret: bool = False,
) -> jax.Array:
    """Multiplies each group of rows by its matrix.

    Args:
      x_mk: [M, K], sorted by group.
      w_gkn: [G, K, N], or [G, N, K] when ``transposed``.
      group_sizes_g: i32[G], with a sum ≤ M.
      blocks: None: those that run where nothing was measured.
      interpret: run on the CPU, for tests.

    Returns:
      [M, N] in the dtype of ``x_mk``, summed in float32; rows beyond the last group are undefined.
    """
    rows, inner = x_mk.shape
    groups, width = w_gkn.shape[0], w_gkn.shape[1 if transposed else 2]
    blocks = blocks or _default(x_mk.dtype, row_block(rows, groups, least=MIN_ROW_BLOCK))
    group, start, stop, _ = cut_groups(group_sizes_g, blocks.rows, rows)
    kernel = functools.partial(
        _gmm_kernel, blocks=blocks, transposed=transposed, precision=matmul_precision(x_mk.dtype)
    )
    return pl.pallas_call(
        kernel,
        # Neighbouring programs share their rows, and the blocks of a group its matrix, while these are in the cache.
        grid=(pl.cdiv(width, blocks.columns), group.shape[0]),
        out_shape=jax.ShapeDtypeStruct((rows, width), x_mk.dtype),
        compiler_params=_params(blocks, x_mk.dtype),
        interpret=interpret,
        metadata=cost_metadata(2.0 * rows * inner * width),
        name="gmm",
    )(x_mk, w_gkn, group, start, stop)


@functools.partial(jax.jit, static_argnames=("blocks", "interpret"))
def tgmm(
    x_mk: jax.Array,
    dout_mn: jax.Array,
    group_sizes_g: jax.Array,
    *,
    blocks: TritonProduct | None = None,
    interpret: bool = False,
) -> jax.Array:
    """Per group, xᵀ · dout: the gradient of `gmm` for its weights.

    Args:
      x_mk: [M, K]; dout_mn: [M, N], both sorted by group.
      group_sizes_g: i32[G], with a sum ≤ M.
      blocks: None: those that run where nothing was measured.

    Returns:
      [G, K, N] in the dtype of ``x_mk``, summed in float32; zero where a group has no rows.
    """
    (rows, inner), width, groups = x_mk.shape, dout_mn.shape[1], group_sizes_g.shape[0]
    blocks = blocks or _default(x_mk.dtype, COLUMNS)
    stop_g = jnp.cumsum(group_sizes_g, dtype=jnp.int32)
    return pl.pallas_call(
        functools.partial(_tgmm_kernel, blocks=blocks, precision=matmul_precision(x_mk.dtype)),
        grid=(pl.cdiv(width, blocks.columns), pl.cdiv(inner, blocks.rows), groups),
        out_shape=jax.ShapeDtypeStruct((groups, inner, width), x_mk.dtype),
        compiler_params=_params(blocks, x_mk.dtype),
        interpret=interpret,
        metadata=cost_metadata(2.0 * rows * inner * width),
        name="tgmm",
    )(x_mk, dout_mn, stop_g - group_sizes_g, stop_g)


def _load_tile(ref, rows: pl.Slice, columns: pl.Slice, stop: jax.Array | int | None, *lead) -> jax.Array:
    """[rows, columns] of a matrix, zero from row ``stop`` on and beyond its width. None: all rows are in it."""
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


def _gmm_kernel(x_ref, w_ref, group_ref, start_ref, stop_ref, out_ref, *, blocks, transposed, precision):
    """One block of a group's rows times some columns of its matrix, a step of the inputs at a time."""
    block, step, count = blocks.rows, blocks.step, blocks.columns
    column, index = pl.program_id(0), pl.program_id(1)
    group, start, stop = group_ref[index], start_ref[index], stop_ref[index]
    inner, width = x_ref.shape[1], out_ref.shape[1]
    rows, columns = pl.ds(start, block), pl.ds(column * count, count)

    def body(k, acc):  # f32[rows, columns]
        depth = pl.ds(k * step, step)
        x = _load_tile(x_ref, rows, depth, stop)  # [rows, step]
        high, wide = (columns, depth) if transposed else (depth, columns)
        w_height = None if w_ref.shape[1] % high.size == 0 else w_ref.shape[1]
        w = _load_tile(w_ref, high, wide, w_height, group)  # [step, columns], or transposed
        return acc + plgpu.dot(x, w.astype(x.dtype), trans_b=transposed, precision=precision)

    steps = (stop > start).astype(jnp.int32) * pl.cdiv(inner, step)
    acc = lax.fori_loop(0, steps, body, jnp.zeros((block, count), jnp.float32))
    mask = (start + jnp.arange(block) < stop)[:, None]
    mask &= (column * count + jnp.arange(count) < width)[None, :]
    plgpu.store(out_ref.at[rows, columns], acc.astype(out_ref.dtype), mask=mask)


def _tgmm_kernel(x_ref, dout_ref, start_ref, stop_ref, dw_ref, *, blocks, precision):
    """One tile of a group's gradient, a step of its rows at a time."""
    column, line, group = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    start, stop = start_ref[group], stop_ref[group]
    _, inner, width = dw_ref.shape
    lines, columns = pl.ds(line * blocks.rows, blocks.rows), pl.ds(column * blocks.columns, blocks.columns)

    def body(k, acc):  # f32[lines, columns]
        rows = pl.ds(start + k * blocks.step, blocks.step)
        x, dout = _load_tile(x_ref, rows, lines, stop), _load_tile(dout_ref, rows, columns, stop)  # [step, …]
        return acc + plgpu.dot(x, dout.astype(x.dtype), trans_a=True, precision=precision)

    steps = pl.cdiv(stop - start, blocks.step)
    acc = lax.fori_loop(0, steps, body, jnp.zeros((blocks.rows, blocks.columns), jnp.float32))
    mask = (lines.start + jnp.arange(blocks.rows) < inner)[:, None]
    mask &= (columns.start + jnp.arange(blocks.columns) < width)[None, :]
    plgpu.store(dw_ref.at[group, lines, columns], acc.astype(dw_ref.dtype), mask=mask)
