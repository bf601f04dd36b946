"""The vision-language adaptor: 2×2 pixel shuffle and an MLP (DeepSeek-VL2, arXiv 2412.10302, §2)."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from dsvl2_jax.model.config import ProjectorConfig
from dsvl2_jax.model.layers import Linear


def pixel_shuffle(x_npw: jax.Array, ratio: int) -> jax.Array:
    """[N, P, W] → [N, ⌈√P / ratio⌉², W · ratio²], zero-padded at the bottom and right.

    A feature's index is channel · ratio² + dy · ratio + dx, as torch's unfold orders it.
    """
    n, patches, width = x_npw.shape
    side = round(patches**0.5)
    out = -(-side // ratio)
    pad = out * ratio - side
    grid = jnp.pad(x_npw.reshape(n, side, side, width), ((0, 0), (0, pad), (0, pad), (0, 0)))
    cells = grid.reshape(n, out, ratio, out, ratio, width).transpose(0, 1, 3, 5, 2, 4)
    return cells.reshape(n, out * out, width * ratio * ratio)


class Adaptor(nn.Module):
    """[N, P, W] vision features → [N, ⌈√P / ratio⌉², D] language embeddings."""

    config: ProjectorConfig
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x_npw: jax.Array) -> jax.Array:
        """[N, P, W] of the encoder → [N, tokens per tile, D]."""
        cfg = self.config
        x = pixel_shuffle(x_npw, cfg.downsample_ratio)
        hidden = cfg.n_embed * cfg.mlp_ratio
        for i in range(cfg.depth):
            last = i == cfg.depth - 1
            axes = (None, "adaptor_mlp") if i == 0 else ("adaptor_mlp", "embed") if last else ("adaptor_mlp", None)
            features = cfg.n_embed if last else hidden
            # Not the language model's own spread: an adaptor is trained from scratch even where the rest is not.
            std = x.shape[-1] ** -0.5
            x = Linear(features, axes, self.dtype, std, bias=True, name=f"layers_{i}")(x)
            x = x if last else nn.gelu(x, approximate=False)
        return x
