"""Reading a checkpoint in the released layout: safetensors shards, with an index or a single file.

Files are read by byte range, never mapped: mapped pages would count as resident memory, and a
conversion must need no more of it than the parameter it works on. bfloat16 comes from `ml_dtypes`.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import re
import struct
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import ml_dtypes
import numpy as np
import safetensors

from dsvl2_jax.checkpoint.leaves import leaf_bytes
from dsvl2_jax.checkpoint.rules import FLOAT_DTYPES, Leaf, Shape
from dsvl2_jax.errors import CheckpointError
from dsvl2_jax.json_files import read_json_object
from dsvl2_jax.messages import listed

INDEX_NAME = "model.safetensors.index.json"
DIGESTS_NAME = "SHA256SUMS"  # as sha256sum writes it; where it is present, the files must agree with it

# Copies between transposed arrays go this many released rows at a time: the strided side then stays
# in the cache (1.4 GB/s instead of 1.0 for a [896, 1280] expert).
ROWS_PER_COPY = 32
READ_BYTES = 8 << 20  # one read of a tensor that has to be transposed or cast
WORKERS = 2  # numpy's copies and the reads release the GIL; more threads than that wait for memory

_ADVICE = "The download is incomplete or damaged: download this file again."


def numpy_dtype(name: str) -> np.dtype:
    """numpy dtype of "float32", "float16" or "bfloat16"."""
    return np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name)


@dataclasses.dataclass(frozen=True)
class Tensor:
    """Where one tensor lies: ``size`` bytes of ``file`` from byte ``start`` on. ``dtype`` as safetensors spells it."""

    file: Path
    dtype: str
    shape: Shape
    start: int
    size: int


class Source:
    """The tensors of a directory in the released layout.

    ``tensors`` maps names to `Tensor`; only headers are read on construction. Use as a context
    manager, or call `close`.
    """

    def __init__(self, directory: str | Path):
        """Raises CheckpointError naming the file for anything missing, truncated or inconsistent."""
        self.directory = Path(directory)
        check_digests(self.directory)
        self.tensors: dict[str, Tensor] = {}
        index = self.directory / INDEX_NAME
        if index.is_file():
            self._open_sharded(index)
        else:
            for tensor_name, tensor in read_header(single_file(self.directory)).items():
                self.tensors[tensor_name] = tensor
        self._files: dict[Path, int] = {}
        self._pool = ThreadPoolExecutor(WORKERS, thread_name_prefix="dsvl2-read")

    def __enter__(self) -> Source:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        self._pool.shutdown(wait=True)
        for descriptor in self._files.values():
            os.close(descriptor)
        self._files.clear()

    @property
    def total_bytes(self) -> int:
        return sum(tensor.size for tensor in self.tensors.values())

    @property
    def shapes_and_dtypes(self) -> dict[str, tuple[Shape, str]]:
        """What `rules.check` takes."""
        return {name: (tensor.shape, tensor.dtype) for name, tensor in self.tensors.items()}

    def leaf_dtype(self, leaf: Leaf) -> np.dtype:
        """The dtype that holds every tensor of a parameter without loss: theirs, or float32 when they differ."""
        names = {FLOAT_DTYPES[self.tensors[source].dtype] for source in leaf.sources}
        return numpy_dtype(names.pop() if len(names) == 1 else "float32")

    def read_leaf(self, leaf: Leaf, dtype: np.dtype) -> np.ndarray:
        """One parameter in our layout, cast to ``dtype``, in memory that jax on CPU can take without a copy."""
        return self.read_into(leaf, aligned_empty(leaf.shape, dtype))

    def read_slice(self, leaf: Leaf, window: tuple[slice, ...], dtype: np.dtype) -> np.ndarray:
        """As `read_leaf`, a slice of the parameter: ``window`` has start and stop for each axis.

        Of a released tensor the rows that the slice needs are read, whole; where the slice is no block of the tensor
        (a convolution's inputs, parts of attention heads), the whole parameter is.
        """
        if window == tuple(slice(0, size) for size in leaf.shape):
            return self.read_leaf(leaf, dtype)
        out = aligned_empty(tuple(part.stop - part.start for part in window), dtype)
        block_and_parts = leaf.block(window, out)
        if block_and_parts is None:
            out[...] = self.read_leaf(leaf, dtype)[window]
        else:
            block, parts = block_and_parts
            self._fill(parts, leaf.layout.is_identity, block)
        return out

    def read_into(self, leaf: Leaf, parameter: np.ndarray) -> np.ndarray:
        """Fills ``parameter``, a contiguous array of the leaf's shape, casting to its dtype; returns it."""
        self._fill(leaf.parts(parameter), leaf.layout.is_identity)
        return parameter

    def _fill(
        self, parts: Sequence[tuple[str, np.ndarray]], in_order: bool, block: tuple[slice, ...] | None = None
    ) -> None:
        """Fills views, each with the shape of ``block`` (all, if None) of its tensor."""
        jobs = [job for name, part in parts for job in self._jobs(name, part, in_order, block)]
        for done in [self._pool.submit(job) for job in jobs]:
            done.result()

    def blocks(self, name: str, block_bytes: int = READ_BYTES) -> Iterator[np.ndarray]:
        """The elements of one tensor, flat, at most ``block_bytes`` at a time, as stored."""
        tensor = self.tensors[name]
        dtype = numpy_dtype(FLOAT_DTYPES[tensor.dtype])
        for start in range(0, tensor.size, block_bytes):
            block = np.empty(min(block_bytes, tensor.size - start) // dtype.itemsize, dtype)
            self._read(tensor, start, block)
            yield block

    def _jobs(self, name: str, out: np.ndarray, in_order: bool, block: tuple[slice, ...] | None) -> list:
        """Calls that together fill ``out``, a view of the released shape or that of ``block``, from tensor ``name``."""
        tensor = self.tensors[name]
        row = tensor.size // max(1, tensor.shape[0])  # bytes
        first, columns = (block[0].start, block[1:]) if block else (0, ())
        whole = out.shape[1:] == tensor.shape[1:]
        if in_order and whole and out.dtype == numpy_dtype(FLOAT_DTYPES[tensor.dtype]):
            return [functools.partial(self._read, tensor, first * row, out)]
        rows = max(1, READ_BYTES // max(1, row))
        return [
            functools.partial(self._copy_rows, tensor, first + start, out[start : start + rows], columns)
            for start in range(0, out.shape[0], rows)
        ]

    def _copy_rows(self, tensor: Tensor, start: int, out: np.ndarray, columns: tuple[slice, ...]) -> None:
        rows = np.empty((len(out), *tensor.shape[1:]), numpy_dtype(FLOAT_DTYPES[tensor.dtype]))
        self._read(tensor, start * (tensor.size // tensor.shape[0]), rows)
        copy_rows(out, rows[:, *columns])

    def _read(self, tensor: Tensor, offset: int, out: np.ndarray) -> None:
        """Fills contiguous ``out`` from byte ``offset`` of the tensor."""
        remaining = memoryview(out.reshape(-1).view(np.uint8))
        position = tensor.start + offset
        descriptor = self._descriptor(tensor.file)
        while remaining:
            try:
                count = os.preadv(descriptor, [remaining], position)
            except OSError as error:
                raise CheckpointError(f"{tensor.file}: cannot be read ({error.strerror}). {_ADVICE}") from None
            if count == 0:
                raise CheckpointError(f"{tensor.file}: ends at byte {position}, while it is being read. {_ADVICE}")
            remaining = remaining[count:]
            position += count

    def _descriptor(self, file: Path) -> int:
        if file not in self._files:
            descriptor = os.open(file, os.O_RDONLY)
            if self._files.setdefault(file, descriptor) != descriptor:  # another thread was faster
                os.close(descriptor)
        return self._files[file]

    def _open_sharded(self, index: Path) -> None:
        weight_map = read_index(index)
        problems: list[str] = []
        tensors: dict[str, Tensor] = {}
        for file_name in sorted(set(weight_map.values())):
            file = self.directory / file_name
            try:
                header = read_header(file)
            except CheckpointError as error:
                problems.append(str(error))
                continue
            for name, tensor in header.items():
                listed_in = weight_map.get(name)
                if listed_in is None:
                    problems.append(f"{file}: tensor {name} is not in {INDEX_NAME}. Download both again.")
                elif listed_in == file_name:
                    tensors[name] = tensor
            problems += [
                f"{index}: says that tensor {name} is in {file_name}, which does not have it. Download both again."
                for name, listed_in in weight_map.items()
                if listed_in == file_name and name not in header
            ]
        if problems:
            raise CheckpointError(
                f"{self.directory}: the shards are not those of {INDEX_NAME}:\n{listed(problems, indent='  ')}"
            )
        self.tensors = {name: tensors[name] for name in weight_map}


def digests(directory: Path, names: Sequence[str]) -> str:
    """The text of a ``SHA256SUMS`` for these files of a directory."""
    lines = []
    for name in names:
        with (directory / name).open("rb") as file:
            lines.append(f"{hashlib.file_digest(file, 'sha256').hexdigest()}  {name}\n")
    return "".join(lines)


def check_digests(directory: Path) -> None:
    """Raises CheckpointError when a file is not as the directory's ``SHA256SUMS``, if it has one, says."""
    path = directory / DIGESTS_NAME
    if not path.is_file():
        return
    expected = path.read_text(encoding="utf-8").splitlines(keepends=True)
    names = [line[66:].rstrip("\n") for line in expected]
    missing = [name for name in names if not (directory / name).is_file()]
    present = [name for name in names if name not in missing]
    changed = sorted(set(digests(directory, present).splitlines(keepends=True)) - set(expected))
    if missing or changed:
        problems = [f"{name}: missing" for name in missing] + [f"{line[66:].strip()}: changed" for line in changed]
        raise CheckpointError(
            f"{directory}: its files are not those that {DIGESTS_NAME} lists; get them again (or remove {DIGESTS_NAME} "
            f"if you changed them on purpose):\n{listed(problems)}"
        )


def single_file(directory: Path) -> Path:
    """The only safetensors file of a directory without an index."""
    files = sorted(directory.glob("*.safetensors"))
    if len(files) == 1:
        return files[0]
    if not files:
        raise CheckpointError(
            f"{directory}: found neither {INDEX_NAME} nor a .safetensors file. Expected a checkpoint in the released "
            "layout: download all files of the release into this directory."
        )
    raise CheckpointError(
        f"{directory}: found {len(files)} .safetensors files but no {INDEX_NAME} that says which tensor is where. "
        "Download the index as well."
    )


def read_index(index: Path) -> dict[str, str]:
    """Tensor name → shard file name. Raises CheckpointError when the index cannot be one."""
    advice = "It is not an index of shards: download the file again."
    weight_map = read_json_object(index, CheckpointError, advice).get("weight_map")
    if not isinstance(weight_map, dict):
        kind = type(weight_map).__name__
        raise CheckpointError(f'{index}: "weight_map" is {kind}, expected an object of tensor names to files. {advice}')
    for name, file_name in weight_map.items():
        # An index is downloaded data: it must not be able to name files outside its directory.
        if not isinstance(file_name, str) or not re.fullmatch(r"[^/\\]+\.safetensors", file_name):
            raise CheckpointError(
                f"{index}: tensor {name} is said to be in {file_name!r}; expected the name of a .safetensors file in "
                "the same directory. Download the file again."
            )
    if not weight_map:
        raise CheckpointError(f"{index}: lists no tensor. Download the file again.")
    return weight_map


def read_header(file: Path) -> dict[str, Tensor]:
    """Tensor name → `Tensor` of one safetensors file, whose header is validated against the file's size.

    Raises:
      CheckpointError: the file is missing, truncated, or its header contradicts itself.
    """
    if not file.is_file():
        raise CheckpointError(f"{file}: this shard is missing. Download it into the directory of the others.")
    try:
        # The library checks that sizes follow from shapes, that the tensors tile the file, and the file's length.
        with safetensors.safe_open(file, framework="numpy"):
            pass
        with file.open("rb") as opened:
            (length,) = struct.unpack("<Q", opened.read(8))
            header = json.loads(opened.read(length))
    except (safetensors.SafetensorError, OSError, ValueError, struct.error) as error:
        raise CheckpointError(
            f"{file}: not a complete safetensors file ({error}); it has {file.stat().st_size} bytes"
            f"{_expected_size(file)}. {_ADVICE}"
        ) from None
    header.pop("__metadata__", None)
    return {
        name: Tensor(
            file,
            entry["dtype"],
            tuple(entry["shape"]),
            8 + length + entry["data_offsets"][0],
            entry["data_offsets"][1] - entry["data_offsets"][0],
        )
        for name, entry in header.items()
    }


def _expected_size(file: Path) -> str:
    """What the header, if it can be read, says about the file's size: part of an error message."""
    try:
        with file.open("rb") as opened:
            (length,) = struct.unpack("<Q", opened.read(8))
            header = json.loads(opened.read(min(length, 100 << 20)))
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        return f", its header says {8 + length + max(ends)}"
    except (OSError, ValueError, struct.error, KeyError, TypeError, IndexError, AttributeError):
        return ""


def aligned_empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An uninitialised array on a 64-byte boundary, which `jax.device_put` on CPU takes without copying."""
    size = leaf_bytes(shape, dtype)
    memory = np.empty(size + 64, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + size].view(dtype).reshape(shape)


def copy_rows(out: np.ndarray, rows: np.ndarray) -> None:
    """``out[...] = rows``, fast when one of them is a transposed view."""
    for start in range(0, len(rows), ROWS_PER_COPY):
        out[start : start + ROWS_PER_COPY] = rows[start : start + ROWS_PER_COPY]
