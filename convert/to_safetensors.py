"""Back to the released layout: the inverse of `convert`, by the same table, shard by shard.

The safetensors library serialises a whole file from memory. Here a shard's header is written first,
since every size is known, and each tensor's bytes then go to their place in the file as the parameter
that holds it comes by.
"""

from __future__ import annotations

import json
import os
import struct
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import numpy as np
from rich import filesize

from dsvl2_jax.checkpoint import rules
from dsvl2_jax.checkpoint.leaves import leaf_bytes
from dsvl2_jax.checkpoint.load import DTYPES, absent_leaves, open_orbax, plain_dtype, read_weights
from dsvl2_jax.checkpoint.locate import PARAMS_NAME, carry_files, kind, model_files, open_model, resolve
from dsvl2_jax.checkpoint.remote import absolute, path_of
from dsvl2_jax.checkpoint.safetensors_source import READ_BYTES, WORKERS, copy_rows, numpy_dtype
from dsvl2_jax.checkpoint.shards import INDEX_NAME
from dsvl2_jax.checkpoint.staging import refuse_existing, staged
from dsvl2_jax.checkpoint.verify import tell
from dsvl2_jax.checkpoint.verify import verify as verify_files
from dsvl2_jax.convert.sizes import parse_bytes
from dsvl2_jax.errors import CheckpointError, UsageError
from dsvl2_jax.model.parameter_paths import stays_float32
from dsvl2_jax.model.quantization import kinds_of
from dsvl2_jax.runtime.progress import progress

DEFAULT_SHARD_BYTES = 5_000_000_000
_SAFETENSORS_NAMES = {numpy_name: name for name, numpy_name in rules.FLOAT_DTYPES.items()}

# Released name → (shape, dtype) of every tensor to write.
Tensors = Mapping[str, tuple[rules.Shape, np.dtype]]


class ShardWriter:
    """Writes named tensors, in any order, into safetensors shards of a directory.

    Every tensor given to the constructor must be written before `finish`. Use as a context manager.
    """

    def __init__(self, directory: Path, tensors: Tensors, max_shard_bytes: int = DEFAULT_SHARD_BYTES):
        """Creates the shards with their headers. ``tensors`` are put into shards in the order given."""
        self._directory = directory
        self._total = sum(leaf_bytes(*entry) for entry in tensors.values())
        self._positions: dict[str, tuple[int, int]] = {}  # name → (file descriptor, byte offset)
        self._weight_map: dict[str, str] = {}
        self._descriptors: list[int] = []
        self._pool = ThreadPoolExecutor(WORKERS, thread_name_prefix="dsvl2-write")
        shards = split_into_shards(tensors, max_shard_bytes)
        for number, names in enumerate(shards, start=1):
            self._create(f"model-{number:05d}-of-{len(shards):05d}.safetensors", {n: tensors[n] for n in names})

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._pool.shutdown(wait=True)
        for descriptor in self._descriptors:
            os.close(descriptor)

    def write(self, tensors: Mapping[str, np.ndarray]) -> None:
        """Writes some tensors, which may be strided views, and returns when that is done."""
        jobs = [
            self._pool.submit(self._write_rows, name, array, start, stop)
            for name, array in tensors.items()
            for start, stop in _row_ranges(array)
        ]
        for job in jobs:
            job.result()

    def finish(self) -> None:
        """Writes the index."""
        index = {"metadata": {"total_size": self._total}, "weight_map": dict(sorted(self._weight_map.items()))}
        (self._directory / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

    def _create(self, file_name: str, tensors: Tensors) -> None:
        # Wide dtypes first: every tensor then starts at a multiple of its element size.
        names = sorted(tensors, key=lambda name: -tensors[name][1].itemsize)
        header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
        position = 0
        for name in names:
            shape, dtype = tensors[name]
            size = leaf_bytes(shape, dtype)
            header[name] = {
                "dtype": _SAFETENSORS_NAMES[dtype.name],
                "shape": list(shape),
                "data_offsets": [position, position + size],
            }
            position += size
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        descriptor = os.open(self._directory / file_name, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
        self._descriptors.append(descriptor)
        _write_all(descriptor, struct.pack("<Q", len(text)) + text, 0)
        os.truncate(descriptor, 8 + len(text) + position)
        for name in names:
            self._positions[name] = (descriptor, 8 + len(text) + header[name]["data_offsets"][0])
            self._weight_map[name] = file_name

    def _write_rows(self, name: str, array: np.ndarray, start: int, stop: int) -> None:
        rows = array[start:stop] if array.ndim else array
        if not rows.flags.c_contiguous:
            strided, rows = rows, np.empty(rows.shape, rows.dtype)
            copy_rows(rows, strided)
        descriptor, offset = self._positions[name]
        row_bytes = array.nbytes // max(1, len(array)) if array.ndim else array.nbytes
        _write_all(descriptor, memoryview(rows.reshape(-1).view(np.uint8)), offset + start * row_bytes)


def export(
    ckpt: str | Path | None,
    dst: str | Path,
    *,
    dtype: Literal["float32", "bfloat16"] | None = None,
    max_shard_bytes: int | str = DEFAULT_SHARD_BYTES,
    verify: bool = False,
) -> Path:
    """Writes a converted or trained checkpoint to the released layout.

    Args:
      ckpt: a converted directory, which comes back bit for bit as it was converted from (of one that was quantized
        each weight is value times scale, in the dtype of the embeddings, and a note says so), or a training run (its
        newest checkpoint) or one of its checkpoints.
      dst: the directory to make. It appears when it is complete.
      dtype: casts every tensor but the router's, which compute in float32; by default each is as stored. What a
        run has trained is stored in float32.
      max_shard_bytes: most bytes of tensors in one shard, such as "5GB"; a single larger tensor may pass.
      verify: read every file before and compare it with its digest.

    Returns:
      The directory.

    Raises:
      CheckpointError: ``ckpt`` is not a complete checkpoint in Orbax's layout, ``dst`` exists, or the disk is full.
      UsageError: ``dtype`` or ``max_shard_bytes`` makes no sense.
      ConfigError, TokenizerError: the directory's config or tokenizer cannot be used.
    """
    if dtype is not None and dtype not in DTYPES:
        raise UsageError(f"--dtype {dtype}: expected one of {', '.join(DTYPES)}.")
    dst = absolute(path_of(dst))
    shard_bytes = parse_bytes(max_shard_bytes)
    refuse_existing(dst)
    directory = resolve(ckpt)
    if kind(directory) == "released":
        raise CheckpointError(
            f"{directory}: is in the released layout already; export takes a converted directory or a training run."
        )
    if verify:
        tell(directory, verify_files(directory))
    config, _ = open_model(directory)
    leaves = {leaf.path: leaf for leaf in rules.expand(config)}
    manifest, stored = open_orbax(directory, config)
    kinds, plain = kinds_of(stored), numpy_dtype(dtype) if dtype else plain_dtype(stored)
    if kinds:
        names, written = ", ".join(sorted(set(kinds.values()))), plain.name
        rounds_again = ", and bfloat16 rounds those of int8 once more (--dtype float32 does not)"
        print(
            f"note: {len(kinds)} weights are in {names} and are written as value times scale in "
            f"{written}. What rounding took from the original numbers does not come back"
            f"{rounds_again if written == 'bfloat16' and 'int8' in names else ''}.",
            file=sys.stderr,
        )
    if absent := absent_leaves(directory / PARAMS_NAME, stored):
        stored = {path: entry for path, entry in stored.items() if path not in absent}
        leaves = {path: leaf for path, leaf in leaves.items() if path not in absent}
        print(f"left out: {rules.UNUSED}*, which the checkpoint was made without", file=sys.stderr)
    mixed = {name: numpy_dtype(dtype_name) for name, dtype_name in manifest.get("mixed_dtypes", {}).items()}
    tensors = {
        name: (
            leaf.layout.source_shape,
            mixed.get(name, plain if path in kinds else stored[path][1])
            if dtype is None or stays_float32(path)
            else numpy_dtype(dtype),
        )
        for path, leaf in leaves.items()
        for name in leaf.sources
    }
    total = sum(leaf_bytes(*entry) for entry in tensors.values())
    with staged(dst, total) as partial:
        carry_files(model_files(directory), partial)
        with ShardWriter(partial, tensors, shard_bytes) as writer, progress("export", total) as advance:
            for path, parameter in read_weights(directory / PARAMS_NAME, stored, config, plain):
                parts = leaves[path].parts(parameter)
                writer.write({name: part.astype(tensors[name][1], copy=False) for name, part in parts})
                advance(sum(leaf_bytes(*tensors[name]) for name in leaves[path].sources))
            writer.finish()
    print(f"wrote {dst}: {len(tensors)} tensors, {filesize.decimal(total)}", file=sys.stderr)
    return dst


def split_into_shards(tensors: Tensors, max_shard_bytes: int) -> list[list[str]]:
    """Tensor names, in order, in groups of at most ``max_shard_bytes``; a larger tensor is alone."""
    shards: list[list[str]] = [[]]
    total = 0
    for name, entry in tensors.items():
        size = leaf_bytes(*entry)
        if shards[-1] and total + size > max_shard_bytes:
            shards.append([])
            total = 0
        shards[-1].append(name)
        total += size
    return shards


def _row_ranges(array: np.ndarray) -> Iterator[tuple[int, int]]:
    """(start, stop) along the first axis, each about `READ_BYTES`."""
    count = len(array) if array.ndim else 1
    step = max(1, READ_BYTES // max(1, array.nbytes // max(1, count)))
    for start in range(0, count, step):
        yield start, min(start + step, count)


def _write_all(descriptor: int, data: bytes | memoryview, offset: int) -> None:
    remaining = memoryview(data)
    while remaining:
        count = os.pwrite(descriptor, remaining, offset)
        remaining = remaining[count:]
        offset += count
