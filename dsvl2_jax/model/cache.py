"""The decode cache: its layout, and an empty one. Tested in tests/infer/test_engine.py and tests/model/."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from dsvl2_jax.errors import UsageError
from dsvl2_jax.kernels.quantized_cache import Entries, QuantizedEntries
from dsvl2_jax.model.attention import ENTRY_AXES, cache_axes
from dsvl2_jax.model.config import Config, LanguageConfig
from dsvl2_jax.model.decoder import Cache
from dsvl2_jax.sharding import constrain

CACHE_DTYPES = ("float32", "bfloat16", "int8")


def cache_layout(config: LanguageConfig) -> dict[str, tuple[tuple[int, ...], tuple[str | None, ...]]]:
    """Name → (shape of a token's entry, its logical axes), of one layer; [slots, cache_length] come before.

    Latent attention keeps ``kv_lora_rank + qk_rope_head_dim`` numbers per token and layer (576 for small and
    base), multi-head attention all keys and values (2,560 for tiny).
    """
    if config.use_mla:
        shapes = {"latent": (config.kv_lora_rank,), "rope_key": (config.qk_rope_head_dim,)}
    else:
        shapes = dict.fromkeys(("key", "value"), (config.kv_heads, config.head_dim))
    return {name: (shape, ENTRY_AXES[name]) for name, shape in shapes.items()}


def cache_arrays(config: LanguageConfig, dtype: DTypeLike) -> list[tuple[tuple[int, ...], tuple[str | None, ...], int]]:
    """(shape of a token's part, its logical axes, bytes of a number) of each array of a layer's cache.

    In int8 the scales are arrays too: one number in float32 for each vector.
    """
    layout = list(cache_layout(config).values())
    arrays = [(shape, axes, jnp.dtype(dtype).itemsize) for shape, axes in layout]
    if jnp.dtype(dtype) == jnp.int8:
        arrays += [(shape[:-1], axes[:-1], 4) for shape, axes in layout]
    return arrays


def token_bytes(config: LanguageConfig, dtype: DTypeLike) -> int:
    """Bytes that the cache keeps of a token, in all layers."""
    return config.num_hidden_layers * sum(size * math.prod(shape) for shape, _, size in cache_arrays(config, dtype))


def check_cache_dtype(dtype: str | None) -> None:
    """Raises UsageError for anything but None or a name of `CACHE_DTYPES`."""
    if dtype is not None and dtype not in CACHE_DTYPES:
        raise UsageError(f"cache dtype {dtype!r}: expected one of {', '.join(CACHE_DTYPES)}.")


def init_cache(config: Config, slots: int, cache_length: int, dtype: DTypeLike) -> Cache:
    """An empty cache, which `prefill` fills and `decode_step` reads; under `jax.set_mesh` it is split over the mesh.

    Args:
      config: static.
      slots: rows that decode together: the B of `prefill`.
      cache_length: positions of a row, for its prompt and its answer.
      dtype: of the entries; usually that of the parameters. int8: `QuantizedEntries`.

    Returns:
      A dict for each layer: "latent" [slots, cache_length, R] and "rope_key" [slots, cache_length, rope width] for
      latent attention, "key" and "value" [slots, cache_length, key heads, head width] for multi-head attention.
    """

    def empty(name: str, shape: tuple[int, ...]) -> Entries:
        values = jnp.zeros((slots, cache_length, *shape), dtype)
        if values.dtype != jnp.int8:
            return constrain(values, *cache_axes(name, values))
        entries = QuantizedEntries(values, jnp.zeros(values.shape[:-1], jnp.float32))
        return jax.tree.map(lambda x: constrain(x, *cache_axes(name, x)), entries)

    layout = cache_layout(config.language).items()
    return [{name: empty(name, shape) for name, (shape, _) in layout} for _ in range(config.language.num_hidden_layers)]
