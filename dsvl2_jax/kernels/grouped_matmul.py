"""Grouped matmul: consecutive groups of rows, each times its own matrix (MegaBlocks, arXiv 2211.15841).

`grouped_matmul`, `grouped_transposed` and `tgmm` pick the kernel of the platform that the program is lowered for:
``jax.lax.ragged_dot`` on TPU (native there; kernels for few rows and for gradients), the kernels of
`dsvl2_jax.kernels.gpu_grouped_matmul` on NVIDIA GPUs (where ``ragged_dot`` is dense), and a blocked loop elsewhere
that touches only the matrices of groups that have rows.

Letters in array names are megablox's: M rows, G groups, K inputs, N outputs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from dsvl2_jax.kernels import gpu_grouped_matmul
from dsvl2_jax.kernels.blocks import cpu_row_block, cut_groups
from dsvl2_jax.kernels.cpu import as_bits, bits_to_slice, from_bits, rows_product
from dsvl2_jax.kernels.precision import matmul_precision
from dsvl2_jax.kernels.tpu import grouped_matvec, megablox_tgmm
from dsvl2_jax.kernels.triton import fits_int32

# So few rows XLA multiplies with every matrix, on TPUs.
FEW_ROWS = 32

# Rows of a block from which on CPUs multiply no more quarters of it than are needed.
LARGE_BLOCK = 64


@jax.custom_vjp
@jax.named_scope("grouped_matmul")
def grouped_matmul(x_mk: jax.Array, w_gkn: jax.Array, group_sizes_g: jax.Array) -> jax.Array:
    """Multiplies each group of rows by its matrix.

    Args:
      x_mk: [M, K], sorted by group.
      w_gkn: [G, K, N].
      group_sizes_g: i32[G], with a sum ≤ M.

    Returns:
      [M, N] in the dtype of ``x_mk``; rows beyond the last group are zero.
    """
    return lax.platform_dependent(x_mk, w_gkn, group_sizes_g, tpu=_tpu, cuda=_cuda, rocm=_ragged, default=_blocked)


def _forward(x_mk, w_gkn, group_sizes_g):
    return grouped_matmul(x_mk, w_gkn, group_sizes_g), (x_mk, w_gkn, group_sizes_g)


def _backward(residuals, dout_mn):
    x_mk, w_gkn, group_sizes_g = residuals
    dx_mk = grouped_transposed(dout_mn, w_gkn, group_sizes_g)
    dw_gkn = tgmm(x_mk, dout_mn, group_sizes_g)
    return dx_mk.astype(x_mk.dtype), dw_gkn.astype(w_gkn.dtype), None


grouped_matmul.defvjp(_forward, _backward)


@jax.named_scope("grouped_transposed")
def grouped_transposed(x_mn: jax.Array, w_gkn: jax.Array, group_sizes_g: jax.Array) -> jax.Array:
    """`grouped_matmul` with the transposed matrices: [M, N], [G, K, N] → [M, K]."""
    return lax.platform_dependent(
        x_mn,
        w_gkn,
        group_sizes_g,
        cuda=functools.partial(_cuda, transposed=True),  # reads the weights as they lie, without a transposed copy
        default=lambda x_mn, w_gkn, group_sizes_g: grouped_matmul(x_mn, w_gkn.swapaxes(1, 2), group_sizes_g),
    )


@jax.named_scope("tgmm")
def tgmm(
    x_mk: jax.Array, dout_mn: jax.Array, group_sizes_g: jax.Array, existing_out_gkn: jax.Array | None = None
) -> jax.Array:
    """The transposed grouped matmul: per group xᵀ · dout, the gradient of the matrices.

    Args:
      x_mk: [M, K]. dout_mn: [M, N]. group_sizes_g: i32[G], with a sum ≤ M.
      existing_out_gkn: [G, K, N] in the dtype of ``x_mk``, to which the products are added; in place where a kernel
        can.

    Returns:
      [G, K, N] in the dtype of ``x_mk``.
    """
    return lax.platform_dependent(
        x_mk,
        dout_mn,
        group_sizes_g,
        existing_out_gkn,
        tpu=_tpu_tgmm,
        cuda=_adding(_cuda_tgmm),
        rocm=_adding(_ragged_tgmm),
        default=_adding(_blocked_tgmm),
    )


def _adding(function: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """A `tgmm` without ``existing_out_gkn`` as one with it."""

    def call(
        x_mk: jax.Array, dout_mn: jax.Array, group_sizes_g: jax.Array, existing_out_gkn: jax.Array | None
    ) -> jax.Array:
        dw_gkn = function(x_mk, dout_mn, group_sizes_g)
        return dw_gkn if existing_out_gkn is None else existing_out_gkn + dw_gkn

    return call


def _zero_beyond_groups(out_mn: jax.Array, group_sizes_g: jax.Array) -> jax.Array:
    return jnp.where((jnp.arange(out_mn.shape[0]) < group_sizes_g.sum())[:, None], out_mn, 0)


def _ragged(x_mk: jax.Array, w_gkn: jax.Array, group_sizes_g: jax.Array) -> jax.Array:
    out_mn = lax.ragged_dot(x_mk, w_gkn, group_sizes_g, precision=matmul_precision(x_mk.dtype))
    return _zero_beyond_groups(out_mn, group_sizes_g)


def _tpu(x_mk: jax.Array, w_gkn: jax.Array, group_sizes_g: jax.Array) -> jax.Array:
    function = grouped_matvec if x_mk.shape[0] <= max(w_gkn.shape[0], FEW_ROWS) else _ragged
    return function(x_mk, w_gkn, group_sizes_g)


def _cuda(x_mk: jax.Array, w_gkn: jax.Array, group_sizes_g: jax.Array, transposed: bool = False) -> jax.Array:
    if not fits_int32(x_mk, w_gkn):
        return _ragged(x_mk, w_gkn.swapaxes(1, 2) if transposed else w_gkn, group_sizes_g)
    out_mn = gpu_grouped_matmul.gmm(x_mk, w_gkn, group_sizes_g, transposed=transposed)
    return _zero_beyond_groups(out_mn, group_sizes_g)


def _cuda_tgmm(x_mk: jax.Array, dout_mn: jax.Array, group_sizes_g: jax.Array) -> jax.Array:
    function = gpu_grouped_matmul.tgmm if fits_int32(x_mk, dout_mn) else _ragged_tgmm
    return function(x_mk, dout_mn, group_sizes_g)


def _ragged_tgmm(x_mk: jax.Array, dout_mn: jax.Array, group_sizes_g: jax.Array) -> jax.Array:
    dims = lax.RaggedDotDimensionNumbers(
        dot_dimension_numbers=(((0,), (0,)), ((), ())), lhs_ragged_dimensions=[0], rhs_group_dimensions=[]
    )
    return lax.ragged_dot_general(x_mk, dout_mn, group_sizes_g, dims, precision=matmul_precision(x_mk.dtype))


def _tpu_tgmm(
    x_mk: jax.Array, dout_mn: jax.Array, group_sizes_g: jax.Array, existing_out_gkn: jax.Array | None
) -> jax.Array:
    # The compiler's own is the masked product of all rows for every group.
    function = _adding(_ragged_tgmm) if x_mk.dtype == jnp.float32 else megablox_tgmm
    return function(x_mk, dout_mn, group_sizes_g, existing_out_gkn)


def _blocked(x_mk: jax.Array, w_gkn: jax.Array, group_sizes_g: jax.Array) -> jax.Array:
    """One block of rows at a time.

    The last block of a group reaches into the rows of the next one; blocks come in order, so the next block
    overwrites those rows with their own product. Of a large block only as many rows are multiplied, in quarters, as
    belong to its group: what the last block of a group has less than the others would be half of a block.
    """
    rows, groups = x_mk.shape[0], w_gkn.shape[0]
    block = cpu_row_block(rows, groups)
    group, start, stop, count = cut_groups(group_sizes_g, block, rows)
    padded_mk = as_bits(jnp.pad(x_mk, ((0, block), (0, 0))))
    # Few rows have one size: what a row gets must not depend on how many others its expert has (a decode step).
    sizes = [block * quarter // 4 for quarter in (1, 2, 3, 4)] if block >= LARGE_BLOCK else [block]

    def first_rows(size: int) -> Callable[[jax.Array, jax.Array], jax.Array]:
        def product(x: jax.Array, w: jax.Array) -> jax.Array:
            return jnp.pad(as_bits(rows_product(from_bits(x[:size]), from_bits(w))), ((0, block - size), (0, 0)))

        return product

    def body(i: jax.Array, out_mn: jax.Array) -> jax.Array:
        x = lax.dynamic_slice_in_dim(padded_mk, start[i], block)  # [block, K]
        w = lax.dynamic_index_in_dim(bits_to_slice(w_gkn, i), group[i], keepdims=False)  # [K, N]
        quarters = (stop[i] - start[i] - 1) * len(sizes) // block  # less one
        y = lax.switch(quarters, [first_rows(size) for size in sizes], x, w)
        return lax.dynamic_update_slice_in_dim(out_mn, y, start[i], axis=0)

    out_mn = lax.fori_loop(0, count, body, as_bits(jnp.zeros((rows + block, w_gkn.shape[2]), x_mk.dtype)))
    return _zero_beyond_groups(from_bits(out_mn[:rows]), group_sizes_g)


def _blocked_tgmm(x_mk: jax.Array, dout_mn: jax.Array, group_sizes_g: jax.Array) -> jax.Array:
    """As `_ragged_tgmm`, a block of rows at a time, summed in float32."""
    rows, groups = x_mk.shape[0], group_sizes_g.shape[0]
    block = cpu_row_block(rows, groups)
    group, start, stop, count = cut_groups(group_sizes_g, block, rows)
    padded_mk, padded_mn = (jnp.pad(a, ((0, block), (0, 0))) for a in (x_mk, dout_mn))
    precision = matmul_precision(x_mk.dtype)

    def body(i: jax.Array, dw_gkn: jax.Array) -> jax.Array:
        x = lax.dynamic_slice_in_dim(padded_mk, start[i], block)  # [block, K]
        dout = lax.dynamic_slice_in_dim(padded_mn, start[i], block)  # [block, N]
        inside = (start[i] + jnp.arange(block) < stop[i])[:, None]
        dw = jnp.dot(jnp.where(inside, x, 0).T, dout, precision=precision, preferred_element_type=dw_gkn.dtype)
        return dw_gkn.at[group[i]].add(dw)

    shape = (groups, x_mk.shape[1], dout_mn.shape[1])
    return lax.fori_loop(0, count, body, jnp.zeros(shape, jnp.float32)).astype(x_mk.dtype)
