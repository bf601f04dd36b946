"""Block sizes of the kernels, and how groups of rows are cut into blocks (tested with the kernels)."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

LANES = 128  # columns of a TPU register
MAX_ROW_BLOCK = 128


def row_block(rows: int, groups: int, least: int = 1) -> int:
    """Rows of a block: a power of two near the mean group, so that few rows of a block belong to the next group."""
    mean = max(1, rows // groups)
    return min(MAX_ROW_BLOCK, max(least, 1 << (mean - 1).bit_length()))


def cpu_row_block(rows: int, groups: int) -> int:
    """Rows of a block on CPUs: a power of two that holds most groups, since each block reads its matrix anew.

    Two standard deviations above the mean of a group, were the rows dealt out at random.
    """
    mean = rows / groups
    least = max(1, math.ceil(mean + 2 * math.sqrt(mean)))
    return min(MAX_ROW_BLOCK, 1 << (least - 1).bit_length())


def column_block(inputs: int, outputs: int, itemsize: int, most: int) -> int:
    """The widest column block of ``most`` bytes, a multiple of the lanes that divides; else all columns."""
    fitting = [
        width
        for width in range(LANES, outputs + 1, LANES)
        if outputs % width == 0 and inputs * width * itemsize <= most
    ]
    return max(fitting, default=outputs)


def cut_groups(group_sizes_g: jax.Array, block: int, rows: int) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Cuts every group of consecutive rows into blocks, none of which has rows of two groups.

    Args:
      group_sizes_g: i32[G], with a sum ≤ ``rows``.
      block: rows of a block; the last one of a group may have fewer.

    Returns:
      Each block's group, first row and end, i32[⌈rows / block⌉ + G] (as many blocks as any group sizes need; those
      beyond the last are empty), and i32[] how many blocks have rows.
    """
    groups = group_sizes_g.shape[0]
    capacity = -(-rows // block) + groups
    counts_g = -(-group_sizes_g // block)
    group = jnp.repeat(jnp.arange(groups, dtype=jnp.int32), counts_g, total_repeat_length=capacity)
    ends_g = jnp.cumsum(group_sizes_g, dtype=jnp.int32)
    first_block_g = jnp.cumsum(counts_g) - counts_g
    start = (ends_g - group_sizes_g)[group] + (jnp.arange(capacity, dtype=jnp.int32) - first_block_g[group]) * block
    stop = jnp.minimum(start + block, ends_g[group])
    count = counts_g.sum()
    used = jnp.arange(capacity) < count
    return group, jnp.where(used, start, 0).astype(jnp.int32), jnp.where(used, stop, 0).astype(jnp.int32), count
