"""Attention on NVIDIA GPUs: Pallas Triton kernels, forward and backward, that never hold a matrix of scores.

Softmax is taken a block of keys at a time (FlashAttention-2, arXiv 2307.08691; names follow its algorithms 1 and 2).
A query sees one range of keys, which is what packed rows need, and blocks of keys outside the ranges of a block of
queries cost nothing. Widths may differ between keys and values (latent attention: 192 and 128) and need not be powers
of two: a width is taken apart into powers of two, each its own product.

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

from dsvl2_jax.kernels.triton import cost_metadata, fits_int32
from dsvl2_jax.runtime.lazy import LazyModule
from dsvl2_jax.sharding import shard_map_kernel

# Only what traces these kernels needs them.
pl = LazyModule("jax.experimental.pallas")
plgpu = LazyModule("jax.experimental.pallas.triton")

MIN_PART = 16  # the least depth of a tensor core's product
BLOCK = 64  # queries, and keys, that a program takes at a time
MASKED = -1e30  # finite, so that a block without a visible key gives no nan

Part = tuple[int, int]  # first column and number of columns, a power of two
Lead = tuple[jax.Array, jax.Array]  # row of the batch and head; read outside of loops, where interpreting wants it


@dataclasses.dataclass(frozen=True)
class AttentionSpec:
    """What `fused_attention` computes.

    Attributes:
      plain: (q_bthd, k_bthd, v_bthd, positions_bt) → out_bthd, what runs on other platforms; its gradients too come
        from it.
      axes: logical axes of q, k, v and the result.
      scale: factor on the scores.
      causal: a query sees no keys after it.
      name: of the result, for rematerialisation policies.
    """

    plain: Callable[[jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]
    axes: tuple[str | None, ...]
    scale: float
    causal: bool
    name: str


def is_supported(q_bthd: jax.Array, v_bthd: jax.Array) -> bool:
    """Whether the kernels are for these: tensor cores multiply 16 bits, and float32 is for exactness."""
    return v_bthd.dtype == jnp.bfloat16 and fits_int32(q_bthd, v_bthd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def fused_attention(
    q_bthd: jax.Array, k_bthd: jax.Array, v_bthd: jax.Array, positions_bt: jax.Array, spec: AttentionSpec
) -> jax.Array:
    """Attention of rows to themselves: the kernels where the program is lowered for CUDA, ``spec.plain`` elsewhere.

    Args:
      q_bthd, k_bthd: [B, T, H, Dk]; v_bthd: [B, T, H, Dv]; see `is_supported`.
      positions_bt: i32[B, T]. Causal: a token sees those since position 0 of its own sample. Else: zeros.

    Returns:
      [B, T, H, Dv].
    """
    kernel = lambda *arrays: _sharded(_forward, spec)(*arrays)[0]  # noqa: E731
    return lax.platform_dependent(q_bthd, k_bthd, v_bthd, positions_bt, cuda=kernel, default=spec.plain)


def _fused_forward(q_bthd, k_bthd, v_bthd, positions_bt, spec):
    b, t, h, _ = q_bthd.shape

    def plain(*arrays):
        return spec.plain(*arrays), jnp.zeros((b, h, t), jnp.float32)

    kernel = _sharded(_forward, spec)
    out_bthd, lse_bht = lax.platform_dependent(q_bthd, k_bthd, v_bthd, positions_bt, cuda=kernel, default=plain)
    # Named here, so that a policy which keeps the result does not run the kernel once more for the lse.
    out_bthd, lse_bht = checkpoint_name(out_bthd, spec.name), checkpoint_name(lse_bht, spec.name)
    return out_bthd, (q_bthd, k_bthd, v_bthd, positions_bt, out_bthd, lse_bht)


def _fused_backward(spec, residuals, do_bthd):
    def plain(q_bthd, k_bthd, v_bthd, positions_bt, out_bthd, lse_bht, do_bthd):
        del out_bthd, lse_bht
        return jax.vjp(lambda *arrays: spec.plain(*arrays, positions_bt), q_bthd, k_bthd, v_bthd)[1](do_bthd)

    kernel = _sharded(_backward, spec)
    return (*lax.platform_dependent(*residuals, do_bthd, cuda=kernel, default=plain), None)


fused_attention.defvjp(_fused_forward, _fused_backward)


def _sharded(function: Callable, spec: AttentionSpec) -> Callable:
    """`_forward` or `_backward` on each device's own rows and heads."""
    batch, length, heads, _ = arrays = spec.axes
    positions, lse = (batch, length), (batch, heads, length)
    in_axes, out_axes = (arrays, arrays, arrays, positions), (arrays, lse)
    if function is _backward:
        in_axes, out_axes = (*in_axes, arrays, lse, arrays), (arrays,) * 3
    return shard_map_kernel(functools.partial(function, spec), in_axes, out_axes)


def _forward(spec: AttentionSpec, q_bthd, k_bthd, v_bthd, positions_bt):
    width = v_bthd.shape[-1]
    first_bt, _ = _visible_ranges(positions_bt, spec.causal)
    q_bthd, k_bthd, v_bthd = (padded(x) for x in (q_bthd, k_bthd, v_bthd))
    out_bthd, lse_bht = attention_forward(q_bthd, k_bthd, v_bthd, first_bt, spec.scale, spec.causal)
    return out_bthd[..., :width], lse_bht


def _backward(spec: AttentionSpec, q_bthd, k_bthd, v_bthd, positions_bt, out_bthd, lse_bht, do_bthd):
    first_bt, end_bs = _visible_ranges(positions_bt, spec.causal)
    arrays = (padded(x) for x in (q_bthd, k_bthd, v_bthd))
    out_bthd, do_bthd = padded(out_bthd), padded(do_bthd)
    gradients = attention_backward(*arrays, first_bt, end_bs, out_bthd, lse_bht, do_bthd, spec.scale, spec.causal)
    return tuple(dx[..., : x.shape[-1]] for dx, x in zip(gradients, (q_bthd, k_bthd, v_bthd), strict=True))


def _visible_ranges(positions_bt: jax.Array, causal: bool) -> tuple[jax.Array, jax.Array]:
    """i32[B, T] the index of the first key that a query sees; i32[B, S] the index after the last query of a key."""
    length = positions_bt.shape[1]
    index_bt = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), positions_bt.shape)
    if not causal:
        return jnp.zeros_like(index_bt), jnp.full_like(index_bt, length)
    starts_bt = jnp.where(positions_bt == 0, index_bt, length)
    next_bt = jnp.concatenate([starts_bt[:, 1:], jnp.full_like(starts_bt[:, :1], length)], axis=1)
    return (index_bt - positions_bt).astype(jnp.int32), lax.cummin(next_bt, axis=1, reverse=True)


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
    parts, start = [], 0
    while start < width:
        size = 1 << (width - start).bit_length() - 1
        parts.append((start, size))
        start += size
    return tuple(parts)


def _shape(q_bthd: jax.Array, k_bshd: jax.Array, v_bshd: jax.Array, scale: float, causal: bool) -> _Shape:
    parts = _parts(q_bthd.shape[-1]), _parts(v_bshd.shape[-1])
    return _Shape(q_bthd.shape[1], k_bshd.shape[1], *parts, scale, causal, BLOCK, BLOCK)


def padded(x: jax.Array) -> jax.Array:
    """[…, D] with zeros up to the next width that the kernels take."""
    return jnp.pad(x, ((0, 0),) * (x.ndim - 1) + ((0, -x.shape[-1] % MIN_PART),))


@functools.partial(jax.jit, static_argnames=("scale", "causal", "interpret"))
def attention_forward(
    q_bthd: jax.Array,
    k_bshd: jax.Array,
    v_bshd: jax.Array,
    first_bt: jax.Array,
    scale: float,
    causal: bool,
    *,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Softmax attention (FlashAttention-2, algorithm 1).

    Args:
      q_bthd: [B, T, H, Dk]; k_bshd: [B, S, H, Dk]; v_bshd: [B, S, H, Dv]. Widths are multiples of `MIN_PART`
        (`padded`).
      first_bt: i32[B, T], the index of the first key that a query sees, at most its own when ``causal``.
      causal: a query sees keys up to its own index; else all from ``first_bt`` on.
      interpret: run on the CPU, for tests.

    Returns:
      out, [B, T, H, Dv], and lse, f32[B, H, T], the log-sum-exp of each query's scaled scores, to base 2.
    """
    s = _shape(q_bthd, k_bshd, v_bshd, scale, causal)
    b, t, h, _ = q_bthd.shape
    flops = 2.0 * s.pairs * b * h * (q_bthd.shape[-1] + v_bshd.shape[-1])
    return pl.pallas_call(
        functools.partial(_forward_kernel, s=s),
        grid=(pl.cdiv(t, s.block_q), h, b),
        out_shape=(
            jax.ShapeDtypeStruct((b, t, h, v_bshd.shape[-1]), v_bshd.dtype),
            jax.ShapeDtypeStruct((b, h, t), jnp.float32),
        ),
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=2),
        interpret=interpret,
        metadata=cost_metadata(flops),
        name="attention_forward",
    )(q_bthd, k_bshd, v_bshd, first_bt)


@functools.partial(jax.jit, static_argnames=("scale", "causal", "interpret"))
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
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients for q, k and v (FlashAttention-2, algorithm 2, as two kernels: one a block of queries, one of keys).

    Args:
      end_bs: i32[B, S], the index after the last query that sees a key.
      out_bthd, lse_bht: of `attention_forward`. do_bthd: [B, T, H, Dv], the cotangent of ``out_bthd``.
    """
    s = _shape(q_bthd, k_bshd, v_bshd, scale, causal)
    b, t, h, _ = q_bthd.shape
    do_bthd = do_bthd.astype(q_bthd.dtype)
    delta_bht = jnp.einsum("bthd,bthd->bht", out_bthd, do_bthd, preferred_element_type=jnp.float32)
    inputs = (q_bthd, k_bshd, v_bshd, first_bt, end_bs, lse_bht, delta_bht, do_bthd)
    params = plgpu.CompilerParams(num_warps=8, num_stages=2)
    pairs = 2.0 * s.pairs * b * h
    dq_bthd = pl.pallas_call(
        functools.partial(_dq_kernel, s=s),
        grid=(pl.cdiv(t, s.block_q), h, b),
        out_shape=jax.ShapeDtypeStruct(q_bthd.shape, q_bthd.dtype),
        compiler_params=params,
        interpret=interpret,
        metadata=cost_metadata(pairs * (2 * q_bthd.shape[-1] + v_bshd.shape[-1])),
        name="attention_dq",
    )(*inputs)
    dk_bshd, dv_bshd = pl.pallas_call(
        functools.partial(_dkv_kernel, s=s),
        grid=(pl.cdiv(s.keys, s.block_k), h, b),
        out_shape=(jax.ShapeDtypeStruct(k_bshd.shape, k_bshd.dtype), jax.ShapeDtypeStruct(v_bshd.shape, v_bshd.dtype)),
        compiler_params=params,
        interpret=interpret,
        metadata=cost_metadata(pairs * 2 * (q_bthd.shape[-1] + v_bshd.shape[-1])),
        name="attention_dkv",
    )(*inputs)
    return dq_bthd, dk_bshd, dv_bshd


# Inside a kernel, "parts" are a block's columns, taken apart as `_parts` says: a list of [rows, columns].


def _load_parts(ref, lead: Lead, start, size: int, length: int, parts: tuple[Part, ...]) -> list[jax.Array]:
    """Parts of rows ``start …`` of one head of one sequence, ``size`` of them, zero beyond its ``length``."""
    row, head = lead
    loaded = []
    for column, columns in parts:
        tile = ref.at[row, pl.ds(start, size), head, pl.ds(column, columns)]
        mask = _inside(start, size, length, columns)
        loaded.append(tile[...] if mask is None else plgpu.load(tile, mask=mask, other=0))
    return loaded


def _store_parts(ref, lead: Lead, values: list[jax.Array], start, size: int, length: int, parts: tuple[Part, ...]):
    row, head = lead
    for (column, columns), value in zip(parts, values, strict=True):
        tile = ref.at[row, pl.ds(start, size), head, pl.ds(column, columns)]
        plgpu.store(tile, value.astype(ref.dtype), mask=_inside(start, size, length, columns))


def _inside(start, size: int, length: int, columns: int) -> jax.Array | None:
    """bool[size, columns], which entries of a tile are in the array; None: all."""
    if length % size == 0:
        return None
    return jnp.broadcast_to((start + jnp.arange(size) < length)[:, None], (size, columns))


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
    lead = row, head = pl.program_id(2), pl.program_id(1)
    q_start = pl.program_id(0) * s.block_q
    q_index = q_start + jnp.arange(s.block_q)
    q = _load_parts(q_ref, lead, q_start, s.block_q, s.queries, s.key_parts)
    first = _load_vector(first_ref, (row,), q_start, s.block_q, s.queries, s.keys)  # i32[block_q]
    low, high = _key_blocks(q_start, first, s)

    def body(j, carry):
        m, l, acc = carry  # noqa: E741  f32[block_q], f32[block_q], parts f32[block_q, columns]
        k_start = j * s.block_k
        scores = _scores(q, _load_parts(k_ref, lead, k_start, s.block_k, s.keys, s.key_parts), s)
        scores = jnp.where(_visible(q_index, k_start + jnp.arange(s.block_k), first, s), scores, MASKED)
        m_new = jnp.maximum(m, jnp.max(scores, axis=1))
        p, alpha = jnp.exp2(scores - m_new[:, None]), jnp.exp2(m - m_new)  # f32[block_q, block_k], f32[block_q]
        v = _load_parts(v_ref, lead, k_start, s.block_k, s.keys, s.value_parts)
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
        _load_parts(q_ref, lead, q_start, s.block_q, s.queries, s.key_parts),
        _load_vector(first_ref, (row,), q_start, s.block_q, s.queries, s.keys),
        _load_vector(lse_ref, lead, q_start, s.block_q, s.queries, 0.0),
        _load_vector(delta_ref, lead, q_start, s.block_q, s.queries, 0.0),
        _load_parts(do_ref, lead, q_start, s.block_q, s.queries, s.value_parts),
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
    lead = pl.program_id(2), pl.program_id(1)
    q_start = pl.program_id(0) * s.block_q
    q_index = q_start + jnp.arange(s.block_q)
    q, first, lse, delta, do = _load_queries(input_refs, lead, q_start, s)
    low, high = _key_blocks(q_start, first, s)

    def body(j, dq):  # parts f32[block_q, columns]
        k_start = j * s.block_k
        k = _load_parts(k_ref, lead, k_start, s.block_k, s.keys, s.key_parts)
        v = _load_parts(v_ref, lead, k_start, s.block_k, s.keys, s.value_parts)
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
    lead = row, _ = pl.program_id(2), pl.program_id(1)
    k_start = pl.program_id(0) * s.block_k
    k_index = k_start + jnp.arange(s.block_k)
    k = _load_parts(k_ref, lead, k_start, s.block_k, s.keys, s.key_parts)
    v = _load_parts(v_ref, lead, k_start, s.block_k, s.keys, s.value_parts)
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
