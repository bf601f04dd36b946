"""Attention of a prompt's chunk to a long cache, a span of positions at a time.

Tested in tests/infer/test_long_prompts.py.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import lax

from dsvl2_jax.kernels.attention import QUERY_BLOCK
from dsvl2_jax.kernels.cpu import bits_to_slice, from_bits
from dsvl2_jax.kernels.precision import product_in_float32
from dsvl2_jax.kernels.quantized_cache import Entries

# Keys of a cache that a chunk of a prompt attends to at a time, where there are more.
SPAN = 4096


def is_long(length: int) -> bool:
    """Whether a cache of so many positions is attended to in spans: each a power of two of at least `QUERY_BLOCK`."""
    return length > SPAN and math.gcd(length, SPAN) >= QUERY_BLOCK


@jax.named_scope("attend_in_spans")
def attend_in_spans(
    queries: Sequence[jax.Array],
    cache: Sequence[Entries],
    expand: Callable[..., tuple[Sequence[jax.Array], jax.Array]],
    last_bt: jax.Array,
    scale: float,
) -> jax.Array:
    """`attend` to a long cache, a span of positions at a time, up to the last that some query sees.

    What is held beside the cache does not grow with its length: neither scores nor keys and values made of latents. The
    softmax is taken as in FlashAttention. Not differentiable, as its loop ends where the data say.

    Args:
      queries: parts [B, T, H, width_i].
      cache: entries [B, S, …] with `is_long` (S).
      expand: from such entries of a span to its keys, parts as `attend` takes them, and its values [B, span, H, Dv].
      last_bt: i32[B, T], the last key that each query sees.
      scale: factor on the scores.

    Returns:
      [B, T, H, Dv] in the dtype of the values.
    """
    size = math.gcd(cache[0].shape[1], SPAN)
    rows, length, heads = queries[0].shape[:3]
    blocks = length // QUERY_BLOCK if length % QUERY_BLOCK == 0 else 1

    def split(x: jax.Array) -> jax.Array:  # [B, T, …] → [blocks, B, T / blocks, …]
        return jnp.moveaxis(x.reshape(rows, blocks, length // blocks, *x.shape[2:]), 1, 0)

    def span(x: jax.Array, i: jax.Array) -> jax.Array:
        return from_bits(lax.dynamic_slice_in_dim(bits_to_slice(x, i), i * size, size, axis=1))

    def body(i: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        keys, values = expand(*jax.tree.map(lambda x: span(x, i), list(cache)))

        def block(arrays: tuple) -> tuple[jax.Array, ...]:
            queries, last_bt, (m_bthi, l_bthi, acc_bthd) = arrays
            scores_bths = 0.0
            for q, k in zip(queries, keys, strict=True):
                scores_bths += product_in_float32("bthd,bshd->bths" if k.ndim == 4 else "bthd,bsd->bths", q, k)
            visible_bts = i * size + jnp.arange(size) <= last_bt[..., None]
            scores_bths = jnp.where(visible_bts[:, :, None], scores_bths * scale, jnp.finfo(jnp.float32).min)
            new_m_bthi = jnp.maximum(m_bthi, scores_bths.max(-1, keepdims=True))
            p_bths, share_bthi = jnp.exp(scores_bths - new_m_bthi), jnp.exp(m_bthi - new_m_bthi)
            acc_bthd = acc_bthd * share_bthi + product_in_float32(
                "bths,bshd->bthd", p_bths.astype(values.dtype), values
            )
            return new_m_bthi, l_bthi * share_bthi + p_bths.sum(-1, keepdims=True), acc_bthd

        return lax.map(block, (by_block, last_by_block, carry))

    by_block, last_by_block = [split(q) for q in queries], split(last_bt)
    parts = jax.tree.map(lambda x: jax.ShapeDtypeStruct((rows, size, *x.shape[2:]), x.dtype), list(cache))
    values = jax.eval_shape(expand, *parts)[1]
    shape = (blocks, rows, length // blocks, heads)
    zeros = functools.partial(jnp.zeros, dtype=jnp.float32)
    first = jnp.full((*shape, 1), jnp.finfo(jnp.float32).min), zeros((*shape, 1)), zeros((*shape, values.shape[-1]))
    _, l, acc = lax.fori_loop(0, last_bt.max() // size + 1, body, first)  # noqa: E741
    out = jnp.moveaxis((acc / l).astype(values.dtype), 0, 1)
    return out.reshape(rows, length, heads, values.shape[-1])
