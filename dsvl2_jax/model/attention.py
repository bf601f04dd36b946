"""Multi-head attention (tiny) and multi-head latent attention (small, base), with a cache as argument and result.

Cache layout, one dict per layer, [slots, cache_length, ...]; an entry's index is its token's position:
  MLA  {"latent": [B, S, R], "rope_key": [B, S, rope]}   normed latent and rotated key, shared by all heads
  MHA  {"key": [B, S, Hkv, Dh], "value": [B, S, Hkv, Dh]} rotated keys
A query at position p sees entries ≤ p, so right-padding and stale entries are never seen. Without a cache a row may
hold several samples one after the other, each with positions from 0: a token sees its own sample only.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike

from dsvl2_jax.kernels.attention import ATTENTION_OUTPUT, attend, causal_self_attention, mla_decode_attention
from dsvl2_jax.kernels.precision import matmul_precision
from dsvl2_jax.model.config import LanguageConfig
from dsvl2_jax.model.layers import RMSNorm, linear, partitioned, rotary_tables, rotate_half, rotate_interleaved
from dsvl2_jax.sharding import batch_axis, constrain, shard_map_kernel, split_over

LayerCache = dict[str, jax.Array]


def write_cache(cache: LayerCache, new: LayerCache, positions: jax.Array) -> LayerCache:
    """Writes T new entries of every row at ``positions[:, 0] …``; the positions of a row are consecutive.

    A dynamic slice per row (not a scatter) keeps the update in place when the cache is donated.
    """
    return {name: _write(cache[name], new[name], positions[:, 0]) for name in cache}


def _write(cache: jax.Array, new: jax.Array, start: jax.Array) -> jax.Array:
    entry = ("kv_heads", "head_dim") if cache.ndim == 4 else ("latent",)
    axes = "slots", "cache_length", *entry
    names, _ = split_over(cache.shape, axes, 1)

    def row(old: jax.Array, update: jax.Array, start: jax.Array) -> jax.Array:
        if names:
            # This device has a part of the row, and writes those entries that belong into it.
            start -= lax.axis_index(names) * old.shape[0]
            length = min(len(update), len(old))
            at = jnp.clip(start, 0, len(old) - length)
            index = at - start + jnp.arange(length)
            inside = ((index >= 0) & (index < len(update))).reshape(length, *[1] * (old.ndim - 1))
            update = jnp.where(inside, update.take(index, 0, mode="clip"), lax.dynamic_slice_in_dim(old, at, length))
            start = at
        return lax.dynamic_update_slice_in_dim(old, update, start, axis=0)

    def rows(*arrays: jax.Array) -> tuple[jax.Array]:
        return (jax.vmap(row)(*arrays),)

    new = new.astype(cache.dtype)
    if names:
        whole = "slots", *[None] * (cache.ndim - 1)
        return shard_map_kernel(rows, (axes, whole, whole[:1]), (axes,), [cache])(cache, new, start)[0]
    return constrain(rows(cache, constrain(new, "slots", None, *entry), start)[0], *axes)


class MultiHeadAttention(nn.Module):
    """Multi-head attention, rotary over the whole head in the half layout; fewer key heads repeat (FACTS §1, §4)."""

    config: LanguageConfig
    dtype: DTypeLike

    @nn.compact
    def __call__(
        self,
        x_btd: jax.Array,
        positions: jax.Array,
        cache: LayerCache | None,
        *,
        read_cache: bool = False,
        decode: bool = False,
    ) -> tuple[jax.Array, LayerCache | None]:
        """As `LatentAttention.__call__`."""
        cfg = self.config
        heads, kv_heads, width = cfg.num_attention_heads, cfg.kv_heads, cfg.head_dim
        batch = batch_axis(decode)

        def project(name: str, count: int, axis: str) -> jax.Array:
            axes = ("embed", axis, "head_dim")
            layer = linear(
                (count, width), axes, dtype=self.dtype, std=cfg.initializer_range, bias=cfg.attention_bias, name=name
            )
            return constrain(layer(x_btd), batch, "length", axis, "head_dim")

        cos, sin = rotary_tables(positions, width, cfg.rope_theta)
        query = rotate_half(project("q_proj", heads, "heads"), cos, sin)
        new = {
            "key": rotate_half(project("k_proj", kv_heads, "kv_heads"), cos, sin),
            "value": project("v_proj", kv_heads, "kv_heads"),
        }
        if cache is not None:
            cache = write_cache(cache, new, positions)
        source = cache if read_cache else new
        key, value = (jnp.repeat(source[n], heads // kv_heads, axis=2) for n in ("key", "value"))
        value = value.astype(self.dtype)
        if read_cache:
            # A decode step goes to the cache, which is split by slots; longer ones fetch it, split by heads.
            first_axis, length_axis, head_axis = ("slots", "cache_length", None) if decode else (batch, None, "heads")
            query = constrain(query, first_axis, None, head_axis, "head_dim")
            key, value = (constrain(a, first_axis, length_axis, "heads", "head_dim") for a in (key, value))
            out = attend([query], [key], value, (None, positions), width**-0.5)
            out = constrain(out, first_axis, None, head_axis, "head_dim")
        else:
            out = causal_self_attention(query, key, value, positions, width**-0.5)
        out = checkpoint_name(constrain(out, batch, "length", "heads", "head_dim"), ATTENTION_OUTPUT)
        axes = ("heads", "head_dim", "embed")
        out = linear(
            x_btd.shape[-1],
            axes,
            dtype=self.dtype,
            std=cfg.initializer_range,
            contract=2,
            bias=cfg.attention_bias,
            name="o_proj",
        )(out)
        return out, cache


class LatentAttention(nn.Module):
    """Multi-head latent attention (DeepSeek-V2 §2.1, FACTS §4), cached as one latent and one key per token.

    A decode step uses the absorbed form (queries and outputs pass through kv_b_proj, the cache is
    read as it is); everything else uses the expanded form (keys and values made from latents). Both are equal.
    """

    config: LanguageConfig
    dtype: DTypeLike

    @nn.compact
    def __call__(
        self,
        x_btd: jax.Array,
        positions: jax.Array,
        cache: LayerCache | None,
        *,
        read_cache: bool = False,
        decode: bool = False,
    ) -> tuple[jax.Array, LayerCache | None]:
        """Attends causally.

        Args:
          x_btd: [B, T, D], normed.
          positions: i32[B, T], consecutive in each row; without a cache, in each sample of a row.
          cache: this layer's cache, or None to keep nothing.
          read_cache: static. False: attend to the T tokens given only. True: to the cache, once they are in it.
          decode: static. True in a decode step: T is 1, and the cache is read.

        Returns:
          [B, T, D] and the updated cache.
        """
        cfg = self.config
        heads, nope, rope, rank = cfg.num_attention_heads, cfg.qk_nope_head_dim, cfg.qk_rope_head_dim, cfg.kv_lora_rank
        std, bias = cfg.initializer_range, cfg.attention_bias
        batch = batch_axis(decode)

        query_input, query_axis = x_btd, "embed"
        if cfg.q_lora_rank is not None:
            query_input = linear(
                cfg.q_lora_rank, ("embed", "latent"), dtype=self.dtype, std=std, bias=bias, name="q_a_proj"
            )(x_btd)
            query_input = RMSNorm(1e-6, "latent", name="q_a_layernorm")(query_input)
            query_axis = "latent"
        query_name = "q_proj" if cfg.q_lora_rank is None else "q_b_proj"
        query = linear(
            (heads, nope + rope), (query_axis, "heads", "head_dim"), dtype=self.dtype, std=std, name=query_name
        )(query_input)
        query = constrain(query, batch, "length", "heads", "head_dim")
        q_nope, q_rope = query[..., :nope], query[..., nope:]

        compressed = linear(
            rank + rope, ("embed", "latent"), dtype=self.dtype, std=std, bias=bias, name="kv_a_proj_with_mqa"
        )(x_btd)
        latent = RMSNorm(1e-6, "latent", name="kv_a_layernorm")(compressed[..., :rank])
        cos, sin = rotary_tables(positions, rope, cfg.rope_theta)
        q_rope = rotate_interleaved(q_rope, cos, sin)
        rope_key = rotate_interleaved(compressed[..., None, rank:], cos, sin)[:, :, 0]  # [B, T, rope]
        new = {"latent": latent, "rope_key": rope_key}
        if cache is not None:
            cache = write_cache(cache, new, positions)
        source = cache if read_cache else new
        latent, rope_key = (source[n].astype(self.dtype) for n in ("latent", "rope_key"))

        # Rows of a head: first the keys' part W_uk, then the values' part W_uv. Heads lead, so that neither form
        # transposes the weight.
        kernel = self.param(
            "kv_b_proj",
            partitioned(nn.initializers.normal(std), ("heads", "head_dim", "latent")),
            (heads, nope + cfg.v_head_dim, rank),
        ).astype(self.dtype)
        key_up, value_up = kernel[:, :nope], kernel[:, nope:]
        scale = (nope + rope) ** -0.5
        exact = matmul_precision(self.dtype)
        if decode:
            q_latent = jnp.einsum("bthn,hnr->bthr", q_nope, key_up, precision=exact)
            q_latent = constrain(q_latent, batch, "length", "heads", "latent")
            # To the cache, which is split by slots, and back: cheaper than every device reading all of it.
            queries = [constrain(q, "slots", None, None, None) for q in (q_latent, q_rope)]
            out = mla_decode_attention(*queries, latent, rope_key, positions, scale)  # [B, 1, H, R]
            out = constrain(constrain(out, "slots", None, None, None), batch, "length", "heads", "latent")
            out = jnp.einsum("bthr,hvr->bthv", out, value_up, precision=exact)
        else:
            latent, rope_key = (constrain(a, batch, None, "latent") for a in (latent, rope_key))
            key = jnp.einsum("bsr,hnr->bshn", latent, key_up, precision=exact)
            value = jnp.einsum("bsr,hvr->bshv", latent, value_up, precision=exact)
            key, value = (constrain(a, batch, "length", "heads", "head_dim") for a in (key, value))
            if read_cache:
                out = attend([q_nope, q_rope], [key, rope_key], value, (None, positions), scale)
            else:  # one product of the joined parts instead of two whose results are added
                rope_keys = jnp.broadcast_to(rope_key[:, :, None], (*key.shape[:3], rope))
                parts = (q_nope, q_rope), (key, rope_keys)
                query, key = (jnp.concatenate(part, axis=-1) for part in parts)
                out = causal_self_attention(query, key, value, positions, scale)
        out = checkpoint_name(constrain(out, batch, "length", "heads", "head_dim"), ATTENTION_OUTPUT)
        axes = ("heads", "head_dim", "embed")
        out = linear(x_btd.shape[-1], axes, dtype=self.dtype, std=std, contract=2, bias=bias, name="o_proj")(out)
        return out, cache
