"""Products of rows with quantized matrices on TPUs: the experts' kernel of `dsvl2_jax.kernels.tpu_grouped_matmul`, with
bytes fetched as they lie and converted in fast memory.

One matrix is a group that all rows belong to. Tested in tests/kernels/test_quantized_kernels.py.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax

from dsvl2_jax.kernels.blocks import LANES, column_block, row_block
from dsvl2_jax.kernels.precision import matmul_precision
from dsvl2_jax.kernels.quantized import INT4_OFFSET, Quantized
from dsvl2_jax.kernels.tpu_grouped_matmul import LEAST_ROWS, chip, visits_of
from dsvl2_jax.runtime.lazy import LazyModule

# Only what traces these kernels needs them.
pl = LazyModule("jax.experimental.pallas")
pltpu = LazyModule("jax.experimental.pallas.tpu")

CONVERTED_BYTES = 8  # that fast memory holds of a value while it is converted: as float32, and before or after


def gmm(
    x_mk: jax.Array,
    weights: tuple[Quantized, ...],
    group_sizes_g: jax.Array,
    *,
    transposed: bool = False,
    interpret: bool = False,
) -> jax.Array:
    """Each group of rows times its matrix, or SwiGLU of the products with its two matrices.

    Args:
      x_mk: [M, K], sorted by group.
      weights: one of [G, K, N], or two of one kind: the results are then silu(x · first) · (x · second).
      group_sizes_g: i32[G], with a sum ≤ M.
      transposed: of one weight, of [G, N, K]: its inputs are the result's columns.

    Returns:
      [M, N] in the dtype of ``x_mk``; rows beyond the last group are zero.
    """
    (first, *_), m = weights, len(x_mk)
    count, stored, columns_stored = first.values.shape
    groups, parts = first.scale.shape[1], 2 if first.kind == "int4" else 1
    tile = row_block(m, count, LEAST_ROWS)
    x = jnp.pad(x_mk, ((0, -m % tile), (0, 0)))
    padded = len(x)
    # What is fetched of x: for int4 the inputs of low values apart from those of high ones.
    xs = x[None] if transposed or parts == 1 else x.reshape(padded, groups, parts, -1).transpose(2, 0, 1, 3)
    xs = xs.reshape(len(xs), padded, -1)
    inner, n = xs.shape[2], stored if transposed else columns_stored
    cores, fast_memory = chip()
    width = column_block(inner, n, len(weights) * parts * CONVERTED_BYTES, fast_memory // 4)
    if transposed and groups > 1:  # whole groups of the result's columns
        width = n
    elif -(-n // width) < cores:  # each core takes columns
        width = -(-n // (cores * LANES)) * LANES
    columns = -(-n // width)
    made = parts if transposed else 1

    def of_tile(column, visit, ends, group, tile):
        return 0, tile[visit], 0

    def of_group(column, visit, ends, group, tile):
        return (group[visit], column, 0) if transposed else (group[visit], 0, column)

    def of_scale(column, visit, ends, group, tile):
        return (group[visit], 0, 0) if transposed else (group[visit], 0, column)

    def of_result(column, visit, ends, group, tile):
        return 0, tile[visit], column

    in_specs, arrays = [pl.BlockSpec((len(xs), tile, inner), of_tile)], [xs]
    for weight in weights:
        in_specs.append(pl.BlockSpec((1, width, inner) if transposed else (1, inner, width), of_group))
        in_specs.append(pl.BlockSpec((1, groups, inner if transposed else width), of_scale))
        # Or the compiler may first fetch all matrices into fast memory.
        values = weight.values if interpret else pltpu.with_memory_space_constraint(weight.values, pltpu.HBM)
        arrays += [values, weight.scale]
    order = visits_of(group_sizes_g, tile, padded // tile)
    moved = padded * (x.shape[1] * columns + n * made) * x.dtype.itemsize
    of_matrix = sum(a.nbytes // count for weight in weights for a in (weight.values, weight.scale))
    out = pl.pallas_call(
        functools.partial(_kernel, kind=first.kind, matrices=len(weights), transposed=transposed),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(columns, order[-1]),
            in_specs=in_specs,
            out_specs=pl.BlockSpec((made, tile, width), of_result),
        ),
        out_shape=jax.ShapeDtypeStruct((made, padded, n), x.dtype),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=fast_memory
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * m * first.shape[1] * first.shape[2] * len(weights),
            transcendentals=m * n * (len(weights) - 1),
            bytes_accessed=min(m, count) * of_matrix + moved,
        ),
        interpret=interpret,
        name="quantized_grouped_matmul",
    )(*order[:-1], *arrays)
    if made == 1:
        return out[0, :m]
    return out[:, :m].reshape(made, m, groups, -1).transpose(1, 2, 0, 3).reshape(m, -1)


def _values(stored: jax.Array, kind: str) -> list[jax.Array]:
    """float32, without scale; of int4 the low values and the high ones."""
    if kind != "int4":
        return [stored.astype(jnp.float32)]
    wide = stored.astype(jnp.int32)
    return [(half - INT4_OFFSET).astype(jnp.float32) for half in (wide & 15, (wide >> 4) & 15)]


def _kernel(ends_ref, group_ref, tile_ref, x_ref, *refs, kind: str, matrices: int, transposed: bool):
    """One visit: x [parts, tile, inputs], of each matrix values [1, …] and scale [1, groups, …] → [parts, tile, …]."""
    *weights, out_ref = refs
    visit, rows = pl.program_id(1), x_ref.shape[1]
    tile = tile_ref[visit]
    first, end = ends_ref[group_ref[visit]] - tile * rows, ends_ref[group_ref[visit] + 1] - tile * rows

    @pl.when((visit == 0) | (tile_ref[jnp.maximum(visit, 1) - 1] != tile))
    def _():
        out_ref[...] = jnp.zeros_like(out_ref)

    @pl.when((first < rows) & (end > 0))
    def _():
        dtype = x_ref.dtype

        def dot(x: jax.Array, w: jax.Array) -> jax.Array:
            dims = (((1,), (1 if transposed else 0,)), ((), ()))
            precision = matmul_precision(dtype)
            return lax.dot_general(x, w.astype(dtype), dims, precision=precision, preferred_element_type=jnp.float32)

        def scaled(value: jax.Array, scale: jax.Array) -> jax.Array:
            """Values times the scale of their group of inputs, which are rows of both."""
            groups, width = scale.shape
            return (value.reshape(groups, -1, width) * scale[:, None]).reshape(value.shape)

        if transposed:
            scale = weights[1][0]
            x = x_ref[0]
            if len(scale) == 1:
                x = (x.astype(jnp.float32) * scale).astype(dtype)
            values = _values(weights[0][0], kind)
            outs = [dot(x, value if len(scale) == 1 else scaled(value, scale)) for value in values]
        else:
            made = []
            for values_ref, scale_ref in zip(weights[::2], weights[1::2], strict=True):
                scale, values = scale_ref[0], _values(values_ref[0], kind)
                values = values if len(scale) == 1 else [scaled(value, scale) for value in values]
                total = sum(dot(x_ref[part], value) for part, value in enumerate(values))
                made.append(total * scale if len(scale) == 1 else total)
            outs = made if matrices == 1 else [jax.nn.silu(made[0]) * made[1]]
        for part, out in enumerate(outs):
            row = lax.broadcasted_iota(jnp.int32, out.shape, 0)
            # Other rows of the tile are those of other groups' visits, before and after.
            inside = (row >= first) & (row < end)
            out_ref[part] = jnp.where(inside, out, out_ref[part].astype(jnp.float32)).astype(out_ref.dtype)
