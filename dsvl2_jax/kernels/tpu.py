"""TPU kernels, for what the compiler's own code does not do well (DESIGN §6)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas.ops.tpu.megablox.gmm import tgmm
from jax.experimental.pallas.ops.tpu.splash_attention import (
    BlockSizes,
    CausalMask,
    MultiHeadMask,
    SegmentIds,
    make_splash_mha_single_device,
)

from dsvl2_jax.kernels.precision import matmul_precision

# Of a block of a matrix; the pipeline holds two.
BLOCK_BYTES = 4 << 20
LANES = 128
# Of a matrix's gradient, summed in float32 in fast memory: rows, inputs and outputs at a time.
OUTER_TILES = 512, 1024, 512

ATTENTION_BLOCK = 512  # queries, and keys, at a time
_BLOCKS = (
    "block_q", "block_kv", "block_kv_compute", "block_q_dkv", "block_kv_dkv", "block_kv_dkv_compute", "block_q_dq",
    "block_kv_dq",
)  # fmt: skip


def few_rows_matmul(
    rows: jax.Array, weights: jax.Array, group_sizes: jax.Array, *, interpret: bool = False
) -> jax.Array:
    """`dsvl2_jax.kernels.grouped_matmul.grouped_matmul` of M ≤ G rows: one row a step, with the matrix of its group.

    A matrix is fetched once for all rows of its group, and not at all for a group without rows, so that a decode step
    reads the experts that its tokens chose.
    """
    (m, i), (g, _, o) = rows.shape, weights.shape
    ends = jnp.cumsum(group_sizes)
    used = jnp.minimum(ends[-1:], m)
    # Rows beyond the last group stay with the matrix that is there already.
    last = jnp.maximum(used - 1, 0)
    group = jnp.searchsorted(ends, jnp.minimum(jnp.arange(m), last), side="right").astype(jnp.int32)
    group = jnp.minimum(group, g - 1)
    width = _block_width(i, o, weights.dtype.itemsize)

    def kernel(group_ref, used_ref, row_ref, matrix_ref, out_ref):
        del group_ref
        here = pl.program_id(1) < used_ref[0]

        @pl.when(here)
        def _():
            product = jnp.dot(
                row_ref[0], matrix_ref[0], precision=matmul_precision(rows.dtype), preferred_element_type=jnp.float32
            )
            out_ref[0] = product.astype(out_ref.dtype)

        @pl.when(jnp.logical_not(here))
        def _():
            out_ref[...] = jnp.zeros_like(out_ref)

    if not interpret:  # or the compiler may first fetch all matrices into fast memory
        weights = pltpu.with_memory_space_constraint(weights, pltpu.HBM)
    itemsize = rows.dtype.itemsize
    out = pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(o // width, m),
            in_specs=[
                pl.BlockSpec((1, 1, i), lambda j, row, group, used: (row, 0, 0)),
                pl.BlockSpec((1, i, width), lambda j, row, group, used: (group[row], 0, j)),
            ],
            out_specs=pl.BlockSpec((1, 1, width), lambda j, row, group, used: (row, 0, j)),
        ),
        out_shape=jax.ShapeDtypeStruct((m, 1, o), rows.dtype),
        cost_estimate=pl.CostEstimate(
            flops=2 * m * i * o,
            transcendentals=0,
            bytes_accessed=min(m, g) * i * o * weights.dtype.itemsize + m * (i * (o // width) + o) * itemsize,
        ),
        interpret=interpret,
        name="few_rows_matmul",
    )(group, used, rows[:, None], weights)
    return out[:, 0]


def megablox_outer(
    rows: jax.Array,
    cotangent: jax.Array,
    group_sizes: jax.Array,
    total: jax.Array | None = None,
    *,
    interpret: bool = False,
) -> jax.Array:
    """`dsvl2_jax.kernels.grouped_matmul.grouped_outer` by jax's megablox kernel, for operands of 16 bits."""
    (m, i), o = rows.shape, cotangent.shape[1]
    tile = min(OUTER_TILES[0], -(-m // LANES) * LANES)
    rows, cotangent = (jnp.pad(a, ((0, -m % tile), (0, 0))) for a in (rows, cotangent))
    tiles = tile, min(OUTER_TILES[1], i), min(OUTER_TILES[2], o)
    return tgmm(rows.T, cotangent, group_sizes, rows.dtype, tiles, existing_out=total, interpret=interpret)


def _block_width(inputs: int, outputs: int, itemsize: int) -> int:
    """The widest column block of a matrix that fits, a multiple of the lanes that divides; else the whole matrix."""
    fitting = [
        width
        for width in range(LANES, outputs + 1, LANES)
        if outputs % width == 0 and inputs * width * itemsize <= BLOCK_BYTES
    ]
    return max(fitting, default=outputs)


def splash_attention(
    query: jax.Array, key: jax.Array, value: jax.Array, positions: jax.Array, scale: float, *, interpret: bool = False
) -> jax.Array:
    """Causal attention of rows to themselves by jax's splash kernel, which never holds a matrix of scores.

    Args:
      query, key: [B, T, H, Dk]; value: [B, T, H, Dv]. T is a multiple of `ATTENTION_BLOCK`.
      positions: i32[B, T], from 0 in each sample of a row.

    Returns:
      [B, T, H, Dv]. Differentiable.
    """
    length, heads = query.shape[1:3]
    block = ATTENTION_BLOCK
    sizes = BlockSizes(**dict.fromkeys(_BLOCKS, block))
    mask = MultiHeadMask([CausalMask((length, length))] * heads)
    kernel = make_splash_mha_single_device(mask, block_sizes=sizes, interpret=interpret)
    first = (jnp.arange(length) - positions).astype(jnp.int32)  # of a sample: the same for all of its tokens
    by_head = ((a * s).swapaxes(1, 2) for a, s in ((query, scale), (key, 1), (value, 1)))
    return jax.vmap(kernel)(*by_head, SegmentIds(first, first)).swapaxes(1, 2)


def latent_attention(
    query: jax.Array,
    rope_query: jax.Array,
    latent: jax.Array,
    rope_key: jax.Array,
    positions: jax.Array,
    scale: float,
    *,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """A decode step's attention over the latent cache, which is read once: every block serves scores and values.

    Args:
      query: [B, H, R]; rope_query: [B, H, P]. latent: [B, S, R]; rope_key: [B, S, P]. S is at most, or a multiple of,
        `ATTENTION_BLOCK`.
      positions: i32[B], the last slot that each row sees, negative for none; blocks after it are not read.

    Returns:
      f32[B, H, R], zero for rows that see nothing, and f32[B, H, 1], the logarithm of the sum that they are divided by.
    """
    (b, h, r), p, slots = query.shape, rope_query.shape[-1], latent.shape[1]
    block = min(ATTENTION_BLOCK, slots)
    exact = matmul_precision(latent.dtype)

    def kernel(
        last_ref, query_ref, rope_query_ref, latent_ref, key_ref, out_ref, log_ref, most_ref, sum_ref, mixed_ref
    ):
        last, place = last_ref[pl.program_id(0)], pl.program_id(1)

        @pl.when(place == 0)
        def _():
            most_ref[...] = jnp.full_like(most_ref, -jnp.inf)
            sum_ref[...] = jnp.zeros_like(sum_ref)
            mixed_ref[...] = jnp.zeros_like(mixed_ref)

        @pl.when(place * block <= last)
        def _():
            def scores(left, right):
                dims = (((1,), (1,)), ((), ()))
                return lax.dot_general(left, right, dims, precision=exact, preferred_element_type=jnp.float32)

            values = latent_ref[0]
            found = scores(query_ref[0], values) + scores(rope_query_ref[0], key_ref[0])  # [H, block]
            slot = place * block + lax.broadcasted_iota(jnp.int32, found.shape, 1)
            found = jnp.where(slot <= last, found * scale, -jnp.inf)
            most = jnp.maximum(most_ref[...], found.max(-1, keepdims=True))
            kept, weights = jnp.exp(most_ref[...] - most), jnp.exp(found - most)
            most_ref[...] = most
            sum_ref[...] = sum_ref[...] * kept + weights.sum(-1, keepdims=True)
            added = jnp.dot(weights.astype(values.dtype), values, precision=exact, preferred_element_type=jnp.float32)
            mixed_ref[...] = mixed_ref[...] * kept + added

        @pl.when(place == pl.num_programs(1) - 1)
        def _():
            total = sum_ref[...]
            out_ref[0] = mixed_ref[...] / jnp.where(total > 0, total, 1)
            log_ref[0] = most_ref[...] + jnp.log(total)

    def row(i, j, last):
        return i, 0, 0

    def seen(i, j, last):
        return i, jnp.minimum(j, jnp.maximum(last[i], 0) // block), 0

    itemsize = latent.dtype.itemsize
    if not interpret:
        latent, rope_key = (pltpu.with_memory_space_constraint(a, pltpu.HBM) for a in (latent, rope_key))
    return pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(b, slots // block),
            in_specs=[
                pl.BlockSpec((1, h, r), row),
                pl.BlockSpec((1, h, p), row),
                pl.BlockSpec((1, block, r), seen),
                pl.BlockSpec((1, block, p), seen),
            ],
            out_specs=[pl.BlockSpec((1, h, r), row), pl.BlockSpec((1, h, 1), row)],
            scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in ((h, 1), (h, 1), (h, r))],
        ),
        out_shape=[jax.ShapeDtypeStruct((b, h, width), jnp.float32) for width in (r, 1)],
        cost_estimate=pl.CostEstimate(
            flops=2 * b * h * slots * (2 * r + p),
            transcendentals=b * h * slots,
            bytes_accessed=itemsize * b * (slots * (r + p) + h * (r + p)) + 4 * b * h * (r + 1),
        ),
        interpret=interpret,
        name="latent_attention",
    )(positions, query, rope_query, latent, rope_key)
