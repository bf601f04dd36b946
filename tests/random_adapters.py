"""Adapters of random numbers."""

from __future__ import annotations

import re
import zlib
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from dsvl2_jax.checkpoint.adapters import AdapterSettings, array_shapes
from dsvl2_jax.checkpoint.rules import linear_leaves
from dsvl2_jax.model.config import Config
from dsvl2_jax.model.weights import is_stored_weight, merged, weight_of


def random_adapter(
    config: Config, targets: str, *, seed: int = 0, rank: int = 4, size: float = 0.01, dora: bool = False
) -> tuple[dict[str, Any], AdapterSettings]:
    """As `read_adapter` returns it, of the parameters whose name matches ``targets``, a pattern of `re`.

    Args:
      size: of lora_b's numbers, about.
    """
    arrays: dict[tuple[str, ...], dict[str, np.ndarray]] = {}
    for path, leaf in linear_leaves(config).items():
        if not re.search(targets, leaf.name):
            continue
        draw = np.random.default_rng([seed, zlib.crc32(leaf.name.encode())])
        shapes = array_shapes(leaf, rank)
        arrays[path] = {
            "lora_a": draw.normal(size=shapes["lora_a"]).astype(np.float32),
            "lora_b": size * draw.normal(size=shapes["lora_b"]).astype(np.float32),
        }
        if dora:
            arrays[path]["magnitude"] = draw.uniform(0.5, 1.5, shapes["magnitude"]).astype(np.float32)
    return unflatten_dict(arrays), AdapterSettings("dora" if dora else "lora", rank, alpha=2.0 * rank)


def merged_params(params: Any, config: Config) -> Any:
    """Parameters with one adapter as plain ones."""
    leaves = linear_leaves(config)

    def plain(path: tuple[str, ...], value: Any) -> Any:
        if not is_stored_weight(value):
            return value
        packed = leaves[path].inputs[-1] - len(leaves[path].shape)
        return merged(weight_of(value, packed), packed).astype(value["base"].dtype)

    flat = flatten_dict(params, is_leaf=lambda _, value: is_stored_weight(value))
    return unflatten_dict({path: plain(path, value) for path, value in flat.items()})
