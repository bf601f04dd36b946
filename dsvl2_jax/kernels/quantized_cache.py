"""Entries of the decode cache in int8: every vector, such as a token's latent, with a scale of its own.

The scale stands outside of each sum over the vector, so that attention multiplies the integers and scales what comes
out: q · (scale · k) = scale · (q · k), and p · (scale · v) = (p · scale) · v. No float copy of a cache is needed.

Tested in tests/kernels/test_quantized_cache.py.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

LARGEST = 127


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QuantizedEntries:
    """Vectors, each of which is values · scale.

    Attributes:
      values: i8[B, S, …, width], from -127 to 127.
      scale: f32[B, S, …].
    """

    values: jax.Array
    scale: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    @property
    def ndim(self) -> int:
        return self.values.ndim


# What a layer keeps under a name: [B, S, …, width].
Entries = jax.Array | QuantizedEntries


def quantize_entries(x: jax.Array) -> QuantizedEntries:
    """Vectors [..., width] in int8. What is no number makes the scale of its vector none, and so the whole vector."""
    x = x.astype(jnp.float32)
    scale = jnp.abs(x).max(-1) / LARGEST
    return QuantizedEntries(jnp.nan_to_num(in_steps(x, scale[..., None])).astype(jnp.int8), scale)


def in_steps(x: jax.Array, scale: jax.Array) -> jax.Array:
    """f32: how many times ``scale`` each number is, to the nearest whole one; by what Triton has, too."""
    return jnp.floor(x / jnp.where(scale == 0, 1.0, scale) + 0.5)


def dequantize_entries(x: Entries, dtype: DTypeLike) -> jax.Array:
    """The vectors as a plain array of ``dtype``."""
    if not isinstance(x, QuantizedEntries):
        return x.astype(dtype)
    return (x.values.astype(jnp.float32) * x.scale[..., None]).astype(dtype)


def numbers(x: Entries, dtype: DTypeLike) -> jax.Array:
    """What enters a product in the place of the vectors: of quantized ones the integers, yet without their scale."""
    return (x.values if isinstance(x, QuantizedEntries) else x).astype(dtype)


def times_scale(x: jax.Array, entries: Entries, *, by_head: bool) -> jax.Array:
    """Scores or weights [..., H, T, S] times the scales of the entries [..., S, (H)] that they are of.

    Args:
      by_head: whether each head has an entry of its own, or all share one.
    """
    if not isinstance(entries, QuantizedEntries):
        return x
    scale = entries.scale.swapaxes(-1, -2)[..., None, :] if by_head else entries.scale[..., None, None, :]
    return x * scale
