"""Products as XLA's compiler for CPUs makes them well (tested in tests/kernels/test_cpu.py).

bfloat16 operands whose sums are asked for in float32 go to its kernels, which multiply bfloat16 as it lies in memory,
with the processor's own instructions where it has some. Asked for bfloat16 sums, it first makes float32 copies of both
operands, weights included. This holds for products of two matrices; with heads beside them there are some that it
accepts and then cannot run (jaxlib 0.10.2: "Unsupported element type for DotThunk").
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from dsvl2_jax.kernels.precision import matmul_precision

# A product with one row goes to other code, which converts as it goes and takes twice as long.
LEAST_ROWS = 2


def cpu_or(cpu: Callable[..., jax.Array], plain: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """A function that is ``cpu`` in programs for CPUs and ``plain`` in all others.

    Where it is differentiated it is ``plain`` on every platform, so that rematerialisation finds the same products.
    """

    @jax.custom_jvp
    def call(*arrays: Any) -> jax.Array:
        return lax.platform_dependent(*arrays, cpu=cpu, default=plain)

    @call.defjvp
    def jvp(primals: tuple, tangents: tuple) -> tuple[jax.Array, jax.Array]:
        return jax.jvp(plain, primals, tangents)

    return call


def weight_product(x: jax.Array, kernel: jax.Array, contract: int) -> jax.Array:
    """x · kernel over the last ``contract`` dimensions of x and the first of kernel, in their common dtype."""

    def plain(x: jax.Array, kernel: jax.Array) -> jax.Array:
        contracted = tuple(range(x.ndim - contract, x.ndim)), tuple(range(contract))
        return lax.dot_general(x, kernel, (contracted, ((), ())), precision=matmul_precision(x.dtype))

    def cpu(x: jax.Array, kernel: jax.Array) -> jax.Array:
        rows, features = x.shape[: x.ndim - contract], kernel.shape[contract:]
        inputs = math.prod(kernel.shape[:contract])
        return rows_product(x.reshape(-1, inputs), kernel.reshape(inputs, -1)).reshape(*rows, *features)

    return (cpu_or(cpu, plain) if x.dtype == jnp.bfloat16 else plain)(x, kernel)


def as_bits(x: jax.Array) -> jax.Array:
    """bfloat16 as uint16, float8 as int8, anything else as it is.

    XLA's compiler for CPUs slices and gathers them in float32 and float16: it converts the whole array before.
    """
    bits = {"bfloat16": jnp.uint16, "float8_e4m3fn": jnp.int8}.get(x.dtype.name)
    return x if bits is None else lax.bitcast_convert_type(x, bits)


def bits_to_slice(x: jax.Array, at: Any) -> jax.Array:
    """`as_bits` of an array that is then sliced at what ``at`` gives, without a copy of the whole.

    The compiler must not take the array's bits out of a loop, where they would be a copy.
    """
    return as_bits(lax.optimization_barrier((x, at))[0])


def from_bits(x: jax.Array) -> jax.Array:
    """What `as_bits` was given, of bfloat16."""
    return lax.bitcast_convert_type(x, jnp.bfloat16) if x.dtype == jnp.uint16 else x


def take_rows(table: jax.Array, index: jax.Array) -> jax.Array:
    """[V, D], i32[...] → [..., D], as `jnp.take`."""

    def plain(table: jax.Array, index: jax.Array) -> jax.Array:
        return jnp.take(table, index, axis=0)

    def cpu(table: jax.Array, index: jax.Array) -> jax.Array:
        return from_bits(jnp.take(bits_to_slice(table, index), index, axis=0))

    return (cpu_or(cpu, plain) if table.dtype == jnp.bfloat16 else plain)(table, index)


def rows_product(x_mk: jax.Array, w_kn: jax.Array) -> jax.Array:
    """[M, K] · [K, N] on CPUs, summed in float32, in the dtype of ``x_mk``."""
    if x_mk.dtype != jnp.bfloat16:
        return jnp.dot(x_mk, w_kn, precision=matmul_precision(x_mk.dtype))
    rows = x_mk.shape[0]
    x_mk = jnp.pad(x_mk, ((0, max(0, LEAST_ROWS - rows)), (0, 0)))
    return jnp.dot(x_mk, w_kn, preferred_element_type=jnp.float32)[:rows].astype(x_mk.dtype)
