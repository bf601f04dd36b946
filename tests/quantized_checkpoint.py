"""Checkpoints in the released layout, quantized as other libraries write them, made from small ones with PyTorch.

What each weight stands for is computed here apart from the code under test, from the definitions of the formats.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import released_checkpoint

Parts = dict  # name → torch.Tensor

NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


def _blocks(weight, rows, columns, largest):
    """The scale of each block, [⌈out / rows⌉, ⌈in / columns⌉], and the same for each element."""
    torch = pytest.importorskip("torch")
    height, width = weight.shape
    padded = torch.nn.functional.pad(weight.abs(), (0, -width % columns, 0, -height % rows))
    blocks = padded.reshape(padded.shape[0] // rows, rows, padded.shape[1] // columns, columns)
    scale = blocks.amax((1, 3)).clamp(min=1e-6) / largest
    return scale, scale.repeat_interleave(rows, 0).repeat_interleave(columns, 1)[:height, :width]


def float8(rows: int, columns: int, name: str = "weight_scale_inv", shape: Callable = lambda scale: scale):
    """float8 of which blocks share a scale; ``shape``: from [blocks, blocks] to the scale's stored shape."""

    def quantize(layer: str, weight) -> tuple[Parts, object]:
        torch = pytest.importorskip("torch")
        height, width = weight.shape
        scale, spread = _blocks(weight, min(rows, height), min(columns, width), 448)
        values = (weight / spread).to(torch.float8_e4m3fn)
        return {f"{layer}.weight": values, f"{layer}.{name}": shape(scale)}, values.float() * spread

    return quantize


def int8(layer: str, weight) -> tuple[Parts, object]:
    """compressed-tensors: a bfloat16 scale for each output."""
    torch = pytest.importorskip("torch")
    scale = (weight.abs().amax(1, keepdim=True).clamp(min=1e-6) / 127).bfloat16()
    values = (weight / scale.float()).round().clamp(-128, 127).to(torch.int8)
    return {f"{layer}.weight": values, f"{layer}.weight_scale": scale}, values.float() * scale.float()


def int8_with_zero_points(layer: str, weight) -> tuple[Parts, object]:
    torch = pytest.importorskip("torch")
    low, high = weight.amin(1, keepdim=True), weight.amax(1, keepdim=True)
    scale = (high - low).clamp(min=1e-6) / 255
    zero = (-128 - low / scale).round().clamp(-128, 127)
    values = (weight / scale + zero).round().clamp(-128, 127).to(torch.int8)
    parts = {
        f"{layer}.weight": values,
        f"{layer}.weight_scale": scale,
        f"{layer}.weight_zero_point": zero.to(torch.int8),
    }
    return parts, (values.float() - zero) * scale


def llm_int8(layer: str, weight) -> tuple[Parts, object]:
    """bitsandbytes: the largest of each output."""
    torch = pytest.importorskip("torch")
    largest = weight.abs().amax(1).clamp(min=1e-6)
    values = (weight * (127 / largest[:, None])).round().to(torch.int8)
    parts = {
        f"{layer}.weight": values,
        f"{layer}.SCB": largest,
        f"{layer}.weight_format": torch.tensor(0, dtype=torch.uint8),
    }
    return parts, values.float() * (largest / 127)[:, None]


def _pack(values, bits: int, axis: int):
    """Whole numbers from -2^(bits-1) on → i32, the first of a word lowest."""
    torch = pytest.importorskip("torch")
    count = 32 // bits
    values = (values + (1 << (bits - 1))).long().movedim(axis, -1)
    values = torch.nn.functional.pad(values, (0, -values.shape[-1] % count))
    words = values.reshape(*values.shape[:-1], -1, count)
    packed = sum(words[..., i] << (bits * i) for i in range(count))
    packed = torch.where(packed >= 1 << 31, packed - (1 << 32), packed)
    return packed.to(torch.int32).movedim(-1, axis)


def packed(bits: int, group: int | None, symmetric: bool):
    """compressed-tensors' pack-quantized; ``group`` None: a scale for each output."""

    def quantize(layer: str, weight) -> tuple[Parts, object]:
        torch = pytest.importorskip("torch")
        half, columns = 1 << (bits - 1), group or weight.shape[1]
        scale, spread = _blocks(weight, 1, columns, half - 1)
        zero = torch.zeros_like(scale)
        if not symmetric:
            zero = (torch.arange(scale.numel()).reshape(scale.shape) % 5 - 2).float()
        zeros = zero.repeat_interleave(columns, 1)[:, : weight.shape[1]]
        values = (weight / spread + zeros).round().clamp(-half, half - 1)
        parts = {
            f"{layer}.weight_packed": _pack(values, bits, 1),
            f"{layer}.weight_shape": torch.tensor(weight.shape),
            f"{layer}.weight_scale": scale,
        }
        if not symmetric:
            parts[f"{layer}.weight_zero_point"] = _pack(zero, bits, 0)
        return parts, (values - zeros) * spread

    return quantize


def _nearest(x, table):
    """The index of the number of an ascending table that is nearest to each of x."""
    torch = pytest.importorskip("torch")
    return torch.bucketize(x.contiguous(), (table[1:] + table[:-1]) / 2)


def nf4(nested: bool, block: int = 64, inner: int = 16):
    """bitsandbytes' 4 bits, with the scales in 8 bits if ``nested``."""

    def quantize(layer: str, weight) -> tuple[Parts, object]:
        torch = pytest.importorskip("torch")
        table = torch.tensor(NF4)
        flat = torch.nn.functional.pad(weight.reshape(-1), (0, -weight.numel() % block)).reshape(-1, block)
        absmax = flat.abs().amax(1).clamp(min=1e-6)
        state = {"quant_type": "nf4", "blocksize": block, "dtype": "bfloat16", "shape": list(weight.shape)}
        parts = {f"{layer}.weight.quant_map": table}
        if nested:
            offset = absmax.mean()
            codes = torch.linspace(-1, 1, 256)
            apart = torch.nn.functional.pad(absmax - offset, (0, -len(absmax) % inner)).reshape(-1, inner)
            factor = apart.abs().amax(1).clamp(min=1e-6)
            stored = _nearest((apart / factor[:, None]).reshape(-1)[: len(absmax)], codes)
            parts |= {f"{layer}.weight.nested_absmax": factor, f"{layer}.weight.nested_quant_map": codes}
            parts[f"{layer}.weight.absmax"] = stored.to(torch.uint8)
            absmax = codes[stored] * factor.repeat_interleave(inner)[: len(absmax)] + offset
            state |= {"nested_blocksize": inner, "nested_dtype": "float32", "nested_offset": offset.item()}
        else:
            parts[f"{layer}.weight.absmax"] = absmax
        codes = _nearest((flat / absmax[:, None]).reshape(-1)[: weight.numel() + weight.numel() % 2], table)
        parts[f"{layer}.weight"] = (codes[::2] << 4 | codes[1::2]).to(torch.uint8)[:, None]
        text = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
        parts[f"{layer}.weight.quant_state.bitsandbytes__nf4"] = text
        values = table[codes[: weight.numel()]] * absmax.repeat_interleave(block)[: weight.numel()]
        return parts, values.reshape(weight.shape)

    return quantize


def _groups(**weights) -> dict:
    return {
        "quant_method": "compressed-tensors",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
    }


# name → (how a weight is quantized, config.json's quantization_config)
FORMS = {
    "fp8-blocks-128": (float8(128, 128), {"quant_method": "fp8", "weight_block_size": [128, 128], "fmt": "e4m3"}),
    "fp8-blocks-cut-off": (float8(24, 40), {"quant_method": "fp8", "weight_block_size": [24, 40]}),
    "fp8-tensor": (
        float8(1 << 20, 1 << 20, "weight_scale", lambda scale: scale.reshape(())),
        {"quant_method": "fp8", "activation_scheme": "static"},
    ),
    "fp8-channel": (float8(1, 1 << 20, "weight_scale"), _groups(num_bits=8, type="float", strategy="channel")),
    "int8-channel": (int8, _groups(num_bits=8, type="int", strategy="channel")),
    "int8-zero-points": (int8_with_zero_points, _groups(num_bits=8, type="int", strategy="channel", symmetric=False)),
    "int4-groups": (packed(4, 16, True), _groups(num_bits=4, type="int", strategy="group", group_size=16)),
    "int4-groups-zero-points": (packed(4, 16, False), _groups(num_bits=4, group_size=16, symmetric=False)),
    "int8-packed": (packed(8, None, True), _groups(num_bits=8, type="int", strategy="channel")),
    "llm-int8": (llm_int8, {"quant_method": "bitsandbytes", "load_in_8bit": True}),
    "nf4": (nf4(False), {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}),
    "nf4-nested": (nf4(True), {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}),
}


def is_quantized(name: str) -> bool:
    """Some of the matrices that libraries quantize: of one layer of each kind, and of a few of its experts."""
    matrix = name.endswith(("_proj.weight", "proj_with_mqa.weight", ".fc1.weight", ".fc2.weight", ".qkv.weight"))
    return matrix and re.search(r"\.(blocks|layers)\.[01]\.(?!.*experts\.[3-9]|.*experts\.1\d)", name) is not None


def quantize(directory: Path, form: str) -> dict:
    """Quantizes a copy of a released checkpoint in place; returns what its tensors stand for, float32 if quantized."""
    how, settings = FORMS[form]
    stored, meant = {}, {}
    for name, tensor in released_checkpoint.tensors(directory).items():
        if is_quantized(name):
            parts, meant[name] = how(name.removesuffix(".weight"), tensor.float())
            stored |= parts
        else:
            stored[name] = meant[name] = tensor
    released_checkpoint.put(directory, stored)
    released_checkpoint.edit_json(directory / "config.json", lambda raw: raw.update(quantization_config=settings))
    return meant
