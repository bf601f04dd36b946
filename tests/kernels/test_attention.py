"""How attention is cut into blocks and over devices; the kernels are in `test_gpu.py` and `test_tpu.py`.

The whole of it, in the modules that call it: tests/model/test_attention.py and test_vision.py.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsvl2_jax.kernels import attention
from dsvl2_jax.kernels.attention import attend
from dsvl2_jax.kernels.tpu import latent_attention
from dsvl2_jax.sharding import make_mesh


@pytest.mark.parametrize("length", [1024, 1000])
def test_query_blocks_equal_one_block(length, monkeypatch):
    """1024 queries go in two blocks; 1000, no multiple of a block, whole."""
    rng = np.random.default_rng(2)
    shapes = (1, length, 2, 4), (1, length, 2, 3), (1, length, 2, 4), (1, length, 3), (1, length, 2, 5)
    q_nope, q_rope, k_nope, k_rope, value = (rng.normal(size=shape).astype(np.float32) for shape in shapes)
    positions = np.arange(length, dtype=np.int32)[None]
    in_blocks = jax.jit(attend)([q_nope, q_rope], [k_nope, k_rope], value, (None, positions), 0.5)
    monkeypatch.setattr(attention, "QUERY_BLOCK", 4096)
    whole = jax.jit(lambda *args: attend(*args))([q_nope, q_rope], [k_nope, k_rope], value, (None, positions), 0.5)
    np.testing.assert_allclose(in_blocks, whole, rtol=0, atol=2e-5 * np.abs(whole).max())


@pytest.mark.parametrize(("rows", "tokens"), [(1, 3), (4, 1)])
def test_latents_of_a_row_on_several_devices_are_attended_to_where_they_are(monkeypatch, rows, tokens):
    monkeypatch.setattr(attention, "latent_attention", functools.partial(latent_attention, interpret=True))
    rng = np.random.default_rng(0)
    sizes = (rows, tokens, 3, 48), (rows, tokens, 3, 8), (rows, 2048, 48), (rows, 2048, 8)
    arrays = [jnp.asarray(rng.normal(size=size), jnp.bfloat16) for size in sizes]
    last = jnp.asarray(rng.integers(0, 2046, (rows, 1)) + np.arange(tokens), jnp.int32)
    expected = attend(arrays[:2], arrays[2:], arrays[2], (None, last), 0.2).astype(jnp.float32)

    def chosen(*arrays, tpu, default):
        return tpu(*arrays)

    monkeypatch.setattr(attention.lax, "platform_dependent", chosen)
    with jax.set_mesh(make_mesh(data=2, tensor=2, expert=2)):
        out = jax.jit(attention.mla_decode_attention, static_argnums=5)(*arrays, last, 0.2).astype(jnp.float32)
    np.testing.assert_allclose(out, expected, rtol=0, atol=2**-7 * np.abs(expected).max())


def shared_and_own(rng, rows, length, tokens=1):
    """Queries, keys and values of latent attention, whose heads share them, and of multi-head attention."""

    def arrays(*shapes):
        return [rng.normal(size=shape).astype(np.float32) for shape in shapes]

    queries = arrays((rows, tokens, 4, 32), (rows, tokens, 4, 8))
    latents = arrays((rows, length, 32), (rows, length, 8))
    keys, values = arrays((rows, length, 4, 32), (rows, length, 4, 16))
    return (queries, latents, latents[0]), (queries[:1], [keys], values)


@pytest.mark.parametrize("way", [attention._decode_by_blocks, attention._decode_in_one])
@pytest.mark.parametrize("kind", [0, 1])
@pytest.mark.parametrize("length", [1, 2, 5, 1 / 2 + 3])  # in blocks; the last is no whole number of them
def test_a_decode_step_by_blocks_equals_attention_in_one(way, kind, length):
    rng, length = np.random.default_rng(1), int(length * attention.KEY_BLOCK)
    first = np.array([0, 1, length // 2, length // 2 + 1, length - 2, length - 1], np.int32)
    for tokens in (1, 3):
        queries, keys, values = shared_and_own(rng, 6, length, tokens)[kind]
        last = np.minimum(first[:, None] + np.arange(tokens, dtype=np.int32), length - 1)
        out = jax.jit(way, static_argnames="scale")(queries, keys, values, last, scale=0.3)
        expected = attend(queries, keys, values, (None, last), 0.3)
        np.testing.assert_allclose(out, expected, rtol=0, atol=2e-6 * np.abs(expected).max())


@pytest.mark.parametrize("kind", [0, 1])
def test_a_decode_step_has_the_same_bits_whatever_the_cache_has_beyond_and_others_see(kind):
    rng, step = np.random.default_rng(2), jax.jit(attention.decode_attention, static_argnames="scale")
    queries, keys, values = shared_and_own(rng, 4, 8 * attention.KEY_BLOCK)[kind]
    last = np.array([3, attention.KEY_BLOCK - 1, attention.KEY_BLOCK, 2 * attention.KEY_BLOCK - 1], np.int32)
    outs = []
    for blocks in (2, 3, 8):
        *short, of_values = (x[:, : blocks * attention.KEY_BLOCK] for x in (*keys, values))
        outs.append(step(queries, short, of_values, last[:, None], scale=0.3))
    np.testing.assert_array_equal(outs[0], outs[1])
    np.testing.assert_array_equal(outs[0], outs[2])
    last[3] = values.shape[1] - 1
    beyond = step(queries, keys, values, last[:, None], scale=0.3)
    np.testing.assert_array_equal(outs[0][:3], beyond[:3])
