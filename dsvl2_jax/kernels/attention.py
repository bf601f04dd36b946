"""Attention: a function for each way in which the model attends; the choice of a kernel stands behind it.

- `causal_self_attention`: rows to themselves, each token to those before it in its sample (prefill, training).
- `self_attention`: all to all (the encoder's patches).
- `mla_decode_attention`: a row's newest tokens, one or a few, to the latents of its cache.
- `mha_decode_attention`: the same to the keys and values of its cache.
- `decode_attention`: what these two do without a kernel.
- `attend`: anything else, and what runs where no kernel is for an operation; in blocks of queries.

A kernel is chosen by the platform that the program is lowered for, by dtype and by shape.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from dsvl2_jax.kernels.cpu import bits_to_slice, cpu_or, from_bits
from dsvl2_jax.kernels.fused_attention import AttentionSpec, fused_attention, is_supported
from dsvl2_jax.kernels.precision import matmul_precision, product_in_float32
from dsvl2_jax.kernels.quantized_cache import Entries, QuantizedEntries, numbers, times_scale
from dsvl2_jax.kernels.ring_attention import ring_attention
from dsvl2_jax.kernels.tpu import ATTENTION_BLOCK, cached_attention, latent_attention, splash_attention
from dsvl2_jax.sharding import shard_map_kernel, split_over

ATTENTION_OUTPUT = "attention_output"  # its name for rematerialisation policies

# Scores are held for this many queries at a time: [B, H, 512, S] instead of [B, H, T, S].
QUERY_BLOCK = 512

# Keys that a decode step attends to at a time.
KEY_BLOCK = 128

CAUSAL_CHUNKS = 4
MIN_CHUNKED = 512  # shorter rows are attended to whole

# Heads whose patches attend to each other at a time, on CPUs.
HEAD_GROUP = 4

KeyRange = tuple[jax.Array | None, jax.Array]


@jax.named_scope("attend")
def attend(
    queries: Sequence[jax.Array],
    keys: Sequence[Entries],
    values: Entries,
    key_range: KeyRange,
    scale: float,
) -> jax.Array:
    """Softmax attention whose score is a sum of products, softmax in float32.

    Args:
      queries: parts [B, T, H, width_i].
      keys: parts [B, S, H, width_i], or [B, S, width_i] where all heads share the key.
      values: [B, S, H, Dv], or [B, S, Dv] shared by all heads.
      key_range: (first, last), each i32[B, T]: the keys that a query sees; first None: from key 0.
      scale: factor on the scores.

    Returns:
      [B, T, H, Dv] in the dtype of ``queries``.
    """
    length = queries[0].shape[1]
    if length > QUERY_BLOCK and length % QUERY_BLOCK == 0:
        blocks = length // QUERY_BLOCK

        def split(x: jax.Array) -> jax.Array:  # [B, T, …] → [blocks, B, QUERY_BLOCK, …]
            return jnp.moveaxis(x.reshape(x.shape[0], blocks, QUERY_BLOCK, *x.shape[2:]), 1, 0)

        out = lax.map(
            lambda block: _attend_block(block[0], keys, values, block[1], scale),
            ([split(q) for q in queries], jax.tree.map(split, key_range)),
        )
        return jnp.moveaxis(out, 0, 1).reshape(out.shape[1], length, *out.shape[3:])
    return _attend_block(queries, keys, values, key_range, scale)


@functools.partial(jax.checkpoint, static_argnums=4)  # training too holds one block's scores at a time
def _attend_block(
    queries: Sequence[jax.Array], keys: Sequence[Entries], values: Entries, key_range: KeyRange, scale: float
) -> jax.Array:
    scores_bhts = sum(_scores(q, k) for q, k in zip(queries, keys, strict=True))  # float32
    first_bt, last_bt = key_range
    key_index = jnp.arange(scores_bhts.shape[-1])
    visible_bts = key_index <= last_bt[..., None]
    if first_bt is not None:
        visible_bts &= key_index >= first_bt[..., None]
    scores_bhts = jnp.where(visible_bts[:, None], scores_bhts * scale, jnp.finfo(jnp.float32).min)
    # Heads before tokens, as the product makes them, and summed in float32 by request: otherwise XLA on CPUs sums
    # bfloat16 in bfloat16.
    dtype = queries[0].dtype
    out_bhtd = _weighted(jax.nn.softmax(scores_bhts, axis=-1), values, dtype)
    return out_bhtd.swapaxes(1, 2).astype(dtype)


@jax.named_scope("decode_attention")
def decode_attention(
    queries: Sequence[jax.Array],
    keys: Sequence[Entries],
    values: Entries,
    last_bt: jax.Array,
    scale: float,
) -> jax.Array:
    """`attend` of a row's newest tokens, whose result does not depend on how much longer the cache is, bit for bit.

    Keys are taken `KEY_BLOCK` at a time, whatever their number, and what the blocks give is added in their order: a
    block that a row does not see adds zeros. CPUs go over the blocks that some row sees, one after the other as in
    FlashAttention; elsewhere, where a loop costs more than its work, all blocks are one batch.

    Args:
      queries: parts [B, T, H, width_i].
      keys: parts [B, S, H, width_i], or [B, S, width_i] where all heads share the key.
      values: [B, S, H, Dv], or [B, S, Dv] shared by all heads.
      last_bt: i32[B, T], the last key that each query sees.
      scale: factor on the scores.

    Returns:
      [B, T, H, Dv] in the dtype of ``queries``.
    """
    arrays = list(queries), list(keys), values, last_bt
    loop, batch = (functools.partial(function, scale=scale) for function in (_decode_by_blocks, _decode_in_one))
    return lax.platform_dependent(*arrays, cpu=loop, default=batch)


def _key_block(length: int) -> int:
    """Keys of a block, of a cache of so many."""
    return KEY_BLOCK if length % KEY_BLOCK == 0 else length


def _scores(q: jax.Array, k: Entries) -> jax.Array:
    """[…, T, H, D] and keys […, S, (H,) D] → f32[…, H, T, S]."""
    by_head = k.ndim == q.ndim
    product = product_in_float32("...thd,...shd->...hts" if by_head else "...thd,...sd->...hts", q, numbers(k, q.dtype))
    return times_scale(product, k, by_head=by_head)


def _weighted(p: jax.Array, v: Entries, dtype: DTypeLike) -> jax.Array:
    """f32[…, H, T, S] and values […, S, (H,) D] → f32[…, H, T, D], multiplied in ``dtype``."""
    by_head = v.ndim == p.ndim
    subscripts = "...hts,...shd->...htd" if by_head else "...hts,...sd->...htd"
    return product_in_float32(subscripts, times_scale(p, v, by_head=by_head).astype(dtype), numbers(v, dtype))


def _decode_by_blocks(
    queries: Sequence[jax.Array], keys: Sequence[Entries], values: Entries, last_bt: jax.Array, scale: float
) -> jax.Array:
    """`decode_attention`, one block after the other, up to the last that some row sees."""
    (rows, length, heads), width, size = queries[0].shape[:3], values.shape[-1], _key_block(values.shape[1])
    least, dtype = jnp.finfo(jnp.float32).min, queries[0].dtype

    def block(entries: Entries, i: jax.Array) -> Entries:
        def cut(x: jax.Array) -> jax.Array:
            return from_bits(lax.dynamic_slice_in_dim(bits_to_slice(x, i), i * size, size, axis=1))

        return jax.tree.map(cut, entries)

    def body(i: jax.Array, carry: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        m_bhts, l_bhts, acc_bhtd = carry
        scores_bhts = 0.0
        for q, k in zip(queries, keys, strict=True):
            scores_bhts += _scores(q, block(k, i))
        visible_bts = i * size + jnp.arange(size) <= last_bt[..., None]
        scores_bhts = jnp.where(visible_bts[:, None], scores_bhts * scale, least)
        new_m_bhts = jnp.maximum(m_bhts, scores_bhts.max(-1, keepdims=True))
        p_bhts, share_bhts = jnp.exp(scores_bhts - new_m_bhts), jnp.exp(m_bhts - new_m_bhts)
        acc_bhtd = acc_bhtd * share_bhts + _weighted(p_bhts, block(values, i), dtype)
        return new_m_bhts, l_bhts * share_bhts + p_bhts.sum(-1, keepdims=True), acc_bhtd

    shape = (rows, heads, length)
    first = jnp.full((*shape, 1), least), jnp.zeros((*shape, 1)), jnp.zeros((*shape, width))
    _, l_bhts, acc_bhtd = lax.fori_loop(0, last_bt.max() // size + 1, body, first)
    return (acc_bhtd / l_bhts).swapaxes(1, 2).astype(dtype)


def _decode_in_one(
    queries: Sequence[jax.Array], keys: Sequence[Entries], values: Entries, last_bt: jax.Array, scale: float
) -> jax.Array:
    """`decode_attention`, all blocks as one batch of products of one shape."""
    length, size, dtype = values.shape[1], _key_block(values.shape[1]), queries[0].dtype
    count = length // size

    def split(entries: Entries) -> Entries:  # [B, S, …] → [B, blocks, size, …]
        return jax.tree.map(lambda x: x.reshape(x.shape[0], count, size, *x.shape[2:]), entries)

    scores_bkhts = 0.0
    for q, k in zip(queries, keys, strict=True):
        q_bkthd = jnp.broadcast_to(q[:, None], (q.shape[0], count, *q.shape[1:]))
        scores_bkhts += _scores(q_bkthd, split(k))
    keys_ks = jnp.arange(length).reshape(count, size)
    visible_bkts = keys_ks[:, None] <= last_bt[:, None, :, None]
    scores_bkhts = jnp.where(visible_bkts[:, :, None], scores_bkhts * scale, jnp.finfo(jnp.float32).min)
    m_bhts = scores_bkhts.max((1, 4), keepdims=True)
    p_bkhts = jnp.exp(scores_bkhts - m_bhts)
    acc_bkhtd = _weighted(p_bkhts, split(values), dtype)
    acc_bhtd, l_bht = (sum(x[:, i] for i in range(count)) for x in (acc_bkhtd, p_bkhts.sum(-1)))
    return (acc_bhtd / l_bht[..., None]).swapaxes(1, 2).astype(dtype)


@jax.named_scope("causal_self_attention")
def causal_self_attention(
    q_bthd: jax.Array, k_bthd: jax.Array, v_bthd: jax.Array, positions_bt: jax.Array, scale: float
) -> jax.Array:
    """Attention of rows to themselves, each token to those before it in its own sample.

    In bfloat16: on GPUs by the kernels of `dsvl2_jax.kernels.fused_attention`, on TPUs by jax's splash kernel. By
    `ring_attention` where the mesh splits rows along their length.

    Args:
      q_bthd, k_bthd: [B, T, H, Dk]; v_bthd: [B, T, H, Dv].
      positions_bt: i32[B, T], from 0 in each sample of a row.
      scale: factor on the scores.

    Returns:
      [B, T, H, Dv] in the dtype of ``v_bthd``.
    """
    arrays = q_bthd, k_bthd, v_bthd, positions_bt
    axes = ("batch", "length", "heads", "head_dim")
    names, parts = split_over(q_bthd.shape, axes, 1)
    if parts > 1:
        return ring_attention(*arrays, scale, axis=names[0], parts=parts, name=ATTENTION_OUTPUT)

    def plain(*arrays: jax.Array) -> jax.Array:
        return _attend_causal_chunks(*arrays, scale)

    if not is_supported(q_bthd, v_bthd):
        return plain(*arrays)
    spec = AttentionSpec(plain, axes, scale, causal=True, name=ATTENTION_OUTPUT)
    if positions_bt.shape[1] % ATTENTION_BLOCK:
        return fused_attention(arrays[:3], positions_bt, spec)

    def splash(*arrays: jax.Array) -> tuple[jax.Array]:
        return (splash_attention(*arrays, scale),)

    (out_bthd,) = lax.platform_dependent(
        *arrays,
        tpu=shard_map_kernel(splash, (axes, axes, axes, axes[:2]), (axes,)),
        default=lambda *arrays: (fused_attention(arrays[:3], arrays[3], spec),),
    )
    return out_bthd


def _attend_causal_chunks(
    q_bthd: jax.Array, k_bthd: jax.Array, v_bthd: jax.Array, positions_bt: jax.Array, scale: float
) -> jax.Array:
    """A quarter of the queries at a time, which needs no keys after it: 5/8 of the work of all pairs."""
    length = positions_bt.shape[1]
    index_bt = jnp.broadcast_to(jnp.arange(length), positions_bt.shape)
    first_bt = index_bt - positions_bt
    if length < MIN_CHUNKED or length % CAUSAL_CHUNKS:
        return attend([q_bthd], [k_bthd], v_bthd, (first_bt, index_bt), scale)

    outs = []
    for chunk in range(CAUSAL_CHUNKS):
        start, stop = chunk * length // CAUSAL_CHUNKS, (chunk + 1) * length // CAUSAL_CHUNKS
        q, first, last = (x[:, start:stop] for x in (q_bthd, first_bt, index_bt))
        outs.append(attend([q], [k_bthd[:, :stop]], v_bthd[:, :stop], (first, last), scale))
    return jnp.concatenate(outs, axis=1)


@jax.named_scope("self_attention")
def self_attention(qkv_np3hd: jax.Array, visible_np: jax.Array | None, scale: float) -> jax.Array:
    """Attention of all to all, within each tile; on GPUs, in bfloat16, by `dsvl2_jax.kernels.fused_attention`.

    Args:
      qkv_np3hd: [N, P, 3, H, D], queries, keys and values.
      visible_np: bool[N, P], False for patches that nothing attends to; None: all are attended to. One of each row
        must be True.
      scale: factor on the scores.

    Returns:
      [N, P, H, D] in the dtype of ``qkv_np3hd``.
    """
    n, p, _, h, d = qkv_np3hd.shape

    def attend_all(q_nphd: jax.Array, k_nphd: jax.Array, v_nphd: jax.Array) -> jax.Array:
        precision = matmul_precision(v_nphd.dtype)
        scores_nhpq = jnp.einsum(
            "nphd,nqhd->nhpq", q_nphd, k_nphd, precision=precision, preferred_element_type=jnp.float32
        )
        scores_nhpq = scores_nhpq * scale
        if visible_np is not None:
            scores_nhpq = jnp.where(visible_np[:, None, None], scores_nhpq, -jnp.inf)
        p_nhpq = jax.nn.softmax(scores_nhpq, axis=-1).astype(v_nphd.dtype)
        return jnp.einsum("nhpq,nqhd->nphd", p_nhpq, v_nphd, precision=precision)

    def plain(qkv: jax.Array, _: jax.Array | None) -> jax.Array:
        parts = (qkv.reshape(n, p, 3, h, d)[:, :, i] for i in range(3))
        if visible_np is not None:
            return attend_all(*parts)
        return cpu_or(functools.partial(_attend_by_heads, scale=scale), attend_all)(*parts)

    if visible_np is not None or not is_supported(qkv_np3hd, qkv_np3hd):
        return plain(qkv_np3hd, None)
    spec = AttentionSpec(plain, ("tiles", None, None, None), scale, causal=False, name="vision_attention_output")
    return fused_attention((qkv_np3hd.reshape(n, p, 3 * h, d),), jnp.zeros((n, p), jnp.int32), spec)


def _attend_by_heads(q_nphd: jax.Array, k_nphd: jax.Array, v_nphd: jax.Array, scale: float) -> jax.Array:
    """`self_attention` of few heads at a time, whose scores stay in a processor's cache."""
    n, p, heads, width = q_nphd.shape
    group = math.gcd(heads, HEAD_GROUP)

    def split(x_nphd: jax.Array) -> jax.Array:  # → [N · H / group, group, P, D]
        return x_nphd.swapaxes(1, 2).reshape(-1, group, p, width)

    def attend_group(heads: tuple[jax.Array, ...]) -> jax.Array:
        q_hpd, k_hpd, v_hpd = heads
        p_hpq = jax.nn.softmax(product_in_float32("hpd,hqd->hpq", q_hpd, k_hpd), axis=-1)
        return product_in_float32("hpq,hqd->hpd", p_hpq.astype(v_hpd.dtype), v_hpd).astype(v_hpd.dtype)

    # The queries are scaled, as there are fewer of them than scores.
    out = lax.map(attend_group, (split(q_nphd * scale), split(k_nphd), split(v_nphd)))
    return out.reshape(n, heads, p, width).swapaxes(1, 2)


@jax.named_scope("mla_decode_attention")
def mla_decode_attention(
    q_latent_bthr: jax.Array,
    q_rope_bthd: jax.Array,
    latent_bsr: Entries,
    k_rope_bsd: Entries,
    positions_bt: jax.Array,
    scale: float,
) -> jax.Array:
    """Multi-head latent attention of a row's newest tokens, in its absorbed form; on TPUs, in bfloat16, by our kernel.

    The cache is read as it lies, in whatever dtype; where it is int8, as `dsvl2_jax.kernels.quantized_cache` says.

    Where a row's latents are on several devices, each attends to its own, and the results are weighted by their
    shares of the softmax's sum and added.

    Args:
      q_latent_bthr: [B, T, H, R], the query's part without rotation, taken into the latent space.
      q_rope_bthd: [B, T, H, D], its rotated part.
      latent_bsr: [B, S, R], keys and values; k_rope_bsd: [B, S, D], the rotated key that all heads share.
      positions_bt: i32[B, T], the last position of the cache that each query sees.
      scale: factor on the scores.

    Returns:
      [B, T, H, R] in the dtype of ``q_latent_bthr``.
    """
    queries, cache = (q_latent_bthr, q_rope_bthd), (latent_bsr, k_rope_bsd)

    def plain(q_latent: jax.Array, q_rope: jax.Array, latent: Entries, k_rope: Entries, last: jax.Array):
        return _decode_plain([q_latent, q_rope], [latent, k_rope], latent, last, scale)

    return _decode_on_tpu(latent_attention, plain, queries, cache, positions_bt, scale)


@jax.named_scope("mha_decode_attention")
def mha_decode_attention(
    q_bthd: jax.Array, k_bshd: Entries, v_bshd: Entries, positions_bt: jax.Array, scale: float
) -> jax.Array:
    """Multi-head attention of the newest tokens of each row to its cache; as `mla_decode_attention`.

    Args:
      q_bthd: [B, T, H, D]. k_bshd, v_bshd: [B, S, H, D].
      positions_bt: i32[B, T], the last position of the cache that each token sees.
      scale: factor on the scores.

    Returns:
      [B, T, H, D] in the dtype of ``q_bthd``.
    """

    def plain(q: jax.Array, k: Entries, v: Entries, last: jax.Array) -> jax.Array:
        return _decode_plain([q], [k], v, last, scale)

    return _decode_on_tpu(cached_attention, plain, (q_bthd,), (k_bshd, v_bshd), positions_bt, scale)


def _decode_plain(
    queries: Sequence[jax.Array], keys: Sequence[Entries], values: Entries, last_bt: jax.Array, scale: float
) -> jax.Array:
    """Without a kernel: where devices have parts of a row, each attends to its part."""
    if _length_split(values)[1] > 1:
        return attend(queries, keys, values, (None, last_bt), scale)
    return decode_attention(queries, keys, values, last_bt, scale)


def _cache_axes(x: jax.Array) -> tuple[str | None, ...]:
    return "slots", "cache_length", *[None] * (x.ndim - 2)


def _length_split(cache: Entries) -> tuple[tuple[str, ...], int]:
    """The mesh axes over which the length of a cache [B, S, …] is split, and into how many parts."""
    return split_over(cache.shape, _cache_axes(cache), 1)


def _decode_on_tpu(
    kernel: Callable[..., tuple[jax.Array, jax.Array]],
    plain: Callable[..., jax.Array],
    queries: tuple[jax.Array, ...],
    cache: tuple[Entries, ...],
    last_bt: jax.Array,
    scale: float,
) -> jax.Array:
    """A decode step's attention by a kernel on TPUs, in bfloat16, for caches of whole blocks in bfloat16 or int8.

    Anything else goes by ``plain``.

    Args:
      kernel: from queries, cache, i32[B] and the scale to out, f32[B, T, H, Dv], and lse, f32[B, T, H, 1].
      plain: from queries, cache and ``last_bt`` to the result.
      queries: [B, T, H, …]. cache: [B, S, …]. last_bt: i32[B, T], consecutive in each row.
    """
    mesh_axes, parts = _length_split(cache[0])
    local_length = cache[0].shape[1] // parts
    floats = [*queries, *(x for x in cache if not isinstance(x, QuantizedEntries))]
    if any(x.dtype != jnp.bfloat16 for x in floats) or local_length % min(local_length, ATTENTION_BLOCK):
        return plain(*queries, *cache, last_bt)
    arrays, tree = jax.tree.flatten((queries, cache))

    def local(*arrays: jax.Array) -> tuple[jax.Array]:
        (queries, cache), last = jax.tree.unflatten(tree, arrays[:-1]), arrays[-1]
        start = lax.axis_index(mesh_axes) * local_length if mesh_axes else 0
        out, lse = kernel(*queries, *cache, last[:, 0] - start, scale)
        if mesh_axes:
            weight = jnp.exp(lse - lax.pmax(lse, mesh_axes))
            out = lax.psum(out * weight, mesh_axes) / lax.psum(weight, mesh_axes)
        return (out.astype(queries[0].dtype),)

    query_axes = ("slots", None, None, None)
    in_axes = *(query_axes for _ in queries), *map(_cache_axes, arrays[len(queries) :]), query_axes[:2]
    sharded = shard_map_kernel(local, in_axes, (query_axes,), [queries[0]])

    def on_others(*arrays: jax.Array) -> jax.Array:
        queries, cache = jax.tree.unflatten(tree, arrays[:-1])
        return plain(*queries, *cache, arrays[-1])

    return lax.platform_dependent(*arrays, last_bt, tpu=lambda *arrays: sharded(*arrays)[0], default=on_others)
