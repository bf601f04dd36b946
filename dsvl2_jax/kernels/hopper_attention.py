"""Attention with the matrix instructions of Hopper GPUs: a Pallas Mosaic GPU kernel beside the Triton one.

What `dsvl2_jax.kernels.gpu_attention.attention_forward` computes, as FlashAttention-3 does (arXiv 2407.08608): one
warpgroup fetches blocks of keys and values by TMA, and two others, with 64 queries each, take turns, so that one
multiplies while the other takes its softmax.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax

from dsvl2_jax.kernels import hopper
from dsvl2_jax.kernels.block_sizes import WARPGROUP_ROWS as ROWS
from dsvl2_jax.kernels.block_sizes import HopperAttention
from dsvl2_jax.kernels.hopper import Ring, compiler_params, cost_scope, shared_tile
from dsvl2_jax.runtime.lazy import LazyModule

# Only what traces these kernels needs them.
pl = LazyModule("jax.experimental.pallas")
plgpu = LazyModule("jax.experimental.pallas.mosaic_gpu")

WARPGROUPS = 2  # that multiply
BLOCK = ROWS * WARPGROUPS
MASKED = -1e30  # finite, so that a block without a visible key gives no nan


@functools.partial(jax.jit, static_argnames=("scale", "causal", "blocks"))
def attention_forward(
    q_bthd: jax.Array,
    k_bshd: jax.Array,
    v_bshd: jax.Array,
    first_bt: jax.Array,
    scale: float,
    causal: bool,
    *,
    blocks: HopperAttention | None = None,
) -> tuple[jax.Array, jax.Array]:
    """As `gpu_attention.attention_forward`, of bfloat16 arrays.

    ``first_bt`` must not fall along a row (it does not, as samples follow each other), and is zero if not ``causal``.
    """
    blocks = blocks or HopperAttention()
    (b, t, h, _), length, out_width = q_bthd.shape, k_bshd.shape[1], v_bshd.shape[-1]
    tiles, base2 = pl.cdiv(t, BLOCK), scale * math.log2(math.e)
    # TMA wants rows of 16 bytes and whole core matrices of 8 rows, products whole steps.
    first_bt = jnp.pad(first_bt, ((0, 0), (0, tiles * BLOCK - t)), mode="edge")
    q_bthd, k_bshd, v_bshd = (
        jnp.pad(x, ((0, 0), (0, -x.shape[1] % 8), (0, 0), (0, -x.shape[-1] % 16))) for x in (q_bthd, k_bshd, v_bshd)
    )
    key_width, value_width = q_bthd.shape[-1], v_bshd.shape[-1]

    def body(q_ref, k_ref, v_ref, first_ref, out_ref, lse_ref, q_smem, k_smem, v_smem, first_smem, lse_smem, *barriers):
        q_loaded, k_loaded, k_used, v_loaded, v_used, turn = barriers
        row, head, tile = (lax.axis_index(name) for name in ("row", "head", "tile"))
        if causal:  # those with the most keys first, so that none of them is left for the end
            tile = tiles - 1 - tile
        warpgroup = lax.axis_index("warpgroup")
        start = tile * BLOCK
        low = lax.div(first_ref[row, start], jnp.int32(blocks.keys)) if causal else jnp.int32(0)
        high = jnp.minimum(pl.cdiv(start + BLOCK if causal else length, blocks.keys), pl.cdiv(length, blocks.keys))
        k_ring, v_ring = Ring(k_loaded, k_used, blocks.stages), Ring(v_loaded, v_used, blocks.stages)

        @pl.when(warpgroup == WARPGROUPS)
        def _fetch():
            plgpu.set_max_registers(40, action="decrease")

            def fetch(j, _):
                keys = (row, pl.ds(j * blocks.keys, blocks.keys), head)
                for ring, source, target in ((k_ring, k_ref, k_smem), (v_ring, v_ref, v_smem)):
                    slot = ring.acquire(j - low)
                    plgpu.copy_gmem_to_smem(source.at[keys], target.at[slot], ring.loaded.at[slot])

            lax.fori_loop(low, high, fetch, None)
            k_ring.drain(high - low)
            v_ring.drain(high - low)

        @pl.when(warpgroup < WARPGROUPS)
        def _attend():
            plgpu.set_max_registers(232, action="increase")
            q_start = start + warpgroup * ROWS
            lines, q, loaded = pl.ds(q_start, ROWS), q_smem.at[warpgroup], q_loaded.at[warpgroup]
            plgpu.copy_gmem_to_smem(q_ref.at[row, lines, head], q, loaded)
            plgpu.copy_gmem_to_smem(first_ref.at[row, lines], first_smem.at[warpgroup], loaded)
            plgpu.barrier_wait(loaded)

            def take_turns():
                plgpu.barrier_arrive(turn)
                plgpu.barrier_wait(turn)

            def visible(j):
                q_index = hopper.iota((ROWS, blocks.keys), 0) + q_start
                k_index = hopper.iota((ROWS, blocks.keys), 1) + j * blocks.keys
                if not causal:
                    return k_index < length
                first = hopper.load_rows(first_smem.at[warpgroup])
                return (k_index <= q_index) & (k_index >= hopper.beside(first, blocks.keys))

            def step(j, carry, masked):
                m, l, acc = carry  # noqa: E741  f32[ROWS], f32[ROWS], f32[ROWS, value_width]
                slot = k_ring.wait(j - low)
                scores = hopper.product(q, k_smem.at[slot], transposed=True, meanwhile=take_turns)
                k_ring.release(j - low)
                if masked:
                    # Scaled before it is masked: with one rounding for a product and a difference, a hidden score
                    # less itself, times the scale, is far from zero.
                    scores = jnp.where(visible(j), scores * base2, MASKED)
                    m_new = jnp.maximum(m, scores.max(axis=1))
                    p = jnp.exp2(scores - hopper.beside(m_new, blocks.keys))
                else:
                    m_new = jnp.maximum(m, scores.max(axis=1) * base2)
                    p = jnp.exp2(scores * base2 - hopper.beside(m_new, blocks.keys))
                alpha = jnp.exp2(m - m_new)
                l = l * alpha + p.sum(axis=1)  # noqa: E741
                acc = acc * hopper.beside(alpha, value_width)
                p = p.astype(v_ref.dtype)
                take_turns()
                v_ring.wait(j - low)
                acc = hopper.product(p, v_smem.at[slot], acc=acc)
                v_ring.release(j - low)
                return m_new, l, acc

            pl.when(warpgroup == 1)(take_turns)  # half a step behind the other one
            rows = hopper.row_vector(ROWS)
            carry = rows + MASKED, rows, hopper.zeros((ROWS, value_width))
            # Keys before all_from are hidden from some query, and so are those from all_until on.
            if causal:
                last_first = first_ref[row, q_start + ROWS - 1]
                all_from = jnp.clip(pl.cdiv(last_first, blocks.keys), low, high)
                all_until = jnp.clip(lax.div(q_start + 1, jnp.int32(blocks.keys)), all_from, high)
            else:
                all_from, all_until = low, jnp.int32(length // blocks.keys)
            masked = functools.partial(step, masked=True)
            if causal:
                carry = lax.fori_loop(low, all_from, masked, carry)
            carry = lax.fori_loop(all_from, all_until, functools.partial(step, masked=False), carry)
            if causal or length % blocks.keys:
                carry = lax.fori_loop(all_until, high, masked, carry)
            pl.when(warpgroup == 0)(take_turns)

            m, l, acc = carry  # noqa: E741
            take_turns()  # no warpgroup needs the values any more, and each writes where some of them were
            out = v_smem.at[warpgroup, pl.ds(0, ROWS)]
            out[...] = (acc / hopper.beside(l, value_width)).astype(out_ref.dtype)
            lse_smem[warpgroup] = m + jnp.log2(l)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(out, out_ref.at[row, lines, head])
            plgpu.copy_smem_to_gmem(lse_smem.at[warpgroup], lse_ref.at[row, head, lines])
            plgpu.wait_smem_to_gmem(0)

    def ring():
        return (
            plgpu.Barrier(num_barriers=blocks.stages),
            plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=blocks.stages),
        )

    pairs = t * (t + 1) / 2 if causal else t * length
    with cost_scope(2.0 * b * h * pairs * (key_width + value_width)):
        out_bthd, lse_bht = plgpu.kernel(
            body,
            out_type=(
                jax.ShapeDtypeStruct((*q_bthd.shape[:3], value_width), v_bshd.dtype),
                jax.ShapeDtypeStruct((b, h, tiles * BLOCK), jnp.float32),
            ),
            scratch_types=(
                shared_tile((WARPGROUPS, ROWS, key_width), q_bthd.dtype),
                shared_tile((blocks.stages, blocks.keys, key_width), k_bshd.dtype),
                shared_tile((blocks.stages, blocks.keys, value_width), v_bshd.dtype),
                plgpu.SMEM((WARPGROUPS, ROWS), jnp.int32),
                plgpu.SMEM((WARPGROUPS, ROWS), jnp.float32),
                plgpu.Barrier(num_arrivals=2, num_barriers=WARPGROUPS),
                *ring(),
                *ring(),
                plgpu.Barrier(num_arrivals=WARPGROUPS),
            ),
            # The last dimension is the fastest; as in `gpu_attention._grid`.
            grid=(tiles, b, h) if causal else (b, h, tiles),
            grid_names=("tile", "row", "head") if causal else ("row", "head", "tile"),
            num_threads=WARPGROUPS + 1,
            thread_name="warpgroup",
            compiler_params=compiler_params(),
        )(q_bthd, k_bshd, v_bshd, first_bt)
    return out_bthd[:, :t, :, :out_width], lse_bht[..., :t]
