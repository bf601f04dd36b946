"""The language model: embeddings, decoder layers, final norm and output head (FACTS §4)."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from dsvl2_jax.model.attention import LatentAttention, LayerCache, MultiHeadAttention
from dsvl2_jax.model.config import LanguageConfig
from dsvl2_jax.model.layers import GatedMLP, RMSNorm, linear, partitioned
from dsvl2_jax.model.moe import MoE, Routing
from dsvl2_jax.sharding import batch_axis, constrain

Cache = list[LayerCache]


class DecoderLayer(nn.Module):
    """Pre-norm attention and feed-forward, each with a residual."""

    config: LanguageConfig
    layer: int
    dtype: DTypeLike

    @nn.compact
    def __call__(
        self,
        x_btd: jax.Array,
        positions: jax.Array,
        valid: jax.Array | None,
        cache: LayerCache | None,
        *,
        read_cache: bool = False,
        decode: bool = False,
    ) -> tuple[jax.Array, LayerCache | None, Routing | None]:
        cfg = self.config
        attention = LatentAttention if cfg.use_mla else MultiHeadAttention
        normed = RMSNorm(cfg.rms_norm_eps, name="input_layernorm")(x_btd)
        attended, cache = attention(cfg, self.dtype, name="self_attn")(
            normed, positions, cache, read_cache=read_cache, decode=decode
        )
        batch = batch_axis(decode)
        x_btd = constrain(x_btd + attended, batch, "length", "embed")
        normed = RMSNorm(cfg.rms_norm_eps, name="post_attention_layernorm")(x_btd)
        routing = None
        if cfg.is_moe_layer(self.layer):
            fed, routing = MoE(cfg, self.dtype, name="mlp")(normed, valid, decode=decode)
        else:
            fed = GatedMLP(cfg.intermediate_size, self.dtype, cfg.initializer_range, name="mlp")(normed, decode=decode)
        return constrain(x_btd + fed, batch, "length", "embed"), cache, routing


class Decoder(nn.Module):
    """DeepSeekMoE decoder. Tokens enter as embeddings, so that images can be merged among them."""

    config: LanguageConfig
    dtype: DTypeLike

    def setup(self) -> None:
        cfg = self.config
        self.embed_tokens = self.param(
            "embed_tokens",
            partitioned(nn.initializers.normal(cfg.initializer_range), ("vocab", "embed")),
            (cfg.vocab_size, cfg.hidden_size),
        )
        self.layers = [DecoderLayer(cfg, i, self.dtype) for i in range(cfg.num_hidden_layers)]
        self.norm = RMSNorm(cfg.rms_norm_eps)
        self.lm_head = linear(cfg.vocab_size, ("embed", "vocab"), dtype=self.dtype, std=cfg.initializer_range)

    def embed(self, ids: jax.Array) -> jax.Array:
        """i32[...] token ids → [..., D]."""
        return jnp.take(self.embed_tokens.astype(self.dtype), ids, axis=0)

    def hidden(
        self,
        x_btd: jax.Array,
        positions: jax.Array,
        valid: jax.Array | None = None,
        cache: Cache | None = None,
        *,
        read_cache: bool = False,
        decode: bool = False,
    ) -> tuple[jax.Array, Cache | None, list[Routing | None]]:
        """Runs all layers and the final norm.

        Args:
          x_btd: [B, T, D] embeddings.
          positions: i32[B, T], consecutive in each row; without a cache, in each sample of a row.
          valid: bool[B, T], False for padding; None: no padding.
          cache: one dict per layer (see `attention`), or None.
          read_cache, decode: static; see `LatentAttention`.

        Returns:
          [B, T, D] hidden states, the updated cache, and each layer's routing (None for dense layers).
        """
        x = constrain(x_btd, batch_axis(decode), "length", "embed")
        new_cache: Cache | None = None if cache is None else []
        routings = []
        for i, layer in enumerate(self.layers):
            x, layer_cache, routing = layer(
                x, positions, valid, None if cache is None else cache[i], read_cache=read_cache, decode=decode
            )
            routings.append(routing)
            if new_cache is not None:
                new_cache.append(layer_cache)
        return self.norm(x), new_cache, routings

    def logits(self, hidden: jax.Array) -> jax.Array:
        """[..., D] → float32 [..., V]."""
        return self.lm_head(hidden).astype(jnp.float32)

    def __call__(self, ids: jax.Array) -> jax.Array:
        """i32[B, T] → f32[B, T, V]; touches every parameter, for init."""
        positions = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
        return self.logits(self.hidden(self.embed(ids), positions)[0])
