"""Small videos, made by PyAV, that tests share."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

av = pytest.importorskip("av", reason="videos need the extra video: pip install -e '.[video]'")
av.logging.set_level(None)  # its encoders speak on standard error

# (container, codec) of those that are read and that PyAV's wheels can write.
KINDS = [
    ("mp4", "libx264"), ("mov", "libx264"), ("matroska", "libx265"), ("webm", "libvpx-vp9"), ("webm", "libvpx"),
    ("mp4", "libsvtav1"), ("avi", "mpeg4"), ("avi", "libx264"), ("mpegts", "libx264"), ("mpeg", "mpeg2video"),
    ("flv", "libx264"),
]  # fmt: skip


def video(
    grays: Sequence[int],
    container: str = "mp4",
    codec: str = "libx264",
    *,
    size: tuple[int, int] = (64, 48),
    rate: int = 10,
    times: Sequence[int] | None = None,
    keyframes: int = 12,
    options: dict[str, str] | None = None,
    container_options: dict[str, str] | None = None,
    aspect: Any = None,
    path: Path | None = None,
) -> bytes:
    """A file whose frames are each of one gray value.

    Args:
      times: when frames are shown, in units of 1 / rate seconds; one after the other without.
      path: write it there, which some options need.
      keyframes: the most frames between two of them.
    """
    width, height = size
    file = io.BytesIO()
    with av.open(path or file, "w", format=container, options=container_options or {}) as output:
        stream = output.add_stream(codec, rate=rate)
        stream.width, stream.height, stream.pix_fmt, stream.gop_size = width, height, "yuv420p", keyframes
        if aspect is not None:
            stream.codec_context.sample_aspect_ratio = aspect
        quiet = {"libx265": {"x265-params": "log-level=none"}}
        stream.options = quiet.get(codec, {}) | (options or {})
        for number, gray in enumerate(grays):
            pixels = np.full((height, width, 3), gray, np.uint8)
            frame = av.VideoFrame.from_ndarray(pixels, "rgb24")
            frame.pts = number if times is None else times[number]
            output.mux(stream.encode(frame))
        output.mux(stream.encode())
    return path.read_bytes() if path else file.getvalue()


def sound(container: str = "mp4", codec: str = "aac") -> bytes:
    """A file with sound alone."""
    file = io.BytesIO()
    with av.open(file, "w", format=container) as output:
        stream = output.add_stream(codec, rate=44100)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 4096), np.float32), "fltp", "mono")
        frame.sample_rate = 44100
        output.mux(stream.encode(frame))
        output.mux(stream.encode())
    return file.getvalue()


def grays(pictures: Sequence[Any]) -> list[int]:
    """The gray value of each picture."""
    return [int(np.asarray(picture)[..., 1].mean().round()) for picture in pictures]
