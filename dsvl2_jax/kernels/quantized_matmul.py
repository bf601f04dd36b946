"""Products that read quantized weights as they lie, on every platform, and their gradients with respect to the rows.

A weight has one form here (`as_matrices`): values [G, K, N] of G matrices, for int4 [G, K/2, N], and a scale
[G, groups of inputs, N]. Values and scales have no gradient: what is trained beside a quantized weight is an adapter.

Each function picks the kernel of the platform that the program is lowered for, as `dsvl2_jax.kernels.grouped_matmul`
does, whose letters these are. Under a mesh that splits arrays, products of one matrix are left to XLA, which splits
them too.

Tested in tests/kernels/test_quantized.py.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax import lax

from dsvl2_jax.kernels import quantized_cpu
from dsvl2_jax.kernels.grouped_matmul import by_blocks, grouped_matmul, grouped_transposed
from dsvl2_jax.kernels.precision import matmul_precision
from dsvl2_jax.kernels.quantized import Quantized, dequantize


def as_matrices(weight: Quantized, contract: int) -> Quantized:
    """One matrix [1, K, N] of a weight whose first ``contract`` axes are its inputs."""
    inputs, outputs = weight.shape[:contract], weight.shape[contract:]
    n = math.prod(outputs)
    scale_inputs = weight.scale.shape[:contract]
    scale = weight.scale
    if weight.kind == "int4" or math.prod(scale_inputs) > 1:  # a scale for each group of each of the other inputs
        scale = jnp.broadcast_to(scale, (*inputs[:-1], scale_inputs[-1], *outputs))
    scale = jnp.broadcast_to(scale, (*scale.shape[:contract], *outputs)).reshape(1, -1, n)
    return Quantized(weight.values.reshape(1, -1, n), scale, weight.kind, -2)


@jax.custom_vjp
@jax.named_scope("quantized_product")
def product(x_mk: jax.Array, weight: Quantized) -> jax.Array:
    """[M, K] times the one matrix of ``weight``: [M, N] in the dtype of ``x_mk``."""
    return lax.platform_dependent(x_mk, weight, cpu=quantized_cpu.product, default=_plain)


def _plain(x_mk: jax.Array, weight: Quantized) -> jax.Array:
    return jnp.dot(x_mk, dequantize(weight, x_mk.dtype)[0], precision=matmul_precision(x_mk.dtype))


@jax.named_scope("quantized_transposed")
def _product_transposed(x_mn: jax.Array, weight: Quantized) -> jax.Array:
    def plain(x_mn: jax.Array, weight: Quantized) -> jax.Array:
        w_kn = dequantize(weight, x_mn.dtype)[0]
        return lax.dot_general(x_mn, w_kn, (((1,), (1,)), ((), ())), precision=matmul_precision(x_mn.dtype))

    return lax.platform_dependent(x_mn, weight, cpu=quantized_cpu.product_transposed, default=plain)


def _forward(x_mk: jax.Array, weight: Quantized) -> tuple[jax.Array, Quantized]:
    return product(x_mk, weight), weight


def _backward(weight: Quantized, dout_mn: jax.Array) -> tuple[jax.Array, None]:
    return _product_transposed(dout_mn, weight), None


product.defvjp(_forward, _backward)


@jax.custom_vjp
@jax.named_scope("quantized_grouped")
def grouped_product(x_mk: jax.Array, weight: Quantized, group_sizes_g: jax.Array) -> jax.Array:
    """Each group of rows times its matrix, as `grouped_matmul`.

    Args:
      x_mk: [M, K], sorted by group. weight: of [G, K, N]. group_sizes_g: i32[G], with a sum ≤ M.

    Returns:
      [M, N] in the dtype of ``x_mk``; rows beyond the last group are zero.
    """
    return lax.platform_dependent(x_mk, weight, group_sizes_g, cpu=_blocked, default=_plain_grouped)


def _blocked(x_mk: jax.Array, weight: Quantized, group_sizes_g: jax.Array, transposed: bool = False) -> jax.Array:
    one = quantized_cpu.product_transposed if transposed else quantized_cpu.product

    def product(x: jax.Array, group: jax.Array, i: jax.Array) -> jax.Array:
        return one(x, weight, group)

    return by_blocks(product, x_mk, weight.shape[1 if transposed else 2], group_sizes_g)


def _plain_grouped(x_mk: jax.Array, weight: Quantized, group_sizes_g: jax.Array, transposed: bool = False) -> jax.Array:
    w_gkn = dequantize(weight, x_mk.dtype)
    return (grouped_transposed if transposed else grouped_matmul)(x_mk, w_gkn, group_sizes_g)


@jax.named_scope("quantized_grouped_transposed")
def grouped_product_transposed(x_mn: jax.Array, weight: Quantized, group_sizes_g: jax.Array) -> jax.Array:
    """`grouped_product` with the transposed matrices: [M, N] → [M, K]."""
    cpu, default = (functools.partial(call, transposed=True) for call in (_blocked, _plain_grouped))
    return lax.platform_dependent(x_mn, weight, group_sizes_g, cpu=cpu, default=default)


def _grouped_forward(x_mk: jax.Array, weight: Quantized, group_sizes_g: jax.Array) -> tuple[jax.Array, tuple]:
    return grouped_product(x_mk, weight, group_sizes_g), (weight, group_sizes_g)


def _grouped_backward(residuals: tuple, dout_mn: jax.Array) -> tuple[jax.Array, None, None]:
    return grouped_product_transposed(dout_mn, *residuals), None, None


grouped_product.defvjp(_grouped_forward, _grouped_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
@jax.named_scope("quantized_einsum")
def einsum(subscripts: str, rows: slice, x: jax.Array, weight: Quantized) -> jax.Array:
    """``jnp.einsum(subscripts, x, weight[:, rows])`` with a weight of heads: [H, O, R], its one input last.

    The input, if the product contracts it, is the last axis of x, and if not, the last axis of the result.
    """
    cpu = functools.partial(quantized_cpu.einsum, subscripts, rows)
    return lax.platform_dependent(x, weight, cpu=cpu, default=functools.partial(_plain_einsum, subscripts, rows))


def _plain_einsum(subscripts: str, rows: slice, x: jax.Array, weight: Quantized) -> jax.Array:
    some = dataclasses.replace(weight, values=weight.values[:, rows], scale=weight.scale[:, rows])
    return jnp.einsum(subscripts, x, dequantize(some, x.dtype), precision=matmul_precision(x.dtype))


def _einsum_forward(subscripts: str, rows: slice, x: jax.Array, weight: Quantized) -> tuple[jax.Array, Quantized]:
    return einsum(subscripts, rows, x, weight), weight


def _einsum_backward(subscripts: str, rows: slice, weight: Quantized, dout: jax.Array) -> tuple[jax.Array, None]:
    terms, out = subscripts.split("->")
    x_axes, weight_axes = terms.split(",")
    return einsum(f"{out},{weight_axes}->{x_axes}", rows, dout, weight), None


einsum.defvjp(_einsum_forward, _einsum_backward)
