"""Which frames of a video are taken: those at even distances, or one of each scene.

Tested in tests/inputs/test_frame_choice.py.
"""

from __future__ import annotations

import bisect
import itertools
import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from dsvl2_jax.errors import UsageError

FRAMES = 8  # of a video whose user says nothing: 9 of the released models' single tiles fill a context of 4,096 tokens
MAX_FRAMES = 1024
EVEN, SCENE = FRAME_CHOICES = ("even", "scene")

_NOISE = 2.0  # of 255: smaller changes are none


def check_frames(frames: Any, choice: Any, where: str = "") -> None:
    """Raises UsageError, beginning with ``where``, for a number or a choice of frames that cannot be."""
    if type(frames) is not int or not 1 <= frames <= MAX_FRAMES:
        raise UsageError(f"{where}frames is {frames!r:.40}, expected a whole number from 1 to {MAX_FRAMES}.")
    if choice not in FRAME_CHOICES:
        raise UsageError(f"{where}frame_choice is {choice!r:.40}, expected {' or '.join(FRAME_CHOICES)}.")


def even_frames(times: Sequence[float], end: float, count: int) -> list[int]:
    """Which frames are shown in the middles of ``count`` equal parts of a video; each once.

    Args:
      times: seconds at which each frame begins to be shown, rising.
      end: when the last ceases to be.
    """
    if count >= len(times):
        return list(range(len(times)))
    step = (end - times[0]) / count
    shown = (bisect.bisect_right(times, times[0] + (part + 0.5) * step) - 1 for part in range(count))
    return list(dict.fromkeys(shown))


def changes_between(pictures: Iterable[np.ndarray]) -> np.ndarray:
    """f64[pictures − 1], how much each picture, u8[...], differs from the one before: the mean of its values'
    differences, from 0 to 255."""
    signed = (picture.astype(np.int16) for picture in pictures)
    return np.array([np.abs(after - before).mean() for before, after in itertools.pairwise(signed)])


def scene_frames(times: Sequence[float], changes: np.ndarray, end: float, count: int) -> list[int]:
    """The frames in the middles of the pieces between the greatest changes; see `read_frames`.

    Args:
      times, end: as of `even_frames`.
      changes: f[frames − 1], of each frame after the first to the one before it.
    """
    if count >= len(times):
        return list(range(len(times)))
    apart = (end - times[0]) / (4 * count)
    cuts: list[int] = []  # the first frame of each piece but the first
    for index in np.argsort(-changes, kind="stable"):
        if len(cuts) == count - 1 or changes[index] < _NOISE:
            break
        at = times[index + 1]
        if all(abs(at - other) >= apart for other in (times[0], end, *(times[cut] for cut in cuts))):
            cuts.append(int(index) + 1)
    starts = [0, *sorted(cuts)]
    ends = [*(times[start] for start in starts[1:]), end]
    return [
        max(start, bisect.bisect_right(times, (times[start] + stop) / 2) - 1)
        for start, stop in zip(starts, ends, strict=True)
    ]


def natural_order(name: str) -> list[tuple[int, str]]:
    """A key for sorting names, in which numbers count as numbers: frame2 before frame10."""
    return [
        (int(part), "") if place % 2 else (0, part.lower()) for place, part in enumerate(re.split(r"(\d+)", name))
    ] + [(0, name)]
