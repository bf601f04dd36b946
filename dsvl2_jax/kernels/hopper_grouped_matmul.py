"""Grouped matmul with the matrix instructions of Hopper GPUs: Pallas Mosaic GPU kernels beside the Triton ones.

What `dsvl2_jax.kernels.gpu_grouped_matmul` computes, bfloat16 alone. A block's warpgroups divide the work: one fetches
tiles by TMA into a ring of buffers, the others multiply (wgmma), each a part of the block's rows. The fetching one runs
ahead across tiles, so that tiles arrive while results are written.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from dsvl2_jax.kernels.block_sizes import HOPPER_STEP as STEP
from dsvl2_jax.kernels.block_sizes import WARPGROUP_ROWS, HopperProduct
from dsvl2_jax.kernels.blocks import cut_groups
from dsvl2_jax.kernels.hopper import PARAMS, Ring, cost_scope, multiprocessors, shared_tile

def fits_gmm(inner: int, width: int) -> bool:
    """Whether the kernels take matrices [inner, width]: rows of 16 bytes, which TMA wants, in whole steps."""
    return inner % STEP == 0 and width % 8 == 0


@functools.partial(jax.jit, static_argnames=("blocks", "transposed"))
def gmm(
    x_mk: jax.Array,
    w_gkn: jax.Array,
    group_sizes_g: jax.Array,
    *,
    blocks: HopperProduct = HopperProduct(),
    transposed: bool = False,
) -> jax.Array:
    """As `gpu_grouped_matmul.gmm`, of bfloat16 arrays that `fits_gmm` accepts."""
    rows, inner = x_mk.shape
    width = w_gkn.shape[1 if transposed else 2]
    group, start, stop, _ = cut_groups(group_sizes_g, blocks.rows, rows)
    columns, steps = pl.cdiv(width, blocks.columns), inner // STEP
    tiles = columns * group.shape[0]
    grid = min(multiprocessors(), tiles)

    def body(x_ref, w_ref, group_ref, start_ref, stop_ref, out_ref, x_smem, w_smem, out_smem, loaded, used):
        warpgroup, first = lax.axis_index("warpgroup"), lax.axis_index("block")
        ring = Ring(loaded, used, blocks.stages)
        turns = lax.div(jnp.int32(tiles - 1) - first, jnp.int32(grid)) + 1

        def tile(turn):
            """Of the `turn`-th tile: its group, first row, end, first column, and steps (0: it has no rows)."""
            index = first + turn * grid
            block, column = lax.div(index, jnp.int32(columns)), lax.rem(index, jnp.int32(columns))
            begin, end = start_ref[block], stop_ref[block]
            return group_ref[block], begin, end, column * blocks.columns, jnp.where(end > begin, steps, 0)

        @pl.when(warpgroup == blocks.warpgroups)
        def _fetch():
            plgpu.set_max_registers(40, action="decrease")

            def fetch_tile(turn, total):
                index, begin, _, column, count = tile(turn)

                def fetch(k, total):
                    slot, depth = ring.acquire(total), pl.ds(k * STEP, STEP)
                    ready = loaded.at[slot]
                    for part in range(blocks.warpgroups):
                        lines = pl.ds(begin + part * WARPGROUP_ROWS, WARPGROUP_ROWS)
                        plgpu.copy_gmem_to_smem(x_ref.at[lines, depth], x_smem.at[slot, part], ready)
                    wide = pl.ds(column, blocks.columns)
                    source = w_ref.at[index, wide, depth] if transposed else w_ref.at[index, depth, wide]
                    plgpu.copy_gmem_to_smem(source, w_smem.at[slot], ready)
                    return total + 1

                return lax.fori_loop(0, count, fetch, total)

            ring.drain(lax.fori_loop(0, turns, fetch_tile, jnp.int32(0)))

        @pl.when(warpgroup < blocks.warpgroups)
        def _multiply():
            plgpu.set_max_registers(240 if blocks.warpgroups <= 2 else 152, action="increase")

            def multiply_tile(turn, total):
                _, begin, end, column, count = tile(turn)

                def scope(acc_ref):
                    def step(k, total):
                        slot = ring.wait(total)
                        w = w_smem.at[slot]
                        plgpu.wgmma(acc_ref, x_smem.at[slot, warpgroup], plgpu.transpose_ref(w, (1, 0)) if transposed else w)
                        plgpu.wgmma_wait(1)  # the step before is done, and its buffers may be filled again
                        pl.when(k > 0)(lambda: ring.release(total - 1))
                        return total + 1

                    lax.fori_loop(0, count, step, total)
                    return acc_ref[...]

                acc = pl.run_scoped(scope, plgpu.ACC((WARPGROUP_ROWS, blocks.columns)))
                pl.when(count > 0)(lambda: ring.release(total + count - 1))
                out = out_smem.at[warpgroup]
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the tile before has been read
                out[...] = acc.astype(out_ref.dtype)
                plgpu.commit_smem()
                begin = begin + warpgroup * WARPGROUP_ROWS
                _store_rows(out, out_ref, begin, jnp.clip(end - begin, 0, WARPGROUP_ROWS), column)
                return total + count

            lax.fori_loop(0, turns, multiply_tile, jnp.int32(0))
            plgpu.wait_smem_to_gmem(0)

    w_tile = (blocks.columns, STEP) if transposed else (STEP, blocks.columns)
    with cost_scope(2.0 * rows * inner * width):
        return plgpu.kernel(
            body,
            out_type=jax.ShapeDtypeStruct((rows, width), x_mk.dtype),
            scratch_types=(
                shared_tile((blocks.stages, blocks.warpgroups, WARPGROUP_ROWS, STEP), x_mk.dtype),
                shared_tile((blocks.stages, *w_tile), x_mk.dtype),
                plgpu.SMEM((blocks.warpgroups, WARPGROUP_ROWS, blocks.columns), x_mk.dtype),
                plgpu.Barrier(num_arrivals=blocks.warpgroups + 1, num_barriers=blocks.stages),
                plgpu.Barrier(num_arrivals=blocks.warpgroups, num_barriers=blocks.stages),
            ),
            grid=(grid,),
            grid_names=("block",),
            num_threads=blocks.warpgroups + 1,
            thread_name="warpgroup",
            compiler_params=PARAMS,
        )(x_mk, w_gkn.astype(x_mk.dtype), group, start, stop)


def _store_rows(tile, out_ref, start, count, column) -> None:
    """Copies the first ``count`` rows of a tile: a TMA copy has a fixed size, so one for each power of two in it."""
    columns, size = tile.shape[1], tile.shape[0]
    done = 0
    while size:

        @pl.when((count & size) != 0)
        def _copy(done=done, size=size):
            lines = pl.ds(start + done, size)
            plgpu.copy_smem_to_gmem(tile.at[pl.ds(done, size)], out_ref.at[lines, pl.ds(column, columns)])

        done, size = done + (count & size), size // 2
