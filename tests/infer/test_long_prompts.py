"""Prompts of many chunks: what prefill holds does not grow with them, and what it computes stays the same."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsvl2_jax.infer import executor
from dsvl2_jax.infer.slots import PAGE
from dsvl2_jax.kernels.attention import QUERY_BLOCK, attend
from dsvl2_jax.kernels.span_attention import SPAN, attend_in_spans, is_long
from dsvl2_jax.model.config import Config
from dsvl2_jax.model.deepseek_vl2 import abstract_params


def compiled_chunk(config: Config, length: int) -> jax.stages.Compiled:
    """The program of a prompt's last chunk, in a cache of a length."""
    make = functools.partial(executor.init_row, config=config, slots=1, cache_length=length, dtype=jnp.float32)
    shape = jax.ShapeDtypeStruct
    arrays = {name: shape((1, PAGE), jnp.int32) for name in ("ids_bt", "image_index_bt")}
    arrays |= {name: shape((), jnp.int32) for name in ("length", "start", "total")}
    features = shape((1, config.tokens_per_tile, config.language.hidden_size), jnp.float32)
    params = jax.tree.map(lambda a: shape(a.shape, jnp.float32), abstract_params(config)[0])
    static = {"config": config, "read_length": length}
    row = jax.eval_shape(make)
    return executor.prefill_chunk.lower(params=params, features=features, row=row, **static, **arrays).compile()


@pytest.mark.parametrize("name", [pytest.param("mini-tiny", marks=pytest.mark.exhaustive), "mini-base"])
def test_prefill_holds_no_more_for_a_longer_prompt(name, checkpoints):
    config = Config.from_file(checkpoints / name)
    found = {length: compiled_chunk(config, length).memory_analysis() for length in (2 * SPAN, 8 * SPAN)}
    short, long = (analysis.temp_size_in_bytes for analysis in found.values())
    rows = [analysis.alias_size_in_bytes for analysis in found.values()]
    assert rows[1] == 4 * rows[0]  # the cache itself, changed where it lies
    assert long <= 1.02 * short, (short, long)


@pytest.mark.parametrize("tokens", [16, 2 * QUERY_BLOCK])
def test_attention_in_spans_is_attention_at_once(tokens):
    rng, length, heads = np.random.default_rng(0), 2 * SPAN, 2

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    queries = [normal(1, tokens, heads, 6), normal(1, tokens, heads, 4)]
    latent, rope_key, into = normal(1, length, 8), normal(1, length, 4), normal(heads, 11, 8)

    def expand(latent: jax.Array, rope_key: jax.Array) -> tuple[list[jax.Array], jax.Array]:
        both = jnp.einsum("bsr,hnr->bshn", latent, into)
        return [both[..., :6], rope_key], both[..., 6:]

    assert is_long(length)
    for start in (SPAN - tokens // 2, length - tokens):
        last = start + jnp.arange(tokens)[None]
        found = jax.jit(attend_in_spans, static_argnums=2)(queries, [latent, rope_key], expand, last, 0.4)
        expected = attend(queries, *expand(latent, rope_key), (None, last), 0.4)
        assert np.abs(found - expected).max() <= 2e-5 * np.abs(expected).max()
