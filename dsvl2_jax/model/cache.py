"""The decode cache: its layout, and an empty one."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from dsvl2_jax.model.config import Config, LanguageConfig
from dsvl2_jax.model.decoder import Cache
from dsvl2_jax.sharding import constrain


def cache_layout(config: LanguageConfig) -> dict[str, tuple[tuple[int, ...], tuple[str | None, ...]]]:
    """Name → (shape of a token's entry, its logical axes), of one layer; [slots, cache_length] come before.

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


def init_cache(config: Config, slots: int, cache_length: int, dtype: DTypeLike) -> Cache:
    """An empty cache, jittable: per layer the arrays of `cache_layout`; see `dsvl2_jax.model.attention`."""
    layout = cache_layout(config.language)

    def layer() -> dict[str, jax.Array]:
        return {
            name: constrain(jnp.zeros((slots, cache_length, *shape), dtype), "slots", "cache_length", *axes)
            for name, (shape, axes) in layout.items()
        }

    return [layer() for _ in range(config.language.num_hidden_layers)]
