"""Where a request's pictures come from: ``data:`` URLs, web servers that the operator allows, folders that he names.

A request is not trusted. What it names is checked before it is touched, how much is read is bounded in bytes, pixels,
pictures and seconds before anything is decoded, and every error names the request's field.
"""

from __future__ import annotations

import asyncio
import dataclasses
import os
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from typing import Any, TypeVar

from PIL import Image

from dsvl2_jax import fields
from dsvl2_jax.errors import ImageError, SampleError, UsageError
from dsvl2_jax.fields import Problem, setting
from dsvl2_jax.infer.serve.addresses import domain_name
from dsvl2_jax.infer.serve.downloads import Downloader
from dsvl2_jax.infer.serve.files import read_file, scheme_of
from dsvl2_jax.infer.serve.media_errors import MediaError, shown, too_many_bytes
from dsvl2_jax.inputs.image_sources import data_uri_text, decode_base64
from dsvl2_jax.inputs.images import MAX_IMAGE_PIXELS, image_size, load_image

_AS_DATA = "Send the picture itself, as data:image/png;base64,iVBO…"

Value = TypeVar("Value")


@dataclasses.dataclass(frozen=True)
class MediaOptions:
    """Which pictures are read, and how.

    Attributes:
      domains: hosts that pictures are fetched from, over https: names, or ``*.`` and a name for all below it.
      paths: folders that pictures are read from.
      max_bytes: of a picture's file.
      max_pixels: of a picture.
      max_images: pictures of a request.
      max_request_pixels: of all pictures of a request.
      time_limit: seconds that fetching a picture may take, from the host's name to the last byte.
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
    time_limit: float = setting(10.0, above=0)
    official: bool = False

    def __post_init__(self) -> None:
        problems = fields.check(self)
        if not problems:
            domains = [_checked(domain_name, text, ("domains", i), problems) for i, text in enumerate(self.domains)]
            paths = [_checked(_folder, text, ("paths", i), problems) for i, text in enumerate(self.paths)]
            object.__setattr__(self, "domains", tuple(domains))
            object.__setattr__(self, "paths", tuple(paths))
        fields.refuse(problems, UsageError)


class Media:
    """Reads the pictures that requests name. One event loop's; the threads of a pool do what takes long.

    All errors are `MediaError`s.
    """

    def __init__(self, options: MediaOptions, pool: Executor, downloader: Downloader | None = None):
        """
        Args:
          pool: where files are read and pictures decoded.
          downloader: instead of the one that the options describe.
        """
        self.options, self._pool = options, pool
        self._downloader = downloader
        if options.domains and downloader is None:
            self._downloader = Downloader(options.domains, max_bytes=options.max_bytes, time_limit=options.time_limit)

    async def load(self, references: Sequence[tuple[Any, str]], field: str = "messages") -> list[Image.Image]:
        """The RGB pictures of one request, in order.

        Args:
          references: a URL or path for each, as the request has it, and the field that it stands in.
          field: which has them all, to be named when there are too many.
        """
        self.check_count(len(references), field)
        try:
            async with asyncio.TaskGroup() as group:  # a failure ends the other downloads
                tasks = [group.create_task(self.fetch(reference, name)) for reference, name in references]
        except ExceptionGroup as failures:
            raise failures.exceptions[0] from None
        files = [(task.result(), name) for task, (_, name) in zip(tasks, references, strict=True)]
        return await self._in_pool(self._decode_all, files, field)

    def check_count(self, count: int, field: str) -> None:
        """Raises MediaError where a request has more pictures than `MediaOptions.max_images`."""
        if count > self.options.max_images:
            raise MediaError(
                field, 413, f"has {count} pictures, expected at most {self.options.max_images}. Send fewer of them."
            )

    async def fetch(self, reference: Any, field: str) -> bytes:
        """The file that a ``data:``, ``https:`` or ``file:`` URL or a path stands for, at most `max_bytes` of it.

        A relative path is looked up in each of `MediaOptions.paths` in turn.
        """
        if not isinstance(reference, str) or not reference:
            found = "an empty one" if reference == "" else f"a value of type {type(reference).__name__}"
            raise MediaError(field, 400, f"must be a string with a picture's URL, not {found}.")
        scheme = scheme_of(reference)
        if scheme == "data":
            return await self._in_pool(self._inline, reference, field)
        if scheme == "https":
            if self._downloader is None:
                raise MediaError(field, 403, f"this server fetches no pictures (--media-domain). {_AS_DATA}")
            return await self._downloader.get(reference, field)
        if scheme in ("", "file"):
            return await self._in_pool(self._file, reference, field)
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

    def _inline(self, url: str, field: str) -> bytes:
        try:
            text = data_uri_text(url)
            if len(text) // 4 * 3 - text[-2:].count("=") > self.options.max_bytes:
                raise MediaError(field, 413, too_many_bytes(self.options.max_bytes))
            return decode_base64(text)
        except SampleError as error:
            raise MediaError(field, 400, str(error)) from None

    def _file(self, reference: str, field: str) -> bytes:
        if not self.options.paths:
            raise MediaError(field, 403, f"this server reads no files (--media-path). {_AS_DATA}")
        return read_file(reference, self.options.paths, self.options.max_bytes, field)

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
