"""How large parameters are on disk, and the groups in which they are read and written."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import numpy as np

from dsvl2_jax.model.parameter_paths import LeafPath

# Leaves are read one Orbax call at a time up to this size together: calls cost about 40 ms each.
BATCH_BYTES = 64 << 20

# Path of a parameter → (shape, dtype).
Leaves = Mapping[LeafPath, tuple[tuple[int, ...], np.dtype]]


def leaf_bytes(shape: tuple[int, ...], dtype: np.dtype) -> int:
    """Bytes of an array."""
    return math.prod(shape) * dtype.itemsize


def batches(leaves: Leaves, batch_bytes: int = BATCH_BYTES) -> Iterator[list[LeafPath]]:
    """Groups leaves, in order, up to ``batch_bytes`` together; a larger leaf is alone."""
    batch: list[LeafPath] = []
    total = 0
    for path, entry in leaves.items():
        size = leaf_bytes(*entry)
        if batch and total + size > batch_bytes:
            yield batch
            batch, total = [], 0
        batch.append(path)
        total += size
    if batch:
        yield batch
