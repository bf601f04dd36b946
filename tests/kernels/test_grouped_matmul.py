"""Every grouped-matmul kernel that runs on a CPU against a dense reference, whatever the group sizes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dsvl2_jax.kernels import grouped_matmul as kernels
from dsvl2_jax.kernels.grouped_matmul import grouped_matmul, grouped_swiglu, grouped_weighted, tgmm
from dsvl2_jax.kernels.tpu import megablox_tgmm
from dsvl2_jax.kernels.tpu_grouped_matmul import gmm

INPUTS, OUTPUTS = 6, 10

# (rows, groups): blocks of 4 rows that groups seldom fill, blocks of 128, and a single row.
SHAPES = {"small": (24, 5), "large": (300, 2), "one row": (1, 3)}

# Of the largest element; bfloat16 results are rounded to 8 bits once, after a float32 sum.
TOLERANCES = {"float32": 2e-6, "bfloat16": 1.01 * 2**-8}


def tpu(rows, weights, group_sizes, **options):
    return gmm(rows, (weights,), group_sizes, interpret=True, **options)


def tpu_transposed(rows, weights, group_sizes):
    return tpu(rows, weights.swapaxes(1, 2), group_sizes, transposed=True)


FORWARD = {
    "blocked": kernels._blocked,
    "ragged": kernels._ragged,
    "tpu": tpu,
    "tpu, transposed": tpu_transposed,
}
TGMM = {
    "blocked": kernels._blocked_tgmm,
    "ragged": kernels._ragged_tgmm,
    "megablox": functools.partial(megablox_tgmm, interpret=True),
}


def vjp(rows, weights, group_sizes, cotangent):
    out, pullback = jax.vjp(lambda r, w: grouped_matmul(r, w, group_sizes), rows, weights)
    return out, *pullback(cotangent)


compiled = functools.cache(jax.jit)


@functools.cache
def arrays(shape: str, dtype: str) -> tuple[jax.Array, jax.Array, jax.Array]:
    """rows [M, I], weights [G, I, O], cotangent [M, O]."""
    rows, groups = SHAPES[shape]
    rng = np.random.default_rng(0)
    sizes = (rows, INPUTS), (groups, INPUTS, OUTPUTS), (rows, OUTPUTS)
    return tuple(jnp.asarray(rng.normal(size=size), dtype) for size in sizes)


def groups_of(shape: str) -> st.SearchStrategy[list[int]]:
    """Group sizes with a sum of at most the rows."""
    rows, groups = SHAPES[shape]
    ends = st.lists(st.integers(0, rows), min_size=groups, max_size=groups).map(sorted)
    return ends.map(lambda e: np.diff([0, *e]).tolist())


def dense(rows, weights, cotangent, group_sizes) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(product, gradient of the rows, gradient of the weights), a row at a time in float64."""
    rows, weights, cotangent = (np.asarray(a, np.float64) for a in (rows, weights, cotangent))
    out, dx, dw = np.zeros(cotangent.shape), np.zeros(rows.shape), np.zeros(weights.shape)
    for row, group in enumerate(np.repeat(np.arange(len(group_sizes)), group_sizes)):
        out[row] = rows[row] @ weights[group]
        dx[row] = weights[group] @ cotangent[row]
        dw[group] += np.outer(rows[row], cotangent[row])
    return out, dx, dw


def assert_close(actual: jax.Array, expected: np.ndarray, dtype: str, roundings: int = 1) -> None:
    actual = np.asarray(actual, np.float64)
    assert actual.shape == expected.shape
    assert not actual[expected == 0].any()  # of rows beyond the groups and of empty groups: exactly
    atol = roundings * TOLERANCES[dtype] * np.abs(expected).max(initial=0)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=atol)


def check(shape: str, dtype: str, sizes: list[int]) -> None:
    rows, weights, cotangent = arrays(shape, dtype)
    group_sizes = jnp.asarray(sizes, jnp.int32)
    out, dx, dw = dense(rows, weights, cotangent, sizes)
    for kernel in FORWARD.values():
        product = compiled(kernel)(rows, weights, group_sizes)
        assert product.dtype == dtype
        assert_close(product, out, dtype)
    for kernel in TGMM.values():
        assert_close(compiled(kernel)(rows, cotangent, group_sizes), dw, dtype)
    added = dw + np.asarray(weights, np.float64)
    assert_close(compiled(TGMM["megablox"])(rows, cotangent, group_sizes, weights), added, dtype)
    assert_close(compiled(tgmm)(rows, cotangent, group_sizes, weights), added, dtype, roundings=2)
    results = compiled(vjp)(rows, weights, group_sizes, cotangent)
    assert {a.dtype.name for a in results} == {dtype}
    for array, expected in zip(results, (out, dx, dw), strict=True):
        assert_close(array, expected, dtype)


@pytest.mark.parametrize("dtype", TOLERANCES)
@settings(max_examples=40, deadline=None)
@given(sizes=groups_of("small"))
@example(sizes=[0, 0, 24, 0, 0])
@example(sizes=[24, 0, 0, 0, 0])
@example(sizes=[0, 0, 0, 0, 24])
@example(sizes=[0, 0, 0, 0, 0])
@example(sizes=[5, 0, 3, 0, 1])
@example(sizes=[1, 1, 1, 1, 20])
def test_kernels_and_gradients_are_the_dense_ones_for_any_groups(dtype, sizes):
    check("small", dtype, sizes)


@settings(max_examples=10, deadline=None)
@given(sizes=groups_of("large"))
@example(sizes=[129, 171])
@example(sizes=[128, 128])
@example(sizes=[0, 300])
def test_groups_of_many_blocks(sizes):
    check("large", "float32", sizes)


@pytest.mark.parametrize("sizes", [[0, 1, 0], [0, 0, 0], [0, 0, 1]])
def test_one_row(sizes):
    check("one row", "float32", sizes)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("sizes", [[5, 0, 3, 0, 1], [0, 0, 24, 0, 0], [0, 0, 0, 0, 0]], ids=str)
def test_the_kernel_of_two_matrices_is_swiglu_and_that_of_factors_multiplies(dtype, sizes):
    rows, gate, cotangent = arrays("small", dtype)
    up, factors = gate[::-1] * 0.5, jnp.linspace(-1, 1, rows.shape[0])
    group_sizes = jnp.asarray(sizes, jnp.int32)

    def product(weights) -> np.ndarray:
        return dense(rows, weights, cotangent, sizes)[0]

    def check_both(swiglu, weighted, roundings: int) -> None:
        first, second = product(gate), product(up)
        assert swiglu.dtype == dtype and weighted.dtype == jnp.float32
        assert_close(swiglu, (first / (1 + np.exp(-first)) * second), dtype, roundings)
        expected = product(gate) * np.asarray(factors)[:, None]
        assert_close(weighted, expected, dtype, roundings)

    by_kernel = (
        gmm(rows, (gate, up), group_sizes, interpret=True),
        gmm(rows, (gate,), group_sizes, factors, interpret=True),
    )
    check_both(*by_kernel, roundings=1)
    plain = grouped_swiglu(rows, gate, up, group_sizes), grouped_weighted(rows, gate, group_sizes, factors)
    check_both(*plain, roundings=4)


def test_no_product_leaks_into_the_rows_of_another_group():
    """A block that runs on into the next group must not leave its own product there, however large."""
    rows = jnp.ones((24, 1))
    weights = jnp.asarray([1e30, 1.0, 1e30, 1.0, 1e30])[:, None, None]
    out = compiled(grouped_matmul)(rows, weights, jnp.asarray([5, 7, 1, 8, 1], jnp.int32))
    expected = np.repeat([1e30, 1, 1e30, 1, 1e30, 0], [5, 7, 1, 8, 1, 2])
    np.testing.assert_array_equal(out[:, 0], np.float32(expected))
