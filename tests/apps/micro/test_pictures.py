"""Drawn pictures: they come from their seed, and what their fields say is what can be seen."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsvl2_jax import configs
from dsvl2_jax.apps.micro import pictures
from dsvl2_jax.apps.micro.pictures import COLOURS, KINDS, TILE, TOP, Chart, Picture
from dsvl2_jax.infer.eval.metrics import iou
from dsvl2_jax.inputs.images import select_best_resolution
from dsvl2_jax.inputs.processor import ProcessorConfig

MICRO = ProcessorConfig.from_dir(Path(configs.__file__).parent / "micro")
WAVER = 12 * math.sqrt(3)  # how far a drawn colour may be from its name's

seeds = st.integers(0, 2**63 - 1)
scenes = st.builds(lambda seed, count: pictures.scene(np.random.default_rng(seed), count), seeds, st.integers(1, 5))
texts = st.one_of(st.integers(0, 9999).map(str), st.sampled_from(pictures.WORDS))
writings = st.builds(lambda seed, text: pictures.writing(np.random.default_rng(seed), text), seeds, texts)
charts = st.builds(lambda seed, bars: pictures.chart(np.random.default_rng(seed), bars), seeds, st.integers(2, 5))

MAKERS = {
    "scene": lambda rng: pictures.scene(rng, 4),
    "writing": lambda rng: pictures.writing(rng, "2074"),
    "chart": lambda rng: pictures.chart(rng, 3),
}


def changed(picture: Picture, without: Picture) -> np.ndarray:
    """bool[height, width]: where two pictures differ visibly."""
    first, second = (np.asarray(p.draw()).astype(int) for p in (picture, without))
    return np.abs(first - second).max(-1) > 8


def box_of(mask: np.ndarray) -> tuple[int, int, int, int]:
    """The least box x1, y1, x2, y2 around what is True."""
    columns, rows = np.flatnonzero(mask.any(0)), np.flatnonzero(mask.any(1))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def assert_same_place(found: tuple[int, ...], said: tuple[int, ...]) -> None:
    """No edge is more than a pixel off, which is what smooth edges take from a tip."""
    assert max(abs(a - b) for a, b in zip(found, said, strict=True)) <= 1, (found, said)


@pytest.mark.parametrize("maker", MAKERS.values(), ids=MAKERS)
def test_a_picture_comes_from_its_seed(maker):
    first, again, other = (maker(np.random.default_rng(seed)) for seed in (7, 7, 8))
    assert first == again != other
    assert first.draw().tobytes() == again.draw().tobytes()
    image = first.draw()
    assert image.mode == "RGB" and image.size == first.size


@settings(max_examples=60)
@given(scenes, st.data())
def test_a_shape_is_seen_in_its_box_and_nowhere_else(picture, data):
    shape = data.draw(st.sampled_from(picture.shapes))
    others = tuple(other for other in picture.shapes if other is not shape)
    mask = changed(picture, dataclasses.replace(picture, shapes=others))
    assert_same_place(box_of(mask), shape.box)
    x1, y1, x2, y2 = shape.box
    area = {"circle": math.pi / 4, "square": 1.0, "triangle": 0.5, "diamond": 0.5, "cross": 0.54, "star": 0.34}
    assert mask[y1:y2, x1:x2].mean() == pytest.approx(area[shape.kind], abs=0.15)


@settings(max_examples=200)
@given(scenes)
def test_shapes_are_whole_apart_and_where_they_are_said_to_be(picture):
    width, height = picture.size
    for shape in picture.shapes:
        x1, y1, x2, y2 = shape.box
        assert 0 <= x1 < x2 <= width and 0 <= y1 < y2 <= height
        assert shape.kind in KINDS and shape.name == f"{shape.colour} {shape.kind}"
        assert min(x2 - x1, y2 - y1) >= 0.19 * min(picture.size)
        across, down = (x1 + x2) / 2 / width, (y1 + y2) / 2 / height
        column = "left" if across < 1 / 3 else "right" if across > 2 / 3 else ""
        row = "top" if down < 1 / 3 else "bottom" if down > 2 / 3 else ""
        assert shape.place == (f"{row} {column}".strip() or "centre")
        assert min(abs(middle - border) for middle in (across, down) for border in (1 / 3, 2 / 3)) >= 0.04
    for (a1, b1, a2, b2), (c1, d1, c2, d2) in itertools.combinations([s.box for s in picture.shapes], 2):
        assert max(c1 - a2, a1 - c2, d1 - b2, b1 - d2) >= 3
    middles = [x1 + x2 for x1, _, x2, _ in (shape.box for shape in picture.shapes)]
    assert middles == sorted(middles)


def test_a_scene_has_the_number_size_and_kinds_that_are_asked_for():
    for count in range(1, 6):
        picture = pictures.scene(np.random.default_rng(count), count, size=(200, 90), kinds=["star", "cross"])
        assert len(picture.shapes) == count and picture.size == (200, 90)
        assert {shape.kind for shape in picture.shapes} <= {"star", "cross"}


def test_no_place_is_said_of_a_middle_near_a_border():
    assert pictures.place_of((0, 0, 10, 10), (90, 90)) == "top left"
    assert pictures.place_of((40, 70, 50, 80), (90, 90)) == "bottom"
    assert pictures.place_of((40, 40, 50, 50), (90, 90)) == "centre"
    assert pictures.place_of((25, 0, 35, 10), (90, 90)) is None
    assert pictures.place_of((0, 58, 10, 68), (90, 90)) is None


@settings(max_examples=60)
@given(writings)
def test_ink_is_in_its_box_and_apart_from_the_shape_beside_it(picture):
    ink = picture.writing
    x1, y1, x2, y2 = box_of(changed(picture, dataclasses.replace(picture, writing=None)))
    # As fonts have it, the first and the last letter's share of the gap between letters belongs to the text.
    assert 0 <= x1 - ink.box[0] <= 0.2 * ink.height + 1 and 0 <= ink.box[2] - x2 <= 0.2 * ink.height + 1
    assert 0 <= y1 - ink.box[1] <= 1 and 0 <= ink.box[3] - y2 <= 1
    assert len(ink.text) < 4 or iou((x1, y1, x2, y2), ink.box) > 0.85
    assert ink.box[0] >= 0 and ink.box[1] >= 0 and ink.box[2] <= picture.size[0] and ink.box[3] <= picture.size[1]
    assert len(picture.shapes) <= 1
    assert all(iou(ink.box, shape.box) == 0 for shape in picture.shapes)


@settings(max_examples=200)
@given(st.one_of(scenes, writings))
def test_colours_stand_out_and_are_those_of_their_names(picture):
    for drawn in [*picture.shapes, *([picture.writing] if picture.writing else [])]:
        assert min(COLOURS, key=lambda name: math.dist(COLOURS[name], drawn.rgb)) == drawn.colour
        assert math.dist(COLOURS[drawn.colour], drawn.rgb) <= WAVER
        for behind in picture.background.colours:
            assert math.dist(drawn.rgb, behind) >= pictures.LEAST_CONTRAST - WAVER


@pytest.mark.parametrize("seed", range(30))
def test_shapes_stand_out_from_every_pixel_behind_them(seed):
    picture = pictures.scene(np.random.default_rng(seed), 1 + seed % 5)
    behind = np.asarray(picture.background.draw(picture.size)).astype(float)
    for shape in picture.shapes:
        x1, y1, x2, y2 = shape.box
        assert np.linalg.norm(behind[y1:y2, x1:x2] - shape.rgb, axis=-1).min() > 80


@settings(max_examples=60)
@given(seeds)
def test_a_background_has_no_other_colours_than_between_its_two(seed):
    behind = pictures.background(np.random.default_rng(seed))
    pixels = np.asarray(behind.draw((97, 61))).reshape(-1, 3)
    low, high = np.min(behind.colours, 0), np.max(behind.colours, 0)
    assert pixels.shape == (97 * 61, 3)
    assert (pixels >= low - 1).all() and (pixels <= high + 1).all()
    assert behind.style == "plain" or behind.colours[0] == behind.colours[1] or len(np.unique(pixels, axis=0)) > 1


def bar_mask(picture: Picture, number: int) -> np.ndarray:
    """Where one bar is, its letter below the axis apart."""
    chart = picture.chart
    rest = tuple(bar for i, bar in enumerate(chart.bars) if i != number)
    full, less = (
        dataclasses.replace(picture, chart=Chart(bars, chart.area, printed=False)) for bars in (chart.bars, rest)
    )
    return changed(full, less)[: chart.area[3]]


@settings(max_examples=60)
@given(charts, st.data())
def test_a_bar_is_seen_in_its_box(picture, data):
    number = data.draw(st.integers(0, len(picture.chart.bars) - 1))
    bar = picture.chart.bars[number]
    assert_same_place(box_of(bar_mask(picture, number)), bar.box)
    x1, y1, x2, y2 = bar.box
    inner = np.asarray(picture.draw())[y1 + 2 : y2 - 2, x1 + 2 : x2 - 2].reshape(-1, 3)
    assert (inner == COLOURS[bar.colour]).all(-1).all()


@settings(max_examples=200)
@given(charts)
def test_bars_are_as_high_as_their_values_and_told_apart(picture):
    bars, (left, top, right, bottom) = picture.chart.bars, picture.chart.area
    assert 0 < left < right < picture.size[0] and 0 < top < bottom < picture.size[1]
    assert [bar.letter for bar in bars] == list("ABCDE"[: len(bars)])
    assert len({bar.colour for bar in bars}) == len(bars)
    for bar in bars:
        assert 1 <= bar.value <= TOP
        assert bar.box[3] == bottom and left <= bar.box[0] < bar.box[2] <= right
        assert bar.box[3] - bar.box[1] == pytest.approx((bottom - top) * bar.value / TOP, abs=0.5)
        for behind in picture.background.colours:
            assert math.dist(COLOURS[bar.colour], behind) >= pictures.LEAST_CONTRAST
    assert all(bar.box[2] < after.box[0] for bar, after in itertools.pairwise(bars))


def test_values_are_printed_over_some_charts_only():
    drawn = [pictures.chart(np.random.default_rng(seed), 3) for seed in range(40)]
    assert 5 < sum(picture.chart.printed for picture in drawn) < 35
    with_values = next(picture for picture in drawn if picture.chart.printed)
    chart = dataclasses.replace(with_values.chart, printed=False)
    mask = changed(with_values, dataclasses.replace(with_values, chart=chart))
    for bar in with_values.chart.bars:
        x1, y1, x2, _ = bar.box
        assert mask[: y1 + 1, x1:x2].any(), "no value over the bar"


@functools.cache
def tiling(size: tuple[int, int]) -> tuple[int, int]:
    """(columns, rows) into which the micro model's processor cuts a picture."""
    width, height = select_best_resolution(size, MICRO.candidate_resolutions)
    return width // MICRO.tile_size, height // MICRO.tile_size


def test_all_tilings_occur_and_small_ones_most_often():
    rng = np.random.default_rng(0)
    found = [tiling(pictures.picture_size(rng)) for _ in range(20_000)]
    assert MICRO.tile_size == TILE
    assert set(found) == {(c, r) for c in range(1, 10) for r in range(1, 10) if c * r <= 9}
    assert len(set(found)) == len(MICRO.candidate_resolutions) == 23
    assert found.count((1, 1)) > len(found) / 2


@given(seeds, st.integers(1, 9))
def test_a_size_keeps_to_the_most_tiles(seed, most):
    columns, rows = tiling(pictures.picture_size(np.random.default_rng(seed), most))
    assert columns * rows <= most
