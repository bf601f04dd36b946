"""Loading a checkpoint's parameters, from any of the layouts that `dsvl2_jax.checkpoint.locate` tells apart."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh, Sharding, SingleDeviceSharding

from dsvl2_jax.checkpoint import orbax_io, rules
from dsvl2_jax.checkpoint.leaves import Leaves, batches
from dsvl2_jax.checkpoint.locate import PARAMS_NAME, kind, read_manifest, run_of
from dsvl2_jax.checkpoint.safetensors_source import Source, numpy_dtype
from dsvl2_jax.checkpoint.verify import check_run_sizes, tell, way_out
from dsvl2_jax.checkpoint.verify import verify as verify_files
from dsvl2_jax.errors import CheckpointError, UsageError
from dsvl2_jax.messages import first_line, listed
from dsvl2_jax.model.config import Config
from dsvl2_jax.model.deepseek_vl2 import Params, param_shardings
from dsvl2_jax.model.parameter_paths import LeafPath, path_name, stays_float32

DTYPES = ("float32", "bfloat16")

Shardings = Mapping[LeafPath, Sharding]


def load_params(
    directory: Path,
    config: Config,
    dtype: str | None = None,
    mesh: Mesh | None = None,
    *,
    fsdp: bool = False,
    verify: bool = False,
) -> Params:
    """Loads every parameter, one large leaf at a time.

    Args:
      directory: as `resolve` returns it, in any layout.
      config: of the same directory.
      dtype: "float32" or "bfloat16" casts (the router's parameters are float32 always); None keeps
        each parameter's stored dtype.
      mesh: places each parameter by `param_shardings`; None: all on the first device. A process reads only what
        its devices hold (in the released layout, whole rows of the tensors).
      fsdp: split large parameters over ``data`` too, as training does.
      verify: read every file before and compare it with its digest; without it, sizes and headers are checked.

    What was tolerated in a released directory is noted on standard error.

    Returns:
      A nested dict of `jax.Array`. Peak memory is that of the parameters and about one leaf.

    Raises:
      CheckpointError: incomplete, damaged, or not a checkpoint of this configuration.
      UsageError: an unknown dtype.
    """
    if dtype is not None and dtype not in DTYPES:
        raise UsageError(f"dtype {dtype!r}: expected one of {', '.join(DTYPES)}.")
    if verify:
        tell(directory, verify_files(directory))
    if mesh is None:
        first = SingleDeviceSharding(jax.devices()[0])
        shardings: Shardings = {leaf.path: first for leaf in rules.expand(config)}
    else:
        shardings = flatten_dict(param_shardings(config, mesh, fsdp=fsdp))
    read = _read_released if kind(directory) == "released" else _read_orbax
    return unflatten_dict(dict(read(directory, config, shardings, dtype)))


def _target_dtype(path: LeafPath, stored: np.dtype, dtype: str | None) -> np.dtype:
    return np.dtype(np.float32) if stays_float32(path) else stored if dtype is None else numpy_dtype(dtype)


def _read_released(
    directory: Path, config: Config, shardings: Shardings, dtype: str | None
) -> Iterator[tuple[LeafPath, jax.Array]]:
    with Source(directory) as source:
        source.fit(config)
        tell(directory, source.notes)
        rules.check(source.shapes_and_dtypes, config, str(directory))
        for leaf in rules.expand(config):
            array = _read_placed(source, leaf, shardings[leaf.path], dtype)
            yield leaf.path, array.block_until_ready()  # so that transfers do not pile up in host memory


def _read_placed(source: Source, leaf: rules.Leaf, sharding: Sharding, dtype: str | None) -> jax.Array:
    """A parameter on the devices, of which this process reads the slices that its own devices hold."""
    target = _target_dtype(leaf.path, source.leaf_dtype(leaf), dtype)
    read: dict[tuple[tuple[int, int], ...], np.ndarray] = {}  # several devices may hold the same slice

    def read_part(window: tuple[slice, ...]) -> np.ndarray:
        bounds = tuple(axis.indices(size)[:2] for axis, size in zip(window, leaf.shape, strict=True))
        if bounds not in read:
            read[bounds] = source.read_slice(leaf, tuple(slice(*pair) for pair in bounds), target)
        return read[bounds]

    return jax.make_array_from_callback(leaf.shape, sharding, read_part)


def _read_orbax(
    directory: Path, config: Config, shardings: Shardings, dtype: str | None
) -> Iterator[tuple[LeafPath, jax.Array]]:
    _, stored = open_orbax(directory, config)
    dtypes = {path: _target_dtype(path, stored_as, dtype) for path, (_, stored_as) in stored.items()}
    yield from read_leaves(directory / PARAMS_NAME, stored, shardings, dtypes)


def open_orbax(directory: Path, config: Config) -> tuple[dict[str, Any], Leaves]:
    """The manifest (empty for a run's checkpoint) and the leaves, both checked against files and configuration.

    Raises:
      CheckpointError: incomplete, damaged, or of another model.
    """
    manifest: dict[str, Any] = {}
    if kind(directory) == "orbax":
        manifest = read_manifest(directory)
    else:
        check_run_sizes(directory)
    return manifest, _stored(directory / PARAMS_NAME, config)


def read_leaves(
    params: Path,
    stored: Leaves,
    shardings: Shardings,
    dtypes: Mapping[LeafPath, np.dtype] | None = None,
) -> Iterator[tuple[LeafPath, jax.Array]]:
    """Reads an Orbax checkpoint leaf by leaf, placed by ``shardings`` and cast to ``dtypes`` (default: as stored).

    Raises:
      CheckpointError: the files cannot be read.
    """
    for batch in batches(stored):
        large = len(batch) == 1
        structs = {}
        for path in batch:
            shape, dtype = stored[path]
            # tensorstore casts 4 times slower than XLA does, but XLA compiles a program per shape.
            read_as = dtype if dtypes is None or large else dtypes[path]
            structs[path] = jax.ShapeDtypeStruct(shape, read_as, sharding=shardings[path])
        try:
            arrays = orbax_io.read(params, structs)
        except Exception as error:  # Orbax and tensorstore raise ValueError, KeyError, OSError, XlaRuntimeError …
            names = ", ".join(path_name(path) for path in batch[:3])
            raise CheckpointError(
                f"{params}: damaged: {_reason(error)} (while {names}{' …' if len(batch) > 3 else ''} were read). "
                f"{_remedy(params.parent)}"
            ) from error
        for path in batch:
            array = arrays.pop(path)
            yield path, array if dtypes is None else array.astype(dtypes[path]).block_until_ready()


def absent_leaves(params: Path, stored: Leaves) -> set[LeafPath]:
    """The parameters of the unused part where the checkpoint was made without it: all of them are zeros.

    So they stay through training, and no pooling head has them: its norm would give nothing.
    """
    unused = {path: entry for path, entry in stored.items() if path[:2] == rules.UNUSED_PATH}
    host = SingleDeviceSharding(jax.local_devices(backend="cpu")[0])
    for _, array in read_leaves(params, unused, dict.fromkeys(unused, host)):
        if np.any(np.asarray(array)):
            return set()
    return set(unused)


def _stored(params: Path, config: Config) -> Leaves:
    """The leaves of a converted checkpoint, checked against those of the configuration."""
    try:
        stored = orbax_io.read_shapes(params)
    except Exception as error:
        raise CheckpointError(
            f"{params}: not a readable Orbax checkpoint ({_reason(error)}). {_remedy(params.parent)}"
        ) from error
    leaves = {leaf.path: leaf for leaf in rules.expand(config)}
    problems = [f"missing: {path_name(path)}" for path in leaves if path not in stored]
    problems += [f"unexpected: {path_name(path)}" for path in stored if path not in leaves]
    problems += [
        f"{leaf.name}: found {list(stored[path][0])}, expected {list(leaf.shape)}"
        for path, leaf in leaves.items()
        if path in stored and stored[path][0] != leaf.shape
    ]
    if problems:
        raise CheckpointError(
            f"{params}: the parameters are not those of the model that config.json describes; convert again from one "
            f"release:\n{listed(problems)}"
        )
    return stored


def _reason(error: BaseException) -> str:
    """The first line of the error that led to this one: Orbax wraps tensorstore's, which names array and file."""
    while error.__cause__ is not None:
        error = error.__cause__
    return first_line(error)


def _remedy(directory: Path) -> str:
    if run_of(directory) is None:
        return "Copy or convert the checkpoint again."
    return f"C{way_out(directory)[1:]}."
