"""The SigLIP vision encoder (arXiv 2303.15343): tiles in, patch features out."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

from dsvl2_jax.kernels.attention import self_attention
from dsvl2_jax.kernels.precision import matmul_precision
from dsvl2_jax.model.config import VisionConfig
from dsvl2_jax.model.layer_runs import LayerWrapper, run_layers, vision_runs
from dsvl2_jax.model.layers import Linear, declare, linear, partitioned
from dsvl2_jax.sharding import constrain

INIT_STD = 0.02
EPSILON = 1e-6  # of the layer norms


def layer_norm(dtype: DTypeLike, name: str | None = None) -> nn.LayerNorm:
    return nn.LayerNorm(
        epsilon=EPSILON,
        dtype=dtype,
        use_fast_variance=False,
        scale_init=partitioned(nn.initializers.ones, ("vision_embed",)),
        bias_init=partitioned(nn.initializers.zeros, ("vision_embed",)),
        name=name,
    )


class VisionAttention(nn.Module):
    """Full attention over the patches of one tile; one product makes q, k and v."""

    config: VisionConfig
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x_npw: jax.Array, visible_np: jax.Array | None = None) -> jax.Array:
        """[N, P, W] → [N, P, W].

        ``visible_np``: bool[N, P], False for positions that nothing attends to; None: all are attended to. One of each
        row must be True.
        """
        cfg = self.config
        axes = ("vision_embed", None, "vision_heads", "head_dim")
        qkv = Linear((3, cfg.heads, cfg.head_dim), axes, self.dtype, INIT_STD, bias=True, name="qkv")(x_npw)
        with jax.named_scope("attention"):
            out = self_attention(qkv, visible_np, cfg.head_dim**-0.5)
        axes = ("vision_heads", "head_dim", "vision_embed")
        return Linear(cfg.width, axes, self.dtype, INIT_STD, contract=2, bias=True, name="proj")(out)


class VisionMLP(nn.Module):
    """Two layers with the tanh form of GELU, [..., W] → [..., W]."""

    config: VisionConfig
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        axes = ("vision_embed", "vision_mlp")
        x = Linear(self.config.mlp_dim, axes, self.dtype, INIT_STD, bias=True, name="fc1")(x)
        x = nn.gelu(x, approximate=True)
        return Linear(self.config.width, axes[::-1], self.dtype, INIT_STD, bias=True, name="fc2")(x)


class VisionBlock(nn.Module):
    """Pre-norm attention and MLP, each with a residual."""

    config: VisionConfig
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x_npw: jax.Array, visible_np: jax.Array | None = None) -> jax.Array:
        """[N, P, W] → [N, P, W]; ``visible_np``: see `VisionAttention`."""
        normed = layer_norm(self.dtype, "norm1")(x_npw)
        x_npw = x_npw + VisionAttention(self.config, self.dtype, name="attn")(normed, visible_np)
        normed = layer_norm(self.dtype, "norm2")(x_npw)
        x_npw = x_npw + VisionMLP(self.config, self.dtype, name="mlp")(normed)
        return constrain(x_npw, "tiles", None, None)


class AttentionPool(nn.Module):
    """SigLIP's pooling head: a learned query attends to the patches, then an MLP (timm's ``AttentionPoolLatent``).

    The released checkpoints carry it, and no part of the language model uses it: its parameters are kept in
    conversion, training and export, and only contrastive training of the encoder computes it.
    """

    config: VisionConfig
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x_npw: jax.Array) -> jax.Array:
        """[N, P, W], after the encoder's final norm → [N, W]."""
        cfg, precision = self.config, matmul_precision(self.dtype)
        width, hidden = cfg.width, cfg.mlp_dim

        def parameter(name: str, *shape: int) -> jax.Array:
            constant = {"bias": nn.initializers.zeros, "scale": nn.initializers.ones}
            init = constant.get(name.rpartition("_")[2], nn.initializers.normal(INIT_STD))
            return declare(self, name, shape, (None,) * len(shape), init)

        # All are declared before any is used: their order gives each its random key.
        latent = parameter("latent", width)
        weights = {
            name: (parameter(f"{name}_kernel", inputs, outputs), parameter(f"{name}_bias", outputs))
            for name, outputs, inputs in (
                ("q", width, width),
                ("kv", 2 * width, width),
                ("proj", width, width),
                ("mlp_fc1", hidden, width),
                ("mlp_fc2", width, hidden),
            )
        }
        scale, shift = (parameter(f"norm_{name}", width).astype(self.dtype) for name in ("scale", "bias"))

        def product(name: str, x: jax.Array) -> jax.Array:
            return linear(x, *weights[name], dtype=self.dtype)

        q_hd = product("q", latent).reshape(cfg.heads, cfg.head_dim)
        kv = product("kv", x_npw).reshape(*x_npw.shape[:2], 2, cfg.heads, cfg.head_dim)
        k, v = kv[:, :, 0], kv[:, :, 1]  # [N, P, H, Dh]
        scores = jnp.einsum("hd,nphd->nhp", q_hd, k, precision=precision, preferred_element_type=jnp.float32)
        weights_nhp = nn.softmax(scores * cfg.head_dim**-0.5, axis=-1).astype(self.dtype)
        pooled = jnp.einsum("nhp,nphd->nhd", weights_nhp, v, precision=precision).reshape(-1, width)
        x = product("proj", pooled)
        x32 = x.astype(jnp.float32)
        centred = x32 - x32.mean(-1, keepdims=True)
        normed = centred * jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + EPSILON)
        inner = nn.gelu(product("mlp_fc1", normed.astype(self.dtype) * scale + shift), approximate=True)
        return x + product("mlp_fc2", inner)


class VisionEncoder(nn.Module):
    """The encoder's parameters, and what comes before and after its blocks; `encode_tiles` runs the blocks."""

    config: VisionConfig
    dtype: DTypeLike

    def setup(self) -> None:
        cfg = self.config
        # The patch convolution has no overlap, so it is a product; kernel rows are (dy, dx, channel).
        axes = (None, "vision_embed")
        self.patch_embed = Linear(cfg.width, axes, self.dtype, INIT_STD, bias=True)
        init = nn.initializers.normal(INIT_STD)
        self.pos_embed = declare(self, "pos_embed", (cfg.patches, cfg.width), axes, init)
        self.blocks = [VisionBlock(cfg, self.dtype) for _ in range(cfg.layers)]
        self.norm = layer_norm(self.dtype)
        self.attn_pool = AttentionPool(cfg, self.dtype)

    def embed_patches(self, tiles: jax.Array, mean: ArrayLike, std: ArrayLike) -> jax.Array:
        """u8[N, side, side, 3] → [N, P, W], what the first block takes; see `encode_tiles`."""
        cfg = self.config
        pixels = ((tiles.astype(jnp.float32) / 255.0 - mean) / std).astype(self.dtype)
        n, grid, patch = pixels.shape[0], cfg.grid, cfg.patch_size
        pixels = pixels[:, : grid * patch, : grid * patch]  # what lies beyond the last whole patch is never seen
        patches = (
            pixels.reshape(n, grid, patch, grid, patch, 3)
            .transpose(0, 1, 3, 2, 4, 5)
            .reshape(n, grid**2, patch * patch * 3)
        )
        patches = constrain(patches, "tiles", None, None)
        return self.patch_embed(patches) + self.pos_embed.astype(self.dtype)

    def final_norm(self, x_npw: jax.Array) -> jax.Array:
        """[N, P, W] of the last block → [N, P, W]."""
        return self.norm(x_npw)

    def pool(self, x_npw: jax.Array) -> jax.Array:
        """[N, P, W] of `final_norm` → [N, W]; see `AttentionPool`."""
        return self.attn_pool(x_npw)

    def __call__(self, tiles: jax.Array, mean: ArrayLike, std: ArrayLike) -> jax.Array:
        """Declares every parameter, for init; returns what the adaptor takes."""
        x_npw = self.embed_patches(tiles, mean, std)
        for block in self.blocks:
            x_npw = block(x_npw)
        x_npw = self.final_norm(x_npw)
        self.pool(x_npw)
        return x_npw


def encoder(params: dict[str, Any], config: VisionConfig, dtype: DTypeLike) -> VisionEncoder:
    """The encoder with its parameters."""
    return VisionEncoder(config, dtype).bind({"params": params})


def encode_tiles(
    params: dict[str, Any],
    config: VisionConfig,
    tiles: jax.Array,
    mean: ArrayLike,
    std: ArrayLike,
    *,
    dtype: DTypeLike,
    wrap: LayerWrapper | None = None,
) -> jax.Array:
    """Encodes tiles, in inference and in training.

    Args:
      params: of the encoder, its blocks separate or stacked (`dsvl2_jax.model.layer_runs`).
      tiles: u8[N, side, side, 3].
      mean, std: f32[3]; a pixel enters as (value / 255 − mean) / std.
      dtype: in which it computes.
      wrap: see `run_layers`.

    Returns:
      [N, P, W] after the final norm, with P = (side // patch size)², row by row.
    """
    block = VisionBlock(config, dtype)

    def layer(x_npw: jax.Array, block_params: Any, state: None) -> tuple[jax.Array, None, None]:
        return block.apply({"params": block_params}, x_npw), state, None

    bound = encoder(params, config, dtype)
    x_npw = bound.embed_patches(tiles, mean, std)
    for run in vision_runs(config):
        x_npw, _, _ = run_layers(run, params, layer, x_npw, wrap=wrap)
    return bound.final_norm(x_npw)
