"""From the released layout to an Orbax checkpoint, one parameter at a time.

Everything that can be wrong with the source is checked before anything is written. While one parameter
is being written, the next is read and transposed; `max_memory` bounds what is held at once.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from rich import filesize

from dsvl2_jax.checkpoint import digests, orbax_io, rules
from dsvl2_jax.checkpoint.leaves import Leaves, batches, leaf_bytes
from dsvl2_jax.checkpoint.load import DTYPES
from dsvl2_jax.checkpoint.locate import (
    MANIFEST_NAME,
    MANIFEST_VERSION,
    PARAMS_NAME,
    carry_files,
    kind,
    model_files,
    open_model,
    resolve,
)
from dsvl2_jax.checkpoint.remote import absolute, path_of
from dsvl2_jax.checkpoint.safetensors_source import WORKERS, Source, aligned_empty, numpy_dtype
from dsvl2_jax.checkpoint.staging import refuse_existing, staged
from dsvl2_jax.checkpoint.verify import tell
from dsvl2_jax.convert.calibrate import calibrated_weights
from dsvl2_jax.convert.sizes import parse_bytes
from dsvl2_jax.convert.stored_source import StoredSource
from dsvl2_jax.errors import CheckpointError, UsageError
from dsvl2_jax.kernels.quantized import quantize
from dsvl2_jax.model.config import Config
from dsvl2_jax.model.deepseek_vl2 import entry_axes, weight_inputs
from dsvl2_jax.model.parameter_paths import LeafPath, path_name
from dsvl2_jax.model.quantization import (
    Quantization,
    leaves_of,
    quantize_array,
    quantized_shapes,
    quantized_weights,
)
from dsvl2_jax.runtime.progress import progress

DEFAULT_MAX_MEMORY = 1 << 30

# A partial save costs time in the number of leaves saved before it, so large leaves go first and small
# ones are saved together.
WRITE_BATCH_BYTES = 256 << 20

_ROUND_AT_ONCE = 1 << 20  # numbers that a thread rounds at a time

_ALIGNMENT = 64  # bytes between parameters of one block of memory


@dataclasses.dataclass(frozen=True)
class Converted:
    """What was written: the directory, parameters, bytes of tensors, wall-clock seconds, and remarks for the user."""

    directory: Path
    parameters: int
    bytes: int
    seconds: float
    notes: tuple[str, ...] = ()


def convert(
    src: str | Path,
    dst: str | Path,
    *,
    dtype: Literal["float32", "bfloat16"] | None = None,
    max_memory: int | str = DEFAULT_MAX_MEMORY,
    quantization: Quantization | None = None,
    calibrate: str | Path | None = None,
) -> Converted:
    """Converts a checkpoint in the released layout to an Orbax directory that is complete by itself.

    Args:
      src: a directory in the released layout (shards with an index, or a single file) or a hub id; to be quantized,
        also a converted directory, a training run or one of its checkpoints.
      dst: the directory to make. It appears when it is complete.
      dtype: casts every tensor that is not quantized; by default each keeps its own.
      quantization: which weights are rounded to 8 or 4 bits; None: none is.
      calibrate: a file of samples, by which int4 weights are rounded; see `dsvl2_jax.convert.calibrate`. The whole
        model is loaded for it.
      max_memory: most memory for parameters on their way, such as "4GiB" or a number of bytes; one
        parameter may always pass. The program itself takes about 0.3 GB besides.

    Raises:
      CheckpointError: the source is incomplete or does not fit its config.json, ``dst`` exists, or the
        disk is full. Nothing is left behind.
      ConfigError, TokenizerError: the source's config or tokenizer cannot be used.
      UsageError: ``dtype`` or ``max_memory`` makes no sense.
    """
    started = time.monotonic()
    if dtype is not None and dtype not in DTYPES:
        raise UsageError(f"--dtype {dtype}: expected one of {', '.join(DTYPES)}.")
    limit = parse_bytes(max_memory)
    if calibrate is not None and quantization is None:
        raise UsageError(f"--calibrate {calibrate}: serves --quantize int4; give both, or neither.")
    dst = absolute(path_of(dst))
    refuse_existing(dst)
    directory = resolve(src)
    released = kind(directory) == "released"
    if not released and quantization is None:
        raise CheckpointError(
            f"{directory}: is a converted checkpoint already; convert takes the released layout, or with --quantize "
            "this one too. To get the released layout back, use dsvl2 export."
        )
    config, processor = open_model(directory)
    with Source(directory) if released else StoredSource(directory, config) as source:
        source.fit(config)
        if released:
            rules.check(source.shapes_and_dtypes, config, str(directory))
        leaves = {leaf.path: leaf for leaf in rules.expand(config)}
        read = {
            path: (leaf.shape, numpy_dtype(dtype) if dtype else source.leaf_dtype(leaf))
            for path, leaf in leaves.items()
        }
        mixed = {} if dtype else mixed_dtypes(source, leaves, read) if released else source.mixed_dtypes
        kinds = quantized_weights(config, quantization)
        plan = {
            path: (shape, stored_as or read[path][1]) for path, (shape, stored_as) in leaves_of(config, kinds).items()
        }
        calibrated = (
            {} if calibrate is None else calibrated_weights(directory, config, processor, kinds, path_of(calibrate))
        )
        total = sum(leaf_bytes(*entry) for entry in plan.values())
        notes = [*source.notes]
        if calibrated:
            notes.append(f"{len(calibrated)} of the weights in int4 are rounded by the samples of {calibrate}")
        if mixed:
            notes.append(
                f"{len(mixed)} tensors are of another dtype than others of the same stacked parameter: kept as float32"
            )
        with staged(dst, total, last=MANIFEST_NAME) as partial:
            carry_files(model_files(directory), partial)
            with digests.Flushing(partial) as flushing:
                with (
                    orbax_io.ParamWriter(partial / PARAMS_NAME, _entry_axes(config, kinds)) as writer,
                    progress("convert", sum(leaf_bytes(*entry) for entry in read.values())) as advance,
                ):
                    inputs = weight_inputs(config)
                    rounding = {
                        path: functools.partial(quantize_in_parts, kind=kind, inputs=inputs[path])
                        for path, kind in kinds.items()
                    }
                    rounding |= {path: lambda _, path=path: calibrated.pop(path) for path in calibrated}
                    fill = functools.partial(_read_released, source, leaves) if released else source.read_into
                    _write_parameters(fill, read, rounding, writer, limit, advance, flushing.take)
                    writer.finalize()
                # Now that the source is in the system's cache, as far as it has room; beside the conversion, reading
                # it a second time made the conversion wait for the disk.
                flushing.take()
                known = source.digests  # of SHA256SUMS, and compared; or of a converted directory's own source
                names = [file.name for file in source.files]
                source_digests = digests.of_files(directory, [name for name in names if name not in known])
                source_digests |= {name: value for name, value in known.items() if not names or name in names}
                own_digests = flushing.finish()
            write_manifest(
                partial,
                plan,
                source=str(src),
                mixed=mixed,
                notes=notes,
                quantization=quantization,
                own_digests=own_digests,
                source_digests=source_digests,
            )
    parameters = sum(math.prod(leaf.shape) for leaf in leaves.values())
    seconds = time.monotonic() - started
    tell(directory, notes)
    print(f"wrote {dst}: {parameters:,} parameters, {filesize.decimal(total)} in {seconds:.1f} s", file=sys.stderr)
    return Converted(dst, parameters, total, seconds, tuple(notes))


def mixed_dtypes(source: Source, leaves: Mapping[LeafPath, rules.Leaf], plan: Leaves) -> dict[str, str]:
    """Tensors whose dtype is not that of the stacked parameter that they are part of → their own."""
    stored_as = {name: rules.FLOAT_DTYPES[tensor.dtype] for name, tensor in source.tensors.items()}
    return {
        name: stored_as[name]
        for path, leaf in leaves.items()
        for name in leaf.sources
        if name in stored_as and stored_as[name] != plan[path][1].name
    }


def _read_released(
    source: Source, leaves: Mapping[LeafPath, rules.Leaf], arrays: Mapping[LeafPath, np.ndarray]
) -> None:
    for path, array in arrays.items():
        source.read_into(leaves[path], array)


def writing_bytes(size: int) -> int:
    """Memory that a batch takes while it is written: Orbax copies what it cuts into chunks, once as they are and
    once encoded."""
    return size if size <= orbax_io.CHUNK_BYTES else 3 * size


def _entry_axes(config: Config, kinds: Mapping[LeafPath, str]) -> dict[LeafPath, int]:
    """`entry_axes`, of the values of quantized weights too."""
    return {(*path, kinds[path]) if path in kinds else path: axis for path, axis in entry_axes(config).items()}


def _write_parameters(
    fill: Callable[[Mapping[LeafPath, np.ndarray]], None],
    read: Leaves,
    rounding: Mapping[LeafPath, Callable[..., dict[str, np.ndarray]]],
    writer: orbax_io.ParamWriter,
    limit: int,
    advance: Callable[[int], None],
    written: Callable[[], None],
) -> None:
    """Reads batches of parameters and gives them to ``writer``, one being written while the next is read.

    Args:
      fill: reads parameters into arrays.
      read: shape and dtype of each parameter as it is read.
      rounding: what makes {kind: values, "scale": scale} of those that are quantized.
      written: called when a batch has been written and the next one has not begun.
    """
    memory, writing, in_flight = _Memory(), None, 0
    by_size = dict(sorted(read.items(), key=lambda item: -leaf_bytes(*item[1])))
    for batch in batches(by_size, min(WRITE_BATCH_BYTES, limit // 2)):
        size = sum(leaf_bytes(*read[path]) for path in batch)
        needed = sum(writing_bytes(leaf_bytes(*read[path])) for path in batch)
        if writing is not None and in_flight + needed > limit:
            writer.wait()
            memory.give_back(writing)
            writing = None
        block = memory.take(size + _ALIGNMENT * len(batch))
        arrays = _carve(block, {path: read[path] for path in batch})
        fill(arrays)
        for path in batch:
            if path in rounding:
                quantized = rounding[path](arrays.pop(path))
                arrays |= {(*path, name): array for name, array in quantized.items()}
        writer.wait()
        written()
        writer.write(arrays)
        if writing is not None:
            memory.give_back(writing)
        writing, in_flight = block, needed
        advance(size)


def quantize_in_parts(weight: np.ndarray, kind: str, inputs: tuple[int, ...]) -> dict[str, np.ndarray]:
    """`quantize`, of a large array by a compiled program for parts of it, so that little is in float32 at a time.

    The parts are cut along an axis that has a scale for each entry: experts, heads or outputs.
    """
    if weight.size <= _ROUND_AT_ONCE:
        return quantize(weight, kind, inputs)
    axis = next(axis for axis in range(weight.ndim) if axis not in inputs)
    step = max(1, math.ceil(weight.shape[axis] * _ROUND_AT_ONCE / weight.size))
    host = jax.local_devices(backend="cpu")[0]
    stored = quantized_shapes(weight.shape, kind, inputs)
    whole = {name: np.empty(shape, dtype) for name, (shape, dtype) in stored.items()}

    def fill(start: int) -> None:
        window = (slice(None),) * axis + (slice(start, start + step),)
        for name, array in quantize_array(jax.device_put(weight[window], host), kind, inputs).items():
            whole[name][window] = array

    with ThreadPoolExecutor(WORKERS, thread_name_prefix="dsvl2-quantize") as pool:
        list(pool.map(fill, range(0, weight.shape[axis], step)))
    return whole


class _Memory:
    """Blocks of memory that are used again: the system's zeroing of fresh pages took a quarter of the time."""

    def __init__(self) -> None:
        self._free: list[np.ndarray] = []

    def take(self, size: int) -> np.ndarray:
        """u8[≥ size]."""
        for i, block in enumerate(self._free):
            if block.size >= size:
                return self._free.pop(i)
        self._free.clear()
        return aligned_empty((size,), np.dtype(np.uint8))

    def give_back(self, block: np.ndarray) -> None:
        self._free.append(block)


def _carve(block: np.ndarray, plan: Leaves) -> dict[LeafPath, np.ndarray]:
    """Arrays of the planned shapes and dtypes, one after the other in ``block``."""
    arrays, start = {}, 0
    for path, (shape, dtype) in plan.items():
        size = leaf_bytes(shape, dtype)
        arrays[path] = block[start : start + size].view(dtype).reshape(shape)
        start += size + -size % _ALIGNMENT
    return arrays


def write_manifest(
    directory: Path,
    plan: Leaves,
    *,
    source: str,
    mixed: Mapping[str, str],
    own_digests: Mapping[str, str],
    notes: Sequence[str] = (),
    quantization: Quantization | None = None,
    source_digests: Mapping[str, str] | None = None,
) -> None:
    """Writes the file that makes a converted directory complete.

    Args:
      mixed: tensors of a stacked parameter whose dtype is not the parameter's, with their own dtype, so that export
        can give it back.
      own_digests: file → SHA-256 of every file of the directory.
      notes: what was tolerated in the source.
      quantization: of the weights; None: none is quantized.
      source_digests: file → SHA-256 of the source.
    """
    files = digests.files_below(directory)
    manifest: dict[str, Any] = {
        "version": MANIFEST_VERSION,
        "source": source,
        "parameters": {
            path_name(path): {"shape": list(shape), "dtype": dtype.name} for path, (shape, dtype) in plan.items()
        },
        "mixed_dtypes": dict(mixed),
        "notes": list(notes),
        "quantization": {} if quantization is None else quantization.described(),
        # A configuration may be edited on purpose, so that its size is not checked each time, as its digest can be.
        "files": {name: size for name, size in files.items() if name.startswith(f"{PARAMS_NAME}/")},
        "sha256": dict(own_digests),
        "source_sha256": dict(source_digests or {}),
    }
    (directory / MANIFEST_NAME).write_text(digests.sealed(manifest), encoding="utf-8")
