"""Copies, in the user's cache, of data files that cannot be read at random as they are.

A copy is named by the SHA-256 of the file that it was made of, so it is made once, is never another file's, and may be
removed at any time but during a run. It appears under its name when it is complete.

Tested in tests/train/data/test_tables.py.
"""

from __future__ import annotations

import gzip
import logging
import os
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import BinaryIO

from rich import filesize

from dsvl2_jax.checkpoint.staging import is_disk_full
from dsvl2_jax.errors import DataError
from dsvl2_jax.runtime.compile_cache import user_cache

_LOG = logging.getLogger(__name__)

COMPRESSED = (".gz", ".zst")

_BLOCK = 1 << 22  # bytes
# A copy of more than both, bytes and times the file's size, is taken for a file made to fill the disk.
_MOST_TIMES, _MOST_BYTES = 200, 1 << 30


class UnpackedTooLarge(Exception):
    """Of a writer whose copy has become larger than it was told."""


def unpacked(path: str, name: str, write: Callable[[str, BinaryIO, int], None]) -> str:
    """The path of a file's copy, which is made if it is not there.

    Args:
      name: of the copy; it has the file's SHA-256 in it.
      write: is given ``path``, a file to write the copy to, and the most bytes that it may have (`UnpackedTooLarge`).

    Raises DataError when the file is damaged or its copy has no room.
    """
    folder = user_cache() / "data"
    copy = folder / name
    if copy.is_file():
        return str(copy)
    temporary = None
    try:
        size = os.path.getsize(path)
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        number, temporary = tempfile.mkstemp(prefix=".", suffix=".partial", dir=folder)
        with os.fdopen(number, "wb") as file:
            write(path, file, max(_MOST_BYTES, _MOST_TIMES * size))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, copy)
        temporary = None
    except UnpackedTooLarge:
        raise DataError(
            f"{path}: has {filesize.decimal(size)} and unpacks to more than {_MOST_TIMES} times as many bytes, as "
            "files do that are made to fill a disk. If it is right, unpack it yourself and give the unpacked file."
        ) from None
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{path}: cannot be unpacked, it is damaged or cut short ({error}). Copy it again.") from None
    except OSError as error:
        why = "the disk is full" if is_disk_full(error) else (error.strerror or str(error))
        raise DataError(
            f"{path}: its copy for reading at random cannot be written to {folder} ({why}). Free some space, set "
            "XDG_CACHE_HOME to a folder with more, or give the unpacked file."
        ) from None
    finally:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
    _LOG.info("%s: unpacked once to %s (%s)", path, copy, filesize.decimal(copy.stat().st_size))
    return str(copy)


def decompress(path: str, file: BinaryIO, most: int) -> None:
    """Writes what a ``.gz`` or ``.zst`` file holds; for `unpacked`.

    Raises DataError when pyarrow is missing, for ``.zst``.
    """
    if path.lower().endswith(".gz"):
        with gzip.open(path) as source:
            _copy(source, file, most)
        return
    arrow = import_pyarrow(path)
    try:
        with arrow.OSFile(path) as packed, arrow.CompressedInputStream(packed, "zstd") as source:
            _copy(source, file, most)
    except OSError as error:
        if error.errno is not None or is_disk_full(error):
            raise
        raise EOFError(str(error)) from None  # arrow's errors about the contents have no number


def import_pyarrow(path: str) -> ModuleType:
    """pyarrow. Raises DataError, naming the file that needs it, when it is not installed."""
    try:
        import pyarrow
    except ImportError:
        raise DataError(
            f"{path}: needs pyarrow, which is not installed. Install the extra: pip install 'dsvl2-jax[train]'."
        ) from None
    return pyarrow


def _copy(source: BinaryIO, file: BinaryIO, most: int) -> None:
    size = 0
    while block := source.read(_BLOCK):
        size += len(block)
        if size > most:
            raise UnpackedTooLarge
        file.write(block)
