"""What one training step reads: packed rows of several samples, and the tiles that they share."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
from jax.typing import ArrayLike

from dsvl2_jax.inputs.batch import Batch
from dsvl2_jax.model.config import TEXT_POSITION


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PhraseBatch:
    """The phrases that are said of regions of each row's image, R places a row, in the order of their tokens."""

    boxes: ArrayLike  # i32[A, B, R, 4], (left, top, right, bottom) of a rectangle of patches; the latter two exclusive
    attributes: ArrayLike  # i32[A, B, R], ids of `Pairs.attribute_id`; -1 where a row has no further phrase
    lengths: ArrayLike  # i32[A, B, R], tokens of a phrase; 0 where a row has no further phrase


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainBatch:
    """A accumulation steps of B rows of T positions, with N tiles each.

    A row holds samples one after the other (its segments), then padding. Within a row segments are numbered from
    1; padding has segment 0, position 0, label `IGNORED_LABEL` and `TEXT_POSITION`.
    """

    ids: ArrayLike  # i32[A, B, T]
    labels: ArrayLike  # i32[A, B, T], not shifted; IGNORED_LABEL where there is no loss
    image_index: ArrayLike  # i32[A, B, T], rows of the flattened adaptor output of this accumulation step, or codes
    positions: ArrayLike  # i32[A, B, T], from 0 within each segment
    segments: ArrayLike  # i32[A, B, T], 0 … max_segments
    with_images: ArrayLike  # bool[A, B, T], True on every token of a sample that has images
    tiles: ArrayLike  # u8[A, N, S, S, 3]; padding tiles are zero; N may be 0
    phrases: PhraseBatch | None = None  # for training on regions

    def micro(self, index: int) -> TrainBatch:
        """One accumulation step, without the leading axis."""
        return jax.tree.map(lambda x: x[index], self)


def one_sample_a_row(batch: Batch) -> TrainBatch:
    """A collated batch as a single accumulation step whose every row is one segment."""
    place = np.arange(batch.ids.shape[1], dtype=np.int32)
    valid = place < batch.lengths[:, None]
    with_images = valid & (batch.image_index != TEXT_POSITION).any(1, keepdims=True)
    rows = (batch.ids, batch.labels, batch.image_index, np.where(valid, place, 0), valid.astype(np.int32), with_images)
    return TrainBatch(*(a[None] for a in (*rows, batch.tiles)))
