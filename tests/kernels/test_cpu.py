"""Products and gathers of bfloat16 on CPUs: the result, its gradient, and no copy of the weights in the program."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsvl2_jax.kernels.cpu import take_rows, weight_product
from dsvl2_jax.kernels.grouped_matmul import grouped_matmul

ROWS = (1, 3)  # a single row goes another way


def normal(*shape: int, dtype: str = "bfloat16") -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).normal(size=shape), dtype)


def in_float32(*arrays: jax.Array) -> list[np.ndarray]:
    return [np.asarray(array, np.float32) for array in arrays]


@pytest.mark.parametrize("rows", ROWS)
def test_a_product_is_rounded_once(rows):
    x, kernel = normal(1, rows, 2, 16), normal(2, 16, 3, 8)
    out = jax.jit(functools.partial(weight_product, contract=2))(x, kernel)
    expected = np.einsum("btki,kihd->bthd", *in_float32(x, kernel))
    assert out.dtype == jnp.bfloat16 and out.shape == expected.shape
    np.testing.assert_allclose(*in_float32(out), expected, rtol=2**-8, atol=1e-5)


def test_rows_are_taken_as_they_are():
    table, index = normal(50, 8), np.array([[0, 49], [7, 7]])
    np.testing.assert_array_equal(jax.jit(take_rows)(table, index), table[index])


def test_a_gradient_is_that_of_the_plain_product():
    arrays, cotangent = (normal(3, 16), normal(16, 8)), normal(3, 8)
    gradients = jax.vjp(functools.partial(weight_product, contract=1), *arrays)[1](cotangent)
    expected = jax.vjp(jnp.matmul, *arrays)[1](cotangent)
    for gradient, other in zip(gradients, expected, strict=True):
        np.testing.assert_array_equal(gradient, other)


def temporary_bytes(function, *arrays: jax.Array) -> int:
    return jax.jit(function).lower(*arrays).compile().memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("rows", ROWS)
def test_no_program_holds_the_weights_in_float32(rows):
    """Each array of weights is 4 MiB in bfloat16; what a program holds besides its arguments is less than a half."""
    kernel, table, experts = normal(1024, 2048), normal(2048, 1024), normal(16, 128, 1024)
    assert temporary_bytes(functools.partial(weight_product, contract=1), normal(rows, 1024), kernel) < 2 << 20

    def repeated(table: jax.Array, index: jax.Array) -> jax.Array:  # as a decode group does
        body = lambda _, index: (jnp.abs(take_rows(table, index).sum(-1)) * 9).astype(jnp.int32) % 2048  # noqa: E731
        return jax.lax.fori_loop(0, 3, body, index)

    assert temporary_bytes(repeated, table, jnp.arange(rows)) < 2 << 20
    sizes = jnp.zeros(16, jnp.int32).at[5].set(rows)
    assert temporary_bytes(grouped_matmul, normal(rows, 128), experts, sizes) < 2 << 20
