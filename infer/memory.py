"""Whether decode slots of a length fit into a device's memory: an error before anything is compiled.

Tested in tests/infer/test_context.py.
"""

from __future__ import annotations

import collections
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.typing import DTypeLike

from dsvl2_jax.errors import DSVL2Error
from dsvl2_jax.model.cache import cache_arrays
from dsvl2_jax.model.config import Config, LanguageConfig
from dsvl2_jax.runtime.hardware import device_memory
from dsvl2_jax.sharding import ACTIVATION_RULES, mesh_axes, partition_spec


def cache_bytes(config: LanguageConfig, slots: int, length: int, sizes: Mapping[str, int], dtype: DTypeLike) -> int:
    """Bytes of a device that the caches of some slots take, each of a length; ``sizes``: of the mesh's axes."""
    total = 0
    for entry, names, itemsize in cache_arrays(config, dtype):
        shape, axes = (slots, length, *entry), ("slots", "cache_length", *names)
        total += config.num_hidden_layers * _own_part(shape, axes, sizes) * itemsize
    return total


def _own_part(shape: tuple[int, ...], axes: tuple[str | None, ...], sizes: Mapping[str, int]) -> int:
    """Numbers of an array that a device has."""
    spec = partition_spec(shape, axes, sizes, ACTIVATION_RULES)
    return math.prod(shape) // math.prod(sizes[name] for part in spec for name in mesh_axes(part))


def check_memory(
    params: Any,
    config: Config,
    mesh: Mesh | None,
    dtype: DTypeLike,
    cache_dtype: DTypeLike,
    slots: int,
    length: int,
    tiles: int,
) -> None:
    """Refuses caches that do not fit beside the parameters.

    Args:
      params: arrays on their devices.
      dtype: in which the model computes. cache_dtype: of the caches.
      slots, length: of the caches; one row more is being prefilled.
      tiles: of the longest prompt's pictures, whose features are kept meanwhile.

    Raises:
      DSVL2Error: parameters and caches are more than a device's memory. Says what would fit.
    """
    sizes = {} if mesh is None else dict(mesh.shape)
    held: collections.Counter[jax.Device] = collections.Counter()
    for leaf in jax.tree.leaves(params):
        for shard in leaf.addressable_shards:
            held[shard.device] += shard.data.nbytes
    device, parameters = held.most_common(1)[0]
    memory = device_memory(device)
    language = config.language
    caches = sum(cache_bytes(language, rows, length, sizes, cache_dtype) for rows in (slots, 1))
    table = (tiles, config.tokens_per_tile, language.hidden_size)
    caches += _own_part(table, (None, None, "features"), sizes) * jnp.dtype(dtype).itemsize
    if parameters + caches <= memory:
        return
    fitting = int(max(0.0, memory - parameters) / (caches / length)) // 512 * 512
    context = f"a context of {fitting} (--context) or less" if fitting else "weights of fewer bytes"
    raise DSVL2Error(
        f"{slots} answers at a time with a context of {length} positions need {(parameters + caches) / 1e9:.2f} GB of "
        f"a device's memory ({parameters / 1e9:.2f} GB of parameters, {caches / 1e9:.2f} GB of caches), but it has "
        f"{memory / 1e9:.2f} GB. What helps: {context}, fewer answers at a time, bfloat16, or a mesh of more devices, "
        "over which caches are split too; dsvl2 plan says what fits where."
    )
