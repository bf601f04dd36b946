"""Attention on NVIDIA GPUs: Pallas Triton kernels, forward and backward, that never hold a matrix of scores.

Softmax is taken a block of keys at a time (FlashAttention-2, arXiv 2307.08691). A query sees one range of keys, which
is what packed rows need, and blocks of keys outside the ranges of a block of queries cost nothing. Widths may differ
between keys and values (latent attention: 192 and 128) and need not be powers of two: a width is taken apart into
powers of two, each its own product.

cuDNN's attention would need values as wide as keys, or a bias [B, 1, T, S] for packed rows, and asks the machine for
a GPU while it is lowered, so that it cannot be compiled ahead of time.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from dsvl2_jax.kernels.gpu_grouped_matmul import addressable, declared
from dsvl2_jax.sharding import on_shards

MIN_PART = 16  # the least depth of a tensor core's product
BLOCK = 64  # queries, and keys, that a program takes at a time
MASKED = -1e30  # finite, so that a block without a visible key gives no nan

Part = tuple[int, int]  # first column and number of columns, a power of two
Lead = tuple[jax.Array, jax.Array]  # row of the batch and head; read outside of loops, where interpreting wants it


@dataclasses.dataclass(frozen=True)
class Attention:
    """One way to attend, for `fused_attention`.

    Attributes:
      plain: (query, key, value, positions) → out, what runs elsewhere; its gradients too come from it.
      axes: logical axes of query, key, value and result.
      causal: a query sees no keys after it.
      name: of the result, for rematerialisation policies.
    """

    plain: Callable[[jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]
    axes: tuple[str | None, ...]
    scale: float
    causal: bool
    name: str


def taken(query: jax.Array, value: jax.Array) -> bool:
    """Whether the kernels are for these: tensor cores multiply 16 bits, and float32 is for exactness."""
    return value.dtype == jnp.bfloat16 and addressable(query, value)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def fused_attention(
    query: jax.Array, key: jax.Array, value: jax.Array, positions: jax.Array, how: Attention
) -> jax.Array:
    """Attention of rows to themselves: the kernels where the program is lowered for CUDA, ``how.plain`` elsewhere.

    Args:
      query, key: [B, T, H, Dk]; value: [B, T, H, Dv]; see `taken`.
      positions: i32[B, T]. Causal: a token sees those since position 0 of its own sample. Else: zeros.

    Returns:
      [B, T, H, Dv].
    """
    kernel = lambda *arrays: _on_shards(_forward, how)(*arrays)[0]  # noqa: E731
    return lax.platform_dependent(query, key, value, positions, cuda=kernel, default=how.plain)


def _fused_forward(query, key, value, positions, how):
    def plain(*arrays):
        return how.plain(*arrays), jnp.zeros((query.shape[0], query.shape[2], query.shape[1]), jnp.float32)

    kernel = _on_shards(_forward, how)
    out, divisor = lax.platform_dependent(query, key, value, positions, cuda=kernel, default=plain)
    # Named here, so that a policy which keeps the result does not run the kernel once more for the divisor.
    out, divisor = checkpoint_name(out, how.name), checkpoint_name(divisor, how.name)
    return out, (query, key, value, positions, out, divisor)


def _fused_backward(how, residuals, cotangent):
    def plain(query, key, value, positions, out, divisor, cotangent):
        del out, divisor
        return jax.vjp(lambda *arrays: how.plain(*arrays, positions), query, key, value)[1](cotangent)

    kernel = _on_shards(_backward, how)
    return (*lax.platform_dependent(*residuals, cotangent, cuda=kernel, default=plain), None)


fused_attention.defvjp(_fused_forward, _fused_backward)


def _on_shards(function: Callable, how: Attention) -> Callable:
    """`_forward` or `_backward` on each device's own rows and heads."""
    arrays, divisor = how.axes, (how.axes[0], how.axes[2], how.axes[1])
    given, made = (arrays, arrays, arrays, arrays[:2]), (arrays, divisor)
    if function is _backward:
        given, made = (*given, arrays, divisor, arrays), (arrays,) * 3
    return on_shards(functools.partial(function, how), given, made)


def _forward(how: Attention, query, key, value, positions):
    width = value.shape[-1]
    first, _ = _ranges(positions, how.causal)
    query, key, value = (padded(x) for x in (query, key, value))
    out, divisor = attention_forward(query, key, value, first, how.scale, how.causal)
    return out[..., :width], divisor


def _backward(how: Attention, query, key, value, positions, out, divisor, cotangent):
    first, after = _ranges(positions, how.causal)
    arrays = (padded(x) for x in (query, key, value))
    out, cotangent = padded(out), padded(cotangent)
    bars = attention_backward(*arrays, first, after, out, divisor, cotangent, how.scale, how.causal)
    return tuple(bar[..., : x.shape[-1]] for bar, x in zip(bars, (query, key, value), strict=True))


def _ranges(positions: jax.Array, causal: bool) -> tuple[jax.Array, jax.Array]:
    """i32[B, T] the first key that a query sees, and the place after the last query that sees a key."""
    length = positions.shape[1]
    own = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), positions.shape)
    if not causal:
        return jnp.zeros_like(own), jnp.full_like(own, length)
    starts = jnp.where(positions == 0, own, length)
    following = jnp.concatenate([starts[:, 1:], jnp.full_like(starts[:, :1], length)], axis=1)
    return (own - positions).astype(jnp.int32), lax.cummin(following, axis=1, reverse=True)


@dataclasses.dataclass(frozen=True)
class _Shape:
    """What the kernels are specialised for."""

    queries: int  # T
    keys: int  # S
    key_parts: tuple[Part, ...]
    value_parts: tuple[Part, ...]
    scale: float
    causal: bool
    block_q: int
    block_k: int

    @property
    def pairs(self) -> float:
        """Queries and keys that meet, of a row that is one sample."""
        return self.queries * (self.queries + 1) / 2 if self.causal else float(self.queries * self.keys)


def _parts(width: int) -> tuple[Part, ...]:
    """192 → (0, 128), (128, 64)."""
    parts, at = [], 0
    while at < width:
        size = 1 << (width - at).bit_length() - 1
        parts.append((at, size))
        at += size
    return tuple(parts)


def _shape(query: jax.Array, key: jax.Array, value: jax.Array, scale: float, causal: bool) -> _Shape:
    parts = _parts(query.shape[-1]), _parts(value.shape[-1])
    return _Shape(query.shape[1], key.shape[1], *parts, scale, causal, BLOCK, BLOCK)


def padded(x: jax.Array) -> jax.Array:
    """[…, D] with zeros up to the next width that the kernels take."""
    return jnp.pad(x, ((0, 0),) * (x.ndim - 1) + ((0, -x.shape[-1] % MIN_PART),))


@functools.partial(jax.jit, static_argnames=("scale", "causal", "interpret"))
def attention_forward(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    first: jax.Array,
    scale: float,
    causal: bool,
    *,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Softmax attention.

    Args:
      query: [B, T, H, Dk]; key: [B, S, H, Dk]; value: [B, S, H, Dv]. Widths are
        multiples of `MIN_PART` (`padded`).
      first: i32[B, T], the first key that a query sees, at most its own place when ``causal``.
      causal: a query sees keys up to its own place; else all from ``first`` on.
      interpret: run on the CPU, for tests.

    Returns:
      [B, T, H, Dv], and f32[B, H, T] the logarithm to base 2 of each query's softmax divisor.
    """
    s = _shape(query, key, value, scale, causal)
    b, t, h, _ = query.shape
    flops = 2.0 * s.pairs * b * h * (query.shape[-1] + value.shape[-1])
    return pl.pallas_call(
        functools.partial(_forward_kernel, s=s),
        grid=(pl.cdiv(t, s.block_q), h, b),
        out_shape=(
            jax.ShapeDtypeStruct((b, t, h, value.shape[-1]), value.dtype),
            jax.ShapeDtypeStruct((b, h, t), jnp.float32),
        ),
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=2),
        interpret=interpret,
        metadata=declared(flops),
        name="attention_forward",
    )(query, key, value, first)


@functools.partial(jax.jit, static_argnames=("scale", "causal", "interpret"))
def attention_backward(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    first: jax.Array,
    after: jax.Array,
    out: jax.Array,
    divisor: jax.Array,
    cotangent: jax.Array,
    scale: float,
    causal: bool,
    *,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients for query, key and value.

    Args:
      after: i32[B, S], the place after the last query that sees a key.
      out, divisor: of `attention_forward`. cotangent: of ``out``.
    """
    s = _shape(query, key, value, scale, causal)
    b, t, h, _ = query.shape
    cotangent = cotangent.astype(query.dtype)
    weighted = jnp.einsum("bthd,bthd->bht", out, cotangent, preferred_element_type=jnp.float32)
    inputs = (query, key, value, first, after, divisor, weighted, cotangent)
    params = plgpu.CompilerParams(num_warps=8, num_stages=2)
    pairs = 2.0 * s.pairs * b * h
    query_bar = pl.pallas_call(
        functools.partial(_query_kernel, s=s),
        grid=(pl.cdiv(t, s.block_q), h, b),
        out_shape=jax.ShapeDtypeStruct(query.shape, query.dtype),
        compiler_params=params,
        interpret=interpret,
        metadata=declared(pairs * (2 * query.shape[-1] + value.shape[-1])),
        name="attention_query_gradient",
    )(*inputs)
    key_bar, value_bar = pl.pallas_call(
        functools.partial(_key_kernel, s=s),
        grid=(pl.cdiv(s.keys, s.block_k), h, b),
        out_shape=(jax.ShapeDtypeStruct(key.shape, key.dtype), jax.ShapeDtypeStruct(value.shape, value.dtype)),
        compiler_params=params,
        interpret=interpret,
        metadata=declared(pairs * 2 * (query.shape[-1] + value.shape[-1])),
        name="attention_key_gradient",
    )(*inputs)
    return query_bar, key_bar, value_bar


def _tile(ref, lead: Lead, at, size: int, most: int, parts: tuple[Part, ...]) -> list[jax.Array]:
    """Parts of ``size`` rows of one head of one sequence, zero beyond its end."""
    row, head = lead
    found = []
    for start, columns in parts:
        place = ref.at[row, pl.ds(at, size), head, pl.ds(start, columns)]
        mask = _inside(at, size, most, columns)
        found.append(place[...] if mask is None else plgpu.load(place, mask=mask, other=0))
    return found


def _write(ref, lead: Lead, values: list[jax.Array], at, size: int, most: int, parts: tuple[Part, ...]):
    row, head = lead
    for (start, columns), value in zip(parts, values, strict=True):
        place = ref.at[row, pl.ds(at, size), head, pl.ds(start, columns)]
        plgpu.store(place, value.astype(ref.dtype), mask=_inside(at, size, most, columns))


def _inside(at, size: int, most: int, columns: int) -> jax.Array | None:
    """Which entries of a tile are in the array; None: all."""
    if most % size == 0:
        return None
    return jnp.broadcast_to((at + jnp.arange(size) < most)[:, None], (size, columns))


def _vector(ref, lead: tuple, at, size: int, most: int, other: float | int) -> jax.Array:
    place = ref.at[(*lead, pl.ds(at, size))]
    if most % size == 0:
        return place[...]
    return plgpu.load(place, mask=at + jnp.arange(size) < most, other=other)


def _scores(queries: list[jax.Array], keys: list[jax.Array], s: _Shape) -> jax.Array:
    """To base 2: the exponential that the hardware has."""
    total = sum(plgpu.dot(q, k, trans_b=True) for q, k in zip(queries, keys, strict=True))
    return total * (s.scale * math.log2(math.e))


def _seen(rows: jax.Array, columns: jax.Array, first: jax.Array, s: _Shape) -> jax.Array:
    """bool[queries, keys]."""
    seen = columns[None, :] >= first[:, None]
    if s.causal:
        seen &= columns[None, :] <= rows[:, None]
    elif s.keys % s.block_k:
        seen &= (columns < s.keys)[None, :]
    return seen


def _key_range(at, first: jax.Array, s: _Shape) -> tuple[jax.Array, jax.Array]:
    """Blocks of keys that a block of queries from ``at`` on needs."""
    low = jnp.maximum(jnp.min(first), 0) // s.block_k
    high = pl.cdiv(s.keys, s.block_k)
    return low, jnp.minimum(pl.cdiv(at + s.block_q, s.block_k), high) if s.causal else low * 0 + high


def _forward_kernel(query, key, value, first, out, divisor, *, s: _Shape):
    lead = row, head = pl.program_id(2), pl.program_id(1)
    at = pl.program_id(0) * s.block_q
    rows = at + jnp.arange(s.block_q)
    queries = _tile(query, lead, at, s.block_q, s.queries, s.key_parts)
    begin = _vector(first, (row,), at, s.block_q, s.queries, s.keys)
    low, high = _key_range(at, begin, s)

    def body(i, carry):
        most, total, sums = carry
        there = i * s.block_k
        scores = _scores(queries, _tile(key, lead, there, s.block_k, s.keys, s.key_parts), s)
        scores = jnp.where(_seen(rows, there + jnp.arange(s.block_k), begin, s), scores, MASKED)
        higher = jnp.maximum(most, jnp.max(scores, axis=1))
        shares, shrink = jnp.exp2(scores - higher[:, None]), jnp.exp2(most - higher)
        values = _tile(value, lead, there, s.block_k, s.keys, s.value_parts)
        weights = shares.astype(value.dtype)
        sums = [a * shrink[:, None] + plgpu.dot(weights, v) for a, v in zip(sums, values, strict=True)]
        return higher, total * shrink + jnp.sum(shares, axis=1), sums

    start = (
        jnp.full(s.block_q, MASKED, jnp.float32),
        jnp.zeros(s.block_q, jnp.float32),
        [jnp.zeros((s.block_q, columns), jnp.float32) for _, columns in s.value_parts],
    )
    most, total, sums = lax.fori_loop(low, high, body, start)
    sums = [a / total[:, None] for a in sums]
    _write(out, lead, sums, at, s.block_q, s.queries, s.value_parts)
    mask = None if s.queries % s.block_q == 0 else rows < s.queries
    plgpu.store(divisor.at[row, head, pl.ds(at, s.block_q)], most + jnp.log2(total), mask=mask)


def _of_queries(refs, lead: Lead, at, s: _Shape):
    """What the gradients need of a block of queries: themselves, first keys, divisors, weighted, cotangents."""
    query, _, _, first, _, divisor, weighted, cotangent = refs
    row, _ = lead
    return (
        _tile(query, lead, at, s.block_q, s.queries, s.key_parts),
        _vector(first, (row,), at, s.block_q, s.queries, s.keys),
        _vector(divisor, lead, at, s.block_q, s.queries, 0.0),
        _vector(weighted, lead, at, s.block_q, s.queries, 0.0),
        _tile(cotangent, lead, at, s.block_q, s.queries, s.value_parts),
    )


def _shares(scores: jax.Array, seen: jax.Array, divisor: jax.Array) -> jax.Array:
    return jnp.where(seen, jnp.exp2(scores - divisor[:, None]), 0.0)


def _score_bar(shares, cotangents, values, weighted, s: _Shape) -> jax.Array:
    """Gradient of the scaled products of queries and keys, [queries, keys]."""
    shares_bar = sum(plgpu.dot(g, v, trans_b=True) for g, v in zip(cotangents, values, strict=True))
    return shares * (shares_bar - weighted[:, None]) * s.scale


def _query_kernel(*refs, s: _Shape):
    *inputs, query_bar = refs
    _, key, value, *_ = inputs
    lead = pl.program_id(2), pl.program_id(1)
    at = pl.program_id(0) * s.block_q
    rows = at + jnp.arange(s.block_q)
    queries, begin, divisors, weighted, cotangents = _of_queries(inputs, lead, at, s)
    low, high = _key_range(at, begin, s)

    def body(i, sums):
        there = i * s.block_k
        keys = _tile(key, lead, there, s.block_k, s.keys, s.key_parts)
        values = _tile(value, lead, there, s.block_k, s.keys, s.value_parts)
        seen = _seen(rows, there + jnp.arange(s.block_k), begin, s)
        shares = _shares(_scores(queries, keys, s), seen, divisors)
        bar = _score_bar(shares, cotangents, values, weighted, s).astype(key.dtype)
        return [a + plgpu.dot(bar, k) for a, k in zip(sums, keys, strict=True)]

    start = [jnp.zeros((s.block_q, columns), jnp.float32) for _, columns in s.key_parts]
    sums = lax.fori_loop(low, high, body, start)
    _write(query_bar, lead, sums, at, s.block_q, s.queries, s.key_parts)


def _key_kernel(*refs, s: _Shape):
    *inputs, key_bar, value_bar = refs
    _, key, value, _, after, *_ = inputs
    lead = row, _ = pl.program_id(2), pl.program_id(1)
    there = pl.program_id(0) * s.block_k
    columns = there + jnp.arange(s.block_k)
    keys = _tile(key, lead, there, s.block_k, s.keys, s.key_parts)
    values = _tile(value, lead, there, s.block_k, s.keys, s.value_parts)
    last = jnp.max(_vector(after, (row,), there, s.block_k, s.keys, 0))
    low = there // s.block_q if s.causal else there * 0

    def body(i, sums):
        key_sums, value_sums = sums
        at = i * s.block_q
        rows = at + jnp.arange(s.block_q)
        queries, begin, divisors, weighted, cotangents = _of_queries(inputs, lead, at, s)
        seen = _seen(rows, columns, begin, s)
        if s.queries % s.block_q:
            seen &= (rows < s.queries)[:, None]
        shares = _shares(_scores(queries, keys, s), seen, divisors)
        bar = _score_bar(shares, cotangents, values, weighted, s).astype(key.dtype)
        weights = shares.astype(value.dtype)
        value_sums = [a + plgpu.dot(weights, g, trans_a=True) for a, g in zip(value_sums, cotangents, strict=True)]
        return [a + plgpu.dot(bar, q, trans_a=True) for a, q in zip(key_sums, queries, strict=True)], value_sums

    start = (
        [jnp.zeros((s.block_k, columns), jnp.float32) for _, columns in s.key_parts],
        [jnp.zeros((s.block_k, columns), jnp.float32) for _, columns in s.value_parts],
    )
    key_sums, value_sums = lax.fori_loop(low, pl.cdiv(last, s.block_q), body, start)
    _write(key_bar, lead, key_sums, there, s.block_k, s.keys, s.key_parts)
    _write(value_bar, lead, value_sums, there, s.block_k, s.keys, s.value_parts)
