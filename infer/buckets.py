"""Shape buckets: sizes are rounded up to a few, so that few programs are compiled."""

from __future__ import annotations

SHORT_LENGTHS = (64, 128, 256)
LENGTH_STEP = 512  # a multiple of `dsvl2_jax.kernels.attention.QUERY_BLOCK`
TILE_BUCKETS = (2, 4, 6, 8, 10, 12, 16, 20, 24, 28, 32)
TILE_STEP = 8


def length_bucket(tokens: int) -> int:
    """The smallest compiled length that holds ``tokens``: 64, 128, 256, then multiples of 512."""
    for size in SHORT_LENGTHS:
        if tokens <= size:
            return size
    return -(-tokens // LENGTH_STEP) * LENGTH_STEP


def tile_bucket(tiles: int, devices: int = 1) -> int:
    """The smallest compiled number of tiles, a multiple of ``devices`` so that all have as many; 0 stays 0."""
    if tiles == 0:
        return 0
    size = next((b for b in TILE_BUCKETS if tiles <= b), -(-tiles // TILE_STEP) * TILE_STEP)
    return -(-size // devices) * devices


def most_padding(devices: int = 1) -> int:
    """More than `tile_bucket` ever adds to a number of tiles."""
    return TILE_STEP + devices


def batch_bucket(rows: int) -> int:
    """The smallest power of two that holds ``rows``."""
    return 1 << (rows - 1).bit_length()


def cache_bucket(positions: int, page: int, context: int) -> int:
    """The smallest compiled length of a cache that holds ``positions``: page · 2ⁱ, at most the whole context."""
    size = page
    while size < positions:
        size *= 2
    return min(size, -(-context // page) * page)
