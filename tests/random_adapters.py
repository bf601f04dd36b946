"""Adapters of random numbers, as parameters that hold one each."""

from __future__ import annotations

import re
import zlib
from typing import Any

import jax.numpy as jnp
import numpy as np

from dsvl2_jax.model.weights import merged, weight_of

# Weights that products read, and how many axes their inputs have; of experts after the first axis.
_INPUTS = (
    (r"(o_proj|attn/proj)/kernel$", 2),
    (r"(self_attn/\w+|(gate|up|down)_proj|fc[12]|qkv|patch_embed|projector/\w+|lm_head)/kernel$", 1),
    (r"experts/\w+_proj$", 1),
    (r"kv_b_proj$", -1),
)


def with_random_adapter(params: Any, targets: str, *, seed: int, rank: int, size: float, gain: bool = False) -> Any:
    """The parameters with an adapter at each weight whose path matches ``targets``, a pattern of `re`.

    Args:
      size: of what it adds, about, over the size of the weights. gain: with gains too, as DoRA has them.
    """

    def walk(value: Any, path: str) -> Any:
        if isinstance(value, dict):
            return {name: walk(inner, f"{path}/{name}".lstrip("/")) for name, inner in value.items()}
        inputs = next((count for pattern, count in _INPUTS if re.search(pattern, path)), None)
        if inputs is None or not re.search(targets, path):
            return value
        lead = 1 if re.search(r"experts/\w+_proj$", path) else 0
        shape = value.shape[lead:]
        into, out = (shape[-1:], shape[:-1]) if inputs < 0 else (shape[:inputs], shape[inputs:])
        draw = np.random.default_rng([seed, zlib.crc32(path.encode())])
        arrays = {
            "lora_a": draw.normal(size=(*value.shape[:lead], *into, rank)) * rank**-0.5,
            "lora_b": draw.normal(size=(*value.shape[:lead], rank, *out)) * size * float(np.std(value)),
        }
        if gain:
            arrays["gain"] = 1 + size * draw.normal(size=(*value.shape[:lead], *out))
        return {"base": value} | {name: jnp.asarray(x, value.dtype) for name, x in arrays.items()}

    return walk(params, "")


def merged_params(params: Any) -> Any:
    """Plain parameters in which each weight with an adapter is one array, as `merged` has it."""

    def walk(value: Any, path: str) -> Any:
        if not isinstance(value, dict):
            return value
        if "base" not in value:
            return {name: walk(inner, f"{path}/{name}") for name, inner in value.items()}
        base = value["base"]
        lead = 1 if re.search(r"experts/\w+_proj$", path) else 0
        inputs = next(count for pattern, count in _INPUTS if re.search(pattern, path))
        packed = -1 if inputs < 0 else lead + inputs - 1 - base.ndim
        return merged(weight_of(value, packed), packed).astype(base.dtype)

    return walk(params, "")
