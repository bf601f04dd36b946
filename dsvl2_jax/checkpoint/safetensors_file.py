"""Where the tensors of a safetensors file lie, from its header."""

from __future__ import annotations

import dataclasses
import os
import struct
from pathlib import Path

import safetensors

from dsvl2_jax.checkpoint.rules import Shape
from dsvl2_jax.errors import CheckpointError
from dsvl2_jax.json_files import parse_json

DOWNLOAD_AGAIN = "The download is incomplete or damaged: download this file again."

_MAX_HEADER = 100 << 20  # bytes: the format's own limit


@dataclasses.dataclass(frozen=True)
class Tensor:
    """Where one tensor lies: ``size`` bytes of ``file`` from byte ``start`` on. ``dtype`` as safetensors spells it."""

    file: Path
    dtype: str
    shape: Shape
    start: int
    size: int


def file_size(file: Path) -> int:
    """The size in bytes.

    Raises:
      CheckpointError: there is no such file.
    """
    try:
        if file.is_file():
            return file.stat().st_size
    except (OSError, ValueError):  # a name that no file can have, or no permission
        pass
    raise CheckpointError(f"{file}: this shard is missing. Download it into the directory of the others.")


def read_header(file: Path) -> dict[str, Tensor]:
    """Tensor name → `Tensor` of one safetensors file, whose header is validated against the file's size.

    Raises:
      CheckpointError: the file is missing, truncated, or its header contradicts itself.
    """
    size = file_size(file)
    try:
        # The library checks that sizes follow from shapes, that the tensors tile the file, and the file's length.
        with safetensors.safe_open(file, framework="numpy"):
            pass
        length, header = _parse(file)
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(
            f"{file}: not a complete safetensors file ({error}); it has {size} bytes{_expected_size(file)}. "
            f"{DOWNLOAD_AGAIN}"
        ) from None
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        start, end = entry["data_offsets"]
        tensors[name] = Tensor(file, entry["dtype"], tuple(entry["shape"]), 8 + length + start, end - start)
    return tensors


def _parse(file: Path) -> tuple[int, dict]:
    """(bytes of the header, its content). Raises OSError and ValueError."""
    with file.open("rb") as opened:
        prefix = opened.read(8)
        if len(prefix) < 8:
            raise ValueError("it ends before the length of its header")
        (length,) = struct.unpack("<Q", prefix)
        if length > min(_MAX_HEADER, os.fstat(opened.fileno()).st_size):
            raise ValueError(f"it says that its header has {length} bytes")
        header = parse_json(opened.read(length))
    if not isinstance(header, dict):
        raise ValueError(f"its header is a JSON {type(header).__name__}")
    return length, header


def _expected_size(file: Path) -> str:
    """What the header, if it can be read, says about the file's size: part of an error message."""
    try:
        length, header = _parse(file)
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        return f", its header says {8 + length + max(ends)}"
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        return ""
