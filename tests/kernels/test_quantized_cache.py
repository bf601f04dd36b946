"""Vectors in int8 with a scale each, and attention that multiplies them as they lie."""

from __future__ import annotations

import functools
import math

import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

from dsvl2_jax.apps.plan.hlo_text import buffers
from dsvl2_jax.kernels import attention
from dsvl2_jax.kernels.quantized_cache import dequantize_entries, quantize_entries
from dsvl2_jax.sharding import make_mesh

FLOATS = st.floats(-1e6, 1e6, width=32)


@settings(max_examples=30)
@given(hnp.arrays(np.float32, (3, 8), elements=FLOATS))
def test_a_number_moves_by_half_a_step_of_its_vector_at_most(x):
    found = quantize_entries(jnp.asarray(x))
    assert found.values.dtype == jnp.int8 and found.scale.dtype == jnp.float32
    back = np.asarray(dequantize_entries(found, jnp.float32))
    step = np.abs(x).max(-1, keepdims=True) / 127
    assert (np.abs(back - x) <= 0.5001 * step + 1e-37).all()


def test_what_is_no_number_leaves_none_in_its_vector_and_harms_no_other():
    for none in (np.nan, np.inf):
        back = np.asarray(dequantize_entries(quantize_entries(jnp.asarray([[1.0, none], [1.0, -2.0]])), jnp.float32))
        assert not np.isfinite(back[0]).any()
        np.testing.assert_allclose(back[1], [1.0, -2.0], rtol=0.01)


def latents_and_heads(rng, rows, length, tokens=2):
    """Queries, keys and values in int8: of latent attention, whose heads share them, and of multi-head attention."""

    def arrays(*shapes):
        return [
            jnp.asarray(rng.normal(size=shape) * 10 ** rng.uniform(-2, 2, (*shape[:-1], 1)), jnp.float32)
            for shape in shapes
        ]

    queries = [0.01 * q for q in arrays((rows, tokens, 4, 32), (rows, tokens, 4, 8))]
    latents = [quantize_entries(x) for x in arrays((rows, length, 32), (rows, length, 8))]
    keys, values = (quantize_entries(x) for x in arrays((rows, length, 4, 32), (rows, length, 4, 16)))
    return (queries, latents, latents[0]), (queries[:1], [keys], values)


@pytest.mark.parametrize("kind", [0, 1], ids=["latents", "heads"])
def test_every_form_of_attention_gives_that_of_the_numbers_which_are_meant(kind):
    length = 3 * attention.KEY_BLOCK
    queries, keys, values = latents_and_heads(np.random.default_rng(0), 3, length)[kind]
    last = jnp.asarray([[0, 1], [200, 201], [length - 2, length - 1]], jnp.int32)
    floats = [dequantize_entries(x, jnp.float32) for x in (*keys, values)]
    expected = attention.attend(queries, floats[:-1], floats[-1], (None, last), 0.3)
    ways = [attention._decode_by_blocks, attention._decode_in_one]
    ways.append(lambda *arrays, scale: attention.attend(*arrays[:3], (None, arrays[3]), scale))
    for way in ways:
        out = jax.jit(way, static_argnames="scale")(queries, keys, values, last, scale=0.3)
        np.testing.assert_allclose(out, expected, rtol=0, atol=2e-5 * np.abs(expected).max())


def test_a_cache_whose_rows_are_split_over_devices_is_attended_to_as_a_whole_one():
    (queries, latents, _), (query, keys, values) = latents_and_heads(np.random.default_rng(1), 2, 512, tokens=1)
    last = jnp.asarray([[100], [511]], jnp.int32)
    latent = functools.partial(attention.mla_decode_attention, scale=0.3)
    heads = functools.partial(attention.mha_decode_attention, scale=0.3)
    for function, arrays in ((latent, (*queries, *latents)), (heads, (*query, *keys, values))):
        one = jax.jit(function)(*arrays, positions_bt=last)
        with jax.set_mesh(make_mesh(data=2, tensor=2, expert=2)):
            split = jax.jit(function)(*arrays, positions_bt=last)
        np.testing.assert_allclose(split, one, rtol=0, atol=2e-5 * np.abs(one).max())


def test_no_program_of_a_cpu_holds_the_cache_in_floats():
    rows, length, width = 4, 8 * attention.KEY_BLOCK, 32
    queries, latents, _ = latents_and_heads(np.random.default_rng(0), rows, length, tokens=1)[0]
    step = jax.jit(functools.partial(attention.mla_decode_attention, scale=0.3))
    text = step.lower(*queries, *latents, positions_bt=jnp.zeros((rows, 1), jnp.int32)).compile().as_text()
    sizes = [(dtype, math.prod(shape)) for _, shape, dtype in buffers(text)]
    assert ("s8", rows * length * width) in sizes
    assert max(size for dtype, size in sizes if dtype in ("f32", "bf16")) < rows * length * width / 4
