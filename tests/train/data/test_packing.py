"""Packing: every sample comes out whole in exactly one place, little room is wasted, and what does not fit is told."""

import dataclasses

import grain
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from packed import sources, unpack

from dsvl2_jax.errors import SampleError
from dsvl2_jax.inputs.processor import ModelInputs, image_positions
from dsvl2_jax.model.config import IGNORED_LABEL, TEXT_POSITION
from dsvl2_jax.train.data.packing import Row, RowShape, assemble, element, fit, pack

SIDE, TILE = 2, 3  # adaptor tokens a side, pixels a side
PER_TILE = SIDE * SIDE


def make_sample(seed: int, text: list[int], grids: list[tuple[int, int]], side: int = SIDE) -> ModelInputs:
    """`text[0]` tokens, an image, `text[1]` tokens, an image …; every token and every tile has its own contents."""
    rng = np.random.default_rng(seed)
    index, tiles = [], 0
    for number, length in enumerate(text):
        index.append(np.full(length, TEXT_POSITION))
        if number < len(grids):
            index.append(image_positions(*grids[number], side, tiles))
            tiles += 1 + grids[number][0] * grids[number][1]
    merge = np.concatenate(index).astype(np.int32)
    ids = rng.integers(1, 1 << 30, len(merge), dtype=np.int32)
    labels = np.where((merge == TEXT_POSITION) & (rng.random(len(merge)) < 0.7), ids, IGNORED_LABEL)
    labels[-1] = ids[-1] if merge[-1] == TEXT_POSITION else IGNORED_LABEL
    return ModelInputs(
        input_ids=ids,
        labels=labels.astype(np.int32),
        image_mask=merge != TEXT_POSITION,
        image_index=merge,
        tiles=rng.integers(1, 256, (tiles, TILE, TILE, 3), np.uint8),
        tile_grid=np.array(grids, np.int32).reshape(-1, 2),
        image_sizes=np.ones((len(grids), 2), np.int32),
        prompt="",
    )


def packed_rows(samples: list[ModelInputs], shape: RowShape, bins: int, seed: int | None = None) -> list[Row]:
    elements = [element(sample, str(number)) for number, sample in enumerate(samples)]
    source = grain.MapDataset.source(elements).to_iter_dataset(grain.ReadOptions(0, 0))
    return list(pack(source, shape, bins, seed))


def expected(sample: ModelInputs) -> tuple[list, list, list, bool]:
    merge = sources(sample.image_index, sample.tiles, PER_TILE)
    return sample.input_ids.tolist(), sample.labels.tolist(), merge, len(sample.tiles) > 0


GRIDS = st.lists(st.tuples(st.integers(1, 2), st.integers(1, 2)), max_size=2)


@st.composite
def sample_lists(draw: st.DrawFn) -> list[ModelInputs]:
    samples = []
    for seed in range(draw(st.integers(1, 14))):
        grids = draw(GRIDS)
        text = [draw(st.integers(1, 20)) for _ in range(len(grids) + 1)]
        samples.append(make_sample(seed, text, grids))
    return samples


@settings(max_examples=60)
@given(samples=sample_lists(), bins=st.integers(1, 5), segments=st.integers(1, 4), accumulation=st.integers(1, 2))
def test_every_sample_comes_out_whole_in_one_place(samples, bins, segments, accumulation):
    shape = RowShape(tokens=128, tiles=12, segments=segments)
    rows = packed_rows(samples, shape, bins, seed=3)
    rows += [None] * (-len(rows) % accumulation)
    batch = assemble(rows, shape, accumulation=accumulation, tile_size=TILE, tokens_per_tile=PER_TILE)
    lead = (accumulation, len(rows) // accumulation)
    assert batch.ids.shape == batch.with_images.shape == (*lead, 128)
    assert batch.tiles.shape == (lead[0], lead[1] * 12, TILE, TILE, 3) and batch.tiles.dtype == np.uint8
    assert batch.segments.max() <= segments
    assert sorted(unpack(batch, PER_TILE), key=repr) == sorted(map(expected, samples), key=repr)
    real_tiles = batch.tiles.reshape(-1, TILE * TILE * 3).any(axis=1).sum()
    assert real_tiles == sum(len(sample.tiles) for sample in samples)


def test_rows_without_tiles_have_none():
    shape = RowShape(tokens=32, tiles=0, segments=9)
    samples = [make_sample(seed, [10], []) for seed in range(4)]
    rows = packed_rows(samples, shape, bins=2)
    batch = assemble(rows, shape, accumulation=1, tile_size=TILE, tokens_per_tile=PER_TILE)
    assert batch.tiles.shape == (1, 0, TILE, TILE, 3) and not batch.with_images.any()
    assert unpack(batch, PER_TILE) == [expected(sample) for sample in samples]


def mixed_lengths(count: int) -> list[tuple[int, int]]:
    """(tokens, tiles) at the released sizes: 70 % one image on any of the 23 canvases and a dialogue, 30 % text."""
    rng = np.random.default_rng(0)
    grids = [(cols, rows) for cols in range(1, 10) for rows in range(1, 9 // cols + 1)]
    assert len(grids) == 23
    found = []
    for _ in range(count):
        if rng.random() < 0.7:
            cols, rows = grids[rng.integers(len(grids))]
            text = int(np.clip(rng.lognormal(5, 0.9), 20, 1500))
            found.append((211 + 14 * rows * (14 * cols + 1) + text, 1 + cols * rows))
        else:
            found.append((int(np.clip(rng.lognormal(5.7, 1.0), 16, 4096)), 0))
    return found


def test_padding_is_under_five_percent_of_a_mixed_set():
    shape = RowShape(tokens=4096, tiles=20, segments=64)
    samples = [
        {
            "tokens": np.zeros((tokens, 3), np.int32),
            "tile_slots": np.zeros(tiles, np.uint8),
            "tiles": np.zeros((tiles, 0)),
            "name": "",
            "truncated": False,
            "skipped": [],
        }
        for tokens, tiles in mixed_lengths(3000)
    ]
    source = grain.MapDataset.source(samples).to_iter_dataset(grain.ReadOptions(0, 0))
    rows = list(pack(source, shape, bins=64, seed=0))
    used = sum(int((row["tokens_segment_ids"] > 0).sum()) for row in rows)
    assert used == sum(len(sample["tokens"]) for sample in samples)
    waste = 1 - used / (len(rows) * shape.tokens)
    print(f"padding: {waste:.2%} of the tokens of {len(rows)} rows")
    assert waste < 0.05


# An image of one local tile has 2·(2·3) + 1 = 13 tokens here, one of 2×1 has 6 + 1 + 2·5 = 17.
ONE, TWO = (1, 1), (2, 1)


def cut(text: list[int], grids: list[tuple[int, int]], tokens: int, tiles: int = 99) -> ModelInputs:
    sample = make_sample(0, text, grids)
    sample = dataclasses.replace(sample, labels=np.where(sample.image_mask, IGNORED_LABEL, sample.input_ids))
    fitted, truncated = fit(sample, RowShape(tokens, tiles, 9), "truncate", SIDE)
    length = len(fitted.input_ids)
    assert truncated
    for name in ("input_ids", "labels", "image_mask", "image_index"):
        assert np.array_equal(getattr(fitted, name), getattr(sample, name)[:length])
    assert np.array_equal(fitted.tiles, sample.tiles[: len(fitted.tiles)])
    assert fitted.image_index.max(initial=-1) < len(fitted.tiles) * PER_TILE
    return fitted


def test_what_fits_stays_as_it_is():
    sample = make_sample(0, [5, 5], [ONE])
    for too_long in ("skip", "truncate"):
        assert fit(sample, RowShape(23, 2, 1), too_long, SIDE) == (sample, False)


def test_truncation_cuts_text_and_the_tiles_of_images_that_are_cut_off():
    assert len(cut([5, 30], [ONE], 20).input_ids) == 20
    behind = cut([5, 10, 30], [ONE, TWO], 28)  # the cut falls exactly before the second image
    assert (len(behind.input_ids), len(behind.tiles), len(behind.tile_grid)) == (28, 2, 1)
    text = cut([40, 5], [ONE], 30)
    assert (len(text.input_ids), len(text.tiles), len(text.tile_grid)) == (30, 0, 0)
    whole = cut([5, 3, 30], [ONE, TWO], 5 + 13 + 3 + 17 + 1)
    assert (len(whole.tiles), len(whole.tile_grid)) == (5, 2)


def test_truncation_for_tiles_cuts_before_the_first_image_without_room():
    fitted = cut([5, 7, 30], [ONE, TWO], 500, tiles=4)
    assert (len(fitted.input_ids), len(fitted.tiles), len(fitted.tile_grid)) == (5 + 13 + 7, 2, 1)
    fitted = cut([5, 7], [TWO], 500, tiles=0)
    assert (len(fitted.input_ids), len(fitted.tiles)) == (5, 0)
    touching = cut([5, 0, 7], [ONE, TWO], 500, tiles=3)
    assert (len(touching.input_ids), len(touching.tiles)) == (18, 2)


@pytest.mark.parametrize("end", [6, 17, 19, 34])
def test_a_cut_inside_an_image_leaves_the_sample_out(end):
    with pytest.raises(SampleError, match="into an image") as error:
        cut([5, 0, 7], [ONE, TWO], end)  # images at 5 … 17 and 18 … 34
    assert error.value.reason == "cut inside an image"


@pytest.mark.parametrize(("tokens", "tiles", "reason"), [(20, 9, "too many tokens"), (99, 1, "too many tiles")])
def test_skipping_tells_which_limit_was_passed(tokens, tiles, reason):
    with pytest.raises(SampleError, match=rf"rows have (room for )?{min(tokens, 20) if tiles > 1 else tiles}") as error:
        fit(make_sample(0, [5, 30], [ONE]), RowShape(tokens, tiles, 9), "skip", SIDE)
    assert error.value.reason == reason


def test_a_cut_that_leaves_no_answer_leaves_the_sample_out():
    sample = make_sample(0, [30], [])
    labels = np.where(np.arange(30) < 20, IGNORED_LABEL, sample.input_ids)
    labels[0] = sample.input_ids[0]  # bos keeps its label and is never predicted
    sample = dataclasses.replace(sample, labels=labels)
    with pytest.raises(SampleError) as error:
        fit(sample, RowShape(20, 0, 1), "truncate", SIDE)
    assert error.value.reason == "no answer left after the cut"
    assert fit(sample, RowShape(21, 0, 1), "truncate", SIDE)[1]
