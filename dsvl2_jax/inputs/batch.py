"""Samples of any lengths, padded into the arrays that one call of the model takes."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np
from jax.typing import ArrayLike

from dsvl2_jax.errors import UsageError
from dsvl2_jax.inputs.processor import ModelInputs, rebased
from dsvl2_jax.model.config import IGNORED_LABEL, TEXT_POSITION, Config


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """B right-padded samples of T positions, and the N tiles that they share."""

    ids: ArrayLike  # i32[B, T]
    labels: ArrayLike  # i32[B, T], not shifted; negative (IGNORED_LABEL) where there is no loss
    image_index: (
        ArrayLike  # i32[B, T], rows of the adaptor output of `tiles`, flattened, or codes of dsvl2_jax.model.config
    )
    lengths: ArrayLike  # i32[B], real tokens of each row; 0 for a padding row
    tiles: ArrayLike  # u8[N, S, S, 3]; N = 0 for text only


def collate(
    samples: Sequence[ModelInputs],
    config: Config,
    *,
    rows: int | None = None,
    length: int | None = None,
    tile_count: int | None = None,
) -> Batch:
    """Pads samples to one shape and rebases their image rows to the tiles of the whole batch.

    Args:
      samples: of the processor.
      rows, length, tile_count: the padded B, T and N; None: as the samples need.

    Returns:
      A `Batch` of numpy arrays.

    Raises:
      UsageError: a sample is longer than ``length``, or there are more tiles than ``tile_count``.
    """
    lengths = np.zeros(len(samples) if rows is None else rows, np.int32)
    lengths[: len(samples)] = [len(sample.input_ids) for sample in samples]
    tiles = np.concatenate([sample.tiles for sample in samples])
    length = int(lengths.max()) if length is None else length
    tile_count = len(tiles) if tile_count is None else tile_count
    if lengths.max() > length:
        longest = int(lengths.argmax())
        raise UsageError(
            f"sample {longest} of the batch has {lengths[longest]} tokens, but rows have {length}: "
            "make the rows longer, or leave the sample out."
        )
    if len(tiles) > tile_count:
        raise UsageError(f"the batch has {len(tiles)} tiles, but room for {tile_count}: put fewer samples into it.")
    shape = (len(lengths), length)
    ids, labels = np.zeros(shape, np.int32), np.full(shape, IGNORED_LABEL, np.int32)
    index = np.full(shape, TEXT_POSITION, np.int32)
    first_row = 0
    for row, sample in enumerate(samples):
        real = slice(lengths[row])
        ids[row, real], labels[row, real] = sample.input_ids, sample.labels
        index[row, real] = rebased(sample.image_index, first_row)
        first_row += len(sample.tiles) * config.tokens_per_tile
    tiles = np.pad(tiles, ((0, tile_count - len(tiles)), (0, 0), (0, 0), (0, 0)))
    return Batch(ids, labels, index, lengths, tiles)
