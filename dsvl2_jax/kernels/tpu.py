"""TPU kernels, for what the compiler's own code does not do well."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax

from dsvl2_jax.kernels.blocks import LANES
from dsvl2_jax.kernels.precision import matmul_precision
from dsvl2_jax.kernels.quantized_cache import Entries, QuantizedEntries
from dsvl2_jax.runtime.lazy import LazyModule

# Only what traces these kernels needs them.
pl = LazyModule("jax.experimental.pallas")
pltpu = LazyModule("jax.experimental.pallas.tpu")
megablox = LazyModule("jax.experimental.pallas.ops.tpu.megablox.gmm")
splash = LazyModule("jax.experimental.pallas.ops.tpu.splash_attention")

# Of a matrix's gradient, summed in float32 in fast memory: rows, inputs and outputs at a time.
TGMM_TILES = 512, 1024, 512

ATTENTION_BLOCK = 512  # queries, and keys, at a time
_SPLASH_BLOCKS = (
    "block_q", "block_kv", "block_kv_compute", "block_q_dkv", "block_kv_dkv", "block_kv_dkv_compute", "block_q_dq",
    "block_kv_dq",
)  # fmt: skip


def megablox_tgmm(
    x_mk: jax.Array,
    dout_mn: jax.Array,
    group_sizes_g: jax.Array,
    existing_out_gkn: jax.Array | None = None,
    *,
    interpret: bool = False,
) -> jax.Array:
    """`dsvl2_jax.kernels.grouped_matmul.tgmm` by jax's megablox kernel, for operands of 16 bits."""
    (m, k), n = x_mk.shape, dout_mn.shape[1]
    tile = min(TGMM_TILES[0], -(-m // LANES) * LANES)
    x_mk, dout_mn = (jnp.pad(a, ((0, -m % tile), (0, 0))) for a in (x_mk, dout_mn))
    tiles = tile, min(TGMM_TILES[1], k), min(TGMM_TILES[2], n)
    return megablox.tgmm(
        x_mk.T, dout_mn, group_sizes_g, x_mk.dtype, tiles, existing_out=existing_out_gkn, interpret=interpret
    )


def splash_attention(
    q_bthd: jax.Array,
    k_bthd: jax.Array,
    v_bthd: jax.Array,
    positions_bt: jax.Array,
    scale: float,
    *,
    interpret: bool = False,
) -> jax.Array:
    """Causal attention of rows to themselves by jax's splash kernel, which never holds a matrix of scores.

    Args:
      q_bthd, k_bthd: [B, T, H, Dk]; v_bthd: [B, T, H, Dv]. T is a multiple of `ATTENTION_BLOCK`.
      positions_bt: i32[B, T], from 0 in each sample of a row.

    Returns:
      [B, T, H, Dv]. Differentiable.
    """
    length, heads = q_bthd.shape[1:3]
    sizes = splash.BlockSizes(**dict.fromkeys(_SPLASH_BLOCKS, ATTENTION_BLOCK))
    mask = splash.MultiHeadMask([splash.CausalMask((length, length))] * heads)
    kernel = splash.make_splash_mha_single_device(mask, block_sizes=sizes, interpret=interpret)
    # The index of a sample's first token: the same for all of its tokens.
    sample_bt = (jnp.arange(length) - positions_bt).astype(jnp.int32)
    by_head = ((a * s).swapaxes(1, 2) for a, s in ((q_bthd, scale), (k_bthd, 1), (v_bthd, 1)))  # [B, H, T, D]
    return jax.vmap(kernel)(*by_head, splash.SegmentIds(sample_bt, sample_bt)).swapaxes(1, 2)


def latent_attention(
    q_latent_bthr: jax.Array,
    q_rope_bthd: jax.Array,
    latent_bsr: Entries,
    k_rope_bsd: Entries,
    positions_b: jax.Array,
    scale: float,
    *,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """A decode step's attention over the latent cache, which is read once: every block serves scores and values.

    The softmax is taken block by block as in FlashAttention-2 (arXiv 2307.08691), with its running maximum m, sum l
    and unnormalized output acc.

    Args:
      q_latent_bthr: [B, T, H, R]; q_rope_bthd: [B, T, H, D]. latent_bsr: [B, S, R]; k_rope_bsd: [B, S, D]. S is at
        most, or a multiple of, `ATTENTION_BLOCK`.
      positions_b: i32[B], the last position that each row's first query sees, negative for none; each query after it
        sees one more. Blocks that none sees are not read.

    Returns:
      out, f32[B, T, H, R], zero for queries that see nothing, and lse, f32[B, T, H, 1], the log-sum-exp of the scaled
      scores, -inf for queries that see nothing.
    """
    (b, t, heads, r), d, length = q_latent_bthr.shape, q_rope_bthd.shape[-1], latent_bsr.shape[1]
    block, h = min(ATTENTION_BLOCK, length), t * heads

    def of_row(i, j, last):
        return i, 0, 0

    def visible_block(i, j, last):
        return jnp.minimum(j, jnp.maximum(last[i] + t - 1, 0) // block)

    def of_visible_block(i, j, last):
        return i, visible_block(i, j, last), 0

    def of_visible_scales(i, j, last):
        return i, 0, visible_block(i, j, last)

    cache, scales = _values_and_scales((latent_bsr, k_rope_bsd))
    scales = [scale_bs[:, None] for scale_bs in scales]  # [B, 1, S]: positions are the last axis of a block
    if not interpret:
        cache = [pltpu.with_memory_space_constraint(a, pltpu.HBM) for a in cache]
    out, lse = pl.pallas_call(
        functools.partial(_latent_kernel, scale=scale, block=block, heads=heads),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(b, length // block),
            in_specs=[
                pl.BlockSpec((1, h, r), of_row),
                pl.BlockSpec((1, h, d), of_row),
                pl.BlockSpec((1, block, r), of_visible_block),
                pl.BlockSpec((1, block, d), of_visible_block),
                *(pl.BlockSpec((1, 1, block), of_visible_scales) for _ in scales),
            ],
            out_specs=[pl.BlockSpec((1, h, r), of_row), pl.BlockSpec((1, h, 1), of_row)],
            scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in ((h, 1), (h, 1), (h, r))],
        ),
        out_shape=[jax.ShapeDtypeStruct((b, h, width), jnp.float32) for width in (r, 1)],
        cost_estimate=pl.CostEstimate(
            flops=2 * b * h * length * (2 * r + d),
            transcendentals=b * h * length,
            bytes_accessed=sum(x.nbytes for x in (q_latent_bthr, q_rope_bthd, *cache, *scales)) + 4 * b * h * (r + 1),
        ),
        interpret=interpret,
        name="latent_attention",
    )(positions_b, q_latent_bthr.reshape(b, h, r), q_rope_bthd.reshape(b, h, d), *cache, *scales)
    return out.reshape(b, t, heads, r), lse.reshape(b, t, heads, 1)


def _values_and_scales(cache):
    """What attention reads of a cache: its arrays, and the scales of those in int8."""
    values = [x.values if isinstance(x, QuantizedEntries) else x for x in cache]
    return values, [x.scale for x in cache if isinstance(x, QuantizedEntries)]


def _latent_kernel(last_ref, q_latent_ref, q_rope_ref, latent_ref, k_rope_ref, *refs, scale, block, heads):
    """All heads of one row and one block of positions: FlashAttention's inner loop, a step of the grid at a time.

    H are the heads of all T queries, one query after the other.

    Shapes: q_latent [1, H, R], q_rope [1, H, D], latent [1, block, R], k_rope [1, block, D], and where these are int8
    the scales of both, f32[1, 1, block]; f32: out [1, H, R], lse [1, H, 1], and kept between the steps of a row m, l
    [H, 1] and acc [H, R].
    """
    *scale_refs, out_ref, lse_ref, m_ref, l_ref, acc_ref = refs
    last, j = last_ref[pl.program_id(0)], pl.program_id(1)
    more = q_latent_ref.shape[1] // heads - 1
    dtype = q_latent_ref.dtype
    precision = matmul_precision(dtype)

    _begin_row(j, m_ref, l_ref, acc_ref)

    @pl.when(j * block <= last + more)
    def _():
        def products(q, k):  # [H, width], [block, width] → f32[H, block]
            dims = (((1,), (1,)), ((), ()))
            return lax.dot_general(q, k, dims, precision=precision, preferred_element_type=jnp.float32)

        latent = latent_ref[0].astype(dtype)  # keys and values
        parts = [products(q_latent_ref[0], latent), products(q_rope_ref[0], k_rope_ref[0].astype(dtype))]
        scales = [ref[0] for ref in scale_refs]
        scores = sum(part * s for part, s in zip(parts, scales, strict=True)) if scales else sum(parts)

        def weigh(p):
            p = p * scales[0] if scales else p
            return jnp.dot(p.astype(dtype), latent, precision=precision, preferred_element_type=jnp.float32)

        query = lax.broadcasted_iota(jnp.int32, (scores.shape[0], 1), 0) // heads if more else 0
        _add_block(scores * scale, weigh, j * block, last + query, m_ref, l_ref, acc_ref)

    _end_row(j, out_ref, lse_ref, m_ref, l_ref, acc_ref)


def _begin_row(j, m_ref, l_ref, acc_ref):
    """In a row's first step j: the softmax of no keys yet."""

    @pl.when(j == 0)
    def _():
        m_ref[...] = jnp.full_like(m_ref, -jnp.inf)
        l_ref[...] = jnp.zeros_like(l_ref)
        acc_ref[...] = jnp.zeros_like(acc_ref)


def _end_row(j, out_ref, lse_ref, m_ref, l_ref, acc_ref):
    """In a row's last step j: its output, and the log-sum-exp of its scores."""

    @pl.when(j == pl.num_programs(1) - 1)
    def _():
        total = l_ref[...]
        out_ref[0] = acc_ref[...] / jnp.where(total > 0, total, 1)
        lse_ref[0] = m_ref[...] + jnp.log(total)


def _add_block(scores, weigh, start, last, m_ref, l_ref, acc_ref):
    """FlashAttention's step: the softmax so far, with one more block of keys, of which those up to ``last`` are seen.

    Args:
      last: i32, or i32[…, 1].
      scores: f32[…, block], of keys from position ``start`` on. weigh: from weights of that shape to f32[…, Dv].
      m_ref, l_ref: f32[…, 1]. acc_ref: f32[…, Dv].
    """
    position = start + lax.broadcasted_iota(jnp.int32, scores.shape, scores.ndim - 1)
    scores = jnp.where(position <= last, scores, -jnp.inf)
    m = jnp.maximum(m_ref[...], scores.max(-1, keepdims=True))
    above = jnp.where(m == -jnp.inf, 0, m)  # of a query that has seen nothing yet
    alpha, p = jnp.exp(m_ref[...] - above), jnp.exp(scores - above)
    m_ref[...] = m
    l_ref[...] = l_ref[...] * alpha + p.sum(-1, keepdims=True)
    acc_ref[...] = acc_ref[...] * alpha + weigh(p)


def cached_attention(
    q_bthd: jax.Array,
    k_bshd: Entries,
    v_bshd: Entries,
    positions_b: jax.Array,
    scale: float,
    *,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """A decode step's multi-head attention over the cache, which is read once and as it lies; as `latent_attention`.

    Args:
      q_bthd: [B, T, H, D]; k_bshd, v_bshd: [B, S, H, D]. S is at most, or a multiple of, `ATTENTION_BLOCK`.
      positions_b: i32[B], the last position that each row's first query sees; see `latent_attention`.

    Returns:
      out, f32[B, T, H, D], and lse, f32[B, T, H, 1]; see `latent_attention`.
    """
    (b, t, h, d), length = q_bthd.shape, k_bshd.shape[1]
    block = min(ATTENTION_BLOCK, length)
    # The compiler keeps ten heads before positions, so that nothing is padded: this moves nothing.
    cache, scales = ([x.swapaxes(1, 2) for x in arrays] for arrays in _values_and_scales((k_bshd, v_bshd)))
    if not interpret:
        cache = [pltpu.with_memory_space_constraint(x, pltpu.HBM) for x in cache]

    def of_row(i, j, last):
        return i, 0, 0, 0

    def of_visible_scales(i, j, last):
        return i, 0, jnp.minimum(j, jnp.maximum(last[i] + t - 1, 0) // block)

    def of_visible_block(i, j, last):
        return *of_visible_scales(i, j, last), 0

    out, lse = pl.pallas_call(
        functools.partial(_cached_kernel, scale=scale, block=block),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(b, length // block),
            in_specs=[
                pl.BlockSpec((1, h, t, d), of_row),
                *(pl.BlockSpec((1, h, block, d), of_visible_block) for _ in cache),
                *(pl.BlockSpec((1, h, block), of_visible_scales) for _ in scales),
            ],
            out_specs=[pl.BlockSpec((1, h, t, d), of_row), pl.BlockSpec((1, h, t, 1), of_row)],
            scratch_shapes=[pltpu.VMEM((h, t, width), jnp.float32) for width in (1, 1, d)],
        ),
        out_shape=[jax.ShapeDtypeStruct((b, h, t, width), jnp.float32) for width in (d, 1)],
        cost_estimate=pl.CostEstimate(
            flops=4 * b * t * h * length * d,
            transcendentals=b * t * h * length,
            bytes_accessed=sum(x.nbytes for x in (q_bthd, *cache, *scales)) + 4 * b * t * h * (d + 1),
        ),
        interpret=interpret,
        name="cached_attention",
    )(positions_b, q_bthd.swapaxes(1, 2), *cache, *scales)
    return out.swapaxes(1, 2), lse.swapaxes(1, 2)


def _cached_kernel(last_ref, q_ref, k_ref, v_ref, *refs, scale, block):
    """All heads of one row and one block of positions.

    Shapes: q [1, H, T, D], k, v [1, H, block, D], and where these are int8 the scales of both, f32[1, H, block]; f32:
    out [1, H, T, D], lse [1, H, T, 1], and kept between the steps of a row m, l [H, T, 1] and acc [H, T, D].
    """
    *scale_refs, out_ref, lse_ref, m_ref, l_ref, acc_ref = refs
    last, j = last_ref[pl.program_id(0)], pl.program_id(1)
    more, dtype = q_ref.shape[2] - 1, q_ref.dtype
    options = {"precision": matmul_precision(dtype), "preferred_element_type": jnp.float32}

    _begin_row(j, m_ref, l_ref, acc_ref)

    @pl.when(j * block <= last + more)
    def _():
        values = v_ref[0].astype(dtype)
        scores = lax.dot_general(q_ref[0], k_ref[0].astype(dtype), (((2,), (2,)), ((0,), (0,))), **options)
        key_scale, value_scale = (ref[0][:, None] for ref in scale_refs) if scale_refs else (None, None)
        scores = scores if key_scale is None else scores * key_scale

        def weigh(p):
            p = p if value_scale is None else p * value_scale
            return lax.dot_general(p.astype(dtype), values, (((2,), (1,)), ((0,), (0,))), **options)

        query = lax.broadcasted_iota(jnp.int32, (1, more + 1, 1), 1) if more else 0
        _add_block(scores * scale, weigh, j * block, last + query, m_ref, l_ref, acc_ref)

    _end_row(j, out_ref, lse_ref, m_ref, l_ref, acc_ref)
