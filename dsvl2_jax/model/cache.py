"""The decode cache: its layout, and an empty one. Tested in tests/infer/test_engine.py and tests/model/."""

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
    """An empty cache, which `prefill` fills and `decode_step` reads; under `jax.set_mesh` it is split over the mesh.

    Args:
      config: static.
      slots: rows that decode together: the B of `prefill`.
      cache_length: positions of a row, for its prompt and its answer.
      dtype: of the arrays; usually that of the parameters.

    Returns:
      A dict for each layer: "latent" [slots, cache_length, R] and "rope_key" [slots, cache_length, rope width] for
      latent attention, "key" and "value" [slots, cache_length, key heads, head width] for multi-head attention.
    """
    layout = cache_layout(config.language)

    def layer() -> dict[str, jax.Array]:
        return {
            name: constrain(jnp.zeros((slots, cache_length, *shape), dtype), "slots", "cache_length", *axes)
            for name, (shape, axes) in layout.items()
        }

    return [layer() for _ in range(config.language.num_hidden_layers)]
