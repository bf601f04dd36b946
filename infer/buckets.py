"""The decode cache and the shape buckets that keep compiled programs few (DESIGN §4.8)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from dsvl2_jax.model.config import Config, LanguageConfig
from dsvl2_jax.model.decoder import Cache
from dsvl2_jax.sharding import constrain

SHORT_LENGTHS = (64, 128, 256)
LENGTH_STEP = 512  # a multiple of attention.QUERY_BLOCK
TILE_BUCKETS = (2, 4, 6, 8, 10, 12, 16, 20, 24, 28, 32)
TILE_STEP = 8


def length_bucket(tokens: int) -> int:
    """The least compiled length that holds ``tokens``: 64, 128, 256, then multiples of 512."""
    for size in SHORT_LENGTHS:
        if tokens <= size:
            return size
    return -(-tokens // LENGTH_STEP) * LENGTH_STEP


def tile_bucket(tiles: int, devices: int = 1) -> int:
    """The least compiled number of tiles, a multiple of ``devices`` so that they share evenly; 0 stays 0."""
    if tiles == 0:
        return 0
    size = next((b for b in TILE_BUCKETS if tiles <= b), -(-tiles // TILE_STEP) * TILE_STEP)
    return -(-size // devices) * devices


def batch_bucket(rows: int) -> int:
    """The least power of two that holds ``rows``."""
    return 1 << (rows - 1).bit_length()


def cache_layout(config: LanguageConfig) -> dict[str, tuple[tuple[int, ...], tuple[str | None, ...]]]:
    """Name → (shape of a token's entry, its logical axes), of one layer; batch and slots come before.

    Latent attention keeps ``kv_lora_rank + qk_rope_head_dim`` numbers per token and layer (576 for small and
    base), multi-head attention all keys and values (2,560 for tiny).
    """
    if config.use_mla:
        return {
            "latent": ((config.kv_lora_rank,), ("latent",)),
            "rope_key": ((config.qk_rope_head_dim,), ("head_dim",)),
        }
    heads = (config.kv_heads, config.head_dim), ("kv_heads", "head_dim")
    return {"key": heads, "value": heads}


def init_cache(config: Config, batch: int, slots: int, dtype: DTypeLike) -> Cache:
    """An empty cache, jittable: per layer the arrays of `cache_layout`, as `dsvl2_jax.model.attention` describes them."""
    layout = cache_layout(config.language)

    def layer() -> dict[str, jax.Array]:
        return {
            name: constrain(jnp.zeros((batch, slots, *shape), dtype), "slots", "cache_length", *axes)
            for name, (shape, axes) in layout.items()
        }

    return [layer() for _ in range(config.language.num_hidden_layers)]
