"""Grouped matmul: consecutive groups of rows, each times its own matrix (MegaBlocks, arXiv 2211.15841).

`grouped_matmul`, `grouped_transposed` and `tgmm` pick the kernel of the platform that the program is lowered for:
``jax.lax.ragged_dot`` on TPU (native there; kernels for few rows and for gradients), the kernels of
`dsvl2_jax.kernels.gpu_grouped_matmul` on NVIDIA GPUs (where ``ragged_dot`` is dense), and a blocked loop elsewhere
that touches only the matrices of groups that have rows.

Letters in array names: M rows, G groups, I inputs, O outputs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from dsvl2_jax.kernels import gpu_grouped_matmul
from dsvl2_jax.kernels.blocks import cut_groups, row_block
from dsvl2_jax.kernels.precision import matmul_precision
from dsvl2_jax.kernels.tpu import grouped_matvec, megablox_tgmm
from dsvl2_jax.kernels.triton import fits_int32

# So few rows XLA multiplies with every matrix, on TPUs.
FEW_ROWS = 32


@jax.custom_vjp
@jax.named_scope("grouped_matmul")
def grouped_matmul(x_mi: jax.Array, w_gio: jax.Array, group_sizes_g: jax.Array) -> jax.Array:
    """Multiplies each group of rows by its matrix.

    Args:
      x_mi: [M, I], sorted by group.
      w_gio: [G, I, O].
      group_sizes_g: i32[G], with a sum ≤ M.

    Returns:
      [M, O] in the dtype of ``x_mi``; rows beyond the last group are zero.
    """
    return lax.platform_dependent(x_mi, w_gio, group_sizes_g, tpu=_tpu, cuda=_cuda, rocm=_ragged, default=_blocked)


def _forward(x_mi, w_gio, group_sizes_g):
    return grouped_matmul(x_mi, w_gio, group_sizes_g), (x_mi, w_gio, group_sizes_g)


def _backward(residuals, dout_mo):
    x_mi, w_gio, group_sizes_g = residuals
    dx_mi = grouped_transposed(dout_mo, w_gio, group_sizes_g)
    dw_gio = tgmm(x_mi, dout_mo, group_sizes_g)
    return dx_mi.astype(x_mi.dtype), dw_gio.astype(w_gio.dtype), None


grouped_matmul.defvjp(_forward, _backward)


@jax.named_scope("grouped_transposed")
def grouped_transposed(x_mo: jax.Array, w_gio: jax.Array, group_sizes_g: jax.Array) -> jax.Array:
    """`grouped_matmul` with the transposed matrices: [M, O], [G, I, O] → [M, I]."""
    return lax.platform_dependent(
        x_mo,
        w_gio,
        group_sizes_g,
        cuda=functools.partial(_cuda, transposed=True),  # reads the weights as they lie, without a transposed copy
        default=lambda x_mo, w_gio, group_sizes_g: grouped_matmul(x_mo, w_gio.swapaxes(1, 2), group_sizes_g),
    )


@jax.named_scope("tgmm")
def tgmm(
    x_mi: jax.Array, dout_mo: jax.Array, group_sizes_g: jax.Array, existing_out_gio: jax.Array | None = None
) -> jax.Array:
    """The transposed grouped matmul: per group xᵀ · dout, the gradient of the matrices.

    Args:
      x_mi: [M, I]. dout_mo: [M, O]. group_sizes_g: i32[G], with a sum ≤ M.
      existing_out_gio: [G, I, O] in the dtype of ``x_mi``, to which the products are added; in place where a kernel
        can.

    Returns:
      [G, I, O] in the dtype of ``x_mi``.
    """
    return lax.platform_dependent(
        x_mi,
        dout_mo,
        group_sizes_g,
        existing_out_gio,
        tpu=_tpu_tgmm,
        cuda=_adding(_cuda_tgmm),
        rocm=_adding(_ragged_tgmm),
        default=_adding(_blocked_tgmm),
    )


def _adding(function: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """A `tgmm` without ``existing_out_gio`` as one with it."""

    def call(
        x_mi: jax.Array, dout_mo: jax.Array, group_sizes_g: jax.Array, existing_out_gio: jax.Array | None
    ) -> jax.Array:
        dw_gio = function(x_mi, dout_mo, group_sizes_g)
        return dw_gio if existing_out_gio is None else existing_out_gio + dw_gio

    return call


def _zero_beyond_groups(out_mo: jax.Array, group_sizes_g: jax.Array) -> jax.Array:
    return jnp.where((jnp.arange(out_mo.shape[0]) < group_sizes_g.sum())[:, None], out_mo, 0)


def _ragged(x_mi: jax.Array, w_gio: jax.Array, group_sizes_g: jax.Array) -> jax.Array:
    out_mo = lax.ragged_dot(x_mi, w_gio, group_sizes_g, precision=matmul_precision(x_mi.dtype))
    return _zero_beyond_groups(out_mo, group_sizes_g)


def _tpu(x_mi: jax.Array, w_gio: jax.Array, group_sizes_g: jax.Array) -> jax.Array:
    function = grouped_matvec if x_mi.shape[0] <= max(w_gio.shape[0], FEW_ROWS) else _ragged
    return function(x_mi, w_gio, group_sizes_g)


def _cuda(x_mi: jax.Array, w_gio: jax.Array, group_sizes_g: jax.Array, transposed: bool = False) -> jax.Array:
    if not fits_int32(x_mi, w_gio):
        return _ragged(x_mi, w_gio.swapaxes(1, 2) if transposed else w_gio, group_sizes_g)
    out_mo = gpu_grouped_matmul.gmm(x_mi, w_gio, group_sizes_g, transposed=transposed)
    return _zero_beyond_groups(out_mo, group_sizes_g)


def _cuda_tgmm(x_mi: jax.Array, dout_mo: jax.Array, group_sizes_g: jax.Array) -> jax.Array:
    function = gpu_grouped_matmul.tgmm if fits_int32(x_mi, dout_mo) else _ragged_tgmm
    return function(x_mi, dout_mo, group_sizes_g)


def _ragged_tgmm(x_mi: jax.Array, dout_mo: jax.Array, group_sizes_g: jax.Array) -> jax.Array:
    dims = lax.RaggedDotDimensionNumbers(
        dot_dimension_numbers=(((0,), (0,)), ((), ())), lhs_ragged_dimensions=[0], rhs_group_dimensions=[]
    )
    return lax.ragged_dot_general(x_mi, dout_mo, group_sizes_g, dims, precision=matmul_precision(x_mi.dtype))


def _tpu_tgmm(
    x_mi: jax.Array, dout_mo: jax.Array, group_sizes_g: jax.Array, existing_out_gio: jax.Array | None
) -> jax.Array:
    # The compiler's own is the masked product of all rows for every group.
    function = _adding(_ragged_tgmm) if x_mi.dtype == jnp.float32 else megablox_tgmm
    return function(x_mi, dout_mo, group_sizes_g, existing_out_gio)


def _blocked(x_mi: jax.Array, w_gio: jax.Array, group_sizes_g: jax.Array) -> jax.Array:
    """One block of rows at a time.

    The last block of a group reaches into the rows of the next one; blocks come in order, so the next block
    overwrites those rows with their own product.
    """
    rows, groups = x_mi.shape[0], w_gio.shape[0]
    block = row_block(rows, groups)
    group, start, _, count = cut_groups(group_sizes_g, block, rows)
    padded_mi = jnp.pad(x_mi, ((0, block), (0, 0)))
    precision = matmul_precision(x_mi.dtype)

    def body(i: jax.Array, out_mo: jax.Array) -> jax.Array:
        x = lax.dynamic_slice_in_dim(padded_mi, start[i], block)  # [block, I]
        w = lax.dynamic_index_in_dim(w_gio, group[i], keepdims=False)  # [I, O]
        y = jnp.dot(x, w, precision=precision).astype(out_mo.dtype)
        return lax.dynamic_update_slice_in_dim(out_mo, y, start[i], axis=0)

    out_mo = lax.fori_loop(0, count, body, jnp.zeros((rows + block, w_gio.shape[2]), x_mi.dtype))
    return _zero_beyond_groups(out_mo[:rows], group_sizes_g)


def _blocked_tgmm(x_mi: jax.Array, dout_mo: jax.Array, group_sizes_g: jax.Array) -> jax.Array:
    """As `_ragged_tgmm`, a block of rows at a time, summed in float32."""
    rows, groups = x_mi.shape[0], group_sizes_g.shape[0]
    block = row_block(rows, groups)
    group, start, stop, count = cut_groups(group_sizes_g, block, rows)
    padded_mi, padded_mo = (jnp.pad(a, ((0, block), (0, 0))) for a in (x_mi, dout_mo))
    precision = matmul_precision(x_mi.dtype)

    def body(i: jax.Array, dw_gio: jax.Array) -> jax.Array:
        x = lax.dynamic_slice_in_dim(padded_mi, start[i], block)  # [block, I]
        dout = lax.dynamic_slice_in_dim(padded_mo, start[i], block)  # [block, O]
        inside = (start[i] + jnp.arange(block) < stop[i])[:, None]
        dw = jnp.dot(jnp.where(inside, x, 0).T, dout, precision=precision, preferred_element_type=dw_gio.dtype)
        return dw_gio.at[group[i]].add(dw)

    shape = (groups, x_mi.shape[1], dout_mo.shape[1])
    return lax.fori_loop(0, count, body, jnp.zeros(shape, jnp.float32)).astype(x_mi.dtype)
