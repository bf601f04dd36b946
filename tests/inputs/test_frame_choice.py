"""Which frames are taken: at even distances, or one of each scene."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsvl2_jax.errors import UsageError
from dsvl2_jax.inputs.frame_choice import changes_between, check_frames, even_frames, natural_order, scene_frames

steps = st.lists(st.integers(1, 40), min_size=1, max_size=60)  # between frames, in tenths of a second


def times_of(steps):
    return [t / 10 for t in itertools.accumulate(steps[:-1], initial=0)], sum(steps) / 10


@given(steps, st.integers(1, 70))
def test_even_frames_are_those_shown_in_the_middle_of_each_part(steps, count):
    times, end = times_of(steps)
    chosen = even_frames(times, end, count)
    assert chosen == sorted(set(chosen)) and 1 <= len(chosen) <= min(count, len(times))
    if count >= len(times):
        assert chosen == list(range(len(times)))
    else:
        middles = [(part + 0.5) * end / count for part in range(count)]
        shown = {max(i for i, time in enumerate(times) if time <= middle) for middle in middles}
        assert set(chosen) == shown


@given(st.integers(1, 100), st.integers(1, 100))
def test_frames_of_equal_length_are_taken_at_equal_distances(length, count):
    chosen = even_frames(range(length), length, count)
    assert len(chosen) == min(length, count)
    assert max(np.diff(chosen), default=0) - min(np.diff(chosen), default=0) <= 1


@given(st.lists(st.tuples(st.integers(8, 30), st.integers(0, 255)), min_size=1, max_size=6), st.integers(0, 2))
def test_of_each_scene_its_middle_is_taken(scenes, noise):
    scenes = [scenes[0], *(s for before, s in itertools.pairwise(scenes) if abs(before[1] - s[1]) > 8)]
    scenes = [scenes[0], *(s for before, s in itertools.pairwise(scenes) if abs(before[1] - s[1]) > 8)]
    shades = np.repeat([shade for _, shade in scenes], [frames for frames, _ in scenes])
    if len(shades) <= len(scenes):
        return
    wobble = np.random.default_rng(0).integers(0, noise + 1, (len(shades), 4, 4))
    thumbnails = np.clip(shades[:, None, None] + wobble, 0, 255).astype(np.uint8)
    length = len(shades)
    if any(frames < length / (4 * len(scenes)) for frames, _ in scenes):
        return  # nearer cuts than these are not made
    chosen = scene_frames(range(length), changes_between(thumbnails), length, len(scenes))
    starts = np.cumsum([0, *(frames for frames, _ in scenes)])
    assert chosen == [int(start + frames / 2) for start, (frames, _) in zip(starts, scenes, strict=False)]
    # Where more frames are asked for than there are scenes, no cut is made up.
    assert scene_frames(range(length), changes_between(thumbnails), length, min(length - 1, len(scenes) + 3)) == chosen


@given(st.integers(2, 40), st.integers(1, 45), st.integers(0, 9))
def test_scenes_of_anything_are_rising_and_no_more_than_asked(length, count, seed):
    thumbnails = np.random.default_rng(seed).integers(0, 256, (length, 3, 3), np.uint8)
    chosen = scene_frames(range(length), changes_between(thumbnails), length, count)
    assert chosen == sorted(set(chosen)) and len(chosen) <= min(count, length)
    assert chosen[0] >= 0 and chosen[-1] < length
    # A quarter of a part at least between two cuts leaves room for all of them.
    assert len(chosen) == min(count, length) or length < 8 * count


def test_names_are_sorted_as_people_count():
    names = ["f10.png", "f2.png", "f1.png", "F3.png", "f2b.png", "a100", "a9", "f02.png"]
    assert sorted(names, key=natural_order) == [
        "a9", "a100", "f1.png", "f02.png", "f2.png", "f2b.png", "F3.png", "f10.png",
    ]  # fmt: skip


@given(st.lists(st.text(max_size=6)))
def test_any_names_can_be_sorted(names):
    backwards = names[::-1]
    assert sorted(names, key=natural_order) == sorted(backwards, key=natural_order)


@pytest.mark.parametrize("frames, choice", [(0, "even"), (1025, "even"), (2.0, "even"), (True, "even"), (1, "odd")])
def test_frames_and_choices_that_cannot_be(frames, choice):
    with pytest.raises(UsageError, match="expected"):
        check_frames(frames, choice)
