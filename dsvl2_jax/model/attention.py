"""Multi-head attention (tiny) and multi-head latent attention (small, base), with a cache as argument and result.

Cache layout, one dict per layer, [slots, cache_length, ...]; an entry's index is its token's position:
  MLA  {"latent": [B, S, R], "rope_key": [B, S, rope]}   normed latent and rotated key, shared by all heads
  MHA  {"key": [B, S, Hkv, Dh], "value": [B, S, Hkv, Dh]} rotated keys
Each is an array or, in int8, `dsvl2_jax.kernels.quantized_cache.QuantizedEntries`.
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

from dsvl2_jax.kernels.attention import (
    ATTENTION_OUTPUT,
    attend,
    causal_self_attention,
    mha_decode_attention,
    mla_decode_attention,
)
from dsvl2_jax.kernels.quantized_cache import Entries, QuantizedEntries, dequantize_entries, quantize_entries
from dsvl2_jax.kernels.span_attention import attend_in_spans, is_long
from dsvl2_jax.model.config import LanguageConfig
from dsvl2_jax.model.layers import (
    Linear,
    RMSNorm,
    declare,
    einsum_weight,
    rotate_half,
    rotate_interleaved,
)
from dsvl2_jax.model.rotary import rotary_tables
from dsvl2_jax.sharding import batch_axis, constrain, shard_map_kernel, split_over

LayerCache = dict[str, Entries]

# Logical axes of an entry, by its name in the cache. Those of a scale are the first of them.
ENTRY_AXES = {
    "latent": ("latent",),
    "rope_key": ("head_dim",),
    "key": ("kv_heads", "head_dim"),
    "value": ("kv_heads", "head_dim"),
}

LATENT_NORM_EPS = 1e-6  # of the norms of latents, whatever the configuration says of the others


def cache_axes(name: str, array: jax.Array) -> tuple[str, ...]:
    """Logical axes of an array [B, S, …] of the cache: of its entries, or of their scales."""
    return "slots", "cache_length", *ENTRY_AXES[name][: array.ndim - 2]


def write_cache(
    cache: LayerCache, new: dict[str, jax.Array], positions_bt: jax.Array, *, drafts: bool = False
) -> LayerCache:
    """Writes T new entries of every row from ``positions_bt[:, 0]`` on; the positions of a row are consecutive.

    A dynamic slice per row (not a scatter) keeps the update in place when the cache is donated.

    Args:
      cache: entries [B, S, ...].
      new: arrays [B, T, ...] of the same names, which are written in the dtype of the cache.
      positions_bt: i32[B, T].
      drafts: static. The entries may be of tokens that are taken back: those beyond the cache's end are left out, and
        zeros stand for what is no number, which would spoil every sum that it is multiplied by zero in.

    Returns:
      The cache with the new entries.
    """
    if drafts:
        new = {name: jnp.where(jnp.isfinite(x), x, 0) for name, x in new.items()}

    def put(name: str) -> Entries:
        entries = quantize_entries(new[name]) if isinstance(cache[name], QuantizedEntries) else new[name]
        return jax.tree.map(
            lambda old, update: _write(old, update, cache_axes(name, old), positions_bt[:, 0], drafts),
            cache[name],
            entries,
        )

    return {name: put(name) for name in cache}


def _write(cache: jax.Array, new: jax.Array, axes: tuple[str, ...], start_b: jax.Array, drafts: bool) -> jax.Array:
    """`write_cache` of one array, on the devices that hold the entries."""
    names, _ = split_over(cache.shape, axes, 1)

    def row(old: jax.Array, update: jax.Array, start: jax.Array) -> jax.Array:
        if names:
            # This device has a part of the row, and writes those entries that belong into it.
            start -= lax.axis_index(names) * old.shape[0]
        if drafts:
            index = start + jnp.arange(len(update))
            return old.at[jnp.where(index < 0, len(old), index)].set(update, mode="drop")  # else -1 is the last one
        if names:
            length = min(len(update), len(old))
            at = jnp.clip(start, 0, len(old) - length)
            index = at - start + jnp.arange(length)
            inside = ((index >= 0) & (index < len(update))).reshape(length, *[1] * (old.ndim - 1))
            update = jnp.where(inside, update.take(index, 0, mode="clip"), lax.dynamic_slice_in_dim(old, at, length))
            start = at
        return lax.dynamic_update_slice_in_dim(old, update, start, axis=0)

    def rows(*arrays: jax.Array) -> jax.Array:
        return jax.vmap(row)(*arrays)

    def entries(old: jax.Array, update: jax.Array, start: jax.Array) -> jax.Array:
        """One entry after the other, those alone that belong here: nothing of the cache is read.

        On TPUs a part of an int8 array that is read at any position costs a copy of the whole.
        """
        start -= lax.axis_index(names) * old.shape[1] if names else 0
        at = (start[:, None] + jnp.arange(update.shape[1])).reshape(-1)
        update = update.reshape(len(at), 1, 1, *update.shape[2:])
        inside = (at >= 0) & (at < old.shape[1])
        order = jnp.argsort(~inside) if names or drafts else jnp.arange(len(at))

        def put(i: jax.Array, old: jax.Array) -> jax.Array:
            index = order[i] // (len(at) // len(start)), at[order[i]], *[0] * (old.ndim - 2)
            return lax.dynamic_update_slice(old, update[order[i]], index)

        return lax.fori_loop(0, inside.sum(), put, old)

    few = cache.dtype == jnp.int8 and (drafts or new.shape[1] == 1)

    def write(*arrays: jax.Array) -> tuple[jax.Array]:
        return (lax.platform_dependent(*arrays, tpu=entries, default=rows) if few else rows(*arrays),)

    new = new.astype(cache.dtype)
    if names or few:
        # Positions take the axes that slots leave free, and leave none to heads.
        of_new = "slots", None, *([None] * (cache.ndim - 2) if names else axes[2:])
        return shard_map_kernel(write, (axes, of_new, of_new[:1]), (axes,), [cache])(cache, new, start_b)[0]
    return constrain(rows(cache, constrain(new, "slots", None, *axes[2:]), start_b), *axes)


class MultiHeadAttention(nn.Module):
    """Multi-head attention of tiny; rotary over the whole head in the half layout (`rotate_half`).

    Fewer key heads than query heads are repeated.
    """

    config: LanguageConfig
    dtype: DTypeLike

    @nn.compact
    def __call__(
        self,
        x_btd: jax.Array,
        positions_bt: jax.Array,
        cache: LayerCache | None,
        *,
        read_cache: bool = False,
        decode: bool = False,
        lengths_bt: jax.Array | None = None,
    ) -> tuple[jax.Array, LayerCache | None]:
        """As `LatentAttention.__call__`."""
        cfg = self.config
        heads, kv_heads, width = cfg.num_attention_heads, cfg.kv_heads, cfg.head_dim
        batch, std, bias = batch_axis(decode), cfg.initializer_range, cfg.attention_bias
        # A decode step's products are split as their weights are, heads and what they leave free of a head's width.
        head_width = "mha_head_dim" if decode else "head_dim"

        def project(name: str, count: int, axis: str) -> jax.Array:
            axes = ("embed", axis, "mha_head_dim")
            x_bthd = Linear((count, width), axes, self.dtype, std, bias=bias, name=name)(x_btd)
            x_bthd = constrain(x_bthd, batch, "length", axis, head_width)
            # Whole heads to the slots' devices, before pairs of a head's width are rotated.
            return constrain(x_bthd, "slots", None, None, "head_dim") if decode else x_bthd

        q_bthd = project("q_proj", heads, "heads")
        k_bthd, v_bthd = project("k_proj", kv_heads, "kv_heads"), project("v_proj", kv_heads, "kv_heads")
        with jax.named_scope("rotary"):
            cos, sin = rotary_tables(cfg, positions_bt, lengths_bt)
            q_bthd, k_bthd = rotate_half(q_bthd, cos, sin), rotate_half(k_bthd, cos, sin)
        new = {"key": k_bthd, "value": v_bthd}
        if cache is not None:
            with jax.named_scope("cache_write"):
                cache = write_cache(cache, new, positions_bt, drafts=decode and x_btd.shape[1] > 1)
        with jax.named_scope("attention"):
            source = cache if read_cache else new
            scale, spans = cfg.softmax_scale, read_cache and not decode and is_long(cache["key"].shape[1])

            def repeated(*entries: Entries) -> tuple[Entries, ...]:
                # A decode step reads the cache as it lies; longer ones are few rows.
                entries = (x if decode else dequantize_entries(x, self.dtype) for x in entries)
                return tuple(jax.tree.map(lambda x: jnp.repeat(x, heads // kv_heads, axis=2), x) for x in entries)

            k_bshd, v_bshd = (None, None) if spans else repeated(source["key"], source["value"])
            if spans:
                kv_axes = batch, None, "kv_heads", "head_dim"
                arrays = jax.tree.map(lambda x: constrain(x, *kv_axes[: x.ndim]), [cache["key"], cache["value"]])

                def expand(keys: Entries, values: Entries) -> tuple[list[jax.Array], jax.Array]:
                    keys, values = repeated(keys, values)
                    return [keys], values

                out_bthd = attend_in_spans([q_bthd], arrays, expand, positions_bt, scale)
            elif read_cache:
                # A decode step goes to the cache, which is split by slots; longer ones fetch it, split by heads.
                axes = ("slots", "cache_length", None) if decode else (batch, None, "heads")
                first_axis, length_axis, head_axis = axes
                q_bthd = constrain(q_bthd, first_axis, None, head_axis, "head_dim")
                entry_axes = first_axis, length_axis, "heads", "head_dim"
                k_bshd, v_bshd = jax.tree.map(lambda x: constrain(x, *entry_axes[: x.ndim]), (k_bshd, v_bshd))
                if decode:
                    out_bthd = mha_decode_attention(q_bthd, k_bshd, v_bshd, positions_bt, scale)
                else:
                    out_bthd = attend([q_bthd], [k_bshd], v_bshd, (None, positions_bt), scale)
                out_bthd = constrain(out_bthd, first_axis, None, head_axis, "head_dim")
            else:
                out_bthd = causal_self_attention(q_bthd, k_bshd, v_bshd, positions_bt, scale)
            out_bthd = constrain(out_bthd, batch, "length", "heads", head_width)
        return _output(self, out_bthd, x_btd.shape[-1], "mha_head_dim"), cache


def _output(
    module: MultiHeadAttention | LatentAttention, out_bthd: jax.Array, width: int, head_width: str = "head_dim"
) -> jax.Array:
    """[B, T, H, Dv] → [B, T, D]: the output projection, which both attentions have."""
    cfg, axes = module.config, ("heads", head_width, "embed")
    out_bthd = checkpoint_name(out_bthd, ATTENTION_OUTPUT)
    layer = Linear(width, axes, module.dtype, cfg.initializer_range, contract=2, bias=cfg.attention_bias, name="o_proj")
    return layer(out_bthd)


class LatentAttention(nn.Module):
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, §2.1): one latent and one key are cached per token.

    A decode step uses the absorbed form (queries and outputs pass through kv_b_proj, the cache is read as it is);
    everything else uses the expanded form (keys and values made from latents). Both are equal.
    """

    config: LanguageConfig
    dtype: DTypeLike

    @nn.compact
    def __call__(
        self,
        x_btd: jax.Array,
        positions_bt: jax.Array,
        cache: LayerCache | None,
        *,
        read_cache: bool = False,
        decode: bool = False,
        lengths_bt: jax.Array | None = None,
    ) -> tuple[jax.Array, LayerCache | None]:
        """Attends causally.

        Args:
          x_btd: [B, T, D], normed.
          positions_bt: i32[B, T], consecutive in each row; without a cache, in each sample of a row.
          cache: this layer's cache, or None to keep nothing.
          read_cache: static. False: attend to the T tokens given only. True: to the cache, once they are in it.
          decode: static. True in a decode step: the cache is read, and the tokens after the first are drafts.
          lengths_bt: i32[B, T], see `rotary_tables`.

        Returns:
          [B, T, D] and the updated cache.
        """
        cfg = self.config
        heads, nope, rope, rank = cfg.num_attention_heads, cfg.qk_nope_head_dim, cfg.qk_rope_head_dim, cfg.kv_lora_rank
        std, bias, dtype = cfg.initializer_range, cfg.attention_bias, self.dtype
        batch = batch_axis(decode)

        q_input, q_axis, q_name = x_btd, "embed", "q_proj"
        if cfg.q_lora_rank is not None:
            q_input = Linear(cfg.q_lora_rank, ("embed", "latent"), dtype, std, bias=bias, name="q_a_proj")(x_btd)
            q_input = RMSNorm(LATENT_NORM_EPS, "latent", name="q_a_layernorm")(q_input)
            q_axis, q_name = "latent", "q_b_proj"
        q_bthd = Linear((heads, nope + rope), (q_axis, "heads", "head_dim"), dtype, std, name=q_name)(q_input)
        q_bthd = constrain(q_bthd, batch, "length", "heads", "head_dim")
        q_nope, q_rope = q_bthd[..., :nope], q_bthd[..., nope:]

        kv_axes = ("embed", "latent")
        compressed = Linear(rank + rope, kv_axes, dtype, std, bias=bias, name="kv_a_proj_with_mqa")(x_btd)
        latent_btr = RMSNorm(LATENT_NORM_EPS, "latent", name="kv_a_layernorm")(compressed[..., :rank])
        with jax.named_scope("rotary"):
            cos, sin = rotary_tables(cfg, positions_bt, lengths_bt)
            q_rope = rotate_interleaved(q_rope, cos, sin)
            rope_key = rotate_interleaved(compressed[..., None, rank:], cos, sin)[:, :, 0]  # [B, T, rope]
        new = {"latent": latent_btr, "rope_key": rope_key}
        if cache is not None:
            with jax.named_scope("cache_write"):
                cache = write_cache(cache, new, positions_bt, drafts=decode and x_btd.shape[1] > 1)
        source = cache if read_cache else new
        spans = read_cache and not decode and is_long(source["latent"].shape[1])
        latent_bsr, rope_key = (
            source[name] if decode or spans else dequantize_entries(source[name], dtype)
            for name in ("latent", "rope_key")
        )

        # Rows of a head: first the keys' part W_uk, then the values' part W_uv. Heads lead, so that neither form
        # transposes the weight.
        kv_b_shape, kv_b_axes = (heads, nope + cfg.v_head_dim, rank), ("heads", "head_dim", "latent")
        kv_b = declare(self, "kv_b_proj", kv_b_shape, kv_b_axes, nn.initializers.normal(std), inputs=2)
        key_rows, value_rows = slice(nope), slice(nope, None)
        scale = cfg.softmax_scale

        @jax.named_scope("kv_b_proj")
        def expand(latent_bsr: jax.Array) -> tuple[jax.Array, jax.Array]:
            k_bshd = einsum_weight("bsr,hnr->bshn", latent_bsr, kv_b, dtype=dtype, rows=key_rows)
            v_bshd = einsum_weight("bsr,hvr->bshv", latent_bsr, kv_b, dtype=dtype, rows=value_rows)
            k_bshd, v_bshd = (constrain(x, batch, "length", "heads", "head_dim") for x in (k_bshd, v_bshd))
            return k_bshd, v_bshd

        if decode:
            with jax.named_scope("kv_b_proj"):
                q_latent = einsum_weight("bthn,hnr->bthr", q_nope, kv_b, dtype=dtype, rows=key_rows)
                q_latent = constrain(q_latent, batch, "length", "heads", "latent")
            with jax.named_scope("attention"):
                # To the cache, which is split by slots, and back: cheaper than every device reading all of it.
                queries = [constrain(q, "slots", None, None, None) for q in (q_latent, q_rope)]
                out_bthr = mla_decode_attention(*queries, latent_bsr, rope_key, positions_bt, scale)
                out_bthr = constrain(out_bthr, "slots", None, None, None)
                out_bthr = constrain(out_bthr, batch, "length", "heads", "latent")
            with jax.named_scope("kv_b_proj"):
                out_bthd = einsum_weight("bthr,hvr->bthv", out_bthr, kv_b, dtype=dtype, rows=value_rows)
        elif spans:

            def expand_span(*entries: Entries) -> tuple[list[jax.Array], jax.Array]:
                latent_bsr, rope_key = (dequantize_entries(x, dtype) for x in entries)
                k_bshd, v_bshd = expand(latent_bsr)
                return [k_bshd, rope_key], v_bshd

            with jax.named_scope("attention"):
                entry_axes = batch, None, "latent"
                arrays = jax.tree.map(lambda x: constrain(x, *entry_axes[: x.ndim]), [latent_bsr, rope_key])
                out_bthd = attend_in_spans([q_nope, q_rope], arrays, expand_span, positions_bt, scale)
        else:
            latent_bsr, rope_key = (constrain(x, batch, "length", "latent") for x in (latent_bsr, rope_key))
            k_bshd, v_bshd = expand(latent_bsr)
            with jax.named_scope("attention"):
                if read_cache:
                    parts = [q_nope, q_rope], [k_bshd, rope_key]
                    out_bthd = attend(*parts, v_bshd, (None, positions_bt), scale)
                else:  # one product of the joined parts instead of two whose results are added
                    rope_keys = jnp.broadcast_to(rope_key[:, :, None], (*k_bshd.shape[:3], rope))
                    parts = (q_nope, q_rope), (k_bshd, rope_keys)
                    q_bthd, k_bshd = (jnp.concatenate(part, axis=-1) for part in parts)
                    out_bthd = causal_self_attention(q_bthd, k_bshd, v_bshd, positions_bt, scale)
        out_bthd = constrain(out_bthd, batch, "length", "heads", "head_dim")
        return _output(self, out_bthd, x_btd.shape[-1]), cache
