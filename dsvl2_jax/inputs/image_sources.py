"""Images that data files refer to: by name in a folder or in tar shards, or inline as base64.

Nothing here decodes pixels: a store turns a reference into a path or a file's bytes for the processor. Stores are
pickled into worker processes; files are opened there, on first use. Tested in tests/inputs/test_records.py.
"""

from __future__ import annotations

import base64
import binascii
import bisect
import dataclasses
import functools
import glob
import hashlib
import os
import string
import tarfile
import threading
import urllib.parse
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from dsvl2_jax.errors import DataError, ImageError, SampleError
from dsvl2_jax.inputs.images import ImageSource

IMAGE_SUFFIXES = frozenset({"jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff"})


def is_frame(name: str) -> bool:
    """Whether a file in a folder of frames is one of them, by its name."""
    return not name.startswith(".") and name.rpartition(".")[2].lower() in IMAGE_SUFFIXES


# The reasons that samples are counted under when an image fails them.
MISSING_IMAGE, BAD_REFERENCE = "image missing", "image reference"

# How base64 of the usual image formats begins: JPEG, PNG, GIF, WebP (RIFF), BMP, both TIFFs.
_BASE64_STARTS = ("/9j/", "iVBORw0KGgo", "R0lGOD", "UklGR", "Qk", "SUkqA", "TU0AK")
_BASE64_LEAST = 64  # characters; no image is smaller, and file names that begin like one are shorter
_BASE64_PIECE = 1 << 18  # characters that are decoded at a time: threads get a chance between them

_OPEN_FILES = 64


class FilePool:
    """Reads byte ranges of files, keeping the last few open. Safe between threads; pickles without its handles."""

    def __init__(self) -> None:
        self._open: OrderedDict[str, int] = OrderedDict()
        self._lock = threading.Lock()

    def read(self, path: str, offset: int, size: int) -> bytes:
        """`size` bytes from `offset`. Raises OSError, also when the file has become shorter than that."""
        with self._lock:
            if path not in self._open:
                if len(self._open) >= _OPEN_FILES:
                    os.close(self._open.popitem(last=False)[1])
                self._open[path] = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
            self._open.move_to_end(path)
            data = b""
            while len(data) < size:  # one call reads 2 GB at most
                more = os.pread(self._open[path], size - len(data), offset + len(data))
                if not more:
                    raise OSError(f"{path}: has become shorter since it was indexed. Do not change data during a run.")
                data = data + more if data else more
        return data

    def close(self) -> None:
        with self._lock:
            while self._open:
                os.close(self._open.popitem()[1])

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__()

    def __del__(self) -> None:
        if hasattr(self, "_open"):
            self.close()


@dataclasses.dataclass(frozen=True)
class TarIndex:
    """Where the regular files of an uncompressed tar lie, in archive order. Compact: shards have many members."""

    path: str
    names: bytes  # all names, one after the other
    name_ends: np.ndarray  # i64[members]
    offsets: np.ndarray  # i64[members], of the contents
    sizes: np.ndarray  # i64[members]
    digest: str  # of names, offsets and sizes

    def __len__(self) -> int:
        return len(self.offsets)

    def name(self, member: int) -> str:
        start = self.name_ends[member - 1] if member else 0
        return self.names[start : self.name_ends[member]].decode("utf-8", "surrogateescape")


def index_tar(path: str) -> TarIndex:
    """Reads a tar's headers, once for every state of the file.

    Raises DataError if it is missing, compressed, or no tar.
    """
    try:
        status = os.stat(path)
    except OSError as error:
        raise DataError.unreadable(path, error) from None
    return _index_tar(path, status.st_size, status.st_mtime_ns)


@functools.cache
def _index_tar(path: str, size: int, mtime: int) -> TarIndex:
    names, offsets, sizes, ends = bytearray(), [], [], []
    try:
        with tarfile.open(path, "r:") as archive:
            while (member := archive.next()) is not None:
                archive.members = []  # tarfile keeps every header otherwise
                if member.isreg() and not member.issparse():
                    if member.offset_data + member.size > size:
                        raise tarfile.ReadError(f"cut short within {member.name}")
                    names += _plain_name(member.name).encode("utf-8", "surrogateescape")
                    ends.append(len(names))
                    offsets.append(member.offset_data)
                    sizes.append(member.size)
    except (tarfile.TarError, OSError, EOFError) as error:
        raise DataError(
            f"{path}: not a whole, uncompressed tar ({error}). Members are read at random, so unpack a compressed one "
            "(gunzip) and copy a damaged one again."
        ) from None
    columns = [np.array(column, np.int64) for column in (ends, offsets, sizes)]
    digest = hashlib.sha256(bytes(names))
    for column in columns:
        digest.update(column.tobytes())
    return TarIndex(path, bytes(names), *columns, digest.hexdigest())


class ImageStore(Protocol):
    """Finds images by name."""

    def find(self, name: str) -> ImageSource:
        """A path or a file's bytes. Raises SampleError when there is no such image, OSError when reading fails."""

    def frames(self, name: str) -> list[str] | None:
        """The names of the pictures in a folder, in any order; None where there is no folder of that name."""


@dataclasses.dataclass(frozen=True)
class FolderImages:
    """Images below a folder. Names that lead out of it are refused: a data file must not open any file it likes.

    So are links that lead out of it, unless ``follow_links``: whoever made the folder must not choose what is read.
    """

    root: str
    follow_links: bool = False

    def frames(self, name: str) -> list[str] | None:
        root = os.path.abspath(self.root)
        path = os.path.normpath(os.path.join(root, name))
        if not _is_below(path, root) or not os.path.isdir(path):
            return None
        resolved = os.path.realpath(path)
        if not self.follow_links and not _is_below(resolved, os.path.realpath(root)):
            return None
        return [os.path.join(name, file) for file in os.listdir(resolved) if is_frame(file)]

    def find(self, name: str) -> ImageSource:
        root = os.path.abspath(self.root)
        path = os.path.normpath(os.path.join(root, name))
        if not _is_below(path, root):
            raise SampleError(
                BAD_REFERENCE,
                f"image {name!r} is outside of the image folder {self.root}. Name images relative to that folder, or "
                "set the source's images to a folder that holds them all.",
            )
        if not os.path.isfile(path):
            raise SampleError(MISSING_IMAGE, f"image {name!r}: no such file ({path}).")
        if self.follow_links:
            return path
        resolved = os.path.realpath(path)
        if not _is_below(resolved, os.path.realpath(root)):
            raise SampleError(
                BAD_REFERENCE,
                f"image {name!r} is a link, or lies behind one, that leads out of the image folder {self.root}, to "
                f"{resolved}. If you trust the links in that folder, set follow_links (--follow-links on a command "
                "line); otherwise copy the images into it.",
            )
        return resolved  # without links: what was checked is what is opened


class TarImages:
    """Images in tar shards, by the member's whole name (``a/b.jpg``; a leading ``./`` counts for nothing)."""

    def __init__(self, paths: Sequence[str]):
        """Reads all headers. Raises DataError as `index_tar` does."""
        self.shards = [index_tar(path) for path in paths]
        self._pool = FilePool()
        members = [(shard, member) for shard, index in enumerate(self.shards) for member in range(len(index))]
        members.sort(key=lambda member: self.shards[member[0]].name(member[1]))
        self._order = np.array(members, np.int64).reshape(-1, 2)

    def find(self, name: str) -> ImageSource:
        plain = _plain_name(name)
        position = bisect.bisect_left(range(len(self._order)), plain, key=self._name)
        if position == len(self._order) or self._name(position) != plain:
            shards = f"{len(self.shards)} tar shard(s), {self.shards[0].path} first"
            raise SampleError(MISSING_IMAGE, f"image {name!r}: no member of that name in {shards}.")
        if position + 1 < len(self._order) and self._name(position + 1) == plain:
            both = [self.shards[self._order[p, 0]].path for p in (position, position + 1)]
            raise SampleError(BAD_REFERENCE, f"image {name!r} is not one image: {both[0]} and {both[1]} have one each.")
        shard, member = self._order[position]
        index = self.shards[shard]
        return self._pool.read(index.path, int(index.offsets[member]), int(index.sizes[member]))

    def frames(self, name: str) -> list[str] | None:
        folder = f"{_plain_name(name).rstrip('/')}/"
        members = []
        for position in range(bisect.bisect_left(range(len(self._order)), folder, key=self._name), len(self._order)):
            member = self._name(position)
            if not member.startswith(folder):
                break
            members.append(member)
        return [member for member in members if is_frame(member.rpartition("/")[2])] if members else None

    def _name(self, position: int) -> str:
        shard, member = self._order[position]
        return self.shards[shard].name(member)


def _is_below(path: str, root: str) -> bool:
    return os.path.commonpath([root, path]) == root


def open_images(images: str, data_path: str, follow_links: bool = False) -> ImageStore:
    """The store of a source: `images` is a folder, a glob of ``.tar`` shards, or empty for the data file's folder.

    ``follow_links``: links in the folder may lead out of it. Raises DataError when there is no such folder or shard.
    """
    if images.endswith(".tar"):
        return TarImages(expand_paths(images, "image shards"))
    folder = images or os.path.dirname(data_path) or "."
    if not os.path.isdir(folder):
        raise DataError(
            f"{folder}: no such folder of images. Give a folder, or tar shards as a pattern ending in .tar."
        )
    return FolderImages(folder, follow_links)


def expand_paths(pattern: str, what: str) -> list[str]:
    """The files that a path or glob pattern names, sorted. Raises DataError when there is none."""
    if not pattern:
        raise DataError(f"{what}: the path is empty. Give a file, or a glob pattern for several.")
    if os.path.isfile(pattern):
        return [pattern]
    paths = sorted(path for path in glob.glob(pattern, recursive=True) if os.path.isfile(path))
    if not paths:
        kind = "a folder" if os.path.isdir(pattern) else "no such file"
        if glob.has_magic(pattern):
            kind = "the pattern matches no file"
        raise DataError(f"{pattern}: {kind} ({what}). Check the path; a relative one starts at {Path.cwd()}.")
    return paths


def resolve_image(reference: Any, store: ImageStore) -> ImageSource:
    """The image that a data file refers to.

    Args:
      reference: a name; a ``data:`` URI or plain base64 of an image file; an object that has one of these under
        ``path``, ``url``, ``base64``, ``bytes`` or ``data``; or, from Python, a file's bytes or a picture already.
      store: where names are looked up.

    Returns:
      A path, a file's bytes, a PIL image or an array.

    Raises:
      SampleError: it is none of these, is a web address, is broken base64, or names no image.
    """
    if isinstance(reference, bytes | Image.Image | np.ndarray):
        return reference
    if isinstance(reference, Mapping):
        for key in ("base64", "bytes", "data", "url", "path"):
            value = reference.get(key)
            if isinstance(value, str) and value and key in ("base64", "bytes", "data"):
                return decode_base64(value)
            if isinstance(value, str | bytes) and value:
                return resolve_image(value, store)
    if not isinstance(reference, str) or not reference:
        found = "an empty one" if isinstance(reference, str) else type(reference).__name__
        raise SampleError(
            BAD_REFERENCE,
            f"an image is a file's name or base64 data, or from Python a file's bytes, a PIL image or an array; found "
            f"{found}.",
        )
    if reference.startswith("data:"):
        return decode_base64(data_uri_text(reference))
    if reference.startswith(("http://", "https://")):
        raise SampleError(BAD_REFERENCE, f"image {reference[:80]!r}: is on the web. Download it and name the file.")
    if reference.startswith("file://"):
        return store.find(reference.removeprefix("file://"))
    if len(reference) >= _BASE64_LEAST and reference.startswith(_BASE64_STARTS):
        return decode_base64(reference)
    return store.find(reference)


class _AnyFile:
    """The store of what the user himself writes: any path. Data files and requests are read from stores with a root."""

    def find(self, name: str) -> ImageSource:
        return name

    def frames(self, name: str) -> list[str] | None:
        return None  # `read_frames` looks for itself


def open_reference(reference: Any) -> ImageSource:
    """What the user of Python or of a command gives as an image: any that `read_image` takes, or `resolve_image` does.

    A name is a path. Raises ImageError for anything else.
    """
    if not isinstance(reference, str | Mapping):
        return reference
    try:
        return resolve_image(reference, _AnyFile())
    except SampleError as error:
        raise ImageError(str(error)) from None


def data_uri_text(uri: str) -> str:
    """The base64 text of a ``data:`` URI, without white space and percent signs.

    The media type that it claims is not believed: the bytes say what they are. Raises SampleError when the URI is not
    in base64.
    """
    head, comma, text = uri.partition(",")
    if not comma or not head.lower().endswith(";base64"):
        raise SampleError(
            BAD_REFERENCE, f"image {head[:40]!r}: only data: URIs in base64 are read, as data:image/png;base64,iVBO…"
        )
    return _without_white_space(urllib.parse.unquote(text) if "%" in text else text)


def _without_white_space(text: str) -> str:
    # Searches for one character are so fast that text without any is hardly looked at.
    may_have_some = not text.isascii() or any(space in text for space in string.whitespace)
    return "".join(text.split()) if may_have_some else text


def decode_base64(text: Any) -> bytes:
    """The bytes of base64 text, with ``data:…,`` before it or not. Raises SampleError for anything else."""
    if not isinstance(text, str):
        raise SampleError(BAD_REFERENCE, f"inline image data is of type {type(text).__name__}, expected base64 text.")
    if text.startswith("data:"):
        text = text.partition(",")[2]
    text = _without_white_space(text)
    try:
        if "=" in text[:-2]:
            raise ValueError("padding before the end")
        pieces = (text[i : i + _BASE64_PIECE] for i in range(0, len(text), _BASE64_PIECE))
        return b"".join(base64.b64decode(piece, validate=True) for piece in pieces)
    except (binascii.Error, ValueError) as error:
        raise SampleError(BAD_REFERENCE, f"inline image {text[:20]!r}…: not valid base64 ({error}).") from None


def _plain_name(name: str) -> str:
    return name[2:] if name.startswith("./") else name
