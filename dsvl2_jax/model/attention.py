"""Multi-head attention (tiny) and multi-head latent attention (small, base), with a cache as argument and result.

Cache layout, one dict per layer, [slots, cache_length, ...]; an entry's index is its token's position:
  MLA  {"latent": [B, S, R], "rope_key": [B, S, rope]}   normed latent and rotated key, shared by all heads
  MHA  {"key": [B, S, Hkv, Dh], "value": [B, S, Hkv, Dh]} rotated keys
A query at position p sees entries ≤ p, so right-padding and stale entries are never seen. Without a cache a row may
hold several samples one after the other, each with positions from 0: a token sees its own sample only.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike

from dsvl2_jax.kernels.gpu_attention import Attention, fused_attention, taken
from dsvl2_jax.kernels.precision import matmul_precision
from dsvl2_jax.kernels.tpu import ATTENTION_BLOCK, latent_attention, splash_attention
from dsvl2_jax.model.config import LanguageConfig
from dsvl2_jax.model.layers import RMSNorm, linear, partitioned, rotary_tables, rotate_half, rotate_interleaved
from dsvl2_jax.sharding import batch_axis, constrain, on_shards, split_over

LayerCache = dict[str, jax.Array]

ATTENTION_OUTPUT = "attention_output"  # its name for rematerialisation policies

# Scores are held for this many queries at a time: [B, H, 512, S] instead of [B, H, T, S].
QUERY_BLOCK = 512

# Shorter rows are attended to whole.
MIN_QUARTERED = 512


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
        return on_shards(rows, (axes, whole, whole[:1]), (axes,), [cache])(cache, new, start)[0]
    return constrain(rows(cache, constrain(new, "slots", None, *entry), start)[0], *axes)


def attend(
    queries: Sequence[jax.Array],
    keys: Sequence[jax.Array],
    values: jax.Array,
    seen: tuple[jax.Array | None, jax.Array],
    scale: float,
) -> jax.Array:
    """Causal softmax attention whose score is a sum of products, softmax in float32.

    Args:
      queries: parts [B, T, H, width_i].
      keys: parts [B, S, H, width_i], or [B, S, width_i] where all heads share the key.
      values: [B, S, H, Dv], or [B, S, Dv] shared by all heads.
      seen: (first, last), each i32[B, T]: the keys that a query sees; first None: from key 0.
      scale: factor on the scores.

    Returns:
      [B, T, H, Dv] in the dtype of ``values``.
    """
    length = queries[0].shape[1]
    if length > QUERY_BLOCK and length % QUERY_BLOCK == 0:
        blocks = length // QUERY_BLOCK

        def split(x: jax.Array) -> jax.Array:
            return jnp.moveaxis(x.reshape(x.shape[0], blocks, QUERY_BLOCK, *x.shape[2:]), 1, 0)

        out = lax.map(
            lambda block: _attend_block(block[0], keys, values, block[1], scale),
            ([split(q) for q in queries], jax.tree.map(split, seen)),
        )
        return jnp.moveaxis(out, 0, 1).reshape(out.shape[1], length, *out.shape[3:])
    return _attend_block(queries, keys, values, seen, scale)


@functools.partial(jax.checkpoint, static_argnums=4)  # training too holds one block's scores at a time
def _attend_block(
    queries: Sequence[jax.Array],
    keys: Sequence[jax.Array],
    values: jax.Array,
    seen: tuple[jax.Array | None, jax.Array],
    scale: float,
) -> jax.Array:
    scores = sum(
        jnp.einsum(
            "bthd,bshd->bhts" if key.ndim == 4 else "bthd,bsd->bhts",
            query,
            key.astype(query.dtype),
            precision=matmul_precision(query.dtype),
            preferred_element_type=jnp.float32,
        )
        for query, key in zip(queries, keys, strict=True)
    )  # [B, H, T, S] float32
    first, last = seen
    slots = jnp.arange(scores.shape[-1])
    visible = slots <= last[..., None]  # [B, T, S]
    if first is not None:
        visible &= slots >= first[..., None]
    scores = jnp.where(visible[:, None], scores * scale, jnp.finfo(jnp.float32).min)
    weights = nn.softmax(scores, axis=-1).astype(values.dtype)
    spec = "bhts,bshd->bthd" if values.ndim == 4 else "bhts,bsd->bthd"
    return jnp.einsum(spec, weights, values, precision=matmul_precision(values.dtype))


def attend_to_latents(
    query: jax.Array,
    rope_query: jax.Array,
    latent: jax.Array,
    rope_key: jax.Array,
    positions: jax.Array,
    scale: float,
) -> jax.Array:
    """`attend` of one token a row, [B, 1, H, …], to its latents; on TPUs, in bfloat16, by a kernel of ours.

    Where a row's latents are on several devices, each attends to its own, and the results are weighted and added.
    """

    def plain(query: jax.Array, rope_query: jax.Array, latent: jax.Array, rope_key: jax.Array, positions: jax.Array):
        return attend([query, rope_query], [latent, rope_key], latent, (None, positions), scale)

    whole, cache = ("slots", None, None, None), ("slots", "cache_length", None)
    names, parts = split_over(latent.shape, cache, 1)
    slots = latent.shape[1] // parts
    if latent.dtype != jnp.bfloat16 or slots % min(slots, ATTENTION_BLOCK):
        return plain(query, rope_query, latent, rope_key, positions)

    def kernel(query: jax.Array, rope_query: jax.Array, *rest: jax.Array) -> tuple[jax.Array]:
        *cache, last = rest
        first = lax.axis_index(names) * slots if names else 0
        out, weight = latent_attention(query[:, 0], rope_query[:, 0], *cache, last[:, 0] - first, scale)
        if names:
            share = jnp.exp(weight - lax.pmax(weight, names))
            out = lax.psum(out * share, names) / lax.psum(share, names)
        return (out.astype(query.dtype)[:, None],)

    split = on_shards(kernel, (whole, whole, cache, cache, ("slots", None)), (whole,), [query])
    return lax.platform_dependent(
        query, rope_query, latent, rope_key, positions, tpu=lambda *arrays: split(*arrays)[0], default=plain
    )


def attend_to_row(
    queries: Sequence[jax.Array], keys: Sequence[jax.Array], values: jax.Array, positions: jax.Array, scale: float
) -> jax.Array:
    """`attend` of rows to themselves, each token to those before it in its own sample; ``positions``: i32[B, T].

    In bfloat16: on GPUs by the kernels of `dsvl2_jax.kernels.gpu_attention`, on TPUs by jax's splash kernel.
    """
    if len(queries) == 1 and taken(queries[0], values):

        def plain(query: jax.Array, key: jax.Array, value: jax.Array, positions: jax.Array) -> jax.Array:
            return _attend_quarters([query], [key], value, positions, scale)

        axes = ("batch", "length", "heads", "head_dim")
        how = Attention(plain, axes, scale, True, ATTENTION_OUTPUT)
        elsewhere = functools.partial(fused_attention, how=how)
        if positions.shape[1] % ATTENTION_BLOCK:
            return elsewhere(*queries, *keys, values, positions)

        def splash(*arrays: jax.Array) -> tuple[jax.Array]:
            return (splash_attention(*arrays, scale),)

        (out,) = lax.platform_dependent(
            *queries,
            *keys,
            values,
            positions,
            tpu=on_shards(splash, (axes, axes, axes, axes[:2]), (axes,)),
            default=lambda *arrays: (elsewhere(*arrays),),
        )
        return out
    return _attend_quarters(queries, keys, values, positions, scale)


def _attend_quarters(
    queries: Sequence[jax.Array], keys: Sequence[jax.Array], values: jax.Array, positions: jax.Array, scale: float
) -> jax.Array:
    """A quarter of the queries at a time, which needs no keys after it: 5/8 of the work of all pairs."""
    length = positions.shape[1]
    own = jnp.broadcast_to(jnp.arange(length), positions.shape)
    seen = own - positions, own
    if length < MIN_QUARTERED or length % 4:
        return attend(queries, keys, values, seen, scale)

    outs = []
    for i in range(4):
        start, stop = i * length // 4, (i + 1) * length // 4
        own_queries, own_seen = jax.tree.map(lambda x: x[:, start:stop], (list(queries), seen))  # noqa: B023
        before, values_before = jax.tree.map(lambda x: x[:, :stop], (list(keys), values))  # noqa: B023
        outs.append(attend(own_queries, before, values_before, own_seen, scale))
    return jnp.concatenate(outs, axis=1)


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
            out = attend_to_row([query], [key], value, positions, width**-0.5)
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
            out = attend_to_latents(*queries, latent, rope_key, positions, scale)  # [B, 1, H, R]
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
                out = attend_to_row([query], [key], value, positions, scale)
        out = checkpoint_name(constrain(out, batch, "length", "heads", "head_dim"), ATTENTION_OUTPUT)
        axes = ("heads", "head_dim", "embed")
        out = linear(x_btd.shape[-1], axes, dtype=self.dtype, std=std, contract=2, bias=bias, name="o_proj")(out)
        return out, cache
