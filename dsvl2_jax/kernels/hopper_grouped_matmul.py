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

from dsvl2_jax.kernels import hopper
from dsvl2_jax.kernels.block_sizes import HOPPER_STEP as STEP
from dsvl2_jax.kernels.block_sizes import WARPGROUP_ROWS, HopperProduct
from dsvl2_jax.kernels.blocks import cut_groups
from dsvl2_jax.kernels.hopper import Ring, compiler_params, cost_scope, multiprocessors, shared_tile
from dsvl2_jax.runtime.lazy import LazyModule

# Only what traces these kernels needs them.
pl = LazyModule("jax.experimental.pallas")
plgpu = LazyModule("jax.experimental.pallas.mosaic_gpu")

_REGISTERS = {1: 240, 2: 232}  # of a thread that multiplies, beside 40 of one that fetches


@functools.partial(jax.jit, static_argnames=("blocks", "transposed"))
def gmm(
    x_mk: jax.Array,
    w_gkn: jax.Array,
    group_sizes_g: jax.Array,
    *,
    blocks: HopperProduct | None = None,
    transposed: bool = False,
) -> jax.Array:
    """As `gpu_grouped_matmul.gmm`, of bfloat16 arrays: K and N multiples of 64, M of `CORE_ROWS`."""
    blocks = blocks or HopperProduct()
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
            plgpu.set_max_registers(_REGISTERS[blocks.warpgroups], action="increase")
            out = out_smem.at[warpgroup]

            def multiply_tile(turn, total):
                _, begin, end, column, count = tile(turn)

                def operands(k):
                    slot = ring.wait(total + k)
                    return x_smem.at[slot, warpgroup], w_smem.at[slot]

                shape = WARPGROUP_ROWS, blocks.columns
                done = lambda k: ring.release(total + k)  # noqa: E731
                acc = hopper.accumulate(count, operands, done, shape, b_transposed=transposed)
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
            scratch_types=_scratch(blocks, (WARPGROUP_ROWS, STEP), w_tile, x_mk.dtype, tiled=False),
            grid=(grid,),
            grid_names=("block",),
            num_threads=blocks.warpgroups + 1,
            thread_name="warpgroup",
            compiler_params=compiler_params(),
        )(x_mk, w_gkn.astype(x_mk.dtype), group, start, stop)


@functools.partial(jax.jit, static_argnames="blocks")
def tgmm(
    x_mk: jax.Array, dout_mn: jax.Array, group_sizes_g: jax.Array, *, blocks: HopperProduct | None = None
) -> jax.Array:
    """As `gpu_grouped_matmul.tgmm`, of bfloat16 arrays: K and N multiples of 64, M of `CORE_ROWS`.

    A group's last step may read rows of the next group: those of ``x_mk`` are set to zero, and those of ``dout_mn``
    must be finite.
    """
    blocks = blocks or HopperProduct()
    (rows, inner), width, groups = x_mk.shape, dout_mn.shape[1], group_sizes_g.shape[0]
    stop_g = jnp.cumsum(group_sizes_g, dtype=jnp.int32)
    lines, columns = pl.cdiv(inner, blocks.rows), pl.cdiv(width, blocks.columns)
    tiles = groups * lines * columns
    grid = min(multiprocessors(), tiles)

    def body(x_ref, dout_ref, start_ref, stop_ref, dw_ref, x_smem, dout_smem, out_smem, loaded, used):
        warpgroup, first = lax.axis_index("warpgroup"), lax.axis_index("block")
        ring = Ring(loaded, used, blocks.stages)
        turns = lax.div(jnp.int32(tiles - 1) - first, jnp.int32(grid)) + 1

        def tile(turn):
            """Of the `turn`-th tile: its group, the group's first row and end, and its first line and column."""
            index = first + turn * grid
            group, index = lax.div(index, jnp.int32(lines * columns)), lax.rem(index, jnp.int32(lines * columns))
            line, column = lax.div(index, jnp.int32(columns)), lax.rem(index, jnp.int32(columns))
            return group, start_ref[group], stop_ref[group], line * blocks.rows, column * blocks.columns

        @pl.when(warpgroup == blocks.warpgroups)
        def _fetch():
            plgpu.set_max_registers(40, action="decrease")

            def fetch_tile(turn, total):
                _, begin, end, line, column = tile(turn)

                def fetch(k, total):
                    slot, depth = ring.acquire(total), pl.ds(begin + k * STEP, STEP)
                    ready = loaded.at[slot]
                    for part in range(blocks.warpgroups):
                        wide = pl.ds(line + part * WARPGROUP_ROWS, WARPGROUP_ROWS)
                        plgpu.copy_gmem_to_smem(x_ref.at[depth, wide], x_smem.at[slot, part], ready)
                    wide = pl.ds(column, blocks.columns)
                    plgpu.copy_gmem_to_smem(dout_ref.at[depth, wide], dout_smem.at[slot], ready)
                    return total + 1

                return lax.fori_loop(0, pl.cdiv(end - begin, STEP), fetch, total)

            ring.drain(lax.fori_loop(0, turns, fetch_tile, jnp.int32(0)))

        @pl.when(warpgroup < blocks.warpgroups)
        def _multiply():
            plgpu.set_max_registers(_REGISTERS[blocks.warpgroups], action="increase")
            out = out_smem.at[warpgroup]

            def multiply_tile(turn, total):
                group, begin, end, line, column = tile(turn)
                count = pl.cdiv(end - begin, STEP)

                def operands(k):
                    slot = ring.wait(total + k)
                    x, left = x_smem.at[slot, warpgroup], end - begin - k * STEP
                    pl.when(left < STEP)(lambda: hopper.clear_rows(x, left))
                    return x, dout_smem.at[slot]

                shape = WARPGROUP_ROWS, blocks.columns
                done = lambda k: ring.release(total + k)  # noqa: E731
                acc = hopper.accumulate(count, operands, done, shape, a_transposed=True)
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the tile before has been read
                out[...] = acc.astype(dw_ref.dtype)
                plgpu.commit_smem()
                tall, wide = pl.ds(line + warpgroup * WARPGROUP_ROWS, WARPGROUP_ROWS), pl.ds(column, blocks.columns)
                plgpu.copy_smem_to_gmem(out, dw_ref.at[group, tall, wide])
                return total + count

            lax.fori_loop(0, turns, multiply_tile, jnp.int32(0))
            plgpu.wait_smem_to_gmem(0)

    with cost_scope(2.0 * rows * inner * width):
        return plgpu.kernel(
            body,
            out_type=jax.ShapeDtypeStruct((groups, inner, width), x_mk.dtype),
            scratch_types=_scratch(blocks, (STEP, WARPGROUP_ROWS), (STEP, blocks.columns), x_mk.dtype, tiled=True),
            grid=(grid,),
            grid_names=("block",),
            num_threads=blocks.warpgroups + 1,
            thread_name="warpgroup",
            compiler_params=compiler_params(),
        )(x_mk, dout_mn.astype(x_mk.dtype), stop_g - group_sizes_g, stop_g)


def _scratch(
    blocks: HopperProduct, part: tuple[int, int], shared: tuple[int, int], dtype: jnp.dtype, *, tiled: bool
) -> tuple:
    """The ring of each warpgroup's part and of what they share, the tile to write (``tiled``: whole), barriers."""
    out = (blocks.warpgroups, WARPGROUP_ROWS, blocks.columns)
    return (
        shared_tile((blocks.stages, blocks.warpgroups, *part), dtype),
        shared_tile((blocks.stages, *shared), dtype),
        shared_tile(out, dtype) if tiled else plgpu.SMEM(out, dtype),
        plgpu.Barrier(num_arrivals=blocks.warpgroups + 1, num_barriers=blocks.stages),
        plgpu.Barrier(num_arrivals=blocks.warpgroups, num_barriers=blocks.stages),
    )


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
