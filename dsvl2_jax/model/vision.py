"""SigLIP vision encoder (SigLIP, arXiv 2303.15343; FACTS §2): tiles in, patch features out."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from dsvl2_jax.kernels.gpu_attention import Attention, fused_attention, taken
from dsvl2_jax.kernels.precision import matmul_precision
from dsvl2_jax.model.config import VisionConfig
from dsvl2_jax.model.layers import linear, partitioned
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
    """Full attention over the patches of one tile; one product makes q, k and v.

    ``seen_np``: bool[N, P], False where nothing looks; None: all are looked at. One of each row must be True.
    """

    config: VisionConfig
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x_npw: jax.Array, seen_np: jax.Array | None = None) -> jax.Array:
        cfg = self.config
        axes = ("vision_embed", None, "vision_heads", "head_dim")
        qkv = linear((3, cfg.heads, cfg.head_dim), axes, dtype=self.dtype, std=INIT_STD, bias=True, name="qkv")(x_npw)
        q, k, v = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]  # [N, P, H, Dh]
        scale = cfg.head_dim**-0.5

        def plain(q: jax.Array, k: jax.Array, v: jax.Array, _: jax.Array) -> jax.Array:
            exact = matmul_precision(self.dtype)
            scores = jnp.einsum("nphd,nqhd->nhpq", q, k, precision=exact, preferred_element_type=jnp.float32) * scale
            if seen_np is not None:
                scores = jnp.where(seen_np[:, None, None], scores, -jnp.inf)
            weights = nn.softmax(scores, axis=-1).astype(self.dtype)
            return jnp.einsum("nhpq,nqhd->nphd", weights, v, precision=exact)

        anywhere = jnp.zeros(x_npw.shape[:2], jnp.int32)
        if seen_np is None and taken(q, v):
            how = Attention(plain, ("tiles", None, None, None), scale, False, "vision_attention_output")
            out = fused_attention(q, k, v, anywhere, how)
        else:
            out = plain(q, k, v, anywhere)
        axes = ("vision_heads", "head_dim", "vision_embed")
        return linear(cfg.width, axes, dtype=self.dtype, std=INIT_STD, contract=2, bias=True, name="proj")(out)


class VisionMLP(nn.Module):
    """Two layers with GELU in its tanh form."""

    config: VisionConfig
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        axes = ("vision_embed", "vision_mlp")
        x = linear(self.config.mlp_dim, axes, dtype=self.dtype, std=INIT_STD, bias=True, name="fc1")(x)
        x = nn.gelu(x, approximate=True)
        return linear(self.config.width, axes[::-1], dtype=self.dtype, std=INIT_STD, bias=True, name="fc2")(x)


class VisionBlock(nn.Module):
    config: VisionConfig
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: jax.Array, seen: jax.Array | None = None) -> jax.Array:
        x = x + VisionAttention(self.config, self.dtype, name="attn")(layer_norm(self.dtype, "norm1")(x), seen)
        x = x + VisionMLP(self.config, self.dtype, name="mlp")(layer_norm(self.dtype, "norm2")(x))
        return constrain(x, "tiles", None, None)


class AttentionPool(nn.Module):
    """SigLIP's pooling head: a learned query attends to the patches, then an MLP (timm's ``AttentionPoolLatent``).

    The released checkpoints carry it, and no part of the language model uses it (FACTS §2): its parameters live in
    the tree through convert → train → export, and only contrastive training of the encoder computes it.
    """

    config: VisionConfig
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x_npw: jax.Array) -> jax.Array:
        """[N, P, W], after the encoder's final norm → [N, W]."""
        cfg, exact = self.config, matmul_precision(self.dtype)
        width, hidden = cfg.width, cfg.mlp_dim

        def declare(name: str, *shape: int) -> jax.Array:
            constant = {"bias": nn.initializers.zeros, "scale": nn.initializers.ones}
            init = constant.get(name.rpartition("_")[2], nn.initializers.normal(INIT_STD))
            return jnp.asarray(self.param(name, partitioned(init, (None,) * len(shape)), shape), self.dtype)

        latent = declare("latent", width)
        weights = {
            name: (declare(f"{name}_kernel", inputs, outputs), declare(f"{name}_bias", outputs))
            for name, outputs, inputs in (
                ("q", width, width),
                ("kv", 2 * width, width),
                ("proj", width, width),
                ("mlp_fc1", hidden, width),
                ("mlp_fc2", width, hidden),
            )
        }
        scale, shift = declare("norm_scale", width), declare("norm_bias", width)

        def product(name: str, x: jax.Array) -> jax.Array:
            kernel, bias = weights[name]
            return jnp.matmul(x, kernel, precision=exact) + bias

        q_hd = product("q", latent).reshape(cfg.heads, cfg.head_dim)
        kv = product("kv", x_npw.astype(self.dtype)).reshape(*x_npw.shape[:2], 2, cfg.heads, cfg.head_dim)
        k, v = kv[:, :, 0], kv[:, :, 1]  # [N, P, H, Dh]
        scores = jnp.einsum("hd,nphd->nhp", q_hd, k, precision=exact, preferred_element_type=jnp.float32)
        shares = nn.softmax(scores * cfg.head_dim**-0.5, axis=-1).astype(self.dtype)
        pooled = jnp.einsum("nhp,nphd->nhd", shares, v, precision=exact).reshape(-1, width)
        x = product("proj", pooled)
        x32 = x.astype(jnp.float32)
        centred = x32 - x32.mean(-1, keepdims=True)
        normed = centred * jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + EPSILON)
        inner = nn.gelu(product("mlp_fc1", normed.astype(self.dtype) * scale + shift), approximate=True)
        return x + product("mlp_fc2", inner)


class VisionEncoder(nn.Module):
    """uint8 tiles → features after the final norm."""

    config: VisionConfig
    dtype: DTypeLike

    def setup(self) -> None:
        cfg = self.config
        # The patch convolution has no overlap, so it is a product; kernel rows are (dy, dx, channel).
        self.patch_embed = linear(cfg.width, (None, "vision_embed"), dtype=self.dtype, std=INIT_STD, bias=True)
        init = partitioned(nn.initializers.normal(INIT_STD), (None, "vision_embed"))
        self.pos_embed = self.param("pos_embed", init, (cfg.patches, cfg.width))
        self.blocks = [VisionBlock(cfg, self.dtype) for _ in range(cfg.layers)]
        self.norm = layer_norm(self.dtype)
        self.attn_pool = AttentionPool(cfg, self.dtype)

    def embed_patches(self, tiles: jax.Array, mean: jax.Array, std: jax.Array) -> jax.Array:
        """u8[N, S, S, 3] → [N, P, W], what the first block takes; see `__call__`."""
        cfg = self.config
        pixels = ((tiles.astype(jnp.float32) / 255.0 - mean) / std).astype(self.dtype)
        n, grid, patch = pixels.shape[0], cfg.grid, cfg.patch_size
        seen = pixels[:, : grid * patch, : grid * patch]
        patches = (
            seen.reshape(n, grid, patch, grid, patch, 3)
            .transpose(0, 1, 3, 2, 4, 5)
            .reshape(n, grid**2, patch * patch * 3)
        )
        patches = constrain(patches, "tiles", None, None)
        return self.patch_embed(patches) + self.pos_embed.astype(self.dtype)

    def final_norm(self, x_npw: jax.Array) -> jax.Array:
        return self.norm(x_npw)

    def pool(self, x_npw: jax.Array) -> jax.Array:
        """[N, P, W] of `final_norm` → [N, W]; see `AttentionPool`."""
        return self.attn_pool(x_npw)

    def __call__(self, tiles: jax.Array, mean: jax.Array, std: jax.Array) -> jax.Array:
        """Encodes tiles.

        Args:
          tiles: u8[N, S, S, 3].
          mean, std: f32[3]; a pixel enters as (value / 255 − mean) / std.

        Returns:
          [N, P, W] with P = (S // patch)², row by row.
        """
        x = self.embed_patches(tiles, mean, std)
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        if self.is_initializing():
            self.attn_pool(x)
        return x
