"""The frames of a video file, decoded by PyAV (the extra ``video``), which brings FFmpeg's libraries.

Nothing but the file itself is opened, whatever it names, and only by the readers of the formats and codecs below.
Tested in tests/inputs/test_videos.py and tests/security/test_videos.py.
"""

from __future__ import annotations

import bisect
import collections
import contextlib
import dataclasses
import itertools
import math
import time
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

import numpy as np
from PIL import Image

from dsvl2_jax.errors import ImageError, UsageError
from dsvl2_jax.inputs.images import MAX_IMAGE_PIXELS
from dsvl2_jax.messages import first_line

if TYPE_CHECKING:
    import av

THUMBNAIL = 32  # side of the gray pictures that are compared

# FFmpeg's names of the containers and codecs that are read: those that videos are shared in. Its other readers meet too
# few files to be trusted with any, and some of them (playlists, lists of files) open what a file names.
_CONTAINERS = "mov,matroska,webm,avi,mpegts,mpeg,flv,ogg,gif"
_CODECS = "h264,hevc,vp8,vp9,av1,libdav1d,mpeg4,msmpeg4v3,mpeg1video,mpeg2video,mjpeg,theora,flv,h263,gif"

_RATE = 25  # frames a second, of a video that does not say it
_MAX_ASPECT = 4  # of a pixel; what is beyond is a mistake in the file
_TURNED = {90: Image.Transpose.ROTATE_90, 180: Image.Transpose.ROTATE_180, 270: Image.Transpose.ROTATE_270}


@dataclasses.dataclass(frozen=True)
class VideoLimits:
    """What may be read of one video; the defaults are for files that their user chose.

    Attributes:
      max_pixels: of a frame.
      max_total_pixels: of all frames that are taken.
      max_seconds: that the video lasts. max_stored: frames that it has.
      deadline: of `time.monotonic`, after which decoding ends in an error.
      threads: that decode; 0: one for each processor.
    """

    max_pixels: int = MAX_IMAGE_PIXELS
    max_total_pixels: int = 64 * MAX_IMAGE_PIXELS
    max_seconds: float = math.inf
    max_stored: int = 2_000_000
    deadline: float = math.inf
    threads: int = 0

    def check_time(self, name: str) -> None:
        """Raises LimitError, naming the video, after the deadline."""
        if time.monotonic() > self.deadline:
            raise LimitError(
                f"{name}: the video takes too long to decode. Send a shorter or smaller one, or pictures of it."
            )


class LimitError(ImageError):
    """A video that is beyond its `VideoLimits`."""


class _Packet(NamedTuple):
    """What is kept of a stored frame: when it is shown, for how long (in the stream's units), and whether it stands for
    itself."""

    stamp: int
    duration: int
    is_key: bool


class VideoFile:
    """Frames of a video file. It is read through once to know them, and again for those that are taken.

    In the second reading the decoder is given what it needs alone: from the last keyframe before a wanted frame to that
    frame. So no index of the file is believed, and none is needed.
    """

    def __init__(self, name: str, file: BinaryIO, limits: VideoLimits):
        self.name, self._file, self._limits = name, file, limits
        with self._container() as (container, stream):
            self._check_length((container.duration or 0) / 1e6)
            self._has_size = stream.codec_context.width > 0
            self._aspect = float(_fraction(stream.sample_aspect_ratio) or 1)
            base, step = _fraction(stream.time_base), 1 / (_fraction(stream.average_rate) or Fraction(_RATE))
            counted = container.format.name == "avi"  # whose frames have no times, and get wrong ones
            packets, stored = [], 0
            for packet in self._packets(container, stream):
                stored += 1
                if stored > limits.max_stored:
                    raise LimitError(
                        f"{name}: the video has more than the {limits.max_stored} frames that are read. Give a part."
                    )
                if not packet.is_discard:
                    packets.append(_Packet(_stamp(packet), packet.duration or 0, packet.is_keyframe))
            if "mov" in container.format.name and stream.frames > stored:
                raise ImageError(
                    f"{name}: the video is cut short: {stored} of its {stream.frames} frames are there. Copy the file "
                    "again."
                )
        stamps = [packet.stamp for packet in packets]
        # Where frames have no times, or several the same, they are counted instead.
        self._timed = not counted and None not in stamps and len(set(stamps)) == len(stamps) and base > 0
        self._keys: list[int] = []
        if self._timed:
            packets.sort()
            self._keys = [packet.stamp for packet in packets if packet.is_key]
            # What comes before the first keyframe, as where a recording begins, cannot be decoded.
            packets = [packet for packet in packets if not self._keys or packet.stamp >= self._keys[0]]
        self._stamps = [packet.stamp for packet in packets] if self._timed else list(range(len(packets)))
        if not packets:
            raise ImageError(f"{name}: the video has no frames. Give another file.")
        first, (over, under) = self._stamps[0], (base if self._timed else step).as_integer_ratio()
        self.times = [(stamp - first) * over / under for stamp in self._stamps]
        self.end = self.times[-1] + float(packets[-1].duration * base or step)
        self._check_length(self.end)

    def thumbnails(self) -> Iterator[np.ndarray]:
        given, before = 0, None
        for index, frame in self._decoded(range(len(self.times)), strict=False):
            thumbnail = frame.reformat(THUMBNAIL, THUMBNAIL, "gray").to_ndarray()
            # Where the decoder gave none, no change is seen.
            yield from itertools.repeat(thumbnail if before is None else before, index - given)
            yield thumbnail
            given, before = index + 1, thumbnail
        yield from itertools.repeat(before, len(self.times) - given)

    def pictures(self, indices: Sequence[int]) -> Iterator[Image.Image]:
        for _, frame in self._decoded(indices):
            image = frame.to_image()
            if self._aspect != 1 and 1 / _MAX_ASPECT <= self._aspect <= _MAX_ASPECT:
                wide, high = max(self._aspect, 1), max(1 / self._aspect, 1)
                image = image.resize((round(image.width * wide), round(image.height * high)), Image.Resampling.BICUBIC)
            turn = round(frame.rotation) % 360
            yield image.transpose(_TURNED[turn]) if turn in _TURNED else image

    def _decoded(self, indices: Sequence[int], strict: bool = True) -> Iterator[tuple[int, av.VideoFrame]]:
        """(index, frame) for rising indices of frames; for one that the decoder does not give, the next that it does.

        With ``strict``, ImageError where that is for an error in the file.
        """
        wanted = collections.deque(indices)
        failed: Exception | None = None
        last, given = None, None
        fed: float | None = None  # the keyframe from which on the decoder has been given everything
        counter = itertools.count()
        with self._container() as (container, stream):
            decoder = stream.codec_context
            for packet in itertools.chain(self._packets(container, stream), [None]):
                if not wanted:
                    return
                if packet is not None:
                    key = self._key_before(wanted[0])
                    if fed is not None and key <= fed:
                        fed = max(fed, _stamp(packet)) if packet.is_keyframe and self._timed else fed
                    elif key == -math.inf or (packet.is_keyframe and _stamp(packet) == key):
                        if fed is not None:
                            decoder.flush_buffers()
                        fed = key
                    else:
                        continue
                try:
                    frames = decoder.decode(packet)
                except _failures() as error:
                    failed = error
                    continue
                for frame in frames:
                    stamp = frame.pts if self._timed else next(counter)
                    if stamp is None:
                        continue
                    last = frame
                    if not wanted or stamp < self._stamps[wanted[0]]:
                        continue
                    while wanted and stamp >= self._stamps[wanted[0]]:
                        index = wanted.popleft()
                    if failed is not None and strict and stamp != self._stamps[index]:
                        raise self._damaged(index, failed)
                    failed, given = None, frame
                    self._check_pixels(frame.width, frame.height)
                    yield index, frame
        if wanted and (last is None or (failed is not None and strict)):
            raise self._damaged(wanted[0], failed)
        if wanted and last is not given:
            self._check_pixels(last.width, last.height)
            yield wanted[-1], last

    def _key_before(self, index: int) -> float:
        """The stamp of the keyframe from which a frame can be decoded; -inf: from the file's beginning."""
        place = bisect.bisect_right(self._keys, self._stamps[index])
        return self._keys[place - 1] if place else -math.inf

    @contextlib.contextmanager
    def _container(self) -> Iterator[tuple[Any, Any]]:
        """The file from its beginning, and its video stream, whose decoder takes no more pixels than are allowed."""
        av = _av()
        self._file.seek(0)
        bounds = {"max_pixels": str(self._limits.max_pixels), "codec_whitelist": _CODECS}
        options = {**bounds, "format_whitelist": _CONTAINERS, "protocol_whitelist": "none"}
        left = self._limits.deadline - time.monotonic()
        try:
            container = av.open(self._file, "r", options=options, timeout=left if 0 < left < math.inf else None)
        except _failures() as error:
            raise ImageError(
                f"{self.name}: not a video in a format that is read (MP4, MOV, MKV, WebM, AVI, MPEG, FLV, Ogg, GIF), "
                f"or damaged ({_reason(error)}). Play it to see whether it is whole, and convert it to MP4."
            ) from None
        with container:
            stream = next((s for s in container.streams.video if not _is_cover(s)), None)
            if stream is None:
                kinds = ", ".join(sorted({s.type for s in container.streams})) or "nothing"
                raise ImageError(f"{self.name}: has no moving pictures, only {kinds}. Give a video.")
            decoder = stream.codec_context
            if decoder is None or decoder.name not in _CODECS.split(","):
                what = "of an unknown kind" if decoder is None else f"stored as {decoder.name}"
                raise ImageError(
                    f"{self.name}: its pictures are {what}, which is not read. Convert the video to MP4 (H.264)."
                )
            self._check_pixels(decoder.width, decoder.height)
            decoder.options, decoder.thread_count = bounds, self._limits.threads
            yield container, stream

    def _packets(self, container: Any, stream: Any) -> Iterator[Any]:
        """The stored frames in the file's order."""
        try:
            for packet in container.demux(stream):
                self._limits.check_time(self.name)
                if packet.size:
                    yield packet
        except _failures() as error:
            raise ImageError(f"{self.name}: the video is damaged ({_reason(error)}). Copy the file again.") from None

    def _check_pixels(self, width: int, height: int) -> None:
        if width * height > self._limits.max_pixels:
            raise LimitError(
                f"{self.name}: its frames are {width}×{height} pixels, more than the {self._limits.max_pixels} that "
                "are read. Scale the video down."
            )

    def _check_length(self, seconds: float) -> None:
        if seconds > self._limits.max_seconds:
            raise LimitError(
                f"{self.name}: the video lasts {seconds:.0f} seconds, more than the {self._limits.max_seconds:g} that "
                "are read. Send a part of it, or pictures of it."
            )

    def _damaged(self, index: int, error: Exception | None) -> ImageError:
        reason = f" ({_reason(error)})" if error is not None else ""
        # Frames that are too large to be looked at have no size.
        most = self._limits.max_pixels
        large = "" if self._has_size else f", or its frames have more than the {most} pixels that are read"
        return ImageError(
            f"{self.name}: the video is damaged{large}: the frame at {self.times[index]:.2f} seconds cannot be "
            f"decoded{reason}. Copy the file again, or convert it."
        )


def _av() -> Any:
    try:
        import av
    except ModuleNotFoundError as error:
        if error.name != "av":
            raise
        raise UsageError(
            "videos need PyAV, which is not installed: pip install -e '.[video]' (a folder of pictures needs none)."
        ) from None
    return av


def _failures() -> tuple[type[Exception], ...]:
    """What PyAV raises: its own errors, and those of reading the file and of memory."""
    return _av().error.FFmpegError, OSError, ValueError, MemoryError


def _fraction(value: Any) -> Fraction:
    """A number of PyAV, whose releases have different types of them; 0 where it says nothing."""
    return Fraction(value.numerator, value.denominator) if value is not None and value.denominator else Fraction(0)


def _stamp(packet: Any) -> int | None:
    return packet.pts if packet.pts is not None else packet.dts


def _is_cover(stream: Any) -> bool:
    """Whether a stream is the one picture that a piece of music is sold with."""
    return bool(stream.disposition & _av().stream.Disposition.attached_pic)


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or first_line(error)
