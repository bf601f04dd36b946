"""Kernels of a GPU's decode step, interpreted; whole layers of them are in tests/model/test_gpu_decode.py."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from dsvl2_jax.kernels.attention import attend
from dsvl2_jax.kernels.gpu_decode_attention import attend_splits, combine
from dsvl2_jax.kernels.gpu_experts import choose_experts


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
def test_experts_are_those_of_top_k_the_first_of_equal_ones_first(scoring):
    rng = np.random.default_rng(0)
    logits = jnp.asarray(rng.integers(-3, 4, size=(7, 72)), jnp.float32)  # of few values, so that many are equal
    bias = jnp.asarray(rng.integers(-1, 2, size=72), jnp.float32) if scoring == "sigmoid" else None
    active = jnp.array([1, 1, 0, 1, 1, 0, 1], jnp.int32)
    options = {"count": 3, "scoring": scoring, "normalize": scoring == "sigmoid", "factor": 2.5}
    experts, weights = choose_experts(logits, bias, active, **options, interpret=True)
    scores = jax.nn.softmax(logits) if bias is None else jax.nn.sigmoid(logits)
    expected = lax.top_k(scores if bias is None else scores + bias, 3)[1]
    factors = jnp.take_along_axis(scores, expected, axis=1)
    factors = factors / factors.sum(-1, keepdims=True) if options["normalize"] else factors
    assert experts.tolist() == jnp.where(active[:, None] > 0, expected, 72).tolist()
    np.testing.assert_allclose(weights, 2.5 * factors, rtol=1e-6)


def test_a_longer_cache_and_other_rows_change_no_bit_of_an_attention():
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((3, 4, 32), *[(3, 300, 2, 32)] * 2))
    last = jnp.array([0, 100, 199], jnp.int32)

    def attention(k: jax.Array, v: jax.Array) -> jax.Array:
        split = attend_splits([q], [k], v, last, scale=0.2, interpret=True)
        return combine(*split, dtype=jnp.dtype(jnp.float32), interpret=True)

    out = attention(k, v)
    repeated = (jnp.repeat(a, 2, axis=2) for a in (k, v))
    expected = attend([q[:, None]], [next(repeated)], next(repeated), (None, last[:, None]), 0.2)[:, 0]
    assert jnp.abs(out - expected).max() < 2e-6
    # Half of each row is seen by none, or is another's business.
    other = attention(k[:, :200].at[0, 1:].set(7.0).at[2].multiply(3.0), v[:, :200])
    assert (other[:2] == out[:2]).all() and not (other[2] == out[2]).all()
