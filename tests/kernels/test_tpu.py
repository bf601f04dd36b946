"""TPU kernels in interpret mode against the plain functions; `test_grouped_matmul.py` has those of grouped products."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsvl2_jax.apps.plan.hlo_gpu import splash_flops
from dsvl2_jax.kernels.attention import attend
from dsvl2_jax.kernels.tpu import ATTENTION_BLOCK, cached_attention, latent_attention, splash_attention

HEADS, KEYS, VALUES = 2, 24, 16
# Interpreted products round their operands to no less than float32; the softmax is added up block by block.
TOLERANCE = 2e-6


def plain(query, key, value, positions, scale):
    index = jnp.broadcast_to(jnp.arange(positions.shape[1]), positions.shape)
    return attend([query], [key], value, (index - positions, index), scale)


@pytest.mark.parametrize("lengths", [(1024,), (1, 300, 723)], ids=["one sample", "packed"])
def test_splash_attention_and_its_gradients_are_those_of_plain_attention(lengths):
    rng = np.random.default_rng(0)
    positions = jnp.asarray(np.concatenate([np.arange(n) for n in lengths])[None], jnp.int32)
    rows = 2 * ATTENTION_BLOCK
    query, key, value, bar = (
        jnp.asarray(rng.normal(size=(1, rows, HEADS, width)), jnp.float32) for width in (KEYS, KEYS, VALUES, VALUES)
    )

    def run(function):
        def both(*arrays):
            out, pull = jax.vjp(lambda q, k, v: function(q, k, v, positions, 0.2), *arrays)
            return out, *pull(bar)

        return jax.jit(both)(query, key, value)

    results = run(lambda *arrays: splash_attention(*arrays, interpret=True))
    for name, a, b in zip(("out", "query", "key", "value"), results, run(plain), strict=True):
        assert a.shape == b.shape, name
        np.testing.assert_allclose(a, b, rtol=0, atol=TOLERANCE * np.abs(b).max(), err_msg=name)


def test_latent_attention_is_plain_attention_of_one_token_a_row():
    rng = np.random.default_rng(0)
    last = jnp.asarray([0, 511, 512, 1000], jnp.int32)
    sizes = (4, 3, 48), (4, 3, 8), (4, 2 * ATTENTION_BLOCK, 48), (4, 2 * ATTENTION_BLOCK, 8)
    query, rope_query, latent, rope_key = (jnp.asarray(rng.normal(size=size), jnp.float32) for size in sizes)
    out, lse = latent_attention(query, rope_query, latent, rope_key, last, 0.2, interpret=True)
    key_range = None, last[:, None]
    expected = attend([query[:, None], rope_query[:, None]], [latent, rope_key], latent, key_range, 0.2)[:, 0]
    np.testing.assert_allclose(out, expected, rtol=0, atol=TOLERANCE * np.abs(expected).max())
    scores = jnp.einsum("bhd,bsd->bhs", query, latent) + jnp.einsum("bhd,bsd->bhs", rope_query, rope_key)
    visible = jnp.arange(2 * ATTENTION_BLOCK) <= last[:, None, None]
    expected = jax.nn.logsumexp(jnp.where(visible, 0.2 * scores, -jnp.inf), -1, keepdims=True)
    np.testing.assert_allclose(lse, expected, rtol=0, atol=TOLERANCE * np.abs(expected).max())


def test_latent_attention_of_a_row_that_sees_nothing_is_zero_and_weighs_nothing():
    ones = (jnp.ones(shape) for shape in ((1, 3, 48), (1, 3, 8), (1, ATTENTION_BLOCK, 48), (1, ATTENTION_BLOCK, 8)))
    out, lse = latent_attention(*ones, jnp.asarray([-1]), 0.2, interpret=True)
    assert not out.any() and (lse == -jnp.inf).all()


def test_cached_attention_is_plain_attention_of_one_token_a_row():
    rng = np.random.default_rng(0)
    last = jnp.asarray([0, 511, 512, 1000, -1], jnp.int32)
    query, key, value = (
        jnp.asarray(rng.normal(size=size), jnp.float32)
        for size in ((5, HEADS, KEYS), *((5, 2 * ATTENTION_BLOCK, HEADS, KEYS),) * 2)
    )
    out, lse = cached_attention(query, key, value, last, 0.2, interpret=True)
    expected = attend([query[:, None]], [key], value, (None, last[:, None]), 0.2)[:, 0]
    np.testing.assert_allclose(out[:4], expected[:4], rtol=0, atol=TOLERANCE * np.abs(expected).max())
    scores = jnp.where(
        jnp.arange(2 * ATTENTION_BLOCK) <= last[:, None, None], 0.2 * jnp.einsum("bhd,bshd->bhs", query, key), -jnp.inf
    )
    expected = jax.nn.logsumexp(scores, -1, keepdims=True)[:4]
    np.testing.assert_allclose(lse[:4], expected, rtol=0, atol=TOLERANCE * np.abs(expected).max())
    assert not out[4].any() and (lse[4] == -jnp.inf).all()


def test_splash_kernels_cost_their_products_in_the_blocks_that_causality_leaves():
    mask = [(1, 2, 2), (1, 2, 2)]
    operands = [*mask, (16, 1024, 192), (16, 1024, 192), (16, 1024, 128), (1024, 128), (8, 1024)]
    pairs = 16 * 3 * ATTENTION_BLOCK**2
    assert splash_flops("splash_mha_fwd_segmented_no_residuals.4", operands) == 2 * pairs * (192 + 128)
    assert splash_flops("splash_mha_dq_segmented_no_residuals", operands) == 2 * pairs * (2 * 192 + 128)
    assert splash_flops("splash_mha_dkv_segmented_no_residuals", operands) == 2 * pairs * 2 * (192 + 128)
    assert splash_flops("fusion.3", operands) == 0
