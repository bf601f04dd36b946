"""The TPU kernel of the experts' products: consecutive groups of rows, each times its own matrices (MegaBlocks).

XLA's own kernel for ``ragged_dot`` wants, on TPU7x, the matrices in another layout than the one that parameters have,
and then copies them in every step; with few rows it multiplies with every matrix. This one takes them as they lie, and
reads those of groups with rows alone.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax

from dsvl2_jax.kernels.blocks import LANES, column_block, row_block
from dsvl2_jax.kernels.precision import matmul_precision
from dsvl2_jax.runtime.lazy import LazyModule

# Only what traces these kernels needs them.
pl = LazyModule("jax.experimental.pallas")
pltpu = LazyModule("jax.experimental.pallas.tpu")

LEAST_ROWS = 16  # of a tile: bfloat16 rows lie in packs of sixteen
FAST_MEMORY = 48 << 20  # bytes that the kernel may take: two blocks of each matrix, of rows, and of the result


def gmm(
    x_mk: jax.Array,
    weights: tuple[jax.Array, ...],
    group_sizes_g: jax.Array,
    row_weights_m: jax.Array | None = None,
    *,
    transposed: bool = False,
    interpret: bool = False,
) -> jax.Array:
    """Each group of rows times its matrix, or SwiGLU of the products with its two matrices.

    A tile of rows is multiplied with all of a matrix's inputs at once, so a matrix is read once for its whole group.

    Args:
      x_mk: [M, K], sorted by group.
      weights: one array [G, K, N], or two: the results are then silu(x · first) · (x · second).
      group_sizes_g: i32[G], with a sum ≤ M.
      row_weights_m: f32[M], factors on the result's rows, which are then float32; None: no factors.
      transposed: weights are [G, N, K].

    Returns:
      [M, N] in the dtype of ``x_mk``, or in float32 with ``row_weights_m``; rows beyond the last group are zero.
    """
    (m, k), groups = x_mk.shape, weights[0].shape[0]
    n = weights[0].shape[1 if transposed else 2]
    tile = row_block(m, groups, LEAST_ROWS)
    x_mk = jnp.pad(x_mk, ((0, -m % tile), (0, 0)))
    tiles = x_mk.shape[0] // tile
    itemsize = x_mk.dtype.itemsize
    cores, fast_memory = chip()
    width = column_block(k, n, len(weights) * itemsize, fast_memory // 4)
    if -(-n // width) < cores:  # each core takes columns
        width = -(-n // (cores * LANES)) * LANES
    columns = -(-n // width)
    out_dtype = x_mk.dtype if row_weights_m is None else jnp.dtype(jnp.float32)

    def of_tile(column, visit, ends, group, tile):
        return tile[visit], 0

    def of_group(column, visit, ends, group, tile):
        return (group[visit], column, 0) if transposed else (group[visit], 0, column)

    def of_result(column, visit, ends, group, tile):
        return tile[visit], column

    in_specs = [pl.BlockSpec((tile, k), of_tile)]
    in_specs += [pl.BlockSpec((1, width, k) if transposed else (1, k, width), of_group) for _ in weights]
    if not interpret:  # or the compiler may first fetch all matrices into fast memory
        weights = tuple(pltpu.with_memory_space_constraint(w, pltpu.HBM) for w in weights)
    arrays = [x_mk, *weights]
    if row_weights_m is not None:
        in_specs.append(pl.BlockSpec((tile, 1), of_tile))
        arrays.append(jnp.pad(row_weights_m, (0, -m % tile))[:, None])
    visits = visits_of(group_sizes_g, tile, tiles)
    moved = tiles * tile * (k * columns * itemsize + n * out_dtype.itemsize)
    out_mn = pl.pallas_call(
        functools.partial(_kernel, matrices=len(weights), transposed=transposed),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(columns, visits[-1]),
            in_specs=in_specs,
            out_specs=pl.BlockSpec((tile, width), of_result),
        ),
        out_shape=jax.ShapeDtypeStruct((tiles * tile, n), out_dtype),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=fast_memory
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * m * k * n * len(weights),
            transcendentals=m * n * (len(weights) - 1),
            bytes_accessed=min(m, groups) * k * n * len(weights) * itemsize + moved,
        ),
        interpret=interpret,
        name="grouped_matmul",
    )(*visits[:-1], *arrays)
    return out_mn[:m]


def chip() -> tuple[int, int]:
    """Cores of a device, and bytes of fast memory that the kernel may take on it; of no TPU, what most have."""
    try:
        chip = pltpu.get_tpu_info()
    except ValueError:  # traced beside other platforms' kernels, or compiled for devices that are not here
        return 1, FAST_MEMORY
    return chip.num_cores, min(FAST_MEMORY, chip.vmem_capacity_bytes * 3 // 4)


def visits_of(group_sizes_g: jax.Array, tile: int, tiles: int) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """The order in which tiles of rows meet the groups that have rows in them; then come the tiles beyond all groups.

    Returns:
      i32[G + 1], each group's first row and, last, the end of all; each visit's group and tile, i32[tiles + G − 1]; and
      i32[], how many visits there are.
    """
    ends_g = jnp.cumsum(group_sizes_g, dtype=jnp.int32)
    starts_g = ends_g - group_sizes_g
    first_tile_g = starts_g // tile
    counts_g = jnp.where(group_sizes_g > 0, (ends_g - 1) // tile - first_tile_g + 1, 0)
    ends_of_visits_g = jnp.cumsum(counts_g, dtype=jnp.int32)
    visit = jnp.arange(tiles + group_sizes_g.shape[0] - 1, dtype=jnp.int32)
    group = (visit[:, None] >= ends_of_visits_g).sum(1, dtype=jnp.int32)
    # Tiles beyond stay with the last matrix, which is there already.
    last = jnp.max(jnp.where(group_sizes_g > 0, jnp.arange(group_sizes_g.shape[0], dtype=jnp.int32), 0))
    group = jnp.minimum(group, last)
    beyond, used = visit - ends_of_visits_g[-1], -(-ends_g[-1] // tile)
    at = first_tile_g[group] + visit - (ends_of_visits_g - counts_g)[group]
    at = jnp.minimum(jnp.where(beyond < 0, at, used + beyond), tiles - 1).astype(jnp.int32)
    return jnp.concatenate([starts_g[:1], ends_g]), group, at, ends_of_visits_g[-1] + tiles - used


def _kernel(ends_ref, group_ref, tile_ref, x_ref, *refs, matrices: int, transposed: bool):
    """One visit: x [tile, K], of each matrix [1, K, width], perhaps factors [tile, 1] → out [tile, width]."""
    weights, (*factors, out_ref) = refs[:matrices], refs[matrices:]
    visit, rows = pl.program_id(1), x_ref.shape[0]
    tile = tile_ref[visit]
    first, end = ends_ref[group_ref[visit]] - tile * rows, ends_ref[group_ref[visit] + 1] - tile * rows

    @pl.when((visit == 0) | (tile_ref[jnp.maximum(visit, 1) - 1] != tile))
    def _():
        out_ref[...] = jnp.zeros_like(out_ref)

    @pl.when((first < rows) & (end > 0))
    def _():
        dims = (((1,), (1 if transposed else 0,)), ((), ()))
        precision = matmul_precision(x_ref.dtype)
        x = x_ref[...]
        out, *second = (
            lax.dot_general(x, w[0], dims, precision=precision, preferred_element_type=jnp.float32) for w in weights
        )
        if second:
            out = jax.nn.silu(out) * second[0]
        if factors:
            out = out * factors[0][...]
        row = lax.broadcasted_iota(jnp.int32, out.shape, 0)
        # Other rows of the tile are those of other groups' visits, before and after.
        inside = (row >= first) & (row < end)
        out_ref[...] = jnp.where(inside, out, out_ref[...].astype(jnp.float32)).astype(out_ref.dtype)
