"""The canvases that a budget leaves, and which of them a picture gets."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from golden import DATA
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dsvl2_jax.errors import UsageError
from dsvl2_jax.inputs.images import select_best_resolution
from dsvl2_jax.inputs.processor import Processor, image_tokens
from dsvl2_jax.inputs.tile_budget import (
    MAX_TILES,
    NO_BUDGET,
    TileBudget,
    budgeted_candidates,
    extended_candidate_resolutions,
    read_budget,
    tiles_of,
)

S = 384
RELEASED = tuple(
    tuple(pair)
    for pair in json.loads((DATA / "checkpoints/mini-tiny/processor_config.json").read_text())["candidate_resolutions"]
)
numbers = st.none() | st.integers(1, MAX_TILES)
budgets = st.builds(TileBudget, numbers, numbers).filter(lambda b: None in b or b.min_tiles <= b.max_tiles)
sizes = st.tuples(st.integers(1, 9000), st.integers(1, 9000))


@pytest.fixture(scope="module")
def mini() -> Processor:
    return Processor.from_dir(DATA / "checkpoints" / "mini-tiny")


def test_without_a_budget_the_checkpoints_candidates_stay_as_they_are():
    own = ((S, S), (2 * S, S), (S, 4 * S))
    assert budgeted_candidates(own, S, NO_BUDGET) == own
    assert budgeted_candidates(RELEASED, S, NO_BUDGET) == RELEASED == extended_candidate_resolutions(9, S)


@given(st.integers(1, MAX_TILES))
def test_the_released_candidates_go_on_as_they_began(most):
    canvases = budgeted_candidates(RELEASED, S, TileBudget(most))
    assert canvases == extended_candidate_resolutions(most, S)
    assert {tiles_of(canvas, S) for canvas in canvases} == set(range(1, most + 1))


@given(
    st.sets(st.tuples(st.integers(1, 6), st.integers(1, 6)), min_size=1, max_size=8).map(sorted), budgets,
)  # fmt: skip
def test_a_budget_narrows_the_checkpoints_candidates_and_widens_above_them(grids, budget):
    own = tuple((cols * S, rows * S) for cols, rows in grids)
    largest = max(cols * rows for cols, rows in grids)
    least, most = budget.min_tiles or 1, budget.max_tiles or largest
    kept = [canvas for canvas in own if least <= tiles_of(canvas, S) <= most]
    further = [
        c for c in extended_candidate_resolutions(MAX_TILES, S) if max(largest, least - 1) < tiles_of(c, S) <= most
    ]
    if not kept + further and least > 1:
        with pytest.raises(UsageError, match="candidate_resolutions have"):
            budgeted_candidates(own, S, budget)
    else:
        assert budgeted_candidates(own, S, budget) == tuple(kept + further or [(S, S)])


@given(sizes, budgets)
def test_the_choice_is_the_references_among_what_the_budget_leaves(size, budget):
    if budget.max_tiles is None and (budget.min_tiles or 1) > 9:
        return
    canvases = budgeted_candidates(RELEASED, S, budget)
    best = select_best_resolution(size, canvases)
    assert (budget.min_tiles or 1) <= tiles_of(best, S) <= (budget.max_tiles or 9)

    def kept(canvas):
        scale = min(canvas[0] / size[0], canvas[1] / size[1])
        return min(int(size[0] * scale) * int(size[1] * scale), size[0] * size[1])

    assert kept(best) == max(map(kept, canvases))
    same = [canvas for canvas in canvases if kept(canvas) == kept(best)]
    assert tiles_of(best, S) == min(tiles_of(canvas, S) for canvas in same)
    if budget == NO_BUDGET:
        assert best == select_best_resolution(size, RELEASED)


@pytest.mark.parametrize(
    "values, message",
    [
        ({"max_tiles": 0}, "max_tiles is 0, expected a whole number from 1 to 100"),
        ({"min_tiles": 101}, "min_tiles is 101"),
        ({"max_tiles": "9"}, "max_tiles is '9'"),
        ({"max_tiles": True}, "max_tiles is True"),
        ({"max_tiles": 2.0}, "max_tiles is 2.0"),
        ({"max_tiles": 2, "min_tiles": 3}, "min_tiles is 3, more than max_tiles, 2"),
    ],
)
def test_budgets_that_cannot_be_say_why(values, message):
    with pytest.raises(UsageError, match=message):
        read_budget(values)


def test_a_budget_that_leaves_nothing_says_what_to_do():
    with pytest.raises(UsageError, match=r"have 9 tiles at most\. Give max_tiles too"):
        budgeted_candidates(RELEASED, S, TileBudget(None, 10))
    with pytest.raises(UsageError, match="none of 2 to 8 tiles"):
        budgeted_candidates(((S, S), (3 * S, 3 * S)), S, TileBudget(8, 2))
    with pytest.raises(UsageError, match=r"more than the 33,554,432 that are read\. Give at most 33"):
        budgeted_candidates(((1000, 1000),), 1000, TileBudget(34))


# In the processor

LARGE = Image.new("RGB", (2400, 1200))


def grids(inputs):
    return inputs.tile_grid.tolist()


def test_more_tiles_are_more_tokens(mini):
    few, as_released, many = (mini(prompt="<image>", images=[LARGE], max_tiles=n) for n in (1, None, 18))
    assert [grids(one) for one in (few, as_released, many)] == [[[1, 1]], [[4, 2]], [[6, 3]]]
    assert [len(one.tiles) for one in (few, as_released, many)] == [2, 9, 19]
    for one in (few, as_released, many):
        ((cols, rows),) = grids(one)
        assert one.image_mask.sum() == image_tokens(cols, rows, mini.config.tokens_per_side)
    np.testing.assert_array_equal(few.tiles[0], few.tiles[1])
    np.testing.assert_array_equal(few.tiles[0], many.tiles[0])


@settings(deadline=None, max_examples=10)
@given(st.integers(1, 800), st.integers(1, 800), st.integers(1, 20), st.integers(1, 20))
def test_any_budget_gives_a_sample_whose_parts_agree(mini, width, height, one, other):
    inputs = mini(
        prompt="<image>",
        images=[Image.new("RGB", (width, height))],
        max_tiles=max(one, other),
        min_tiles=min(one, other),
    )
    ((cols, rows),) = grids(inputs)
    assert min(one, other) <= cols * rows <= max(one, other)
    assert len(inputs.tiles) == 1 + cols * rows
    assert inputs.image_index.max() == len(inputs.tiles) * mini.config.tokens_per_side**2 - 1


def test_among_many_images_one_tile_each_unless_a_budget_says_more(mini):
    images = [LARGE] * 3
    assert grids(mini(prompt="<image>" * 3, images=images)) == [[1, 1]] * 3
    assert grids(mini(prompt="<image>" * 3, images=images, max_tiles=18)) == [[1, 1]] * 3
    assert grids(mini(prompt="<image>" * 3, images=images, max_tiles=4, min_tiles=2)) == [[2, 1]] * 3
    mixed = [LARGE, {"image": LARGE, "max_tiles": 2}, {"image": LARGE, "min_tiles": 6}]
    assert grids(mini(prompt="<image>" * 3, images=mixed)) == [[1, 1], [2, 1], [4, 2]]
    assert grids(mini(prompt="<image>" * 2, images=mixed[:2])) == [[4, 2], [2, 1]]
    assert grids(mini(prompt="<image>" * 2, images=mixed[:2], max_tiles=1)) == [[1, 1], [2, 1]]


def test_a_budget_may_stand_in_every_form_of_a_part(mini, tmp_path):
    path = tmp_path / "a.png"
    LARGE.save(path)
    parts = [
        {"type": "image", "image": LARGE, "max_tiles": 2},
        {"type": "image_url", "image_url": {"url": str(path), "max_tiles": 2}},
        {"type": "image_url", "image_url": {"url": str(path)}, "max_tiles": 2, "min_tiles": None},
        {"type": "image", "path": path, "max_tiles": 2},
    ]
    for part in parts:
        assert grids(mini([{"role": "user", "content": [part, "What?"]}])) == [[2, 1]]
    listed = {"role": "user", "content": "<image>", "images": [{"path": str(path), "max_tiles": 2}]}
    assert grids(mini([listed])) == [[2, 1]]


def test_the_processors_own_budget_is_for_those_who_have_none(mini):
    processor = dataclasses.replace(mini)
    processor.set_visuals(max_tiles=4)
    assert grids(processor(prompt="<image>", images=[LARGE])) == [[2, 1]]
    assert grids(processor(prompt="<image>", images=[LARGE], max_tiles=18)) == [[6, 3]]
    with pytest.raises(UsageError, match="Give max_tiles too"):
        processor.set_visuals(min_tiles=12)
    assert Path(mini.config.source).name == "processor_config.json" and mini.budget == NO_BUDGET
