"""Attention on NVIDIA GPUs: Pallas Triton kernels, forward and backward, that never hold a matrix of scores.

Softmax is taken a block of keys at a time (FlashAttention-2, arXiv 2307.08691; names follow its algorithms 1 and 2).
A query sees one range of keys, which is what packed rows need, and blocks of keys outside the ranges of a block of
queries cost nothing. Widths may differ between keys and values (latent attention: 192 and 128) and need not be powers
of two: a width is taken apart into powers of two, each its own product. `dsvl2_jax.kernels.fused_attention` calls them.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from dsvl2_jax.kernels.block_sizes import TritonAttention
from dsvl2_jax.kernels.triton import cost_metadata, fewer_stages, fits_shared_memory
from dsvl2_jax.runtime.lazy import LazyModule

# Only what traces these kernels needs them.
pl = LazyModule("jax.experimental.pallas")
plgpu = LazyModule("jax.experimental.pallas.triton")

MIN_PART = 16  # the least depth of a tensor core's product
FORWARD, BACKWARD = TritonAttention(), TritonAttention(warps=8)  # where nothing was measured
MASKED = -1e30  # finite, so that a block without a visible key gives no nan

Part = tuple[int, int]  # first column and number of columns, a power of two
Lead = tuple[jax.Array, jax.Array]  # row of the batch and head; read outside of loops, where interpreting wants it


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
    heads: int  # H
    packed: bool  # queries, keys and values are the heads of one array, in this order

    @property
    def k_head(self) -> int:
        """Where the heads of the keys begin."""
        return self.heads * self.packed

    @property
    def v_head(self) -> int:
        return 2 * self.heads * self.packed

    @property
    def pairs(self) -> float:
        """Queries and keys that meet, of a row that is one sample."""
        return self.queries * (self.queries + 1) / 2 if self.causal else float(self.queries * self.keys)


def _parts(width: int) -> tuple[Part, ...]:
    """192 → (0, 128), (128, 64); 72 → (0, 64), (64, 16), of which the last 8 columns are none of the array's."""
    parts, start = [], 0
    while start < width:
        size = max(MIN_PART, 1 << (width - start).bit_length() - 1)
        parts.append((start, size))
        start += size
    return tuple(parts)


def _shape(
    q_bthd: jax.Array,
    k_bshd: jax.Array,
    v_bshd: jax.Array,
    scale: float,
    causal: bool,
    blocks: TritonAttention,
    packed: bool,
) -> _Shape:
    parts, heads = (_parts(q_bthd.shape[-1]), _parts(v_bshd.shape[-1])), q_bthd.shape[2] // (3 if packed else 1)
    lengths = q_bthd.shape[1], k_bshd.shape[1]
    return _Shape(*lengths, *parts, scale, causal, blocks.queries, blocks.keys, heads, packed)


def _default(part: str, q_bthd: jax.Array, v_bshd: jax.Array) -> TritonAttention:
    """What runs where nothing was measured. ``part``: forward, dq or dkv."""
    widths = q_bthd.shape[-1], v_bshd.shape[-1]
    blocks = FORWARD if part == "forward" else BACKWARD
    return fewer_stages(blocks, lambda blocks: blocks.shared_memory(part, *widths))


def _params(s: _Shape, blocks: TritonAttention, part: str) -> plgpu.CompilerParams:
    """``part``: forward, dq or dkv."""
    widths = (sum(columns for _, columns in parts) for parts in (s.key_parts, s.value_parts))
    fits_shared_memory(blocks, blocks.shared_memory(part, *widths))
    return plgpu.CompilerParams(num_warps=blocks.warps, num_stages=blocks.stages)


@functools.partial(jax.jit, static_argnames=("scale", "causal", "blocks", "packed", "interpret"))
def attention_forward(
    q_bthd: jax.Array,
    k_bshd: jax.Array,
    v_bshd: jax.Array,
    first_bt: jax.Array,
    scale: float,
    causal: bool,
    *,
    blocks: TritonAttention | None = None,
    packed: bool = False,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Softmax attention (FlashAttention-2, algorithm 1).

    Args:
      q_bthd: [B, T, H, Dk]; k_bshd: [B, S, H, Dk]; v_bshd: [B, S, H, Dv].
      first_bt: i32[B, T], the index of the first key that a query sees, at most its own when ``causal``.
      causal: a query sees keys up to its own index; else all from ``first_bt`` on.
      blocks: None: those that run where nothing was measured.
      packed: all three arrays are the same, [B, T, 3H, D]: the heads of the queries, the keys and the values.
      interpret: run on the CPU, for tests.

    Returns:
      out, [B, T, H, Dv], and lse, f32[B, H, T], the log-sum-exp of each query's scaled scores, to base 2.
    """
    blocks = blocks or _default("forward", q_bthd, v_bshd)
    s = _shape(q_bthd, k_bshd, v_bshd, scale, causal, blocks, packed)
    (b, t), h = q_bthd.shape[:2], s.heads
    flops = 2.0 * s.pairs * b * h * (q_bthd.shape[-1] + v_bshd.shape[-1])
    return pl.pallas_call(
        functools.partial(_forward_kernel, s=s),
        grid=_grid(pl.cdiv(t, s.block_q), h, b, causal),
        out_shape=(
            jax.ShapeDtypeStruct((b, t, h, v_bshd.shape[-1]), v_bshd.dtype),
            jax.ShapeDtypeStruct((b, h, t), jnp.float32),
        ),
        compiler_params=_params(s, blocks, "forward"),
        interpret=interpret,
        metadata=cost_metadata(flops),
        name="attention_forward",
    )(q_bthd, k_bshd, v_bshd, first_bt)


@functools.partial(jax.jit, static_argnames=("scale", "causal", "blocks", "packed", "interpret"))
def attention_backward(
    q_bthd: jax.Array,
    k_bshd: jax.Array,
    v_bshd: jax.Array,
    first_bt: jax.Array,
    end_bs: jax.Array,
    out_bthd: jax.Array,
    lse_bht: jax.Array,
    do_bthd: jax.Array,
    scale: float,
    causal: bool,
    *,
    blocks: tuple[TritonAttention | None, TritonAttention | None] = (None, None),
    packed: bool = False,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients for q, k and v (FlashAttention-2, algorithm 2), by two kernels: `attention_dq` takes blocks of queries,
    `attention_dkv` blocks of keys.

    Args:
      end_bs: i32[B, S], the index after the last query that sees a key.
      out_bthd, lse_bht: of `attention_forward`. do_bthd: [B, T, H, Dv], the cotangent of ``out_bthd``.
      blocks: of the kernel for queries, and of that for keys and values.
    """
    delta_bht = attention_delta(out_bthd, do_bthd)
    inputs = (q_bthd, k_bshd, v_bshd, first_bt, end_bs, lse_bht, delta_bht, do_bthd.astype(q_bthd.dtype))
    dq_bthd = attention_dq(*inputs, scale, causal, blocks=blocks[0], packed=packed, interpret=interpret)
    return dq_bthd, *attention_dkv(*inputs, scale, causal, blocks=blocks[1], packed=packed, interpret=interpret)


def attention_delta(out_bthd: jax.Array, do_bthd: jax.Array) -> jax.Array:
    """f32[B, H, T]: what the softmax takes off its gradient."""
    return jnp.einsum("bthd,bthd->bht", out_bthd, do_bthd.astype(out_bthd.dtype), preferred_element_type=jnp.float32)


@functools.partial(jax.jit, static_argnames=("scale", "causal", "blocks", "packed", "interpret"))
def attention_dq(
    q_bthd: jax.Array,
    k_bshd: jax.Array,
    v_bshd: jax.Array,
    first_bt: jax.Array,
    end_bs: jax.Array,
    lse_bht: jax.Array,
    delta_bht: jax.Array,
    do_bthd: jax.Array,
    scale: float,
    causal: bool,
    *,
    blocks: TritonAttention | None = None,
    packed: bool = False,
    interpret: bool = False,
) -> jax.Array:
    """The gradient for q, in `attention_backward`; ``delta_bht`` is of `attention_delta`."""
    blocks = blocks or _default("dq", q_bthd, v_bshd)
    s = _shape(q_bthd, k_bshd, v_bshd, scale, causal, blocks, packed)
    (b, t, _, key_width), h = q_bthd.shape, s.heads
    return pl.pallas_call(
        functools.partial(_dq_kernel, s=s),
        grid=_grid(pl.cdiv(t, s.block_q), h, b, causal),
        out_shape=jax.ShapeDtypeStruct((b, t, h, key_width), q_bthd.dtype),
        compiler_params=_params(s, blocks, "dq"),
        interpret=interpret,
        metadata=cost_metadata(2.0 * s.pairs * b * h * (2 * key_width + v_bshd.shape[-1])),
        name="attention_dq",
    )(q_bthd, k_bshd, v_bshd, first_bt, end_bs, lse_bht, delta_bht, do_bthd)


@functools.partial(jax.jit, static_argnames=("scale", "causal", "blocks", "packed", "interpret"))
def attention_dkv(
    q_bthd: jax.Array,
    k_bshd: jax.Array,
    v_bshd: jax.Array,
    first_bt: jax.Array,
    end_bs: jax.Array,
    lse_bht: jax.Array,
    delta_bht: jax.Array,
    do_bthd: jax.Array,
    scale: float,
    causal: bool,
    *,
    blocks: TritonAttention | None = None,
    packed: bool = False,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """The gradients for k and v, in `attention_backward`."""
    blocks = blocks or _default("dkv", q_bthd, v_bshd)
    s = _shape(q_bthd, k_bshd, v_bshd, scale, causal, blocks, packed)
    (b, _, _, key_width), h = q_bthd.shape, s.heads
    return pl.pallas_call(
        functools.partial(_dkv_kernel, s=s),
        grid=_grid(pl.cdiv(s.keys, s.block_k), h, b, causal),
        out_shape=tuple(jax.ShapeDtypeStruct((b, s.keys, h, x.shape[-1]), x.dtype) for x in (k_bshd, v_bshd)),
        compiler_params=_params(s, blocks, "dkv"),
        interpret=interpret,
        metadata=cost_metadata(2.0 * s.pairs * b * h * 2 * (key_width + v_bshd.shape[-1])),
        name="attention_dkv",
    )(q_bthd, k_bshd, v_bshd, first_bt, end_bs, lse_bht, delta_bht, do_bthd)


def _grid(blocks: int, heads: int, rows: int, causal: bool) -> tuple[int, int, int]:
    """Programs, the first dimension fastest. If not ``causal``, those of a head run together and share its keys."""
    return (heads, rows, blocks) if causal else (blocks, heads, rows)


def _program(s: _Shape, *, longest_last: bool) -> tuple[Lead, jax.Array]:
    """Row and head of a program, and its block.

    Causal blocks differ in work. The longest run first, over all heads: started late, one of them keeps the others
    waiting (for 4,096 tokens and 16 heads, 264 at a time need 1.01 × the mean work this way, and 1.32 × head by head).
    """
    if not s.causal:
        return (pl.program_id(2), pl.program_id(1)), pl.program_id(0)
    block = pl.program_id(2)
    return (pl.program_id(1), pl.program_id(0)), pl.num_programs(2) - 1 - block if longest_last else block


# Inside a kernel, "parts" are a block's columns, taken apart as `_parts` says: a list of [rows, columns].


def _load_parts(ref, lead: Lead, head, start, size: int, length: int, parts: tuple[Part, ...]) -> list[jax.Array]:
    """Parts of rows ``start …`` of one head of one sequence, ``size`` of them, zero beyond its ``length``.

    ``head``: where the heads begin to which ``lead``'s belongs.
    """
    loaded = []
    for part in parts:
        tile, mask = _tile(ref, lead, head, start, size, length, part)
        loaded.append(tile[...] if mask is None else plgpu.load(tile, mask=mask, other=0))
    return loaded


def _store_parts(ref, lead: Lead, values: list[jax.Array], start, size: int, length: int, parts: tuple[Part, ...]):
    for part, value in zip(parts, values, strict=True):
        tile, mask = _tile(ref, lead, 0, start, size, length, part)
        plgpu.store(tile, value.astype(ref.dtype), mask=mask)


def _tile(ref, lead: Lead, head, start, size: int, length: int, part: Part) -> tuple[Any, jax.Array | None]:
    """[size, columns] of an array, and which of its entries are in the array (bool); None: all."""
    (row, own), (column, columns), width = lead, part, ref.shape[-1]
    cut = column + columns > width
    # A slice that is known to reach beyond the array is refused; so its start is said not to be known.
    wide = pl.ds(own * 0 + column if cut else column, columns)
    mask = None
    if length % size:
        mask = jnp.broadcast_to((start + jnp.arange(size) < length)[:, None], (size, columns))
    if cut:
        inside = jnp.broadcast_to((column + jnp.arange(columns) < width)[None, :], (size, columns))
        mask = inside if mask is None else mask & inside
    return ref.at[row, pl.ds(start, size), own + head, wide], mask


def _load_vector(ref, lead: tuple, start, size: int, length: int, other: float | int) -> jax.Array:
    """[size], ``other`` beyond ``length``."""
    vector = ref.at[(*lead, pl.ds(start, size))]
    if length % size == 0:
        return vector[...]
    return plgpu.load(vector, mask=start + jnp.arange(size) < length, other=other)


def _scores(q: list[jax.Array], k: list[jax.Array], s: _Shape) -> jax.Array:
    """f32[block_q, block_k], to base 2: the exponential that the hardware has."""
    scores = sum(plgpu.dot(q_part, k_part, trans_b=True) for q_part, k_part in zip(q, k, strict=True))
    return scores * (s.scale * math.log2(math.e))


def _visible(q_index: jax.Array, k_index: jax.Array, first: jax.Array, s: _Shape) -> jax.Array:
    """bool[block_q, block_k]."""
    visible = k_index[None, :] >= first[:, None]
    if s.causal:
        visible &= k_index[None, :] <= q_index[:, None]
    elif s.keys % s.block_k:
        visible &= (k_index < s.keys)[None, :]
    return visible


def _key_blocks(q_start, first: jax.Array, s: _Shape) -> tuple[jax.Array, jax.Array]:
    """Blocks of keys that the block of queries from ``q_start`` on needs: the first, and the one after the last."""
    low = jnp.maximum(jnp.min(first), 0) // s.block_k
    high = pl.cdiv(s.keys, s.block_k)
    return low, jnp.minimum(pl.cdiv(q_start + s.block_q, s.block_k), high) if s.causal else low * 0 + high


def _forward_kernel(q_ref, k_ref, v_ref, first_ref, out_ref, lse_ref, *, s: _Shape):
    """One block of queries of one head."""
    lead, block = _program(s, longest_last=True)
    row, head = lead
    q_start = block * s.block_q
    q_index = q_start + jnp.arange(s.block_q)
    q = _load_parts(q_ref, lead, 0, q_start, s.block_q, s.queries, s.key_parts)
    first = _load_vector(first_ref, (row,), q_start, s.block_q, s.queries, s.keys)  # i32[block_q]
    low, high = _key_blocks(q_start, first, s)

    def body(j, carry):
        m, l, acc = carry  # noqa: E741  f32[block_q], f32[block_q], parts f32[block_q, columns]
        k_start = j * s.block_k
        scores = _scores(q, _load_parts(k_ref, lead, s.k_head, k_start, s.block_k, s.keys, s.key_parts), s)
        scores = jnp.where(_visible(q_index, k_start + jnp.arange(s.block_k), first, s), scores, MASKED)
        m_new = jnp.maximum(m, jnp.max(scores, axis=1))
        p, alpha = jnp.exp2(scores - m_new[:, None]), jnp.exp2(m - m_new)  # f32[block_q, block_k], f32[block_q]
        v = _load_parts(v_ref, lead, s.v_head, k_start, s.block_k, s.keys, s.value_parts)
        p_low = p.astype(v_ref.dtype)
        acc = [a * alpha[:, None] + plgpu.dot(p_low, v_part) for a, v_part in zip(acc, v, strict=True)]
        return m_new, l * alpha + jnp.sum(p, axis=1), acc

    start = (
        jnp.full(s.block_q, MASKED, jnp.float32),
        jnp.zeros(s.block_q, jnp.float32),
        [jnp.zeros((s.block_q, columns), jnp.float32) for _, columns in s.value_parts],
    )
    m, l, acc = lax.fori_loop(low, high, body, start)  # noqa: E741
    out = [a / l[:, None] for a in acc]
    _store_parts(out_ref, lead, out, q_start, s.block_q, s.queries, s.value_parts)
    mask = None if s.queries % s.block_q == 0 else q_index < s.queries
    plgpu.store(lse_ref.at[row, head, pl.ds(q_start, s.block_q)], m + jnp.log2(l), mask=mask)


def _load_queries(refs, lead: Lead, q_start, s: _Shape):
    """What the gradients need of a block of queries: q, first (i32), lse and delta (f32[block_q]), do."""
    q_ref, _, _, first_ref, _, lse_ref, delta_ref, do_ref = refs
    row, _ = lead
    return (
        _load_parts(q_ref, lead, 0, q_start, s.block_q, s.queries, s.key_parts),
        _load_vector(first_ref, (row,), q_start, s.block_q, s.queries, s.keys),
        _load_vector(lse_ref, lead, q_start, s.block_q, s.queries, 0.0),
        _load_vector(delta_ref, lead, q_start, s.block_q, s.queries, 0.0),
        _load_parts(do_ref, lead, 0, q_start, s.block_q, s.queries, s.value_parts),
    )


def _p(scores: jax.Array, visible: jax.Array, lse: jax.Array) -> jax.Array:
    """The softmax, f32[block_q, block_k]."""
    return jnp.where(visible, jnp.exp2(scores - lse[:, None]), 0.0)


def _ds(p: jax.Array, do: list[jax.Array], v: list[jax.Array], delta: jax.Array, s: _Shape) -> jax.Array:
    """The gradient of the products of queries and keys, before they are scaled, f32[block_q, block_k]."""
    dp = sum(plgpu.dot(do_part, v_part, trans_b=True) for do_part, v_part in zip(do, v, strict=True))
    return p * (dp - delta[:, None]) * s.scale


def _dq_kernel(*refs, s: _Shape):
    """The gradient of one block of queries of one head."""
    *input_refs, dq_ref = refs
    _, k_ref, v_ref, *_ = input_refs
    lead, block = _program(s, longest_last=True)
    q_start = block * s.block_q
    q_index = q_start + jnp.arange(s.block_q)
    q, first, lse, delta, do = _load_queries(input_refs, lead, q_start, s)
    low, high = _key_blocks(q_start, first, s)

    def body(j, dq):  # parts f32[block_q, columns]
        k_start = j * s.block_k
        k = _load_parts(k_ref, lead, s.k_head, k_start, s.block_k, s.keys, s.key_parts)
        v = _load_parts(v_ref, lead, s.v_head, k_start, s.block_k, s.keys, s.value_parts)
        visible = _visible(q_index, k_start + jnp.arange(s.block_k), first, s)
        p = _p(_scores(q, k, s), visible, lse)
        ds = _ds(p, do, v, delta, s).astype(k_ref.dtype)
        return [a + plgpu.dot(ds, k_part) for a, k_part in zip(dq, k, strict=True)]

    start = [jnp.zeros((s.block_q, columns), jnp.float32) for _, columns in s.key_parts]
    dq = lax.fori_loop(low, high, body, start)
    _store_parts(dq_ref, lead, dq, q_start, s.block_q, s.queries, s.key_parts)


def _dkv_kernel(*refs, s: _Shape):
    """The gradients of one block of keys, and of values, of one head."""
    *input_refs, dk_ref, dv_ref = refs
    _, k_ref, v_ref, _, end_ref, *_ = input_refs
    lead, block = _program(s, longest_last=False)
    row, _ = lead
    k_start = block * s.block_k
    k_index = k_start + jnp.arange(s.block_k)
    k = _load_parts(k_ref, lead, s.k_head, k_start, s.block_k, s.keys, s.key_parts)
    v = _load_parts(v_ref, lead, s.v_head, k_start, s.block_k, s.keys, s.value_parts)
    end = jnp.max(_load_vector(end_ref, (row,), k_start, s.block_k, s.keys, 0))
    low = k_start // s.block_q if s.causal else k_start * 0

    def body(i, carry):
        dk, dv = carry  # parts f32[block_k, columns]
        q_start = i * s.block_q
        q_index = q_start + jnp.arange(s.block_q)
        q, first, lse, delta, do = _load_queries(input_refs, lead, q_start, s)
        visible = _visible(q_index, k_index, first, s)
        if s.queries % s.block_q:
            visible &= (q_index < s.queries)[:, None]
        p = _p(_scores(q, k, s), visible, lse)
        ds = _ds(p, do, v, delta, s).astype(k_ref.dtype)
        p_low = p.astype(v_ref.dtype)
        dv = [a + plgpu.dot(p_low, do_part, trans_a=True) for a, do_part in zip(dv, do, strict=True)]
        return [a + plgpu.dot(ds, q_part, trans_a=True) for a, q_part in zip(dk, q, strict=True)], dv

    start = (
        [jnp.zeros((s.block_k, columns), jnp.float32) for _, columns in s.key_parts],
        [jnp.zeros((s.block_k, columns), jnp.float32) for _, columns in s.value_parts],
    )
    dk, dv = lax.fori_loop(low, pl.cdiv(end, s.block_q), body, start)
    _store_parts(dk_ref, lead, dk, k_start, s.block_k, s.keys, s.key_parts)
    _store_parts(dv_ref, lead, dv, k_start, s.block_k, s.keys, s.value_parts)
