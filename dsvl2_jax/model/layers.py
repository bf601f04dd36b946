"""Small layers shared by the encoder, the adaptor and the decoder.

Letters in array names, used everywhere: B batch, T tokens, S cache length, N tiles, P patches, W vision
width, D language width, H heads, R latent rank, E experts, F expert MLP width, V vocabulary, K top-k.
"""

from __future__ import annotations

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from dsvl2_jax.kernels.precision import matmul_precision
from dsvl2_jax.sharding import batch_axis, constrain

Axes = tuple[str | None, ...]


def partitioned(init: nn.initializers.Initializer, axes: Axes) -> nn.initializers.Initializer:
    return nn.with_logical_partitioning(init, axes)


def linear(
    features: int | Sequence[int],
    axes: Axes,
    *,
    dtype: DTypeLike,
    std: float,
    contract: int = 1,
    bias: bool = False,
    name: str | None = None,
) -> nn.DenseGeneral:
    """x[..., contracted dims] → [..., features]; ``axes`` are the kernel's logical axes, inputs first."""
    return nn.DenseGeneral(
        features=features,
        axis=tuple(range(-contract, 0)),
        use_bias=bias,
        dtype=dtype,
        kernel_init=partitioned(nn.initializers.normal(std), axes),
        bias_init=partitioned(nn.initializers.zeros, axes[contract:]),
        precision=matmul_precision(dtype),
        name=name,
    )


class RMSNorm(nn.Module):
    """Root-mean-square norm: float32 inside, cast to the input's dtype, then times the weight (FACTS §4)."""

    eps: float
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", partitioned(nn.initializers.ones, (self.axis_name,)), (x.shape[-1],))
        x32 = x.astype(jnp.float32)
        normed = x32 * lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + self.eps)
        return normed.astype(x.dtype) * scale.astype(x.dtype)


class GatedMLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) · up(x)); the dense layers and the shared experts (FACTS §4)."""

    width: int
    dtype: DTypeLike
    std: float

    @nn.compact
    def __call__(self, x_btd: jax.Array, *, decode: bool = False) -> jax.Array:
        axes = ("embed", "mlp")
        gate = linear(self.width, axes, dtype=self.dtype, std=self.std, name="gate_proj")(x_btd)
        up = linear(self.width, axes, dtype=self.dtype, std=self.std, name="up_proj")(x_btd)
        hidden = constrain(nn.silu(gate) * up, batch_axis(decode), "length", "mlp")
        return linear(x_btd.shape[-1], axes[::-1], dtype=self.dtype, std=self.std, name="down_proj")(hidden)


def rotary_tables(positions: jax.Array, width: int, theta: float) -> tuple[jax.Array, jax.Array]:
    """cos and sin, f32[..., width/2], for i32 positions [...]; kept in float32 whatever the model's dtype."""
    inverse_frequency = theta ** (-jnp.arange(0, width, 2, dtype=jnp.float32) / width)
    angles = positions.astype(jnp.float32)[..., None] * inverse_frequency
    return jnp.cos(angles), jnp.sin(angles)


def rotate_half(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotary embedding over pairs (i, i + width/2): the layout of multi-head attention (tiny).

    Args:
      x: [B, T, H, width]. cos, sin: f32[B, T, width/2].
    """
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[:, :, None], sin[:, :, None]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def rotate_interleaved(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotary embedding over pairs (2i, 2i + 1), written as halves: the layout of latent attention (FACTS §1)."""
    pairs = x.reshape(*x.shape[:-1], -1, 2)
    return rotate_half(jnp.concatenate([pairs[..., 0], pairs[..., 1]], axis=-1), cos, sin)
