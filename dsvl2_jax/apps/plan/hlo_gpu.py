"""What calls into GPU libraries and Triton kernels cost, as their text in an optimized program says.

XLA's GPU compiler writes matrix products that it leaves to cuBLAS, and attention that it leaves to cuDNN, as custom
calls without a cost: FLOPs follow from their shapes. Our own kernels carry theirs
(`dsvl2_jax.kernels.triton.cost_metadata`, `dsvl2_jax.kernels.hopper.cost_scope`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from dsvl2_jax.kernels.tpu import ATTENTION_BLOCK

_TARGET = re.compile(r'custom_call_target="([^"]+)"')
# {"flops": "123", "bytes_accessed": "456"} within a string whose quotes are escaped as \22.
_METADATA = re.compile(r'serialized_metadata = "([^"]*)"')
_DECLARED = re.compile(r"\\22(flops|bytes_accessed)\\22: \\22(\d+)\\22")
TRITON = "__gpu$xla.gpu.triton"
MOSAIC = "mosaic_gpu"  # and a version
_SCOPE = re.compile(r'op_name="[^"]*\bflops=(\d+)/')


def declared_cost(attributes: str) -> dict[str, str]:
    """What a Triton kernel of ours says of its ``flops`` and ``bytes_accessed``; empty for any other call.

    Args:
      attributes: text after the call's operands.
    """
    metadata = _METADATA.search(attributes) if f'"{TRITON}"' in attributes else None
    return dict(_DECLARED.findall(metadata[1])) if metadata else {}


def custom_call_flops(attributes: str, config: Mapping[str, Any], shapes: Sequence[tuple[int, ...]]) -> float | None:
    """FLOPs of a custom call of a GPU program.

    Args:
      attributes: text after the call's operands.
      config: its ``backend_config``, where that is JSON.
      shapes: of the operands' arrays.

    Returns:
      None: it is none of those known here.
    """
    named = _TARGET.search(attributes)
    target = named[1] if named else ""
    if target.startswith(MOSAIC):
        declared = _SCOPE.search(attributes)
        return float(declared[1]) if declared else None
    if target.startswith("__cublas$") and "gemm_backend_config" in config:
        return _gemm(config["gemm_backend_config"]["dot_dimension_numbers"], shapes)
    if target.startswith("__cudnn$fmha"):
        return _attention(config["cudnn_fmha_backend_config"], shapes, backward=target.endswith("Backward"))
    return None


def _gemm(numbers: Mapping[str, Any], shapes: Sequence[tuple[int, ...]]) -> float:
    """Batch × rows × contracted × columns; the numbers are written as strings."""
    left, right = shapes[:2]
    contracted = {int(d) for d in numbers.get("rhs_contracting_dimensions", ())}
    shared = contracted | {int(d) for d in numbers.get("rhs_batch_dimensions", ())}
    columns = math.prod(size for d, size in enumerate(right) if d not in shared)
    return 2.0 * math.prod(left) * columns


def _attention(config: Mapping[str, Any], shapes: Sequence[tuple[int, ...]], *, backward: bool) -> float:
    """Two products of scores with keys' and values' widths; five in the backward pass, which makes scores again."""
    batch, heads, queries, keys = (int(size) for size in config["intermediate_tensor_shape"]["dimensions"])
    key_width, value_width = shapes[0][-1], shapes[2][-1]
    pairs = batch * heads * queries * keys / (2 if "CAUSAL" in config.get("mask_type", "") else 1)
    widths = 3 * key_width + 2 * value_width if backward else key_width + value_width
    return 2.0 * pairs * widths


# Products as wide as keys, and as values, of jax's splash attention kernels for TPUs, which declare no cost.
_SPLASH = {"fwd": (1, 1), "dq": (2, 1), "dkv": (2, 2)}


def splash_flops(name: str, shapes: Sequence[tuple[int, ...]]) -> float:
    """FLOPs of a causal splash attention kernel by its operation's name; 0 when it is none.

    Args:
      shapes: of the operands; query, key and value [..., T, width] are the first three of them after the mask's blocks.
    """
    kernel = re.match(r"splash_mha_(fwd|dq|dkv)", name)
    if kernel is None:
        return 0.0
    query, _, value = [shape for shape in shapes if shape[-1] > 1 and len(shape) >= 3 and shape[-2] >= 128][:3]
    keys, values = _SPLASH[kernel[1]]
    blocks = max(1, query[-2] // ATTENTION_BLOCK)
    pairs = math.prod(query[:-1]) * query[-2] * (blocks + 1) / (2 * blocks)
    return 2.0 * pairs * (keys * query[-1] + values * value[-1])
