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
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from dsvl2_jax.kernels import gpu_quantized, quantized_cpu, tpu_quantized
from dsvl2_jax.kernels.grouped_matmul import (
    GROUPED_PRODUCT,
    by_blocks,
    grouped_matmul,
    grouped_transposed,
    zero_beyond_groups,
)
from dsvl2_jax.kernels.precision import matmul_precision
from dsvl2_jax.kernels.quantized import Quantized, dequantize
from dsvl2_jax.sharding import ambient_mesh_shape


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
    if ambient_mesh_shape() is not None:
        return _plain(x_mk, weight)
    return lax.platform_dependent(x_mk, weight, cpu=quantized_cpu.product, cuda=_cuda, default=_plain)


def _cuda(x_mk: jax.Array, weight: Quantized) -> jax.Array:
    if not gpu_quantized.is_supported(x_mk, weight):
        return _plain(x_mk, weight)
    return gpu_quantized.gmm(x_mk, weight, _all_rows(x_mk))


def _all_rows(x_mk: jax.Array) -> jax.Array:
    return jnp.full(1, len(x_mk), jnp.int32)


def _plain(x_mk: jax.Array, weight: Quantized, transposed: bool = False) -> jax.Array:
    """In operations of XLA, whose compiler for TPUs converts values where they enter the product.

    So it does with the low and the high values of int4 apart, and not with both joined.
    """
    (values,), (scale,), dtype = weight.values, weight.scale, x_mk.dtype
    groups, n = scale.shape
    if transposed and groups == 1:
        x_mk = (x_mk * scale).astype(dtype)
    split = None if transposed else x_mk.reshape(len(x_mk), groups, quantized_cpu.parts(weight), -1)
    # The axes of a part of a weight: groups of inputs, the inputs of each, outputs.
    contracted = ((1,), (2,)) if transposed else ((1, 2), (0, 1))
    made = []
    is_float = weight.kind == "float8"
    parts = [values.astype(jnp.float32)] if is_float else quantized_cpu.converted(values, weight.kind)
    for part, value in enumerate(parts):
        value = value.reshape(groups, -1, n)
        value = (value * scale[:, None] if groups > 1 else value).astype(dtype)
        x = x_mk if transposed else split[:, :, part]
        dims = contracted, ((), ())
        made.append(lax.dot_general(x, value, dims, matmul_precision(dtype), preferred_element_type=jnp.float32))
    if transposed:  # each [M, groups, inputs]
        return jnp.stack(made, axis=2).reshape(len(x_mk), -1).astype(dtype)
    out = sum(made)
    return (out if groups > 1 else out * scale).astype(dtype)


@jax.named_scope("quantized_transposed")
def _product_transposed(x_mn: jax.Array, weight: Quantized) -> jax.Array:
    def cuda(x_mn: jax.Array, weight: Quantized) -> jax.Array:
        if not gpu_quantized.is_supported(x_mn, weight):
            return plain(x_mn, weight)
        return gpu_quantized.gmm_transposed(x_mn, weight, _all_rows(x_mn))

    plain = functools.partial(_plain, transposed=True)
    if ambient_mesh_shape() is not None:
        return plain(x_mn, weight)
    return lax.platform_dependent(x_mn, weight, cpu=quantized_cpu.product_transposed, cuda=cuda, default=plain)


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
    return _grouped(x_mk, weight, group_sizes_g)


def _grouped(x_mk: jax.Array, weight: Quantized, group_sizes_g: jax.Array, transposed: bool = False) -> jax.Array:
    """On the platform that the program is lowered for."""
    calls = {"cpu": _blocked, "cuda": _cuda_grouped, "tpu": _tpu_grouped, "default": _plain_grouped}
    calls = {name: functools.partial(call, transposed=transposed) for name, call in calls.items()}
    return lax.platform_dependent(x_mk, weight, group_sizes_g, **calls)


def _cuda_grouped(x_mk: jax.Array, weight: Quantized, group_sizes_g: jax.Array, transposed: bool) -> jax.Array:
    if not gpu_quantized.is_supported(x_mk, weight):
        return _plain_grouped(x_mk, weight, group_sizes_g, transposed)
    gmm = gpu_quantized.gmm_transposed if transposed else gpu_quantized.gmm
    return zero_beyond_groups(gmm(x_mk, weight, group_sizes_g), group_sizes_g)


def _tpu_grouped(x_mk: jax.Array, weight: Quantized, group_sizes_g: jax.Array, transposed: bool) -> jax.Array:
    return tpu_quantized.gmm(x_mk, (weight,), group_sizes_g, transposed=transposed)


def _blocked(x_mk: jax.Array, weight: Quantized, group_sizes_g: jax.Array, transposed: bool) -> jax.Array:
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
    return _grouped(x_mn, weight, group_sizes_g, transposed=True)


def _grouped_forward(x_mk: jax.Array, weight: Quantized, group_sizes_g: jax.Array) -> tuple[jax.Array, tuple]:
    return grouped_product(x_mk, weight, group_sizes_g), (weight, group_sizes_g)


def _grouped_backward(residuals: tuple, dout_mn: jax.Array) -> tuple[jax.Array, None, None]:
    return grouped_product_transposed(dout_mn, *residuals), None, None


grouped_product.defvjp(_grouped_forward, _grouped_backward)


@jax.custom_vjp
@jax.named_scope("quantized_swiglu")
def grouped_gated(x_mk: jax.Array, gate: Quantized, up: Quantized, group_sizes_g: jax.Array) -> jax.Array:
    """silu(x · gate) · (x · up), each group of rows with its own matrices, as `grouped_swiglu`; on TPUs one kernel."""

    def fused(x_mk: jax.Array, gate: Quantized, up: Quantized, group_sizes_g: jax.Array) -> jax.Array:
        if gate.kind != up.kind:
            return _gated(x_mk, gate, up, group_sizes_g)
        return tpu_quantized.gmm(x_mk, (gate, up), group_sizes_g)

    return lax.platform_dependent(x_mk, gate, up, group_sizes_g, tpu=fused, default=_gated)


def _gated(x_mk: jax.Array, gate: Quantized, up: Quantized, group_sizes_g: jax.Array) -> jax.Array:
    gate_mn, up_mn = (named_product(x_mk, weight, group_sizes_g) for weight in (gate, up))
    return jax.nn.silu(gate_mn) * up_mn


def named_product(x_mk: jax.Array, weight: Quantized, group_sizes_g: jax.Array) -> jax.Array:
    """`grouped_product` under the name that rematerialisation policies know."""
    return checkpoint_name(grouped_product(x_mk, weight, group_sizes_g), GROUPED_PRODUCT)


def _gated_forward(x_mk: jax.Array, gate: Quantized, up: Quantized, group_sizes_g: jax.Array) -> tuple:
    return jax.vjp(lambda x: _gated(x, gate, up, group_sizes_g), x_mk)


def _gated_backward(pullback: Callable, dout_mn: jax.Array) -> tuple[jax.Array, None, None, None]:
    return pullback(dout_mn)[0], None, None, None


grouped_gated.defvjp(_gated_forward, _gated_backward)


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
