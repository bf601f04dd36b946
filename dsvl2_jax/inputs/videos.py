"""Videos as pictures: the frames that are taken of a file, a folder of pictures, or a list of them.

Tested in tests/inputs/test_videos.py.
"""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Iterator, Sequence
from typing import Protocol, TypeAlias

import numpy as np
from PIL import Image

from dsvl2_jax.errors import ImageError
from dsvl2_jax.inputs.frame_choice import (
    EVEN,
    FRAMES,
    SCENE,
    changes_between,
    check_frames,
    even_frames,
    natural_order,
    scene_frames,
)
from dsvl2_jax.inputs.image_sources import IMAGE_SUFFIXES, is_frame
from dsvl2_jax.inputs.images import ImageSource, check_file, load_image, name_of
from dsvl2_jax.inputs.video_file import THUMBNAIL, LimitError, VideoFile, VideoLimits

# A file's path, a folder of pictures, a file's bytes, or the frames themselves.
VideoSource: TypeAlias = str | os.PathLike[str] | bytes | Sequence[ImageSource]


def read_frames(
    source: VideoSource,
    frames: int = FRAMES,
    choice: str = EVEN,
    limits: VideoLimits = VideoLimits(),  # noqa: B008 (frozen)
    as_seen: bool = False,
) -> list[Image.Image]:
    """At most so many frames of a video, in order, as RGB pictures.

    A file's frames are as a player shows them: turned as the file says, and with square pixels. The pictures of a
    folder are taken in the order of their names, in which numbers count as numbers, and read as `load_image` does.

    Args:
      frames: how many. A video that has fewer gives all of them.
      choice: "even": of that many parts of equal length the frame that is shown in the middle of each, once. "scene":
        the video is cut where it changes most, and the frame in the middle of each piece is taken. The change between
        two frames is the mean difference of their gray values, from 0 to 255, at 32×32 pixels; below 2 it is none, and
        cuts are at least a (4 · frames)-th of the video apart and from its ends.
      as_seen: how the pictures of a folder are read.

    Raises:
      ImageError: there is no such file, it is damaged, no video, or without frames.
      LimitError: it is beyond ``limits``.
      UsageError: PyAV is missing; frames or choice cannot be.
    """
    check_frames(frames, choice)
    with _opened(source, limits, as_seen) as clip:
        if choice == SCENE and frames < len(clip.times):
            chosen = scene_frames(clip.times, changes_between(clip.thumbnails()), clip.end, frames)
        else:
            chosen = even_frames(clip.times, clip.end, frames)
        pictures, pixels = [], 0
        for picture in clip.pictures(chosen):
            pictures.append(picture)
            pixels += picture.width * picture.height
            if pixels > limits.max_total_pixels:
                raise LimitError(
                    f"{clip.name}: {len(chosen)} frames have more than the {limits.max_total_pixels} pixels that are "
                    "read of a video. Take fewer frames, or scale it down."
                )
        return pictures


class _Clip(Protocol):
    """An opened video, whose frames are shown at ``times`` until ``end`` (seconds)."""

    name: str
    times: Sequence[float]
    end: float

    def thumbnails(self) -> Iterator[np.ndarray]:
        """u8[32, 32] of each frame, gray."""

    def pictures(self, indices: Sequence[int]) -> Iterator[Image.Image]:
        """The frames of rising indices, in RGB."""


@contextlib.contextmanager
def _opened(source: VideoSource, limits: VideoLimits, as_seen: bool) -> Iterator[_Clip]:
    if isinstance(source, list | tuple):
        yield _Pictures(f"video of {len(source)} pictures", source, limits, as_seen)
    elif isinstance(source, bytes | bytearray | memoryview):
        yield VideoFile(f"video of {len(source)} bytes", io.BytesIO(source), limits)
    elif not isinstance(source, str | os.PathLike):
        raise ImageError(
            f"video object {type(source).__name__}: expected a file's path, a folder of pictures, a file's bytes, or a "
            "list of pictures."
        )
    elif os.path.isdir(source):
        names = sorted(filter(is_frame, os.listdir(source)), key=natural_order)
        yield _Pictures(name_of(source), [os.path.join(source, name) for name in names], limits, as_seen)
    else:
        name = name_of(source)
        check_file(source, name)
        if not os.path.isfile(source):
            raise ImageError(
                f"{name}: is neither a file nor a folder of pictures. A video is read twice, so give a file."
            )
        try:
            file = open(source, "rb")  # noqa: SIM115
        except OSError as error:
            raise ImageError(f"{name}: cannot be read ({error.strerror or error}).") from None
        with file:
            yield VideoFile(name, file, limits)


class _Pictures:
    """Frames that are pictures of their own, a second each."""

    def __init__(self, name: str, sources: Sequence[ImageSource], limits: VideoLimits, as_seen: bool):
        if not sources:
            kinds = ", ".join(sorted(IMAGE_SUFFIXES))
            raise ImageError(f"{name}: has no frames. Expected one or more pictures (files that end in {kinds}).")
        self.name, self._sources, self._limits, self._as_seen = name, sources, limits, as_seen
        self.times: Sequence[float] = range(len(sources))
        self.end = float(len(sources))

    def thumbnails(self) -> Iterator[np.ndarray]:
        gray = (self._load(source).convert("L").resize((THUMBNAIL, THUMBNAIL)) for source in self._sources)
        return map(np.asarray, gray)

    def pictures(self, indices: Sequence[int]) -> Iterator[Image.Image]:
        return (self._load(self._sources[index]) for index in indices)

    def _load(self, source: ImageSource) -> Image.Image:
        self._limits.check_time(self.name)
        return load_image(source, self._as_seen, max_pixels=self._limits.max_pixels)
