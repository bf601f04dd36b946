"""Grouped matmul: consecutive groups of rows, each times its own matrix (MegaBlocks, arXiv 2211.15841).

Each function picks the kernel of the platform that the program is lowered for: `dsvl2_jax.kernels.tpu_grouped_matmul`
on TPUs (jax's megablox for the matrices' gradients), `dsvl2_jax.kernels.gpu_grouped_matmul` on NVIDIA GPUs (where
``ragged_dot`` is dense), and a blocked loop elsewhere that touches only the matrices of groups that have rows.

Letters in array names are megablox's: M rows, G groups, K inputs, N outputs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from dsvl2_jax.kernels import gpu_grouped_matmul, tpu_grouped_matmul
from dsvl2_jax.kernels.block_sizes import CORE_ROWS, Blocks, HopperProduct
from dsvl2_jax.kernels.blocks import cpu_row_block, cut_groups
from dsvl2_jax.kernels.cpu import as_bits, bits_to_slice, from_bits, rows_product
from dsvl2_jax.kernels.precision import matmul_precision
from dsvl2_jax.kernels.tpu import megablox_tgmm
from dsvl2_jax.kernels.triton import fits_int32
from dsvl2_jax.kernels.tuning import chosen

GROUPED_PRODUCT = "expert_product"  # what rematerialisation policies call the experts' matrix products

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
        # These read the weights as they lie, without a transposed copy.
        tpu=functools.partial(_tpu, transposed=True),
        cuda=functools.partial(_cuda, transposed=True),
        default=lambda x_mn, w_gkn, group_sizes_g: grouped_matmul(x_mn, w_gkn.swapaxes(1, 2), group_sizes_g),
    )


@jax.custom_vjp
@jax.named_scope("grouped_swiglu")
def grouped_swiglu(x_mk: jax.Array, gate_gkn: jax.Array, up_gkn: jax.Array, group_sizes_g: jax.Array) -> jax.Array:
    """silu(x · gate) · (x · up), each group of rows with its own matrices; on TPUs as one kernel.

    Its gradient is that of two products, whose results are kept under the name `GROUPED_PRODUCT`.

    Args:
      x_mk: [M, K], sorted by group.
      gate_gkn, up_gkn: [G, K, N].
      group_sizes_g: i32[G], with a sum ≤ M.

    Returns:
      [M, N] in the dtype of ``x_mk``; rows beyond the last group are zero.
    """

    def fused(x_mk: jax.Array, gate_gkn: jax.Array, up_gkn: jax.Array, group_sizes_g: jax.Array) -> jax.Array:
        return tpu_grouped_matmul.gmm(x_mk, (gate_gkn, up_gkn), group_sizes_g)

    return lax.platform_dependent(x_mk, gate_gkn, up_gkn, group_sizes_g, tpu=fused, default=_swiglu)


def _swiglu(x_mk: jax.Array, gate_gkn: jax.Array, up_gkn: jax.Array, group_sizes_g: jax.Array) -> jax.Array:
    gate_mn, up_mn = (named_product(x_mk, w, group_sizes_g) for w in (gate_gkn, up_gkn))
    return jax.nn.silu(gate_mn) * up_mn


def named_product(x_mk: jax.Array, w_gkn: jax.Array, group_sizes_g: jax.Array) -> jax.Array:
    """`grouped_matmul` under the name that rematerialisation policies know."""
    return checkpoint_name(grouped_matmul(x_mk, w_gkn, group_sizes_g), GROUPED_PRODUCT)


def _swiglu_forward(x_mk, gate_gkn, up_gkn, group_sizes_g):
    return jax.vjp(lambda x, gate, up: _swiglu(x, gate, up, group_sizes_g), x_mk, gate_gkn, up_gkn)


def _swiglu_backward(pullback, dout_mn):
    return *pullback(dout_mn), None


grouped_swiglu.defvjp(_swiglu_forward, _swiglu_backward)


@jax.named_scope("grouped_weighted")
def grouped_weighted(
    x_mk: jax.Array, w_gkn: jax.Array, group_sizes_g: jax.Array, row_weights_m: jax.Array
) -> jax.Array:
    """`grouped_matmul` times f32[M], as f32[M, N]; on TPUs one kernel, which has no gradient."""

    def tpu(x_mk: jax.Array, w_gkn: jax.Array, group_sizes_g: jax.Array, row_weights_m: jax.Array) -> jax.Array:
        return tpu_grouped_matmul.gmm(x_mk, (w_gkn,), group_sizes_g, row_weights_m)

    def default(x_mk: jax.Array, w_gkn: jax.Array, group_sizes_g: jax.Array, row_weights_m: jax.Array) -> jax.Array:
        out_mn = grouped_matmul(x_mk, w_gkn, group_sizes_g)
        return out_mn.astype(jnp.float32) * row_weights_m[:, None]

    return lax.platform_dependent(x_mk, w_gkn, group_sizes_g, row_weights_m, tpu=tpu, default=default)


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


def zero_beyond_groups(out_mn: jax.Array, group_sizes_g: jax.Array) -> jax.Array:
    return jnp.where((jnp.arange(out_mn.shape[0]) < group_sizes_g.sum())[:, None], out_mn, 0)


def _ragged(x_mk: jax.Array, w_gkn: jax.Array, group_sizes_g: jax.Array) -> jax.Array:
    out_mn = lax.ragged_dot(x_mk, w_gkn, group_sizes_g, precision=matmul_precision(x_mk.dtype))
    return zero_beyond_groups(out_mn, group_sizes_g)


def _tpu(x_mk: jax.Array, w_gkn: jax.Array, group_sizes_g: jax.Array, transposed: bool = False) -> jax.Array:
    return tpu_grouped_matmul.gmm(x_mk, (w_gkn,), group_sizes_g, transposed=transposed)


def _cuda(x_mk: jax.Array, w_gkn: jax.Array, group_sizes_g: jax.Array, transposed: bool = False) -> jax.Array:
    if not fits_int32(x_mk, w_gkn):
        return _ragged(x_mk, w_gkn.swapaxes(1, 2) if transposed else w_gkn, group_sizes_g)
    operation, gmm = "gmm_transposed" if transposed else "gmm", gpu_grouped_matmul.gmm
    blocks = _measured(operation, x_mk, w_gkn.shape)
    if isinstance(blocks, HopperProduct):
        from dsvl2_jax.kernels.hopper_grouped_matmul import gmm
    out_mn = gmm(x_mk, w_gkn, group_sizes_g, blocks=blocks, transposed=transposed)
    return zero_beyond_groups(out_mn, group_sizes_g)


def _cuda_tgmm(x_mk: jax.Array, dout_mn: jax.Array, group_sizes_g: jax.Array) -> jax.Array:
    if not fits_int32(x_mk, dout_mn):
        return _ragged_tgmm(x_mk, dout_mn, group_sizes_g)
    tgmm, shape = gpu_grouped_matmul.tgmm, (group_sizes_g.shape[0], x_mk.shape[1], dout_mn.shape[1])
    blocks = _measured("tgmm", x_mk, shape)
    if isinstance(blocks, HopperProduct):
        from dsvl2_jax.kernels.hopper_grouped_matmul import tgmm
    return tgmm(x_mk, dout_mn, group_sizes_g, blocks=blocks)


def _measured(operation: str, x_mk: jax.Array, matrices: tuple[int, ...]) -> Blocks | None:
    """``matrices``: [G, K, N], as the weights lie."""
    if x_mk.dtype != jnp.bfloat16:
        return None
    groups, inner, width = matrices
    blocks = chosen(operation, groups=groups, inner=inner, width=width, rows=x_mk.shape[0])
    if isinstance(blocks, HopperProduct) and x_mk.shape[0] % CORE_ROWS:
        return None
    return blocks


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
    def product(x: jax.Array, group: jax.Array, i: jax.Array) -> jax.Array:
        w = lax.dynamic_index_in_dim(bits_to_slice(w_gkn, i), group, keepdims=False)  # [K, N]
        return rows_product(x, from_bits(w))

    return by_blocks(product, x_mk, w_gkn.shape[2], group_sizes_g)


def by_blocks(
    product: Callable[[jax.Array, jax.Array, jax.Array], jax.Array],
    x_mk: jax.Array,
    width: int,
    group_sizes_g: jax.Array,
) -> jax.Array:
    """`grouped_matmul` on CPUs: one block of rows at a time.

    The last block of a group reaches into the rows of the next one; blocks come in order, so the next block
    overwrites those rows with their own product. Of a large block only as many rows are multiplied, in quarters, as
    belong to its group: what the last block of a group has less than the others would be half of a block.

    Args:
      product: of rows [rows, K], their group i32[] and the block's number i32[], to [rows, N].
      width: N.
    """
    rows, groups = x_mk.shape[0], group_sizes_g.shape[0]
    block = cpu_row_block(rows, groups)
    group, start, stop, count = cut_groups(group_sizes_g, block, rows)
    padded_mk = as_bits(jnp.pad(x_mk, ((0, block), (0, 0))))
    # Few rows have one size: what a row gets must not depend on how many others its expert has (a decode step).
    sizes = [block * quarter // 4 for quarter in (1, 2, 3, 4)] if block >= LARGE_BLOCK else [block]

    def first_rows(size: int) -> Callable[[jax.Array, jax.Array], jax.Array]:
        def some(x: jax.Array, i: jax.Array) -> jax.Array:
            return jnp.pad(as_bits(product(from_bits(x[:size]), group[i], i)), ((0, block - size), (0, 0)))

        return some

    def body(i: jax.Array, out_mn: jax.Array) -> jax.Array:
        x = lax.dynamic_slice_in_dim(padded_mk, start[i], block)  # [block, K]
        quarters = (stop[i] - start[i] - 1) * len(sizes) // block  # less one
        y = lax.switch(quarters, [first_rows(size) for size in sizes], x, i)
        return lax.dynamic_update_slice_in_dim(out_mn, y, start[i], axis=0)

    out_mn = lax.fori_loop(0, count, body, as_bits(jnp.zeros((rows + block, width), x_mk.dtype)))
    return zero_beyond_groups(from_bits(out_mn[:rows]), group_sizes_g)


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
