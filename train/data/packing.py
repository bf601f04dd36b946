"""Samples of any lengths into rows of one length: fitting, joint packing of tokens and tiles, and the step's batch.

grain's best-fit packer decides which samples share a row; a sample goes in where both its tokens and its tiles have
room. The packer numbers tiles within a row, the model within an accumulation step, so `assemble` rebases the merge
index. Tiles themselves stay out of the packer's buffers: they are copied once, into the batch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from dsvl2_jax.errors import SampleError
from dsvl2_jax.inputs.processor import ModelInputs, image_tokens, rebased
from dsvl2_jax.model.config import IGNORED_LABEL, TEXT_POSITION

if TYPE_CHECKING:  # jax and grain, which checking a file of samples does without
    import grain

    from dsvl2_jax.train.data.batch import TrainBatch

# The reasons for which whole, unbroken samples are left out.
TOO_MANY_TOKENS, TOO_MANY_TILES = "too many tokens", "too many tiles"
CUT_IN_IMAGE, NOTHING_LEFT = "cut inside an image", "no answer left after the cut"
TOO_LONG = frozenset({TOO_MANY_TOKENS, TOO_MANY_TILES, CUT_IN_IMAGE, NOTHING_LEFT})

_PADDING = (0, IGNORED_LABEL, TEXT_POSITION)  # of ids, labels and image_index, the columns of a packed row
_NO_PHRASE = (0, 0, 0, 0, -1, 0)  # `PHRASE_COLUMNS`

Row = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class RowShape:
    """What one row has room for."""

    tokens: int
    tiles: int
    segments: int
    phrases: int = 0  # of regions; 0: rows have none


def fit(inputs: ModelInputs, shape: RowShape, too_long: str, tokens_per_side: int) -> tuple[ModelInputs, bool]:
    """Makes a sample fit into an empty row.

    Args:
      too_long: "skip", or "truncate": cut the end off, images that then stand for nothing included.
      tokens_per_side: of a tile, as in `ProcessorConfig`.

    Returns:
      The sample, and whether it was cut.

    Raises:
      SampleError: with a reason of `TOO_LONG`, if it does not fit and may not be cut, or the cut would fall into an
        image or leave nothing to learn.
    """
    length, tiles = len(inputs.input_ids), len(inputs.tiles)
    if length <= shape.tokens and tiles <= shape.tiles:
        return inputs, False
    if too_long == "skip":
        if length > shape.tokens:
            raise SampleError(TOO_MANY_TOKENS, f"{length} tokens, rows have {shape.tokens}.")
        raise SampleError(TOO_MANY_TILES, f"{tiles} tiles, rows have room for {shape.tiles}.")
    tiles_after = np.cumsum(1 + inputs.tile_grid.prod(axis=1))
    cols, rows = inputs.tile_grid.astype(np.int64).T
    tokens_after = np.cumsum(image_tokens(cols, rows, tokens_per_side))
    image_positions = np.flatnonzero(inputs.image_mask)
    end = min(length, shape.tokens)
    images = int(np.searchsorted(tiles_after, shape.tiles, side="right"))  # whose tiles there is room for
    if images < len(tiles_after):
        end = min(end, int(image_positions[tokens_after[images - 1] if images else 0]))
    in_images = int(np.searchsorted(image_positions, end))  # image tokens that are kept
    images = int(np.searchsorted(tokens_after, in_images, side="right"))
    if in_images != (tokens_after[images - 1] if images else 0):
        raise SampleError(CUT_IN_IMAGE, f"{length} tokens; the cut at {shape.tokens} would fall into an image.")
    if not (inputs.labels[1:end] >= 0).any():
        raise SampleError(NOTHING_LEFT, f"{length} tokens, {tiles} tiles; the first {end} tokens have no answer.")
    return (
        dataclasses.replace(
            inputs,
            input_ids=inputs.input_ids[:end],
            labels=inputs.labels[:end],
            image_mask=inputs.image_mask[:end],
            image_index=inputs.image_index[:end],
            tiles=inputs.tiles[: tiles_after[images - 1] if images else 0],
            tile_grid=inputs.tile_grid[:images],
            image_sizes=inputs.image_sizes[:images],
        ),
        True,
    )


def element(
    inputs: ModelInputs,
    name: str,
    *,
    truncated: bool = False,
    skipped: Sequence[str] = (),
    phrases: np.ndarray | None = None,
) -> dict[str, Any]:
    """A sample as the packer takes it.

    Args:
      skipped: the reasons of the samples left out since the one before.
      phrases: i32[P, 6], of `process_regions`; only if the rows have places for them.
    """
    regions = {} if phrases is None else {"phrases": phrases}
    return regions | {
        "tokens": np.stack([inputs.input_ids, inputs.labels, inputs.image_index], axis=1),  # i32[T, 3]
        "tile_slots": np.empty(len(inputs.tiles), np.uint8),  # only its length counts
        "tiles": inputs.tiles,
        "name": name,
        "truncated": truncated,
        "skipped": list(skipped),
    }


def pack(samples: grain.IterDataset, shape: RowShape, bins: int, seed: int | None) -> grain.IterDataset[Row]:
    """Packs `element`s that `fit` into rows.

    Args:
      bins: rows that are filled at the same time.
      seed: of the order in which rows filled together come out; None: in the order of their first samples.
    """
    from grain.experimental import BestFitPackIterDataset

    lengths = {"tokens": shape.tokens, "tile_slots": shape.tiles}
    padding = {"tokens": np.array(_PADDING, np.int32), "tile_slots": 0}
    if shape.phrases:
        lengths["phrases"], padding["phrases"] = shape.phrases, np.array(_NO_PHRASE, np.int32)
    return BestFitPackIterDataset(
        samples,
        length_struct=lengths,
        num_packing_bins=bins,
        seed=seed or 0,
        shuffle_bins=seed is not None,
        meta_features=("tiles", "name", "truncated", "skipped"),
        padding_struct=padding,
        max_sequences_per_bin=shape.segments,
    )


def assemble(
    rows: Sequence[Row | None], shape: RowShape, *, accumulation: int, tile_size: int, tokens_per_tile: int
) -> TrainBatch:
    """The batch of one step from A·B packed rows, accumulation step by accumulation step; None is an empty row.

    Row b of an accumulation step owns the tile places from b·tiles on, its samples' tiles one after the other.
    """
    from dsvl2_jax.train.data.batch import PhraseBatch, TrainBatch

    count = len(rows)
    tokens = np.empty((3, count, shape.tokens), np.int32)
    tokens[:] = np.array(_PADDING, np.int32)[:, None, None]
    positions, segments = (np.zeros((count, shape.tokens), np.int32) for _ in range(2))
    with_images = np.zeros((count, shape.tokens), bool)
    tiles = np.zeros((count * shape.tiles, tile_size, tile_size, 3), np.uint8)
    phrases = np.tile(np.array(_NO_PHRASE, np.int32), (count, shape.phrases, 1))
    in_step = count // accumulation  # B
    for number, row in enumerate(rows):
        if row is None:
            continue
        tokens[:, number] = row["tokens"].T
        positions[number], segments[number] = row["tokens_positions"], row["tokens_segment_ids"]
        counts = [len(sample_tiles) for sample_tiles in row["tiles"]]
        first = number * shape.tiles
        for sample_tiles in row["tiles"]:
            tiles[first : first + len(sample_tiles)] = sample_tiles
            first += len(sample_tiles)
        if shape.phrases:
            phrases[number] = row["phrases"]
        # By segment, padding (segment 0) first: where its tiles begin, among those of its accumulation step.
        before = np.concatenate([[0, 0], np.cumsum(counts)[:-1]]) + number % in_step * shape.tiles
        tokens[2, number] = rebased(tokens[2, number], before[segments[number]] * tokens_per_tile)
        with_images[number] = np.array([False, *(n > 0 for n in counts)])[segments[number]]
    lead = (accumulation, in_step, shape.tokens)
    phrases = phrases.reshape(accumulation, in_step, shape.phrases, len(_NO_PHRASE))
    return TrainBatch(
        *(column.reshape(lead) for column in (*tokens, positions, segments, with_images)),
        tiles=tiles.reshape(accumulation, in_step * shape.tiles, tile_size, tile_size, 3),
        phrases=PhraseBatch(phrases[..., :4], phrases[..., 4], phrases[..., 5]) if shape.phrases else None,
    )
