"""A decode step's layer by the GPU kernels, interpreted, against the modules; and what is lowered for CUDA."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsvl2_jax.model import gpu_decode
from dsvl2_jax.model.cache import cache_layout
from dsvl2_jax.model.config import Config, LanguageConfig
from dsvl2_jax.model.decoder import DecoderLayer
from dsvl2_jax.model.released import released_config

SMALL = {"vocab_size": 64, "hidden_size": 48, "intermediate_size": 80, "moe_intermediate_size": 32}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
LATENT = {
    "kv_lora_rank": 64, "qk_rope_head_dim": 32, "qk_nope_head_dim": 16, "v_head_dim": 16, "num_attention_heads": 3,
    "num_key_value_heads": 3,
}  # fmt: skip


def language(size: str, **fields) -> LanguageConfig:
    """A released model's, with small widths."""
    config = Config.from_dict(released_config(size)).language
    widths = {**SMALL, **(LATENT if config.use_mla else {**HEADS, "hidden_size": 128})}
    return dataclasses.replace(config, **widths | {"num_hidden_layers": 2, "n_routed_experts": 12} | fields)


CASES = [("tiny", 1, 1), ("tiny", 5, 0), ("small", 5, 1), ("base", 20, 1), ("base", 1, 0)]


@pytest.mark.parametrize(("size", "rows", "layer"), CASES)
def test_a_layer_gives_what_the_modules_give(size, rows, layer):
    config, length = language(size), 70
    rng = np.random.default_rng(rows)
    module = DecoderLayer(config, layer, jnp.float32)
    x = jnp.asarray(rng.normal(size=(rows, 1, config.hidden_size)), jnp.float32)
    positions = jnp.asarray(rng.integers(0, length, size=rows), jnp.int32)
    active = jnp.arange(rows) % 3 != 1  # the second row, if there is one, visits no expert
    cache = {
        name: jnp.asarray(rng.normal(size=(rows, length, *shape)), jnp.float32)
        for name, (shape, _) in cache_layout(config).items()
    }
    given = x, positions[:, None], active[:, None], cache
    params = module.init(jax.random.key(0), *given, read_cache=True, decode=True)["params"]
    params = jax.tree.map(lambda a: a.value + 0.3 * rng.normal(size=a.value.shape), params, is_leaf=boxed)
    params = jax.tree.map(lambda a: a.astype(jnp.float32), params)
    run = functools.partial(module.apply, read_cache=True, decode=True)
    expected, expected_cache, _ = jax.jit(run)({"params": params}, *given)
    rotary = gpu_decode.rotary_of(config, positions)
    step = positions, active.astype(jnp.int32), rotary
    out, new = gpu_decode.decode_layer(params, config, x[:, 0], *step, cache, moe=layer > 0, interpret=True)
    assert close(out, expected[:, 0])
    assert all(close(new[name], expected_cache[name]) for name in cache)


def boxed(leaf: object) -> bool:
    return hasattr(leaf, "value")


def close(a: jax.Array, b: jax.Array) -> bool:
    return bool(jnp.abs(a - b).max() <= 2e-5 * jnp.maximum(jnp.abs(b).max(), 1.0))
