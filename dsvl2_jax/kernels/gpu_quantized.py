"""Products of rows with quantized matrices on NVIDIA GPUs: Pallas Triton kernels that convert bytes in registers.

As `dsvl2_jax.kernels.gpu_grouped_matmul`: the rows of a group are cut into blocks, each of which reads its own group's
matrix. One matrix is a group that all rows belong to. Scales are applied to sums, not to each value. XLA would write
out the converted matrices.

Tested in tests/kernels/test_quantized_kernels.py.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax

from dsvl2_jax.kernels.blocks import cut_groups, row_block
from dsvl2_jax.kernels.gpu_few_rows import (
    MIN_ROWS,
    column_block,
    depth_step,
    has_steps,
    load_tile,
    multiply,
    tile,
    values_of,
)
from dsvl2_jax.kernels.precision import matmul_precision
from dsvl2_jax.kernels.quantized import Quantized
from dsvl2_jax.kernels.triton import cost_metadata, fits_int32
from dsvl2_jax.runtime.lazy import LazyModule

# Only what traces these kernels needs them.
pl = LazyModule("jax.experimental.pallas")
plgpu = LazyModule("jax.experimental.pallas.triton")

STAGES = 3


def is_supported(x_mk: jax.Array, weight: Quantized) -> bool:
    """Whether the kernels are for such rows and matrices [G, K, N]; their steps are of widths that 16 divides."""
    return has_steps(weight) and weight.shape[2] % MIN_ROWS == 0 and fits_int32(x_mk, weight.values)


def _params(rows: int) -> plgpu.CompilerParams:
    return plgpu.CompilerParams(num_warps=8 if rows >= 128 else 4, num_stages=STAGES)


def _cost(rows: int, weight: Quantized) -> dict[str, str]:
    _, inner, width = weight.shape
    return cost_metadata(2.0 * rows * inner * width)


@functools.partial(jax.jit, static_argnames="interpret")
def gmm(x_mk: jax.Array, weight: Quantized, group_sizes_g: jax.Array, *, interpret: bool = False) -> jax.Array:
    """Multiplies each group of rows by its matrix.

    Args:
      x_mk: [M, K], sorted by group. weight: of [G, K, N], as `is_supported` says.
      group_sizes_g: i32[G], with a sum ≤ M.
      interpret: run on the CPU, for tests.

    Returns:
      [M, N] in the dtype of ``x_mk``, summed in float32; rows beyond the last group are undefined.
    """
    (m, inner), (count, _, n) = x_mk.shape, weight.shape
    rows = row_block(m, count, least=MIN_ROWS)
    group, start, stop, _ = cut_groups(group_sizes_g, rows, m)
    columns = column_block(n * len(group))
    step = depth_step(inner, rows, columns, x_mk.dtype.itemsize, weight)
    flat, form = jax.tree.flatten(weight)

    def kernel(x_ref, group_ref, start_ref, stop_ref, *refs):
        *w_refs, out_ref = refs
        first, index = pl.program_id(0) * columns, pl.program_id(1)
        begin, end = start_ref[index], stop_ref[index]
        inside = (begin + jnp.arange(rows) < end)[:, None]

        @pl.when(end > begin)
        def _():
            def load_x(at: jax.Array) -> jax.Array:
                mask = jnp.broadcast_to(inside, (rows, step))
                return load_tile(x_ref, (pl.ds(begin, rows), pl.ds(at, step)), mask)

            mine = tile(jax.tree.unflatten(form, w_refs), first, columns, step, (group_ref[index],))
            (out,) = multiply(load_x, [mine], inner, step, (rows, columns))
            mask = jnp.broadcast_to(inside & (first + jnp.arange(columns) < n)[None, :], (rows, columns))
            plgpu.store(out_ref.at[pl.ds(begin, rows), pl.ds(first, columns)], out.astype(out_ref.dtype), mask=mask)

    return pl.pallas_call(
        kernel,
        # Neighbouring programs share their rows, and the blocks of a group its matrix, while these are in the cache.
        grid=(pl.cdiv(n, columns), len(group)),
        out_shape=jax.ShapeDtypeStruct((m, n), x_mk.dtype),
        compiler_params=_params(rows),
        interpret=interpret,
        metadata=_cost(m, weight),
        name="quantized_gmm",
    )(x_mk, group, start, stop, *flat)


@functools.partial(jax.jit, static_argnames="interpret")
def gmm_transposed(
    x_mn: jax.Array, weight: Quantized, group_sizes_g: jax.Array, *, interpret: bool = False
) -> jax.Array:
    """`gmm` with the transposed matrices: [M, N] → [M, K].

    A program makes the columns of some of the matrix's rows as they are stored, for int4 of one group of inputs.
    """
    (m, n), (count, stored, _), groups = x_mn.shape, weight.values.shape, weight.scale.shape[1]
    inner, parts = weight.shape[1], 2 if weight.kind == "int4" else 1
    rows = row_block(m, count, least=MIN_ROWS)
    group, start, stop, _ = cut_groups(group_sizes_g, rows, m)
    half = stored // groups
    height = min(64, half & -half)
    step = min(64, n & -n)
    precision = matmul_precision(x_mn.dtype)
    flat, form = jax.tree.flatten(weight)

    def kernel(x_ref, group_ref, start_ref, stop_ref, *refs):
        *w_refs, out_ref = refs
        mine = jax.tree.unflatten(form, w_refs)
        first, index = pl.program_id(0) * height, pl.program_id(1)
        begin, end, matrix = start_ref[index], stop_ref[index], group_ref[index]
        inside = (begin + jnp.arange(rows) < end)[:, None]
        of_inputs = first // half  # the group of all rows of a program

        @pl.when(end > begin)
        def _():
            def body(i: jax.Array, accs: list[jax.Array]) -> list[jax.Array]:
                at = pl.ds(i * step, step)
                x = load_tile(x_ref, (pl.ds(begin, rows), at), jnp.broadcast_to(inside, (rows, step)))
                scale = mine.scale[matrix, of_inputs, at]
                x = (x.astype(jnp.float32) * scale[None, :]).astype(x.dtype)
                tile = mine.values[matrix, pl.ds(first, height), at]
                values = values_of(tile, mine.kind, x.dtype)
                return [
                    acc + plgpu.dot(x, value, trans_b=True, precision=precision)
                    for acc, value in zip(accs, values, strict=True)
                ]

            accs = [jnp.zeros((rows, height), jnp.float32) for _ in range(parts)]
            for part, acc in enumerate(lax.fori_loop(0, n // step, body, accs)):
                at = first if parts == 1 else first + (of_inputs + part) * half
                where = out_ref.at[pl.ds(begin, rows), pl.ds(at, height)]
                plgpu.store(where, acc.astype(out_ref.dtype), mask=jnp.broadcast_to(inside, (rows, height)))

    return pl.pallas_call(
        kernel,
        grid=(stored // height, len(group)),
        out_shape=jax.ShapeDtypeStruct((m, inner), x_mn.dtype),
        compiler_params=_params(rows),
        interpret=interpret,
        metadata=_cost(m, weight),
        name="quantized_gmm_transposed",
    )(x_mn, group, start, stop, *flat)
