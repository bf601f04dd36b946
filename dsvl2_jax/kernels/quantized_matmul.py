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


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
@jax.named_scope("quantized_product")
def product(x: jax.Array, weight: Quantized, contract: int) -> jax.Array:
    """x · weight over the last ``contract`` dimensions of x and the first of the weight, in the dtype of x."""
    plain = functools.partial(_plain, contract=contract)
    if ambient_mesh_shape() is not None:
        return plain(x, weight)
    inputs, outputs = weight.shape[:contract], weight.shape[contract:]

    def flat(call: Callable[[jax.Array, Quantized], jax.Array], x: jax.Array, weight: Quantized) -> jax.Array:
        out_mn = call(x.reshape(-1, math.prod(inputs)), as_matrices(weight, contract))
        return out_mn.reshape(*x.shape[: x.ndim - contract], *outputs)

    def cuda(x: jax.Array, weight: Quantized) -> jax.Array:
        if not gpu_quantized.is_supported(x, as_matrices(weight, contract)):
            return plain(x, weight)
        return flat(lambda x_mk, one: gpu_quantized.gmm(x_mk, one, _all_rows(x_mk)), x, weight)

    return lax.platform_dependent(
        x, weight, cpu=functools.partial(flat, quantized_cpu.product), cuda=cuda, default=plain
    )


@jax.named_scope("quantized_transposed")
def _product_transposed(x: jax.Array, weight: Quantized, contract: int) -> jax.Array:
    """`product` with the weight's outputs in the place of its inputs, and the other way round."""
    plain = functools.partial(_plain_transposed, contract=contract)
    if ambient_mesh_shape() is not None:
        return plain(x, weight)
    inputs, outputs = weight.shape[:contract], weight.shape[contract:]

    def flat(call: Callable[[jax.Array, Quantized], jax.Array], x: jax.Array, weight: Quantized) -> jax.Array:
        out_mk = call(x.reshape(-1, math.prod(outputs)), as_matrices(weight, contract))
        return out_mk.reshape(*x.shape[: x.ndim - len(outputs)], *inputs)

    def cuda(x: jax.Array, weight: Quantized) -> jax.Array:
        if not gpu_quantized.is_supported(x, as_matrices(weight, contract)):
            return plain(x, weight)
        return flat(lambda x_mn, one: gpu_quantized.gmm_transposed(x_mn, one, _all_rows(x_mn)), x, weight)

    cpu = functools.partial(flat, quantized_cpu.product_transposed)
    return lax.platform_dependent(x, weight, cpu=cpu, cuda=cuda, default=plain)


def _all_rows(x_mk: jax.Array) -> jax.Array:
    return jnp.full(1, len(x_mk), jnp.int32)


def _plain(x: jax.Array, weight: Quantized, contract: int) -> jax.Array:
    """In operations of XLA, whose compiler for TPUs converts values where they enter the product.

    So it does with the low and the high values of int4 apart, not with both joined; and with axes as they are, since it
    would move what it has converted into others.
    """
    lead, outputs = x.ndim - contract, weight.shape[contract:]
    if weight.kind != "int4":
        out = _dot(x, weight.values, range(lead, x.ndim), range(contract))
        return (out * weight.scale.reshape(outputs)).astype(x.dtype)
    values, groups = _int4_parts(weight, contract)
    split = x.reshape(*x.shape[:-1], groups, 2, -1)
    made = [
        _dot(split[..., part, :], value.astype(x.dtype), range(lead, x.ndim + 1), range(contract + 1))
        for part, value in enumerate(values)
    ]
    return sum(made).astype(x.dtype)


def _plain_transposed(x: jax.Array, weight: Quantized, contract: int) -> jax.Array:
    outputs = weight.ndim - contract
    of_x = range(x.ndim - outputs, x.ndim)
    if weight.kind != "int4":
        scaled = (x * weight.scale.reshape(weight.shape[contract:])).astype(x.dtype)
        return _dot(scaled, weight.values, of_x, range(contract, weight.ndim)).astype(x.dtype)
    values, _ = _int4_parts(weight, contract)
    made = [_dot(x, value.astype(x.dtype), of_x, range(contract + 1, value.ndim)) for value in values]
    out = jnp.stack(made, axis=-2)
    return out.reshape(*out.shape[:-3], -1).astype(x.dtype)


def _int4_parts(weight: Quantized, contract: int) -> tuple[list[jax.Array], int]:
    """The low and the high values times their scale, with the last of the inputs' axes in two; and its groups."""
    groups = weight.scale.shape[contract - 1]
    values = weight.values
    values = values.reshape(*values.shape[: contract - 1], groups, -1, *values.shape[contract:])
    scale = jnp.expand_dims(weight.scale, contract)
    return [value * scale for value in quantized_cpu.converted(values, "int4")], groups


def _dot(x: jax.Array, values: jax.Array, of_x: range, of_values: range) -> jax.Array:
    """In float32, over some axes of each."""
    dims = (tuple(of_x), tuple(of_values)), ((), ())
    precision = matmul_precision(x.dtype)
    return lax.dot_general(x, values.astype(x.dtype), dims, precision, preferred_element_type=jnp.float32)


def _forward(x: jax.Array, weight: Quantized, contract: int) -> tuple[jax.Array, Quantized]:
    return product(x, weight, contract), weight


def _backward(contract: int, weight: Quantized, dout: jax.Array) -> tuple[jax.Array, None]:
    return _product_transposed(dout, weight, contract), None


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
