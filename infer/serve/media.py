"""Where a request's pictures and videos come from: ``data:`` URLs, web servers and folders that the operator allows.

A request is not trusted. What it names is checked before it is touched, how much is read is bounded in bytes, pixels,
pictures, frames and seconds before anything is decoded, and every error names the request's field.
"""

from __future__ import annotations

import asyncio
import dataclasses
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple, TypeVar

from PIL import Image

from dsvl2_jax import fields
from dsvl2_jax.errors import ImageError, SampleError, UsageError
from dsvl2_jax.fields import Problem, setting
from dsvl2_jax.infer.serve.addresses import domain_name
from dsvl2_jax.infer.serve.downloads import Downloader
from dsvl2_jax.infer.serve.files import read_file, scheme_of
from dsvl2_jax.infer.serve.media_errors import MediaError, shown, too_many_bytes
from dsvl2_jax.inputs.frame_choice import MAX_FRAMES
from dsvl2_jax.inputs.image_sources import data_uri_text, decode_base64
from dsvl2_jax.inputs.images import MAX_IMAGE_PIXELS, image_size, load_image
from dsvl2_jax.inputs.video_file import LimitError, VideoLimits
from dsvl2_jax.inputs.videos import read_frames

_AS_DATA = {
    "picture": "Send the picture itself, as data:image/png;base64,iVBO…",
    "video": "Send the video itself, as data:video/mp4;base64,AAAA…",
}

_MAX_RATE = 240  # frames a second, of a video

Value = TypeVar("Value")


@dataclasses.dataclass(frozen=True)
class MediaOptions:
    """Which pictures and videos are read, and how.

    Attributes:
      domains: hosts that files are fetched from, over https: names, or ``*.`` and a name for all below it.
      paths: folders that files are read from.
      max_bytes: of a picture's file. max_video_bytes: of a video's.
      max_pixels: of a picture, or a frame.
      max_images: pictures of a request. max_frames: frames of all its videos.
      max_request_pixels: of all pictures and frames of a request.
      max_video_seconds: that a video may last.
      time_limit: seconds that fetching a file may take, from the host's name to the last byte.
      video_time_limit: seconds that decoding a request's videos may take.
      official: read pictures as the official code does: alpha dropped, EXIF orientation ignored, 16-bit values over 255
        white. Otherwise they are read as a person sees them: over white, turned, and brought to 8 bits.

    Raises:
      UsageError: values are wrong, or a folder is not there; all of them are listed.
    """

    domains: tuple[str, ...] = setting((), expected="a list of host names")
    paths: tuple[str, ...] = setting((), expected="a list of folders")
    max_bytes: int = setting(32 * 2**20, least=1)
    max_pixels: int = setting(50_000_000, least=1, most=MAX_IMAGE_PIXELS)
    max_images: int = setting(16, least=1)
    max_request_pixels: int = setting(200_000_000, least=1)
    max_video_bytes: int = setting(64 * 2**20, least=1)
    max_video_seconds: float = setting(600.0, above=0)
    max_frames: int = setting(32, least=1, most=MAX_FRAMES)
    time_limit: float = setting(10.0, above=0)
    video_time_limit: float = setting(20.0, above=0)
    official: bool = False

    def __post_init__(self) -> None:
        problems = fields.check(self)
        if not problems:
            domains = [_checked(domain_name, text, ("domains", i), problems) for i, text in enumerate(self.domains)]
            paths = [_checked(_folder, text, ("paths", i), problems) for i, text in enumerate(self.paths)]
            object.__setattr__(self, "domains", tuple(domains))
            object.__setattr__(self, "paths", tuple(paths))
        fields.refuse(problems, UsageError)


class Clip(NamedTuple):
    """A video of a request: where it is, the field that says so, and which frames of it are wanted."""

    reference: Any
    field: str
    frames: int
    choice: str


class Media:
    """Reads the pictures and videos that requests name. One event loop's; the threads of a pool do what takes long.

    All errors are `MediaError`s.
    """

    def __init__(self, options: MediaOptions, pool: Executor, downloader: Downloader | None = None):
        """
        Args:
          pool: where files are read and pictures decoded.
          downloader: instead of those that the options describe.
        """
        self.options, self._pool = options, pool
        self._bytes = {"picture": options.max_bytes, "video": options.max_video_bytes}
        self._downloaders = dict.fromkeys(self._bytes, downloader)
        if options.domains and downloader is None:
            self._downloaders = {
                kind: Downloader(options.domains, max_bytes=most, time_limit=options.time_limit, kind=kind)
                for kind, most in self._bytes.items()
            }
        # Videos take long: they have threads of their own, and half of the processors at most.
        self._video_pool = ThreadPoolExecutor(max(1, (os.cpu_count() or 1) // 2), "dsvl2-videos")

    async def load(self, references: Sequence[tuple[Any, str]], field: str = "messages") -> list[Image.Image]:
        """The RGB pictures of one request, in order.

        Args:
          references: a URL or path for each, as the request has it, and the field that it stands in.
          field: which has them all, to be named when there are too many.
        """
        self.check_count(len(references), field)
        files = await self._fetch_all([(reference, name, "picture") for reference, name in references])
        return await self._in_pool(self._decode_all, files, field)

    async def load_videos(
        self, clips: Sequence[Clip], field: str = "messages", pictures: Sequence[Image.Image] = ()
    ) -> list[list[Image.Image]]:
        """The frames of each of the videos of one request, in RGB.

        Args:
          field: which has them all, to be named when there are too many frames.
          pictures: of the same request; their pixels count too.
        """
        if not clips:
            return []
        most = self.options.max_frames
        if (frames := sum(clip.frames for clip in clips)) > most:
            raise MediaError(field, 413, f"asks for {frames} frames of videos, expected at most {most}. Ask for fewer.")
        files = await self._fetch_all([(clip.reference, clip.field, "video") for clip in clips])
        left = self.options.max_request_pixels - sum(picture.width * picture.height for picture in pictures)
        work = partial(self._decode_videos, [data for data, _ in files], clips, left)
        return await asyncio.get_running_loop().run_in_executor(self._video_pool, work)

    async def _fetch_all(self, wanted: Sequence[tuple[Any, str, str]]) -> list[tuple[bytes, str]]:
        """(file, field) of each (reference, field, kind)."""
        try:
            async with asyncio.TaskGroup() as group:  # a failure ends the other downloads
                tasks = [group.create_task(self.fetch(*one)) for one in wanted]
        except ExceptionGroup as failures:
            raise failures.exceptions[0] from None
        return [(task.result(), field) for task, (_, field, _) in zip(tasks, wanted, strict=True)]

    def check_count(self, count: int, field: str) -> None:
        """Raises MediaError where a request has more pictures than `MediaOptions.max_images`."""
        if count > self.options.max_images:
            raise MediaError(
                field, 413, f"has {count} pictures, expected at most {self.options.max_images}. Send fewer of them."
            )

    async def fetch(self, reference: Any, field: str, kind: str = "picture") -> bytes:
        """The file that a ``data:``, ``https:`` or ``file:`` URL or a path stands for, at most as large as may be.

        A relative path is looked up in each of `MediaOptions.paths` in turn.

        Args:
          kind: "picture" or "video".
        """
        if not isinstance(reference, str) or not reference:
            found = "an empty one" if reference == "" else f"a value of type {type(reference).__name__}"
            raise MediaError(field, 400, f"must be a string with a {kind}'s URL, not {found}.")
        scheme = scheme_of(reference)
        if scheme == "data":
            return await self._in_pool(self._inline, reference, field, kind)
        if scheme == "https":
            downloader = self._downloaders[kind]
            if downloader is None:
                raise MediaError(field, 403, f"this server fetches no {kind}s (--media-domain). {_AS_DATA[kind]}")
            return await downloader.get(reference, field)
        if scheme in ("", "file"):
            return await self._in_pool(self._file, reference, field, kind)
        raise MediaError(
            field, 400, f"is of the scheme {shown(scheme)}, expected data, or https or file where they are allowed."
        )

    def decode(self, data: bytes, field: str) -> Image.Image:
        """The RGB picture in a file's bytes, read as `MediaOptions.official` says. Runs for a while: in a thread."""
        self._size(data, field)
        try:
            return load_image(data, as_seen=not self.options.official)
        except ImageError as error:
            raise MediaError(field, 400, str(error)) from None

    def _decode_all(self, files: Sequence[tuple[bytes, str]], field: str) -> list[Image.Image]:
        pixels = sum(width * height for width, height in (self._size(data, name) for data, name in files))
        if pixels > self.options.max_request_pixels:
            most = self.options.max_request_pixels
            raise MediaError(field, 413, f"its pictures have {pixels} pixels in all, expected at most {most}.")
        return [self.decode(data, name) for data, name in files]

    def _size(self, data: bytes, field: str) -> tuple[int, int]:
        try:
            width, height = image_size(data)
        except ImageError as error:
            bomb = isinstance(error.__cause__, Image.DecompressionBombError)
            raise MediaError(field, 413 if bomb else 400, str(error)) from None
        if width * height > self.options.max_pixels:
            most = self.options.max_pixels
            raise MediaError(
                field, 413, f"the picture is {width}×{height} pixels, expected at most {most} in all. Scale it down."
            )
        return width, height

    def _decode_videos(self, files: Sequence[bytes], clips: Sequence[Clip], pixels: int) -> list[list[Image.Image]]:
        """The frames of all videos, which together have at most so many pixels."""
        deadline, videos = time.monotonic() + self.options.video_time_limit, []
        for data, clip in zip(files, clips, strict=True):
            seconds = self.options.max_video_seconds
            limits = VideoLimits(
                self.options.max_pixels, pixels, seconds, int(_MAX_RATE * seconds), deadline, threads=1
            )
            try:
                frames = read_frames(data, clip.frames, clip.choice, limits)
            except LimitError as error:
                raise MediaError(clip.field, 413, str(error)) from None
            except ImageError as error:
                raise MediaError(clip.field, 400, str(error)) from None
            except UsageError as error:  # PyAV is missing
                raise MediaError(clip.field, 403, f"this server reads no videos: {error}") from None
            pixels -= sum(frame.width * frame.height for frame in frames)
            videos.append(frames)
        return videos

    def _inline(self, url: str, field: str, kind: str) -> bytes:
        try:
            text, most = data_uri_text(url), self._bytes[kind]
            if len(text) // 4 * 3 - text[-2:].count("=") > most:
                raise MediaError(field, 413, too_many_bytes(most, kind))
            return decode_base64(text)
        except SampleError as error:
            raise MediaError(field, 400, str(error)) from None

    def _file(self, reference: str, field: str, kind: str) -> bytes:
        if not self.options.paths:
            raise MediaError(field, 403, f"this server reads no files (--media-path). {_AS_DATA[kind]}")
        return read_file(reference, self.options.paths, self._bytes[kind], field, kind)

    async def _in_pool(self, function: Callable[..., Value], *arguments: Any) -> Value:
        return await asyncio.get_running_loop().run_in_executor(self._pool, function, *arguments)


def _folder(text: str) -> str:
    """A folder's path without links, as those of the files in it will be."""
    if not os.path.isdir(text):
        raise ValueError("must be a folder that is there")
    return os.path.realpath(text)


def _checked(read: Callable[[str], str], text: str, path: fields.Path, problems: list[Problem]) -> str:
    try:
        return read(text)
    except ValueError as error:
        problems.append(Problem(path, f"{error}, not {fields.literal(text)}."))
        return text
