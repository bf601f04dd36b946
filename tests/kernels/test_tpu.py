"""TPU kernels in interpret mode against the plain functions; `test_grouped_matmul.py` has those of grouped products."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsvl2_jax.apps.plan.hlo_gpu import splash_flops
from dsvl2_jax.kernels.attention import attend
from dsvl2_jax.kernels.quantized_cache import dequantize_entries, quantize_entries
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


def seen(last, tokens):
    """i32[B, T], the last position that each query sees."""
    return last[:, None] + jnp.arange(tokens)


def close_where_something_is_seen(found, scores_bhts, out_bthd, last):
    """The kernel's results, against scaled scores of all keys and plain attention; nothing seen is zero and -inf."""
    out, lse = found
    visible = jnp.arange(scores_bhts.shape[-1]) <= last[..., None]
    expected = jax.nn.logsumexp(jnp.where(visible[:, None], scores_bhts, -jnp.inf), -1).swapaxes(1, 2)[..., None]
    sees = last >= 0
    for a, b in ((out, out_bthd), (lse, expected)):
        np.testing.assert_allclose(a[sees], b[sees], rtol=0, atol=TOLERANCE * np.abs(b[sees]).max())
    assert not out[~sees].any() and (lse[~sees] == -jnp.inf).all()


def stored(arrays, int8):
    """(what a cache keeps of them, what it stands for)."""
    kept = [quantize_entries(x) if int8 else x for x in arrays]
    return kept, [dequantize_entries(x, jnp.float32) for x in kept]


@pytest.mark.parametrize("int8", [False, True], ids=["float", "int8"])
@pytest.mark.parametrize("tokens", [1, 3])
def test_latent_attention_is_plain_attention_of_a_row_s_newest_tokens(tokens, int8):
    rng = np.random.default_rng(0)
    first = jnp.asarray([0, 511, 512, 1000, 510, -1, -9], jnp.int32)
    sizes = (tokens, 3, 48), (tokens, 3, 8), (2 * ATTENTION_BLOCK, 48), (2 * ATTENTION_BLOCK, 8)
    arrays = (jnp.asarray(rng.normal(size=(len(first), *size)), jnp.float32) for size in sizes)
    query, rope_query, latent, rope_key = arrays
    kept, (latent, rope_key) = stored((latent, rope_key), int8)
    found = latent_attention(query, rope_query, *kept, first, 0.2, interpret=True)
    last = seen(first, tokens)
    expected = attend([query, rope_query], [latent, rope_key], latent, (None, last), 0.2)
    scores = jnp.einsum("bthd,bsd->bhts", query, latent) + jnp.einsum("bthd,bsd->bhts", rope_query, rope_key)
    close_where_something_is_seen(found, 0.2 * scores, expected, last)


@pytest.mark.parametrize("int8", [False, True], ids=["float", "int8"])
@pytest.mark.parametrize("tokens", [1, 3])
def test_cached_attention_is_plain_attention_of_a_row_s_newest_tokens(tokens, int8):
    rng = np.random.default_rng(0)
    first = jnp.asarray([0, 511, 512, 1000, 510, -1, -9], jnp.int32)
    sizes = (tokens, HEADS, KEYS), *((2 * ATTENTION_BLOCK, HEADS, KEYS),) * 2
    query, key, value = (jnp.asarray(rng.normal(size=(len(first), *size)), jnp.float32) for size in sizes)
    kept, (key, value) = stored((key, value), int8)
    found = cached_attention(query, *kept, first, 0.2, interpret=True)
    last = seen(first, tokens)
    expected = attend([query], [key], value, (None, last), 0.2)
    close_where_something_is_seen(found, 0.2 * jnp.einsum("bthd,bshd->bhts", query, key), expected, last)


def test_splash_kernels_cost_their_products_in_the_blocks_that_causality_leaves():
    mask = [(1, 2, 2), (1, 2, 2)]
    operands = [*mask, (16, 1024, 192), (16, 1024, 192), (16, 1024, 128), (1024, 128), (8, 1024)]
    pairs = 16 * 3 * ATTENTION_BLOCK**2
    assert splash_flops("splash_mha_fwd_segmented_no_residuals.4", operands) == 2 * pairs * (192 + 128)
    assert splash_flops("splash_mha_dq_segmented_no_residuals", operands) == 2 * pairs * (2 * 192 + 128)
    assert splash_flops("splash_mha_dkv_segmented_no_residuals", operands) == 2 * pairs * 2 * (192 + 128)
    assert splash_flops("fusion.3", operands) == 0
