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
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

KINDS = ("int8", "int4", "float8")

INT4_OFFSET = 8  # a value v from -8 to 7 is stored as v + 8


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
