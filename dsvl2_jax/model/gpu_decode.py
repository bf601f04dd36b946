"""A decoder layer's decode step on one NVIDIA GPU, in bfloat16, as few launches: nine to eleven, where XLA makes 45.

The same parameters, cache and results as `dsvl2_jax.model.decoder.DecoderLayer` with ``decode``, by the kernels of
`dsvl2_jax.kernels`: the order of operations is that of the modules, and what stands around a product is part of its
launch. `dsvl2_jax.model.decoder.hidden_states` chooses it where a program is lowered for CUDA.

Tested in tests/model/test_gpu_decode.py and tests/apps/plan/test_gpu_compile.py.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from dsvl2_jax.kernels import gpu_experts
from dsvl2_jax.kernels.gpu_decode_attention import attend_splits, combine, combine_latent
from dsvl2_jax.kernels.gpu_decode_inputs import heads_into_cache, latent_into_cache
from dsvl2_jax.kernels.gpu_few_rows import MAX_ROWS, has_steps, project
from dsvl2_jax.kernels.quantized import Quantized
from dsvl2_jax.kernels.quantized_cache import QuantizedEntries
from dsvl2_jax.kernels.quantized_matmul import as_matrices
from dsvl2_jax.model.attention import LATENT_NORM_EPS, LayerCache, write_cache
from dsvl2_jax.model.config import LanguageConfig
from dsvl2_jax.model.rotary import rotary_tables
from dsvl2_jax.model.weights import Adapted, are_plain, weight_of
from dsvl2_jax.sharding import ambient_mesh_shape

Rotary = tuple[jax.Array, jax.Array]


def is_supported(config: LanguageConfig, slots: int, dtype: DTypeLike, cache_dtypes: Sequence[DTypeLike]) -> bool:
    """Whether the kernels are for this model, so many slots, and the dtypes of parameters and of the cache's arrays.

    Tensor cores multiply 16 bits, and float32 is for exactness; their tiles want widths that 16 divides, and powers of
    two where a tile is as wide as a head. A cache in int8 has scales in float32 beside it.
    """
    cfg = config
    kinds = {jnp.dtype(kind) for kind in cache_dtypes}
    if dtype != jnp.bfloat16 or kinds not in ({jnp.dtype(jnp.bfloat16)}, {jnp.dtype(jnp.int8), jnp.dtype(jnp.float32)}):
        return False
    if slots > MAX_ROWS or ambient_mesh_shape() is not None:
        return False
    grouped = cfg.topk_method in ("group_limited_greedy", "noaux_tc") and cfg.n_group > 1
    if cfg.attention_bias or cfg.q_lora_rank is not None or grouped:
        return False
    if cfg.use_mla:
        tiles = (cfg.kv_lora_rank, 16), (cfg.qk_rope_head_dim, 32)
        widths = [cfg.qk_nope_head_dim, cfg.v_head_dim]
    else:
        tiles, widths = ((cfg.head_dim, 32),), []
    widths += [cfg.hidden_size, cfg.intermediate_size, cfg.moe_intermediate_size or 16]
    whole = cfg.num_attention_heads % cfg.kv_heads == 0
    return whole and all(w % 16 == 0 for w in widths) and all(w >= least and not w & w - 1 for w, least in tiles)


def reads_layers(params: dict[str, Any], config: LanguageConfig) -> bool:
    """Whether the kernels read the layers' weights as they are kept: plain, or quantized in groups of a step or more.

    Args:
      params: of the decoder, its layers separate.
    """
    return all(_is_read(params[f"layers_{i}"], config.is_moe_layer(i), config) for i in range(config.num_hidden_layers))


def _is_read(layer: dict[str, Any], moe: bool, config: LanguageConfig) -> bool:
    if are_plain(layer):
        return True
    weights = jax.tree.leaves(_weights(layer, moe, config), is_leaf=lambda leaf: isinstance(leaf, Quantized | Adapted))
    if any(isinstance(w, Adapted) or (isinstance(w, Quantized) and not has_steps(w)) for w in weights):
        return False
    if not moe or not config.n_shared_experts:
        return True
    # The shared experts' output is made an expert's inputs at a time.
    stored = layer["mlp"]["experts"]["down_proj"], layer["mlp"]["shared_experts"]["down_proj"]["kernel"]
    one, shared = (weight_of(value, -2) for value in stored)
    return _group(one) == _group(shared)


def _group(weight: Any) -> tuple[str | None, int]:
    """Its kind, and the inputs that share a scale in int4."""
    if not isinstance(weight, Quantized):
        return None, 0
    return weight.kind, weight.shape[-2] // weight.scale.shape[-2] if weight.kind == "int4" else 0


def _weights(layer: dict[str, Any], moe: bool, config: LanguageConfig) -> dict[str, Any]:
    """The weights of a layer as the kernels take them: two axes, or three with those of experts or heads."""
    attention, mlp = layer["self_attn"], layer["mlp"]

    def matrix(module: dict[str, Any], contract: int = 1) -> Any:
        stored = module["kernel"]
        axes = jax.tree.leaves(stored)[0].ndim
        weight = weight_of(stored, contract - 1 - axes)
        if isinstance(weight, Quantized):
            one = as_matrices(weight, contract)
            return dataclasses.replace(one, values=one.values[0], scale=one.scale[0])
        return weight if isinstance(weight, Adapted) else weight.reshape(-1, math.prod(weight.shape[contract:]))

    names = ("q_proj", "kv_a_proj_with_mqa") if config.use_mla else ()
    made = {name: matrix(attention[name]) for name in names} | {"o_proj": matrix(attention["o_proj"], contract=2)}
    if config.use_mla:
        made["kv_b_proj"] = weight_of(attention["kv_b_proj"], -1)
    else:
        made |= {name: weight_of(attention[name]["kernel"], -3) for name in ("q_proj", "k_proj", "v_proj")}
    projections = "gate_proj", "up_proj", "down_proj"
    if not moe:
        return made | {name: matrix(mlp[name]) for name in projections}
    made |= {name: weight_of(mlp["experts"][name], -2) for name in projections}
    if config.n_shared_experts:
        made |= {f"shared_{name}": matrix(mlp["shared_experts"][name]) for name in projections}
    return made


def rotary_of(config: LanguageConfig, positions_b: jax.Array) -> Rotary:
    """cos and sin, f32[B, width/2], that all layers of a step share."""
    return rotary_tables(config, positions_b, positions_b + 1)


@functools.partial(jax.jit, static_argnames=("config", "moe", "interpret"))
def decode_layer(
    params: dict[str, Any],
    config: LanguageConfig,
    x_bd: jax.Array,
    positions_b: jax.Array,
    active_b: jax.Array,
    rotary: Rotary,
    cache: LayerCache,
    *,
    moe: bool,
    interpret: bool = False,
) -> tuple[jax.Array, LayerCache]:
    """One layer for one token of each slot.

    Args:
      params: of the layer.
      x_bd: [B, D], the residual stream.
      positions_b: i32[B], the position in the cache that each token takes.
      active_b: i32[B], 0 for rows whose result does not count: they visit no expert.
      rotary: of `rotary_of`.
      cache: of the layer.
      moe: static, whether the layer has experts.

    Returns:
      [B, D], and the cache with the new entries.
    """
    weights = _weights(params, moe, config)
    attention = _latent_attention if config.use_mla else _multi_head_attention
    out_bhd, cache = attention(params, weights, config, x_bd, positions_b, rotary, cache, interpret)
    with jax.named_scope("self_attn/o_proj"):
        flat = out_bhd.reshape(len(x_bd), -1), [weights["o_proj"]]
        (x_bd,) = project(*flat, residual_mn=x_bd, interpret=interpret)
    scale_d = params["post_attention_layernorm"]["scale"]
    with jax.named_scope("mlp"):
        if moe:
            return _experts(params["mlp"], weights, config, x_bd, scale_d, active_b, interpret), cache
        into = weights["gate_proj"], weights["up_proj"]
        (hidden_bf,) = project(x_bd, [into], scale_d, eps=config.rms_norm_eps, interpret=interpret)
        (x_bd,) = project(hidden_bf, [weights["down_proj"]], residual_mn=x_bd, interpret=interpret)
        return x_bd, cache


@jax.named_scope("self_attn")
def _multi_head_attention(
    params: dict[str, Any],
    weights: dict[str, Any],
    config: LanguageConfig,
    x_bd: jax.Array,
    positions_b: jax.Array,
    rotary: Rotary,
    cache: LayerCache,
    interpret: bool,
) -> tuple[jax.Array, LayerCache]:
    """[B, H, Dv], and the cache."""
    into, at_b = (cache["key"], cache["value"]), positions_b
    quantized = isinstance(cache["key"], QuantizedEntries)
    if quantized:
        # A program makes a part of a head, and does not see the rest, on which the scale depends.
        into = tuple(jnp.zeros((len(x_bd), 1, *entries.shape[2:]), x_bd.dtype) for entries in into)
        at_b = jnp.zeros_like(positions_b)
    q_bhd, keys, values = heads_into_cache(
        x_bd,
        params["input_layernorm"]["scale"],
        tuple(weights[name] for name in ("q_proj", "k_proj", "v_proj")),
        rotary,
        at_b,
        into,
        eps=config.rms_norm_eps,
        interpret=interpret,
    )
    new = {"key": keys, "value": values}
    cache = write_cache(cache, new, positions_b[:, None]) if quantized else new
    options = {"scale": config.softmax_scale, "interpret": interpret}
    split = attend_splits([q_bhd], [cache["key"]], cache["value"], positions_b, **options)
    return combine(*split, dtype=x_bd.dtype, interpret=interpret), cache


@jax.named_scope("self_attn")
def _latent_attention(
    params: dict[str, Any],
    weights: dict[str, Any],
    config: LanguageConfig,
    x_bd: jax.Array,
    positions_b: jax.Array,
    rotary: Rotary,
    cache: LayerCache,
    interpret: bool,
) -> tuple[jax.Array, LayerCache]:
    """[B, H, Dv], and the cache."""
    cfg = config
    width, nope = cfg.qk_nope_head_dim + cfg.qk_rope_head_dim, cfg.qk_nope_head_dim
    into = [weights["q_proj"], weights["kv_a_proj_with_mqa"]]
    scale_d = params["input_layernorm"]["scale"]
    q_bm, compressed_bc = project(x_bd, into, scale_d, eps=cfg.rms_norm_eps, interpret=interpret)
    q_latent_bhr, q_rope_bhd, latent_bsr, key_bsd = latent_into_cache(
        q_bm.reshape(len(x_bd), -1, width),
        compressed_bc,
        params["self_attn"]["kv_a_layernorm"]["scale"],
        weights["kv_b_proj"],
        rotary,
        positions_b,
        (cache["latent"], cache["rope_key"]),
        eps=LATENT_NORM_EPS,
        interpret=interpret,
    )
    # One head of keys.
    queries, keys = [q_latent_bhr, q_rope_bhd], jax.tree.map(lambda a: a[:, :, None], [latent_bsr, key_bsd])
    split = attend_splits(queries, keys, None, positions_b, scale=cfg.softmax_scale, interpret=interpret)
    out_bhd = combine_latent(*split, weights["kv_b_proj"], first_row=nope, dtype=x_bd.dtype, interpret=interpret)
    return out_bhd, {"latent": latent_bsr, "rope_key": key_bsd}


def _experts(
    params: dict[str, Any],
    weights: dict[str, Any],
    config: LanguageConfig,
    x_bd: jax.Array,
    scale_d: jax.Array,
    active_b: jax.Array,
    interpret: bool,
) -> jax.Array:
    """[B, D], with what the experts give added."""
    cfg = config
    first: list[Any] = [params["router"]["kernel"].astype(jnp.float32)]
    if cfg.n_shared_experts:
        first.append((weights["shared_gate_proj"], weights["shared_up_proj"]))
    logits_be, *shared_bf = project(x_bd, first, scale_d, eps=cfg.rms_norm_eps, interpret=interpret)
    bias_e = params["router"]["correction_bias"].astype(jnp.float32) if cfg.topk_method == "noaux_tc" else None
    experts_bk, weights_bk = gpu_experts.choose_experts(
        logits_be,
        bias_e,
        active_b,
        count=cfg.num_experts_per_tok,
        scoring=cfg.scoring_func,
        normalize=cfg.norm_topk_prob and cfg.num_experts_per_tok > 1,
        factor=cfg.routed_scaling_factor,
        interpret=interpret,
    )
    into = weights["gate_proj"], weights["up_proj"]
    hidden_cf = gpu_experts.gate_up(x_bd, scale_d, *into, experts_bk, eps=cfg.rms_norm_eps, interpret=interpret)
    out_bkd, shared_nbd = gpu_experts.down(
        hidden_cf,
        weights["down_proj"],
        experts_bk,
        weights_bk,
        shared_bf[0] if shared_bf else None,
        weights.get("shared_down_proj"),
        interpret=interpret,
    )
    # Added one by one, which XLA makes one pass of.
    total_bd = x_bd.astype(jnp.float32)
    for k in range(cfg.num_experts_per_tok):
        total_bd += jnp.where(experts_bk[:, k, None] < cfg.n_routed_experts, out_bkd[:, k], 0)
    for n in range(cfg.n_shared_experts or 0):
        total_bd += shared_nbd[n]
    return total_bd.astype(x_bd.dtype)
