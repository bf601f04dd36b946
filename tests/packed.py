"""What is in a packed batch, read from the batch alone, for tests."""

import numpy as np

from dsvl2_jax.model.config import IGNORED_LABEL, TEXT_POSITION
from dsvl2_jax.train.data.batch import TrainBatch


def sources(index: np.ndarray, tiles: np.ndarray, per_tile: int) -> list:
    """What each position is made of: a code, or a tile's pixels and the place within the tile."""
    return [int(i) if i < 0 else (tiles[i // per_tile].tobytes(), int(i % per_tile)) for i in index]


def unpack(batch: TrainBatch, per_tile: int) -> list[tuple[list, list, list, bool]]:
    """(ids, labels, sources, with images) of every segment, from the batch alone."""
    found = []
    for a in range(batch.ids.shape[0]):
        for b in range(batch.ids.shape[1]):
            row = batch.segments[a, b]
            used = int((row > 0).sum())
            assert (row[:used] > 0).all() and not row[used:].any()
            assert (np.diff(row[:used]) >= 0).all() and set(row[:used]) == set(range(1, row.max(initial=0) + 1))
            padding = (a, b, slice(used, None))
            assert not batch.positions[padding].any() and not batch.with_images[padding].any()
            assert (batch.labels[padding] == IGNORED_LABEL).all() and (
                batch.image_index[padding] == TEXT_POSITION
            ).all()
            for segment in range(1, row.max(initial=0) + 1):
                at = (a, b, row == segment)
                assert batch.positions[at].tolist() == list(range(len(batch.positions[at])))
                (with_images,) = set(batch.with_images[at].tolist())
                own_tiles = batch.image_index[at][batch.image_index[at] >= 0] // per_tile
                per_row = batch.tiles.shape[1] // batch.ids.shape[1]
                assert not len(own_tiles) or (own_tiles.min() >= b * per_row and own_tiles.max() < (b + 1) * per_row)
                merge = sources(batch.image_index[at], batch.tiles[a], per_tile)
                found.append((batch.ids[at].tolist(), batch.labels[at].tolist(), merge, with_images))
    return found
