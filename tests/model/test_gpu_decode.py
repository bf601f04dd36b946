"""A decode step's layer by the GPU kernels, interpreted, against the modules; and what is lowered for CUDA."""

from __future__ import annotations

import dataclasses
import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import unflatten_dict

from dsvl2_jax.infer.slots import decode_group, init_slots
from dsvl2_jax.kernels.quantized import quantize
from dsvl2_jax.kernels.quantized_cache import dequantize_entries, quantize_entries
from dsvl2_jax.model import deepseek_vl2 as model
from dsvl2_jax.model import gpu_decode
from dsvl2_jax.model.cache import cache_layout
from dsvl2_jax.model.config import Config, LanguageConfig
from dsvl2_jax.model.decoder import DecoderLayer
from dsvl2_jax.model.parameter_paths import stays_float32
from dsvl2_jax.model.released import released_config
from dsvl2_jax.model.rope_scaling import RopeScaling

SMALL = {"vocab_size": 64, "hidden_size": 48, "intermediate_size": 80, "moe_intermediate_size": 32}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
LATENT = {
    "kv_lora_rank": 64, "qk_rope_head_dim": 32, "qk_nope_head_dim": 16, "v_head_dim": 16, "num_attention_heads": 3,
    "num_key_value_heads": 3,
}  # fmt: skip


def language(size: str) -> LanguageConfig:
    """A released model's, with small widths."""
    config = Config.from_dict(released_config(size)).language
    widths = {**SMALL, **(LATENT if config.use_mla else {**HEADS, "hidden_size": 128})}
    counts = {"num_hidden_layers": 2, "n_routed_experts": 12, "num_experts_per_tok": 2}
    return dataclasses.replace(config, **widths | counts)


YARN = RopeScaling("yarn", 4.0, 32, mscale=0.5, mscale_all_dim=1.3)


@pytest.mark.parametrize(
    ("size", "rows", "scaling", "int8"),
    [("tiny", 5, YARN, False), ("base", 20, None, False), ("tiny", 3, None, True), ("base", 5, YARN, True)],
    ids=["tiny, yarn", "base", "tiny, cache in int8", "base, yarn, cache in int8"],
)
def test_a_layer_gives_what_the_modules_give(size, rows, scaling, int8):
    """Five rows visit fewer experts than there are, twenty all of them."""
    config, length = dataclasses.replace(language(size), rope_scaling=scaling), 70
    rng = np.random.default_rng(rows)

    def normal(a: jax.ShapeDtypeStruct) -> jax.Array:
        return jnp.asarray(rng.normal(size=a.shape), jnp.float32)

    module = DecoderLayer(config, 1, jnp.float32)
    x = normal(jax.ShapeDtypeStruct((rows, 1, config.hidden_size), jnp.float32))
    positions = jnp.asarray(rng.integers(0, length, size=rows), jnp.int32)
    active = jnp.arange(rows) % 3 != 1  # the second row visits no expert
    cache = jax.tree.map(
        normal,
        {
            name: jax.ShapeDtypeStruct((rows, length, *shape), jnp.float32)
            for name, (shape, _) in cache_layout(config).items()
        },
    )
    if int8:
        cache = {name: quantize_entries(entries) for name, entries in cache.items()}
    given = x, positions[:, None], active[:, None], cache
    static = {"read_cache": True, "decode": True}
    shapes = jax.eval_shape(functools.partial(module.init, **static), jax.random.key(0), *given)["params"]
    params = jax.tree.map(lambda a: 0.3 * normal(a), nn.unbox(shapes))
    expected, expected_cache, _ = jax.jit(functools.partial(module.apply, **static))({"params": params}, *given)
    step = positions, active.astype(jnp.int32), gpu_decode.rotary_of(config, positions)
    out, new = gpu_decode.decode_layer(params, config, x[:, 0], *step, cache, moe=True, interpret=True)
    assert close(out, expected[:, 0])
    floats = functools.partial(dequantize_entries, dtype=jnp.float32)
    # Sums in another order may round a number to the next step of its vector.
    steps = 1 / 127 if int8 else 2e-5
    assert all(close(floats(new[name]), floats(expected_cache[name]), steps) for name in cache)


# Widths of which int4 has groups of 32, halves of which tensor cores take.
WIDE = {"hidden_size": 96, "moe_intermediate_size": 128, "v_head_dim": 32, "qk_nope_head_dim": 32}


# Each kind once, both kinds of attention; the other pairs are exhaustive.
@pytest.mark.parametrize(
    ("kind", "size"),
    [
        ("int8", "tiny"),
        ("int4", "base"),
        ("float8", "base"),
        *(
            pytest.param(*pair, marks=pytest.mark.exhaustive)
            for pair in (("int8", "base"), ("int4", "tiny"), ("float8", "tiny"))
        ),
    ],
)
def test_a_layer_with_quantized_weights_gives_what_the_modules_give(kind, size):
    config = dataclasses.replace(language(size), **WIDE)
    if not config.use_mla:
        config = dataclasses.replace(config, hidden_size=128)
    whole = dataclasses.replace(Config.from_dict(released_config(size)), language=config)
    rng, rows, length = np.random.default_rng(0), 5, 40
    inputs, params = model.weight_inputs(whole), {}
    for path, (shape, _) in model.abstract_leaves(whole).items():
        if path[:2] == ("language", "layers_1"):
            value = jnp.asarray(0.3 * rng.normal(size=shape), jnp.float32)
            params[path[2:]] = quantize(value, kind, inputs[path]) if path in inputs else value
    params = unflatten_dict(params)
    assert gpu_decode.reads_layers(
        {"layers_0": params, "layers_1": params}, dataclasses.replace(config, first_k_dense_replace=0)
    )
    shapes = cache_layout(config).items()
    cache = {name: jnp.asarray(rng.normal(size=(rows, length, *shape)), jnp.float32) for name, (shape, _) in shapes}
    x = jnp.asarray(rng.normal(size=(rows, 1, config.hidden_size)), jnp.float32)
    positions, active = jnp.arange(rows) * 7, jnp.arange(rows) != 1
    given = x, positions[:, None], active[:, None], cache
    call = functools.partial(DecoderLayer(config, 1, jnp.float32).apply, read_cache=True, decode=True)
    expected, expected_cache, _ = jax.jit(call)({"params": params}, *given)
    step = positions, active.astype(jnp.int32), gpu_decode.rotary_of(config, positions)
    out, new = gpu_decode.decode_layer(params, config, x[:, 0], *step, cache, moe=True, interpret=True)
    assert close(out, expected[:, 0])
    assert all(close(new[name], expected_cache[name]) for name in cache)


def close(a: jax.Array, b: jax.Array, tolerance: float = 2e-5) -> bool:
    return bool(jnp.abs(a - b).max() <= tolerance * jnp.maximum(jnp.abs(b).max(), 1.0))


def test_what_is_lowered_for_cuda_sorts_nothing_and_asks_nothing():
    """Two layers, one dense and one of experts: seven launches and ten, of which one is XLA's."""
    config = dataclasses.replace(Config.from_dict(released_config("base")), language=language("base"))
    flat = {
        path: jax.ShapeDtypeStruct(shape, jnp.float32 if stays_float32(path) else jnp.bfloat16)
        for path, (shape, _) in model.abstract_leaves(config).items()
    }
    state = jax.eval_shape(lambda: init_slots(config, 4, 512, jnp.bfloat16))
    budget = jax.ShapeDtypeStruct((4,), jnp.int32)
    function = jax.jit(decode_group, static_argnames=("config", "eos", "cache_length", "top", "greedy"))
    static = {"eos": 1, "cache_length": 512, "top": False, "greedy": True}
    traced = function.trace(unflatten_dict(flat), config, state, budget, None, **static)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert "stablehlo.sort" not in text
    assert set(re.findall(r"chlo.top_k\(.*k = (\d+)", text)) <= {"0"}  # of a group that tells no log-probabilities
    kernels = re.findall(r'name = "(\w+)"', text)
    assert set(kernels) == {
        "few_rows", "latent_into_cache", "attend_splits", "combine_latent", "choose_experts", "experts_gate_up",
        "experts_down",
    }  # fmt: skip


SUPPORTED = Config.from_dict(released_config("base")).language


@pytest.mark.parametrize(
    ("fields", "slots", "dtype"),
    [
        ({"attention_bias": True}, 1, jnp.bfloat16),
        ({"q_lora_rank": 64}, 1, jnp.bfloat16),
        ({"n_group": 8, "topk_group": 4}, 1, jnp.bfloat16),
        ({"kv_lora_rank": 384}, 1, jnp.bfloat16),
        ({"moe_intermediate_size": 1400}, 1, jnp.bfloat16),
        ({}, 129, jnp.bfloat16),
        ({}, 1, jnp.float32),
    ],
)
def test_what_the_kernels_are_not_for(fields, slots, dtype):
    kinds = [jnp.bfloat16], [jnp.int8, jnp.float32]
    assert all(gpu_decode.is_supported(SUPPORTED, 128, jnp.bfloat16, cache) for cache in kinds)
    changed = dataclasses.replace(SUPPORTED, **fields)
    assert not gpu_decode.is_supported(changed, slots, jnp.bfloat16, [dtype])
    assert not gpu_decode.is_supported(changed, slots, dtype, [jnp.bfloat16])
