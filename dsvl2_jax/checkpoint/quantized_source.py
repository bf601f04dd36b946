"""Checkpoints in the released layout whose weights others have quantized: which tensors make up each weight.

Read are, by what the tensors are named and config.json's ``quantization_config`` says of them:

  X.weight F8_E4M3, X.weight_scale_inv F32 [⌈out / 128⌉, ⌈in / 128⌉]      float8 as DeepSeek-V3 is released ("fp8")
  X.weight F8_E4M3 or I8, X.weight_scale [], [1], [out], [out, 1] or       compressed-tensors: float-, int- and
    [⌈out / rows⌉, ⌈in / columns⌉], X.weight_zero_point                      naive-quantized; "fp8", "fbgemm_fp8"
  X.weight_packed I32, X.weight_shape, X.weight_scale [out, groups]        compressed-tensors: pack-quantized
  X.weight I8, X.SCB F32 [out], X.weight_format                            bitsandbytes' LLM.int8
  X.weight U8, X.weight.absmax, X.weight.quant_map, X.weight.nested_…,     bitsandbytes' nf4 and fp4
    X.weight.quant_state.bitsandbytes__nf4

Scales of activations (X.input_scale and the like) are of no use to weights that are read as plain numbers.
"""

from __future__ import annotations

import collections
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dsvl2_jax.checkpoint.quantized_tensors import (
    FLOAT8,
    LookupTensor,
    QuantizedTensor,
    Read,
    ScaledTensor,
    elements,
)
from dsvl2_jax.checkpoint.rules import FLOAT_DTYPES, Shape
from dsvl2_jax.checkpoint.safetensors_file import Tensor
from dsvl2_jax.errors import CheckpointError
from dsvl2_jax.json_files import parse_json, read_json_object
from dsvl2_jax.messages import listed
from dsvl2_jax.model.config import STORAGE_KEYS

# Endings of a layer's name that its tensors have, besides "weight" and "bias".
_OF_WEIGHTS = (
    "weight_scale_inv", "weight_scale", "weight_zero_point", "weight_packed", "weight_shape", "SCB", "weight_format",
    "weight.absmax", "weight.quant_map", "weight.nested_absmax", "weight.nested_quant_map",
    "weight.quant_state.bitsandbytes__nf4", "weight.quant_state.bitsandbytes__fp4",
)  # fmt: skip
_OF_ACTIVATIONS = re.compile(
    r"\.((input|output|activation|act|q|k|v)_(scale|zero_point)(_inv)?|(input|output)_global_scale)$"
)
_METHODS = ("fp8", "fbgemm_fp8", "compressed-tensors", "bitsandbytes")
# Tensors of other formats → what to call them.
_OTHERS = {
    "qweight": "GPTQ or AWQ", "qzeros": "GPTQ or AWQ", "weight_g_idx": "compressed-tensors with activation order",
    "weight_global_scale": "NVFP4", "weight_scale_2": "ModelOpt NVFP4", "bitmask": "sparse compressed-tensors",
    "weight._data": "quanto", "W_q": "HQQ",
}  # fmt: skip
_UNQUANTIZED = (
    "Read are float8 (block, channel or tensor scales), compressed-tensors int8 and int4, and bitsandbytes int8, nf4 "
    "and fp4. Take the original checkpoint, or let the library that made this one write it in bfloat16; dsvl2 convert "
    "--quantize makes int8, int4 and float8 of it."
)

_Problems = list[str]


def quantization_settings(directory: Path) -> dict[str, Any] | None:
    """What config.json says of how the weights are quantized; None where it says nothing.

    Raises:
      CheckpointError: it cannot be read, is contradictory, or names a format that is not read.
    """
    file = directory / "config.json"
    if not file.is_file():
        return None
    raw = read_json_object(file, CheckpointError)
    inner = raw.get("language_config")
    found = [
        part[key] for part in (raw, inner if isinstance(inner, dict) else {}) for key in STORAGE_KEYS if part.get(key)
    ]
    if not found:
        return None
    settings = found[0]
    if any(other != settings for other in found) or not isinstance(settings, dict):
        raise CheckpointError(
            f"{file}: quantization_config is {'given twice, and differently' if len(found) > 1 else 'no object'}; "
            "download the file again."
        )
    method = settings.get("quant_method", "compressed-tensors" if "config_groups" in settings else None)
    if method not in _METHODS:
        raise CheckpointError(
            f"{file}: the weights are quantized as {_shown(method)}, which is not read. {_UNQUANTIZED}"
        )
    sparsity = settings.get("sparsity_config") or {}
    sparse = sparsity.get("format", "dense") if isinstance(sparsity, dict) else sparsity
    for name, value in (("sparsity_config.format", sparse), ("transform_config", settings.get("transform_config"))):
        if value not in (None, "dense", {}):
            raise CheckpointError(
                f"{file}: quantization_config.{name} is {_shown(value)}, which is not read. {_UNQUANTIZED}"
            )
    return settings


def _shown(value: Any) -> str:
    return "something without a name" if value is None else repr(value)[:80]


def find_quantized(
    tensors: Mapping[str, Tensor], expected: Mapping[str, Shape], directory: Path, read: Read
) -> tuple[dict[str, Tensor | QuantizedTensor], list[str]]:
    """Puts each quantized weight in the place of the tensors that make it up.

    Args:
      tensors: by released name; of the weights' parts, by the layer's.
      expected: released name → shape.
      directory: of config.json.

    Returns:
      The tensors, and notes about them.

    Raises:
      CheckpointError: a part is missing, has a wrong shape, or the format is not read; all such weights are named.
    """
    settings = quantization_settings(directory)
    parts: dict[str, dict[str, Tensor]] = collections.defaultdict(dict)
    plain: dict[str, Tensor | QuantizedTensor] = {}
    of_activations, others = [], collections.defaultdict(list)
    for name, tensor in tensors.items():
        layer, ending = _split(name)
        if ending is not None:
            parts[layer][ending] = tensor
        elif name in expected:
            plain[name] = tensor
        elif _OF_ACTIVATIONS.search(name):
            of_activations.append(name)
        elif other := next((end for end in _OTHERS if name.endswith(f".{end}")), None):
            others[_OTHERS[other]].append(name)
        else:
            plain[name] = tensor
    for form, names in others.items():
        raise CheckpointError(f"{directory}: the weights are quantized as {form}, such as {names[0]}. {_UNQUANTIZED}")
    dtype = plain.get("language.model.embed_tokens.weight")
    dtype_name = dtype.dtype if dtype is not None and dtype.dtype in FLOAT_DTYPES else "F32"
    problems: list[str] = []
    quantized: dict[str, QuantizedTensor] = {}
    for layer, own in parts.items():
        weight = f"{layer}.weight"
        values = plain.pop(weight, None)
        try:
            quantized[weight] = _quantized(weight, values, own, dtype_name, settings or {}, read)
        except _Wrong as error:
            problems.append(f"{error}")
    problems += [
        f"{name} is {tensor.dtype}, but has no scale: expected {name}_scale_inv, {name}_scale or "
        f"{name.removesuffix('weight')}SCB beside it"
        for name, tensor in plain.items()
        if name in expected and (tensor.dtype in FLOAT8 or tensor.dtype == "I8")
    ]
    if problems:
        raise CheckpointError(
            f"{directory}: {len(problems)} quantized weights cannot be read; download their files and config.json "
            f"again:\n{listed(problems)}"
        )
    notes = list(_notes(quantized, sum(name.endswith(".weight") for name in plain), dtype_name))
    if of_activations:
        notes.append(
            f"{len(of_activations)} scales of activations, such as {of_activations[0]}, are not used: here activations "
            "are not quantized"
        )
    if settings is not None and not quantized:
        notes.append("config.json has a quantization_config, but no weight is quantized: it is not used")
    return plain | quantized, notes


def _split(name: str) -> tuple[str, str | None]:
    for ending in _OF_WEIGHTS:
        if name.endswith(f".{ending}"):
            return name.removesuffix(f".{ending}"), ending
    return name, None


class _Wrong(Exception):
    """What is wrong with one weight."""


def _quantized(
    weight: str, values: Tensor | None, parts: Mapping[str, Tensor], dtype: str, settings: Mapping[str, Any], read: Read
) -> QuantizedTensor:
    """The weight that these tensors make up; raises _Wrong."""
    layer = weight.removesuffix(".weight")
    if any(ending.startswith("weight.") for ending in parts):
        return _lookup(weight, values, parts, dtype, read)
    zero_point = parts.get("weight_zero_point")
    if "weight_packed" in parts:
        values = parts["weight_packed"]
        shape, bits = _packed_shape(layer, values, parts.get("weight_shape"), read)
    else:
        if values is None:
            raise _Wrong(f"{weight} is missing, though {layer}.{next(iter(parts))} is there")
        if values.dtype not in FLOAT8 and values.dtype != "I8":
            raise _Wrong(
                f"{weight} is {values.dtype}, though {layer}.{next(iter(parts))} is there; expected F8_E4M3 or I8"
            )
        shape, bits = values.shape, 8
    if len(shape) != 2 or 0 in shape:
        raise _Wrong(f"{weight} has shape {list(shape)}; only matrices are quantized")
    named = [name for name in ("weight_scale_inv", "weight_scale", "SCB") if name in parts]
    if len(named) != 1:
        raise _Wrong(
            f"{weight} has {' and '.join(named) or 'no scale'}; expected one of weight_scale_inv, weight_scale and SCB"
        )
    (name,) = named
    scale = parts[name]
    if scale.dtype not in FLOAT_DTYPES:
        raise _Wrong(f"{layer}.{name} is {scale.dtype}; expected {', '.join(FLOAT_DTYPES)}")
    if name == "SCB":
        _check_format(layer, parts.get("weight_format"), read)
    block = _block(f"{layer}.{name}", scale.shape, shape, settings)
    if zero_point is not None:
        _check_zero_point(layer, zero_point, scale, shape, bits)
    return ScaledTensor(dtype, shape, values, bits, scale, block, 127 if name == "SCB" else 1, zero_point)


def _block(name: str, found: Shape, shape: Shape, settings: Mapping[str, Any]) -> tuple[int, int]:
    """(rows, columns) that share a scale, by the scales' shape."""
    height, width = shape
    choices: list[tuple[Shape, tuple[int, int]]] = []
    for rows, columns in _stated_blocks(settings):
        choices.append(((-(-height // rows), -(-width // columns)), (rows, columns)))
    choices += [((height, 1), (1, width)), ((height,), (1, width))]
    choices += [((), shape), ((1,), shape), ((1, 1), shape)]
    for expected, block in choices:
        if found == expected:
            return block
    sizes = ", ".join(str(list(expected)) for expected, _ in choices[:-2])
    said = "" if _stated_blocks(settings) else "; config.json's quantization_config names no block or group size"
    raise _Wrong(f"{name}: found shape {list(found)}, expected one of {sizes} for a weight {list(shape)}{said}")


def _stated_blocks(settings: Mapping[str, Any]) -> list[tuple[int, int]]:
    """Sizes of blocks that config.json names."""
    groups = settings.get("config_groups")
    weights = [
        group["weights"]
        for group in (groups.values() if isinstance(groups, dict) else ())
        if isinstance(group, dict) and isinstance(group.get("weights"), dict)
    ]
    stated = [settings.get("weight_block_size"), *(args.get("block_structure") for args in weights)]
    stated += [[1, args["group_size"]] for args in weights if args.get("group_size")]
    return [
        (pair[0], pair[1])
        for pair in stated
        if isinstance(pair, list) and len(pair) == 2 and all(type(n) is int and 0 < n < 1 << 31 for n in pair)
    ]


def _packed_shape(layer: str, values: Tensor, stated: Tensor | None, read: Read) -> tuple[Shape, int]:
    """The shape of a packed weight, and bits of a value."""
    if stated is None or stated.shape != (2,) or stated.dtype not in ("I32", "I64"):
        found = "missing" if stated is None else f"{stated.dtype} {list(stated.shape)}"
        raise _Wrong(f"{layer}.weight_shape: {found}; expected two whole numbers beside weight_packed")
    height, width = (int(size) for size in elements(stated, read, 0, 2))
    for bits in (4, 8):
        if values.dtype == "I32" and width > 0 and values.shape == (height, -(-width // (32 // bits))):
            return (height, width), bits
    raise _Wrong(
        f"{layer}.weight_packed: found {values.dtype} {list(values.shape)}, expected I32 words of 4 or 8 bits for the "
        f"weight {[height, width]} of weight_shape"
    )


def _check_format(layer: str, stated: Tensor | None, read: Read) -> None:
    """Only rows in order are read, not the tiles that bitsandbytes once wrote for GPUs."""
    if stated is None:
        return
    code = elements(stated, read, 0, 1) if stated.dtype in ("U8", "I8") and stated.size else np.array([-1])
    if code[0] != 0:
        raise _Wrong(
            f"{layer}.weight_format: found {code[0]}, expected 0 (rows in order); save it with a newer bitsandbytes"
        )


def _check_zero_point(layer: str, zero_point: Tensor, scale: Tensor, shape: Shape, bits: int) -> None:
    packed = (-(-shape[0] // (32 // bits)), *scale.shape[1:])
    fits = zero_point.dtype == "I8" and math.prod(zero_point.shape) == math.prod(scale.shape)
    fits |= zero_point.dtype == "I32" and zero_point.shape == packed and scale.shape[:1] == shape[:1]
    if not fits:
        raise _Wrong(
            f"{layer}.weight_zero_point: found {zero_point.dtype} {list(zero_point.shape)}, expected I8 "
            f"{list(scale.shape)}, or I32 {list(packed)} where values are packed"
        )


def _lookup(weight: str, values: Tensor | None, parts: Mapping[str, Tensor], dtype: str, read: Read) -> LookupTensor:
    """A weight of bitsandbytes' 4 bits."""
    kind = "fp4" if "weight.quant_state.bitsandbytes__fp4" in parts else "nf4"
    if values is None:
        raise _Wrong(f"{weight} is missing, though {weight}.absmax is there")

    def part(ending: str, dtypes: tuple[str, ...]) -> Tensor:
        found = parts.get(f"weight.{ending}")
        if found is None or found.dtype not in dtypes:
            raise _Wrong(
                f"{weight}.{ending}: {'missing' if found is None else found.dtype}; expected {' or '.join(dtypes)}"
            )
        return found

    def table(ending: str, length: int) -> tuple[float, ...]:
        found = part(ending, ("F32",))
        if found.shape != (length,):
            raise _Wrong(f"{weight}.{ending}: found shape {list(found.shape)}, expected [{length}]")
        return tuple(elements(found, read, 0, length).tolist())

    stored = part(f"quant_state.bitsandbytes__{kind}", ("U8",))
    try:
        state = parse_json(elements(stored, read, 0, stored.size).tobytes())
        shape, block = tuple(state["shape"]), state["blocksize"]
        inner, offset = state.get("nested_blocksize", 1), float(state.get("nested_offset", 0.0))
        sizes = [*shape, block, inner]
        if len(shape) != 2 or not all(type(size) is int and 0 < size < 1 << 31 for size in sizes):
            raise ValueError("its sizes are none")
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
        raise _Wrong(f"{weight}.quant_state.bitsandbytes__{kind}: cannot be read ({error})") from None
    count = math.prod(shape)
    blocks = -(-count // block)
    nested = None
    if "weight.nested_absmax" in parts:
        factors = part("nested_absmax", ("F32",))
        nested = table("nested_quant_map", 256), factors, inner, offset
        _expect_count(f"{weight}.nested_absmax", math.prod(factors.shape), -(-blocks // inner))
    absmax = part("absmax", ("U8",) if nested else ("F32",))
    _expect_count(f"{weight}.absmax", math.prod(absmax.shape), blocks)
    _expect_count(f"{weight}, in bytes", values.size, -(-count // 2))
    return LookupTensor(dtype, shape, kind, table("quant_map", 16), values, absmax, block, nested)


def _expect_count(name: str, found: int, expected: int) -> None:
    if found != expected:
        raise _Wrong(f"{name}: found {found:,} elements, expected {expected:,}")


_COMPONENTS: tuple[tuple[str, Callable[[str], bool]], ...] = (
    ("routed experts", lambda name: ".mlp.experts." in name),
    ("shared experts", lambda name: ".shared_experts." in name),
    ("router", lambda name: name.endswith(".mlp.gate.weight")),
    ("encoder", lambda name: name.startswith("vision.")),
    ("adaptor", lambda name: name.startswith("projector.")),
    ("attention", lambda name: ".self_attn." in name),
    ("dense MLPs", lambda name: ".mlp." in name),
    ("output head", lambda name: name.endswith("lm_head.weight")),
)


def _components(names: Iterable[str]) -> str:
    found = {next((part for part, belongs in _COMPONENTS if belongs(name)), "other") for name in names}
    return ", ".join([part for part, _ in _COMPONENTS if part in found] + (["other"] if "other" in found else []))


def _notes(quantized: Mapping[str, QuantizedTensor], plain: int, dtype: str) -> Iterator[str]:
    by_form: dict[str, list[str]] = collections.defaultdict(list)
    for name, tensor in quantized.items():
        by_form[tensor.described].append(name)
    for form, names in by_form.items():
        yield (
            f"{len(names)} of {plain + len(quantized)} weights are quantized, {form} ({_components(names)}): they are "
            f"read as {FLOAT_DTYPES[dtype]}, the dtype of the embeddings, unless another is asked for"
        )
