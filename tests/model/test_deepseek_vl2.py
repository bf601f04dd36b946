"""The model's functions as a user composes them, its parameters, and the names that a profile shows."""

from __future__ import annotations

import contextlib
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dsvl2_jax
from dsvl2_jax.inputs.processor import image_positions
from dsvl2_jax.model.config import TEXT_POSITION, Config
from dsvl2_jax.model.deepseek_vl2 import abstract_params, forward, init_params, output_logits, param_shardings

LANGUAGE = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "n_shared_experts": 1,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
    "topk_method": "greedy",
    "kv_lora_rank": 16,
    "q_lora_rank": None,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "n_group": 1,
    "topk_group": 1,
    "initializer_range": 0.2,
}
HALF = np.full(3, 0.5, np.float32)
ROWS, LENGTH, CACHE_LENGTH = 8, 24, 32
TOLERANCE = 2e-5  # of the largest logit


@functools.cache
def config(*, mla: bool = True) -> Config:
    return Config.from_dict(
        {
            "language_config": LANGUAGE | {"use_mla": mla},
            "vision_config": {"image_size": 28, "patch_size": 7, "width": 16, "layers": 2, "heads": 2},
            "projector_config": {"input_dim": 16, "n_embed": LANGUAGE["hidden_size"]},
            "tile_tag": "2D",
        }
    )


@functools.cache
def prompts() -> tuple[np.ndarray, ...]:
    """Tiles, ids, image_index and lengths of rows with one image of two tiles and 5 to 8 tokens of text."""
    rng = np.random.default_rng(0)
    tiles = rng.integers(0, 256, (2 * ROWS, 28, 28, 3), np.uint8)
    index = np.full((ROWS, LENGTH), TEXT_POSITION, np.int32)
    for row in range(ROWS):
        image = image_positions(1, 1, 2, 2 * row)
        index[row, 1 : 1 + len(image)] = image
    lengths = (14 + 2 + np.arange(ROWS) % 4).astype(np.int32)
    return tiles, rng.integers(0, 64, (ROWS, LENGTH)).astype(np.int32), index, lengths


def answer(cfg: Config, params, tiles, ids, image_index, lengths, steps: int) -> tuple[list, list]:
    """Greedy tokens, and the logits from which they were chosen, by the exported functions alone."""

    def first(params, tiles, ids, image_index, lengths):
        features = dsvl2_jax.adapt_tiles(params, cfg, tiles, HALF, HALF)
        embeddings = dsvl2_jax.merge(params, cfg, ids, image_index, features)
        cache = dsvl2_jax.init_cache(cfg, ROWS, CACHE_LENGTH, jnp.float32)
        return dsvl2_jax.prefill(params, cfg, embeddings, lengths, cache)

    step = jax.jit(dsvl2_jax.decode_step, static_argnames="config", donate_argnames="cache")
    logits, cache = jax.jit(first)(params, tiles, ids, image_index, lengths)
    tokens, all_logits = [], []
    for i in range(steps):
        tokens.append(jnp.argmax(logits, -1).astype(jnp.int32))
        all_logits.append(np.asarray(logits))
        logits, cache = step(params, cfg, tokens[-1], lengths + i, cache)
    return [np.asarray(t) for t in tokens], all_logits


@pytest.mark.parametrize("mla", [True, False], ids=["MLA", "MHA"])
def test_prefill_and_decode_give_the_logits_of_the_whole_sequence_also_on_a_mesh(mla):
    cfg = config(mla=mla)
    params = init_params(cfg, jax.random.key(0))
    tiles, ids, index, lengths = prompts()
    tokens, logits = answer(cfg, params, tiles, ids, index, lengths, steps=3)

    @jax.jit
    def whole(params, ids):
        features = dsvl2_jax.adapt_tiles(params, cfg, tiles, HALF, HALF)
        hidden = forward(params, cfg, dsvl2_jax.merge(params, cfg, ids, index, features))
        return output_logits(params, cfg, hidden)

    rows = np.arange(ROWS)
    continued = ids.copy()
    for i, new in enumerate(tokens):
        continued[rows, lengths + i] = new
    expected = np.asarray(whole(params, continued))
    for i, found in enumerate(logits):
        wanted = expected[rows, lengths - 1 + i]
        assert np.abs(found - wanted).max() <= TOLERANCE * np.abs(wanted).max()

    mesh = dsvl2_jax.make_mesh(data=2, tensor=2, expert=2)
    placed = jax.device_put(params, param_shardings(cfg, mesh))
    with jax.set_mesh(mesh):
        sharded_tokens, sharded_logits = answer(cfg, placed, tiles, ids, index, lengths, steps=3)
    np.testing.assert_array_equal(sharded_tokens, tokens)
    for found, wanted in zip(sharded_logits, logits, strict=True):
        assert np.abs(found - wanted).max() <= TOLERANCE * np.abs(wanted).max()


def test_the_initial_values_of_a_seed_stay():
    """Sums of parameters drawn in every way that there is; a seed's model is the same from version to version."""
    params = init_params(config(), jax.random.key(3))
    layer, pool = params["language"]["layers_1"], params["vision"]["attn_pool"]
    drawn = {
        "embed_tokens": params["language"]["embed_tokens"],
        "q_proj": layer["self_attn"]["q_proj"]["kernel"],
        "kv_b_proj": layer["self_attn"]["kv_b_proj"],
        "router": layer["mlp"]["router"]["kernel"],
        "experts": layer["mlp"]["experts"]["down_proj"],
        "newline": params["image_newline"],
        "separator": params["view_seperator"],
        "pool": pool["latent"],
        "pool's last": pool["mlp_fc2_kernel"],
        "pos_embed": params["vision"]["pos_embed"],
        "qkv": params["vision"]["blocks_1"]["attn"]["qkv"]["kernel"],
        "adaptor": params["projector"]["layers_1"]["kernel"],
    }
    found = {name: round(float(np.abs(np.asarray(value, np.float64)).sum()), 3) for name, value in drawn.items()}
    assert found == {
        "embed_tokens": 324.688,
        "q_proj": 248.526,
        "kv_b_proj": 165.457,
        "router": 39.916,
        "experts": 659.509,
        "newline": 3.424,
        "separator": 4.998,
        "pool": 0.323,
        "pool's last": 16.319,
        "pos_embed": 3.904,
        "qkv": 12.737,
        "adaptor": 147.323,
    }


# What the locations of a lowered program name, below its jit: a part of a layer each.
_LAYER = ("input_layernorm", "post_attention_layernorm", "self_attn/rotary", "self_attn/cache_write")
_LAYER += ("self_attn/attention", "self_attn/o_proj", "self_attn/q_proj")
_MLA = ("self_attn/kv_a_proj_with_mqa", "self_attn/kv_a_layernorm", "self_attn/kv_b_proj")
_MHA = ("self_attn/k_proj", "self_attn/v_proj")
_MOE = ("mlp/router", "mlp/shared_experts")
_EXPERTS = ("mlp/experts/dispatch", "mlp/experts/mlp", "mlp/experts/combine")
_SHARDED_EXPERTS = ("experts/dispatch", "body/mlp", "body/combine")  # within shard_map and a loop, names begin anew
_DENSE = ("mlp/gate_proj", "mlp/up_proj", "mlp/down_proj")
_BLOCK = ("norm1", "attn/qkv", "attn/attention", "attn/proj", "norm2", "mlp/fc1", "mlp/fc2")


@pytest.mark.parametrize("mesh", [False, True], ids=["one device", "mesh"])
@pytest.mark.parametrize("mla", [True, False], ids=["MLA", "MHA"])
def test_a_profile_names_every_part_of_the_model(mla, mesh):
    cfg = config(mla=mla)
    params, _ = abstract_params(cfg)
    cache = jax.eval_shape(lambda: dsvl2_jax.init_cache(cfg, ROWS, CACHE_LENGTH, jnp.float32))

    def image(params, tiles, ids, image_index, lengths, cache):
        features = dsvl2_jax.adapt_tiles(params, cfg, tiles, HALF, HALF)
        merged = dsvl2_jax.merge(params, cfg, ids, image_index, features)
        return dsvl2_jax.prefill(params, cfg, merged, lengths, cache)

    def step(params, tokens, positions, cache):
        return dsvl2_jax.decode_step(params, cfg, tokens, positions, cache)

    lengths = prompts()[-1]
    with jax.set_mesh(dsvl2_jax.make_mesh(data=2, tensor=2, expert=2)) if mesh else contextlib.nullcontext():
        prefilled = jax.jit(image).lower(params, *prompts(), cache).as_text(debug_info=True)
        decoded = jax.jit(step).lower(params, lengths, lengths, cache).as_text(debug_info=True)

    attention = _LAYER + (_MLA if mla else _MHA)
    language = [f"layers_0/DecoderLayer/{part}" for part in attention + _DENSE]
    language += [f"layers_2/DecoderLayer/{part}" for part in attention + _MOE]
    language += _SHARDED_EXPERTS if mesh else [f"layers_2/DecoderLayer/{part}" for part in _EXPERTS]
    language += ["embed_tokens", "Decoder.final_norm/norm", "Decoder.logits/lm_head"]
    vision = [f"blocks_1/VisionBlock/{part}" for part in _BLOCK]
    vision += ["VisionEncoder.embed_patches", "VisionEncoder.final_norm", "projector/Adaptor/layers_1", "merge"]
    for text, parts in ((prefilled, language + vision), (decoded, language)):
        names = set(re.findall(r'loc\("([^"]+)"', text))
        assert [part for part in parts if not any(f"/{part}/" in f"/{name}/" for name in names)] == []
