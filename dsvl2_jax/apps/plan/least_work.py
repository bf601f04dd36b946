"""The least that a job costs: FLOPs of the products that the model needs, bytes that must pass through memory.

The planner compares these with what the compiled program does (`dsvl2_jax.apps.plan.hlo_walk`).

Tested in tests/apps/plan/test_planner.py.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

from dsvl2_jax.model.cache import token_bytes
from dsvl2_jax.model.config import Config, LanguageConfig
from dsvl2_jax.model.deepseek_vl2 import abstract_leaves
from dsvl2_jax.model.parameter_paths import LeafPath, path_name
from dsvl2_jax.model.quantization import Quantization, leaves_of, quantized_weights
from dsvl2_jax.train.flops import StepFlops, step_flops
from dsvl2_jax.train.settings.schema import ParameterRule


@dataclasses.dataclass(frozen=True)
class Work:
    """Of a whole job, all devices together: FLOPs, and bytes read and written once."""

    flops: float
    bytes: float


@dataclasses.dataclass(frozen=True)
class _Weights:
    """Bytes of the language model's parameters, by how a job reads them."""

    whole: int  # read by every job: all but the embedding table and the routed experts
    expert: float  # of one routed expert of one layer
    expert_layers: int
    row: int  # of the embedding table
    head: int  # entries of the output head


def encode_work(config: Config, tiles: int, itemsize: int = 2, *, quantization: Quantization | None = None) -> Work:
    """Encoder and adaptor on ``tiles`` tiles, their weights in ``itemsize`` bytes each where they are not quantized."""
    weights = sum(
        size
        for path, size in _weight_bytes(config, itemsize, quantization)
        if path[0] in ("vision", "projector") and "attn_pool" not in path
    )
    pixels = 3 * config.vision.image_size**2
    made = config.tokens_per_tile * config.language.hidden_size * itemsize
    return Work(_forward(config).per_tile * tiles, weights + tiles * (pixels + made))


def prefill_work(
    config: Config,
    rows: int,
    length: int,
    itemsize: int = 2,
    *,
    before: int = 0,
    quantization: Quantization | None = None,
    cache_dtype: str = "bfloat16",
) -> Work:
    """Prompts of ``length`` tokens each into the cache; logits of the last token alone.

    Args:
      cache_dtype: of the cache.
      before: tokens of each prompt that are in the cache already, to which the others attend.
      quantization: of the weights; the others have ``itemsize`` bytes a number.
    """
    weights, forward = _language(config, itemsize, quantization), _forward(config)
    per_token = forward.per_token - 2.0 * weights.head
    pairs = rows * length * ((length + 1) / 2 + before)
    flops = rows * length * per_token + rows * 2.0 * weights.head + forward.per_pair * pairs
    moved = weights.whole + _experts(config.language, weights, rows * length) + rows * length * weights.row
    return Work(flops, moved + rows * (before + length) * token_bytes(config.language, cache_dtype))


def decode_work(
    config: Config,
    slots: int,
    cache_length: int,
    itemsize: int = 2,
    *,
    quantization: Quantization | None = None,
    cache_dtype: str = "bfloat16",
) -> Work:
    """One token for each of ``slots`` decode slots, with ``cache_length`` tokens in each cache.

    Latent attention runs in its absorbed form: the up-projection of keys and values is applied to queries and outputs,
    which takes as many products, and a head's score and value are as wide as the cache.
    """
    cfg, weights, forward = config.language, _language(config, itemsize, quantization), _forward(config)
    per_pair = forward.per_pair
    if cfg.use_mla:
        widths = 2 * cfg.kv_lora_rank + cfg.qk_rope_head_dim
        per_pair = 2.0 * cfg.num_attention_heads * widths * cfg.num_hidden_layers
    flops = slots * (forward.per_token + per_pair * cache_length)
    moved = weights.whole + _experts(cfg, weights, slots) + slots * weights.row
    return Work(flops, moved + slots * cache_length * token_bytes(cfg, cache_dtype))


def _experts(config: LanguageConfig, weights: _Weights, tokens: int) -> float:
    """Bytes of the routed experts that ``tokens`` tokens visit at most."""
    visited = min(tokens * config.num_experts_per_tok, config.n_routed_experts)
    return visited * weights.expert * weights.expert_layers


def _forward(config: Config) -> StepFlops:
    """Of a forward pass alone."""
    frozen = ParameterRule(train=False)
    return step_flops(config, {path_name(path): frozen for path in abstract_leaves(config)})


def _weight_bytes(config: Config, itemsize: int, quantization: Quantization | None) -> Iterator[tuple[LeafPath, int]]:
    """(path, bytes) of every array of the parameters."""
    for path, (shape, dtype) in leaves_of(config, quantized_weights(config, quantization)).items():
        yield path, math.prod(shape) * (itemsize if dtype is None else dtype.itemsize)


def _language(config: Config, itemsize: int, quantization: Quantization | None) -> _Weights:
    cfg = config.language
    whole = expert = 0
    for path, size in _weight_bytes(config, itemsize, quantization):
        if path[0] != "language" or path[1] == "embed_tokens":
            continue
        if "experts" in path and "mlp" in path:
            expert += size
        else:
            whole += size
    layers = sum(cfg.is_moe_layer(i) for i in range(cfg.num_hidden_layers))
    row, head = itemsize * cfg.hidden_size, cfg.hidden_size * cfg.vocab_size
    return _Weights(whole, expert / max(1, layers * cfg.n_routed_experts), layers, row, head)
