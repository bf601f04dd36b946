"""DeepSeek-VL2 in JAX/Flax: convert the released checkpoints, run them, train them.

import dsvl2_jax

model = dsvl2_jax.load("deepseek-ai/deepseek-vl2-tiny", dtype="bfloat16")
inputs = model.processor([{"role": "user", "content": "<image>\\nWhat is this?", "images": ["photo.jpg"]}])
print(model.generate(inputs, max_new_tokens=128).text)
"""

from __future__ import annotations

import importlib
from typing import Any

# Names are found on first use, so that reading a tokenizer or printing help does not import jax.
_EXPORTS = {
    "Config": "dsvl2_jax.model.config",
    "DSVL2Error": "dsvl2_jax.errors",
    "Generation": "dsvl2_jax.infer.answer",
    "Model": "dsvl2_jax.infer.engine",
    "Processor": "dsvl2_jax.inputs.processor",
    "SamplingParams": "dsvl2_jax.infer.sampling",
    "adapt_tiles": "dsvl2_jax.model.deepseek_vl2",
    "decode_step": "dsvl2_jax.model.deepseek_vl2",
    "draw_boxes": "dsvl2_jax.inputs.grounding",
    "init_cache": "dsvl2_jax.model.cache",
    "load": "dsvl2_jax.infer.engine",
    "make_mesh": "dsvl2_jax.sharding",
    "merge": "dsvl2_jax.model.deepseek_vl2",
    "prefill": "dsvl2_jax.model.deepseek_vl2",
}

__all__ = sorted(_EXPORTS)


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(importlib.import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_EXPORTS])
