"""Grouped matmul: consecutive groups of rows, each times its own matrix (DESIGN §4.3).

One function, `grouped_matmul`, picks the kernel of the platform that the program is lowered for:
``jax.lax.ragged_dot`` on TPU (native there; kernels for few rows and for gradients), the kernels of
`dsvl2_jax.kernels.gpu_grouped_matmul` on NVIDIA GPUs (where ``ragged_dot`` is dense), and a blocked loop elsewhere
that touches only the matrices of groups that have rows.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from dsvl2_jax.kernels import gpu_grouped_matmul
from dsvl2_jax.kernels.precision import matmul_precision
from dsvl2_jax.kernels.tpu import few_rows_matmul, megablox_outer

MAX_BLOCK = 128

# So few rows XLA multiplies with every matrix, on TPUs.
FEW_ROWS = 32


@jax.custom_vjp
def grouped_matmul(rows: jax.Array, weights: jax.Array, group_sizes: jax.Array) -> jax.Array:
    """Multiplies each group of rows by its matrix.

    Args:
      rows: [M, I], sorted by group.
      weights: [G, I, O].
      group_sizes: i32[G], with a sum ≤ M.

    Returns:
      [M, O] in the dtype of ``rows``; rows beyond the last group are zero.
    """
    return lax.platform_dependent(rows, weights, group_sizes, tpu=_tpu, cuda=_cuda, rocm=_ragged, default=_blocked)


def _forward(rows, weights, group_sizes):
    return grouped_matmul(rows, weights, group_sizes), (rows, weights, group_sizes)


def _backward(residuals, cotangent):
    rows, weights, group_sizes = residuals
    rows_bar = grouped_transposed(cotangent, weights, group_sizes)
    weights_bar = grouped_outer(rows, cotangent, group_sizes)
    return rows_bar.astype(rows.dtype), weights_bar.astype(weights.dtype), None


grouped_matmul.defvjp(_forward, _backward)


def grouped_transposed(rows: jax.Array, weights: jax.Array, group_sizes: jax.Array) -> jax.Array:
    """`grouped_matmul` with the transposed matrices: [M, O], [G, I, O] → [M, I]."""
    return lax.platform_dependent(
        rows,
        weights,
        group_sizes,
        cuda=functools.partial(_cuda, transposed=True),  # reads the weights as they lie, without a transposed copy
        default=lambda rows, weights, sizes: grouped_matmul(rows, weights.swapaxes(1, 2), sizes),
    )


def grouped_outer(
    rows: jax.Array, cotangent: jax.Array, group_sizes: jax.Array, total: jax.Array | None = None
) -> jax.Array:
    """The gradient of the matrices: per group, rowsᵀ · cotangent.

    Args:
      rows: [M, I]. cotangent: [M, O]. group_sizes: i32[G], with a sum ≤ M.
      total: [G, I, O] in the dtype of ``rows``, to which the products are added; in place where a kernel can.

    Returns:
      [G, I, O] in the dtype of ``rows``.
    """
    return lax.platform_dependent(
        rows,
        cotangent,
        group_sizes,
        total,
        tpu=_tpu_outer,
        cuda=_added(_cuda_outer),
        rocm=_added(_ragged_outer),
        default=_added(_blocked_outer),
    )


def _added(outer: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    def add(rows: jax.Array, cotangent: jax.Array, group_sizes: jax.Array, total: jax.Array | None) -> jax.Array:
        made = outer(rows, cotangent, group_sizes)
        return made if total is None else total + made

    return add


def _in_a_group(rows: jax.Array, group_sizes: jax.Array) -> jax.Array:
    """Zeroes the rows beyond the last group."""
    return jnp.where((jnp.arange(rows.shape[0]) < group_sizes.sum())[:, None], rows, 0)


def _ragged(rows: jax.Array, weights: jax.Array, group_sizes: jax.Array) -> jax.Array:
    out = lax.ragged_dot(rows, weights, group_sizes, precision=matmul_precision(rows.dtype))
    return _in_a_group(out, group_sizes)


def _tpu(rows: jax.Array, weights: jax.Array, group_sizes: jax.Array) -> jax.Array:
    if rows.shape[0] <= max(weights.shape[0], FEW_ROWS):
        return few_rows_matmul(rows, weights, group_sizes)
    return _ragged(rows, weights, group_sizes)


def _cuda(rows: jax.Array, weights: jax.Array, group_sizes: jax.Array, transposed: bool = False) -> jax.Array:
    if not gpu_grouped_matmul.addressable(rows, weights):
        return _ragged(rows, weights.swapaxes(1, 2) if transposed else weights, group_sizes)
    return _in_a_group(
        gpu_grouped_matmul.grouped_product(rows, weights, group_sizes, transposed=transposed), group_sizes
    )


def _cuda_outer(rows: jax.Array, cotangent: jax.Array, group_sizes: jax.Array) -> jax.Array:
    product = gpu_grouped_matmul.grouped_outer if gpu_grouped_matmul.addressable(rows, cotangent) else _ragged_outer
    return product(rows, cotangent, group_sizes)


def _ragged_outer(rows: jax.Array, cotangent: jax.Array, group_sizes: jax.Array) -> jax.Array:
    dims = lax.RaggedDotDimensionNumbers(
        dot_dimension_numbers=(((0,), (0,)), ((), ())), lhs_ragged_dimensions=[0], rhs_group_dimensions=[]
    )
    return lax.ragged_dot_general(rows, cotangent, group_sizes, dims, precision=matmul_precision(rows.dtype))


def _tpu_outer(rows: jax.Array, cotangent: jax.Array, group_sizes: jax.Array, total: jax.Array | None) -> jax.Array:
    # The compiler's own is the masked product of all rows for every group.
    function = _added(_ragged_outer) if rows.dtype == jnp.float32 else megablox_outer
    return function(rows, cotangent, group_sizes, total)


def _block_size(rows: int, groups: int) -> int:
    """A power of two near the mean group, so that few rows of a block belong to the next group."""
    mean = max(1, rows // groups)
    return min(MAX_BLOCK, 1 << (mean - 1).bit_length())


def _blocks(group_sizes: jax.Array, block: int, most: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Cuts every group into blocks: (group of each block, its first row, how many blocks there are)."""
    counts = -(-group_sizes // block)
    group = jnp.repeat(jnp.arange(group_sizes.shape[0]), counts, total_repeat_length=most)
    first_block = jnp.cumsum(counts) - counts
    first_row = jnp.cumsum(group_sizes) - group_sizes
    start = first_row[group] + (jnp.arange(most) - first_block[group]) * block
    return group, start, counts.sum()


def _blocked(rows: jax.Array, weights: jax.Array, group_sizes: jax.Array) -> jax.Array:
    """One block of rows at a time.

    The last block of a group runs on into rows of the next one; blocks come in order, so the next
    block writes those rows again, rightly.
    """
    count, groups = rows.shape[0], weights.shape[0]
    block = _block_size(count, groups)
    group, start, used = _blocks(group_sizes, block, count // block + groups)
    padded = jnp.pad(rows, ((0, block), (0, 0)))
    exact = matmul_precision(rows.dtype)

    def body(i: jax.Array, out: jax.Array) -> jax.Array:
        x = lax.dynamic_slice_in_dim(padded, start[i], block)
        w = lax.dynamic_index_in_dim(weights, group[i], keepdims=False)
        y = jnp.dot(x, w, precision=exact).astype(out.dtype)
        return lax.dynamic_update_slice_in_dim(out, y, start[i], axis=0)

    out = lax.fori_loop(0, used, body, jnp.zeros((count + block, weights.shape[2]), rows.dtype))
    return _in_a_group(out[:count], group_sizes)


def _blocked_outer(rows: jax.Array, cotangent: jax.Array, group_sizes: jax.Array) -> jax.Array:
    """As `_ragged_outer`, a block of rows at a time, summed in float32."""
    count, groups = rows.shape[0], group_sizes.shape[0]
    block = _block_size(count, groups)
    group, start, used = _blocks(group_sizes, block, count // block + groups)
    ends = jnp.cumsum(group_sizes)
    padded, padded_bar = (jnp.pad(a, ((0, block), (0, 0))) for a in (rows, cotangent))
    exact = matmul_precision(rows.dtype)

    def body(i: jax.Array, out: jax.Array) -> jax.Array:
        x = lax.dynamic_slice_in_dim(padded, start[i], block)
        g = lax.dynamic_slice_in_dim(padded_bar, start[i], block)
        own = (start[i] + jnp.arange(block) < ends[group[i]])[:, None]
        part = jnp.dot(jnp.where(own, x, 0).T, g, precision=exact, preferred_element_type=out.dtype)
        return out.at[group[i]].add(part)

    shape = (groups, rows.shape[1], cotangent.shape[1])
    return lax.fori_loop(0, used, body, jnp.zeros(shape, jnp.float32)).astype(rows.dtype)
