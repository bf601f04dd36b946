"""Reading a checkpoint in the released layout: the tensors of `dsvl2_jax.checkpoint.shards`.

Files are read by byte range, never mapped: mapped pages would count as resident memory, and a
conversion must need no more of it than the parameter it works on. bfloat16 comes from `ml_dtypes`.
"""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import ml_dtypes
import numpy as np

from dsvl2_jax.checkpoint.digests import check_sums
from dsvl2_jax.checkpoint.leaves import leaf_bytes
from dsvl2_jax.checkpoint.quantized_source import find_quantized
from dsvl2_jax.checkpoint.quantized_tensors import QuantizedTensor
from dsvl2_jax.checkpoint.rules import FLOAT_DTYPES, UNUSED, Leaf, Shape, expected_shapes
from dsvl2_jax.checkpoint.safetensors_file import DOWNLOAD_AGAIN, Tensor
from dsvl2_jax.checkpoint.shards import open_shards
from dsvl2_jax.checkpoint.tensor_names import check_buffer, released_names
from dsvl2_jax.errors import CheckpointError
from dsvl2_jax.model.config import Config

# Copies between transposed arrays go this many released rows at a time: the strided side then stays in the cache.
ROWS_PER_COPY = 32
READ_BYTES = 8 << 20  # one read of a tensor that has to be transposed or cast
WORKERS = 2  # numpy's copies and the reads release the GIL; more threads than that wait for memory


def numpy_dtype(name: str) -> np.dtype:
    """numpy dtype of "float32", "float16" or "bfloat16"."""
    return np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name)


class Source:
    """The tensors of a directory in the released layout.

    ``tensors`` maps names to `Tensor` or, once the names are released ones, to the `QuantizedTensor` that several of
    them make up; ``notes`` says what was tolerated. Only headers are read on construction. Use as a context manager, or
    call `close`.
    """

    def __init__(self, directory: str | Path):
        """Raises CheckpointError naming the file for anything missing, truncated, changed or inconsistent."""
        self.directory = Path(directory)
        self.digests = check_sums(self.directory)  # by file name
        self.tensors: dict[str, Tensor | QuantizedTensor]
        self.tensors, self.notes = open_shards(self.directory)
        self.files = sorted({tensor.file for tensor in self.tensors.values()})
        self._files: dict[Path, int] = {}
        self._buffers = threading.local()
        self._pool = ThreadPoolExecutor(WORKERS, thread_name_prefix="dsvl2-read")

    def fit(self, config: Config) -> None:
        """Gives the tensors their released names, and adds to ``notes``.

        Buffers that are no parameters are let go of, and a weight that others have quantized takes the place of the
        tensors that make it up.

        Raises:
          CheckpointError: the names are an adapter's, two become the same, a buffer is not what ``config`` says, or
            quantized weights are incomplete or of a format that is not read.
        """
        names = released_names(self.tensors, config, str(self.directory))
        for name, stored in names.buffers.items():
            blocks = [block.astype(np.float32) for block in self._blocks(self.tensors[stored])]
            check_buffer(name, np.concatenate(blocks or [np.empty(0, np.float32)]), config, str(self.directory))
        tensors = {name: self.tensors[stored] for name, stored in names.tensors.items()}
        self.tensors, notes = find_quantized(tensors, expected_shapes(config), self.directory, self._read)
        self.notes += [*names.notes, *notes]

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
        """The dtype that holds all tensors of a parameter without loss; float32 where they differ or are absent."""
        sources = (source for source in leaf.sources if source in self.tensors)
        names = {FLOAT_DTYPES[self.tensors[source].dtype] for source in sources}
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
        """The elements of a tensor, flat, at most ``block_bytes`` at a time, as stored; of a quantized one float32."""
        return self._blocks(self.tensors[name], block_bytes)

    def _blocks(self, tensor: Tensor | QuantizedTensor, block_bytes: int = READ_BYTES) -> Iterator[np.ndarray]:
        if isinstance(tensor, QuantizedTensor):
            rows = max(1, block_bytes // _row_bytes(tensor))
            for start in range(0, tensor.shape[0], rows):
                yield self._rows(tensor, start, min(rows, tensor.shape[0] - start)).reshape(-1)
            return
        dtype = numpy_dtype(FLOAT_DTYPES[tensor.dtype])
        for start in range(0, tensor.size, block_bytes):
            block = np.empty(min(block_bytes, tensor.size - start) // dtype.itemsize, dtype)
            self._read(tensor, start, block)
            yield block

    def _jobs(self, name: str, out: np.ndarray, in_order: bool, block: tuple[slice, ...] | None) -> list:
        """Calls that together fill ``out``, a view of the released shape or that of ``block``, from tensor ``name``.

        A tensor of an unused part that the checkpoint lacks is zeros.
        """
        if name.startswith(UNUSED) and name not in self.tensors:
            return [functools.partial(out.fill, 0)]
        tensor = self.tensors[name]
        row = _row_bytes(tensor)
        first, columns = (block[0].start, block[1:]) if block else (0, ())
        whole = out.shape[1:] == tensor.shape[1:] and isinstance(tensor, Tensor)
        if in_order and whole and out.dtype == numpy_dtype(FLOAT_DTYPES[tensor.dtype]):
            return [functools.partial(self._read, tensor, first * row, out)]
        rows = max(1, READ_BYTES // max(1, row))
        return [
            functools.partial(self._copy_rows, tensor, first + start, out[start : start + rows], columns)
            for start in range(0, out.shape[0], rows)
        ]

    def _copy_rows(
        self, tensor: Tensor | QuantizedTensor, start: int, out: np.ndarray, columns: tuple[slice, ...]
    ) -> None:
        copy_rows(out, self._rows(tensor, start, len(out))[:, *columns])

    def _rows(self, tensor: Tensor | QuantizedTensor, start: int, count: int) -> np.ndarray:
        """Rows of a tensor, which stay until this thread reads others."""
        if isinstance(tensor, QuantizedTensor):
            return tensor.rows(start, count, self._read)
        dtype, row = numpy_dtype(FLOAT_DTYPES[tensor.dtype]), _row_bytes(tensor)
        rows = self._buffer(count * row).view(dtype).reshape(count, *tensor.shape[1:])
        self._read(tensor, start * row, rows)
        return rows

    def _buffer(self, size: int) -> np.ndarray:
        """u8[size] of this thread, used again by its next read: fresh memory is zeroed by the system, page by page."""
        buffer = getattr(self._buffers, "bytes", None)
        if buffer is None or buffer.size < size:
            buffer = self._buffers.bytes = np.empty(max(size, READ_BYTES), np.uint8)
        return buffer[:size]

    def _read(self, tensor: Tensor, offset: int, out: np.ndarray) -> None:
        """Fills contiguous ``out`` from byte ``offset`` of the tensor."""
        remaining = memoryview(out.reshape(-1).view(np.uint8))
        position = tensor.start + offset
        descriptor = self._descriptor(tensor.file)
        while remaining:
            try:
                count = os.preadv(descriptor, [remaining], position)
            except OSError as error:
                raise CheckpointError(f"{tensor.file}: cannot be read ({error.strerror}). {DOWNLOAD_AGAIN}") from None
            if count == 0:
                raise CheckpointError(
                    f"{tensor.file}: ends at byte {position}, while it is being read. {DOWNLOAD_AGAIN}"
                )
            remaining = remaining[count:]
            position += count

    def _descriptor(self, file: Path) -> int:
        if file not in self._files:
            descriptor = os.open(file, os.O_RDONLY)
            if self._files.setdefault(file, descriptor) != descriptor:  # another thread was faster
                os.close(descriptor)
        return self._files[file]


def _row_bytes(tensor: Tensor | QuantizedTensor) -> int:
    """What a row of the tensor's first axis takes while it is copied; of a quantized one, float32 and its making."""
    if isinstance(tensor, QuantizedTensor):
        return 16 * tensor.shape[1]
    return tensor.size // max(1, tensor.shape[0])


def aligned_empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An uninitialised array on a 64-byte boundary, which `jax.device_put` on CPU takes without copying."""
    size = leaf_bytes(shape, dtype)
    memory = np.empty(size + 64, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + size].view(dtype).reshape(shape)


def copy_rows(out: np.ndarray, rows: np.ndarray) -> None:
    """``out[...] = rows``, fast when one of them is a transposed view.

    A transposed copy is one of whole numbers, and a cast runs along the memory of ``out``: ml_dtypes' functions for
    strided elements take four times as long.
    """
    bits = np.dtype(f"u{rows.itemsize}")
    for start in range(0, len(rows), ROWS_PER_COPY):
        block, part = out[start : start + ROWS_PER_COPY], rows[start : start + ROWS_PER_COPY].view(bits)
        if block.dtype == rows.dtype:
            block.view(bits)[...] = part
        else:
            ordered = np.empty_like(block, dtype=bits)  # its axes lie in memory as those of the block do
            ordered[...] = part
            block[...] = ordered.view(rows.dtype)
