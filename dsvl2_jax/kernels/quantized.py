"""Weights kept in 8 or 4 bits, and the products that read them.

A quantized weight is its values and a scale for each output channel, or for each group of consecutive inputs of one:
weight = values · scale. The scale has as many axes as the values; along the weight's inputs it has size 1 (one scale
for all of them) or, along the last of them, one entry for each group.

int4 lies two values to a byte, offset by 8, along the last input axis: of each group the first half is in the low four
bits and the second half in the high ones, so that unpacking a group joins two contiguous halves.

Tested in tests/kernels/test_quantized.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

KINDS = ("int8", "int4", "float8")

INT4_OFFSET = 8  # a value v from -8 to 7 is stored as v + 8
GROUP = 128  # inputs that share a scale in int4, where the weight has as many
SMALLEST_GROUP = 16
_LARGEST = {"int8": 127, "float8": 448}
_INT4_PARTS = (1, 0.92, 0.84, 0.76)  # of the largest magnitude, that the values of int4 may reach to


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Quantized:
    """A weight as it is kept: ``values`` in 8 bits, or two to a byte, and their ``scale``.

    Attributes:
      values: int8 or float8_e4m3fn of the weight's shape; for int4 uint8, half as long along ``packed_axis``.
      scale: float, of as many axes as ``values``; see above.
      kind: static, of `KINDS`.
      packed_axis: static, the weight's last input axis, along which int4 is packed and groups lie; from the end (-1 is
        the last axis), so that it stays the same where layers are stacked in front.
    """

    values: jax.Array
    scale: jax.Array
    kind: str = dataclasses.field(metadata={"static": True})
    packed_axis: int = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight that it stands for."""
        shape = list(self.values.shape)
        if self.kind == "int4":
            shape[self.packed_axis] *= 2
        return tuple(shape)

    @property
    def ndim(self) -> int:
        return self.values.ndim

    def astype(self, dtype: DTypeLike) -> Quantized:
        """Itself: products compute in the dtype of what the weight is multiplied with."""
        return self

    def dequantized(self, dtype: DTypeLike) -> jax.Array:
        """The weight as a plain array of ``dtype``: of tests, export and gradients' references, not of inference."""
        return dequantize(self, dtype)


def unpack_int4(values: jax.Array, groups: int, axis: int) -> jax.Array:
    """uint8 with two values to a byte → int8 from -8 to 7, twice as long along ``axis``; see the module's text."""
    axis %= values.ndim
    split = values.reshape(*values.shape[:axis], groups, -1, *values.shape[axis + 1 :])
    halves = [(split & 15).astype(jnp.int8) - INT4_OFFSET, (split >> 4).astype(jnp.int8) - INT4_OFFSET]
    joined = jnp.concatenate(halves, axis=axis + 1)
    return joined.reshape(*values.shape[:axis], -1, *values.shape[axis + 1 :])


def pack_int4(values: Any, groups: int, axis: int) -> Any:
    """Integers from -8 to 7 (numpy or jax) → uint8, half as long along ``axis``: what `unpack_int4` reads."""
    axis %= values.ndim
    split = values.reshape(*values.shape[:axis], groups, 2, -1, *values.shape[axis + 1 :])
    low, high = (split.take(half, axis=axis + 1).astype("uint8") + INT4_OFFSET for half in (0, 1))
    packed = (low & 15) | ((high & 15) << 4)
    return packed.astype("uint8").reshape(*values.shape[:axis], -1, *values.shape[axis + 1 :])


def dequantize(weight: Quantized, dtype: DTypeLike) -> jax.Array:
    """values · scale as a plain array of ``dtype``."""
    axis, scale = weight.packed_axis % weight.ndim, weight.scale
    groups = scale.shape[axis]
    values = unpack_int4(weight.values, groups, axis) if weight.kind == "int4" else weight.values
    size = values.shape[axis] // groups
    split = values.reshape(*values.shape[:axis], groups, size, *values.shape[axis + 1 :])
    whole = split.astype(jnp.float32) * jnp.expand_dims(scale, axis + 1).astype(jnp.float32)
    return whole.reshape(values.shape).astype(dtype)


def group_size(inputs: int) -> int | None:
    """How many consecutive inputs share a scale in int4: `GROUP`, or the largest power of two below that divides.

    Args:
      inputs: of the weight's last input axis.

    Returns:
      None where it would be below `SMALLEST_GROUP`, so that scales take too many bytes.
    """
    size = GROUP
    while size >= SMALLEST_GROUP and inputs % size:
        size //= 2
    return size if size >= SMALLEST_GROUP else None


def quantize(weight: Any, kind: str, inputs: Sequence[int]) -> dict[str, Any]:
    """Rounds a weight to the nearest values of ``kind``, symmetrically.

    A scale of int8 and float8 is what the largest magnitude needs; of int4 the one of a few that gives the least sum of
    squared errors.

    Args:
      weight: floating point, numpy or jax, which the result is too.
      kind: of `KINDS`. For int4, `group_size` of the last of ``inputs`` is not None.
      inputs: the axes that products contract; int4 has groups along the last of them, and a scale for each entry of
        the others.

    Returns:
      {kind: values, "scale": f32 scale}, see `Quantized`.
    """
    xp = jnp if isinstance(weight, jax.Array) else np
    if kind == "int4":
        return _quantize_int4(xp, weight, inputs[-1])
    weight = weight.astype(xp.float32)
    largest = xp.abs(weight).max(tuple(inputs), keepdims=True)
    scale = _not_zero(xp, largest / xp.float32(_LARGEST[kind]))
    scaled = weight / scale
    if kind == "float8":
        return {kind: scaled.astype(jnp.float8_e4m3fn), "scale": scale}
    return {kind: xp.rint(scaled).astype(xp.int8), "scale": scale}


def _quantize_int4(xp: Any, weight: Any, axis: int) -> dict[str, Any]:
    shape, size = weight.shape, group_size(weight.shape[axis])
    groups = shape[axis] // size
    split = weight.astype(xp.float32).reshape(*shape[:axis], groups, size, *shape[axis + 1 :])
    scale = int4_scale(split, axis + 1)
    values = int4_values(split, scale).reshape(shape)
    return {"int4": pack_int4(values, groups, axis), "scale": scale.squeeze(axis + 1)}


def int4_scale(weight: Any, axis: int, importance: Any = 1.0) -> Any:
    """The scale, along one axis of a weight (numpy or jax), that gives the least sum of squared errors.

    The number that is largest by magnitude becomes -8, whatever its sign, or 7, or is cut.

    Args:
      weight: float32, all of whose numbers along ``axis`` share a scale.
      importance: factor of each squared error; of a shape that ``weight`` can be multiplied with.

    Returns:
      float32 of the weight's shape, with 1 along ``axis``.
    """
    xp = jnp if isinstance(weight, jax.Array) else np
    low, high = weight.min(axis, keepdims=True), weight.max(axis, keepdims=True)
    largest = xp.where(high > -low, high, low)
    scale, least = None, None
    for value in (-INT4_OFFSET, INT4_OFFSET - 1):
        for part in _INT4_PARTS:
            tried = _not_zero(xp, largest * xp.float32(part) / xp.float32(value))
            errors = xp.square(int4_values(weight, tried) * tried - weight)
            error = (errors * importance).sum(axis, keepdims=True)
            scale = tried if scale is None else xp.where(error < least, tried, scale)
            least = error if least is None else xp.minimum(error, least)
    return scale


def int4_values(weight: Any, scale: Any) -> Any:
    """int8 from -8 to 7, nearest to weight / scale; numpy or jax."""
    xp = jnp if isinstance(weight, jax.Array) else np
    return xp.clip(xp.rint(weight / scale), -INT4_OFFSET, INT4_OFFSET - 1).astype(xp.int8)


def _not_zero(xp: Any, scale: Any) -> Any:
    """Of zeros alone, any scale will do."""
    return xp.where(scale == 0, xp.float32(1), scale)
