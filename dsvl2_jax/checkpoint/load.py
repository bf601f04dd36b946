"""Loading a checkpoint's parameters, from any of the layouts that `dsvl2_jax.checkpoint.locate` tells apart."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import unflatten_dict
from jax.sharding import Mesh, Sharding, SingleDeviceSharding

from dsvl2_jax.checkpoint import orbax_io, rules
from dsvl2_jax.checkpoint.leaves import Leaves, batches
from dsvl2_jax.checkpoint.locate import PARAMS_NAME, kind, read_manifest, refuse_adapter, run_of
from dsvl2_jax.checkpoint.safetensors_source import Source, numpy_dtype
from dsvl2_jax.checkpoint.verify import check_run_sizes, tell, way_out
from dsvl2_jax.checkpoint.verify import verify as verify_files
from dsvl2_jax.errors import CheckpointError, UsageError
from dsvl2_jax.kernels.quantized import KINDS, Quantized, dequantize
from dsvl2_jax.messages import first_line, listed
from dsvl2_jax.model import quantization
from dsvl2_jax.model.config import Config
from dsvl2_jax.model.deepseek_vl2 import Params, weight_inputs
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
      dtype: "float32" or "bfloat16" casts (the router's parameters are float32 always, and quantized weights stay
        as they are); None keeps each parameter's stored dtype.
      mesh: places each array by `stored_shardings`; None: all on the first device. A process reads only what
        its devices hold (in the released layout, whole rows of the tensors).
      fsdp: split large parameters over ``data`` too, as training does.
      verify: read every file before and compare it with its digest; without it, sizes and headers are checked.

    What was tolerated in a released directory is noted on standard error.

    Returns:
      A nested dict of `jax.Array`; a quantized weight is a dict of arrays, see `dsvl2_jax.model.weights`. Peak memory
      is that of the parameters and about one leaf.

    Raises:
      CheckpointError: incomplete, damaged, or not a checkpoint of this configuration.
      UsageError: an unknown dtype.
    """
    if dtype is not None and dtype not in DTYPES:
        raise UsageError(f"dtype {dtype!r}: expected one of {', '.join(DTYPES)}.")
    if verify:
        tell(directory, verify_files(directory))
    place = functools.partial(_shardings, config, mesh, fsdp)
    read = _read_released if kind(directory) == "released" else _read_orbax
    return unflatten_dict(dict(read(directory, config, place, dtype)))


def _shardings(config: Config, mesh: Mesh | None, fsdp: bool, shapes: quantization.Shapes) -> Shardings:
    """Where each array goes."""
    if mesh is None:
        return dict.fromkeys(shapes, SingleDeviceSharding(jax.devices()[0]))
    return quantization.stored_shardings(config, mesh, shapes, fsdp=fsdp)


def _target_dtype(path: LeafPath, stored: np.dtype, dtype: str | None) -> np.dtype:
    return np.dtype(np.float32) if stays_float32(path) else stored if dtype is None else numpy_dtype(dtype)


def _read_released(
    directory: Path, config: Config, place: Callable[[quantization.Shapes], Shardings], dtype: str | None
) -> Iterator[tuple[LeafPath, jax.Array]]:
    shardings = place({leaf.path: leaf.shape for leaf in rules.expand(config)})
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
    directory: Path, config: Config, place: Callable[[quantization.Shapes], Shardings], dtype: str | None
) -> Iterator[tuple[LeafPath, jax.Array]]:
    _, stored = open_orbax(directory, config)
    shardings = place({path: shape for path, (shape, _) in stored.items()})
    quantized = quantization.kinds_of(stored)
    dtypes = {
        path: stored_as if path[:-1] in quantized else _target_dtype(path, stored_as, dtype)
        for path, (_, stored_as) in stored.items()
    }
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
        refuse_adapter(directory)
        check_run_sizes(directory)
    stored = _stored(directory / PARAMS_NAME, config)
    if manifest and (problems := _unlike_manifest(manifest, stored)):
        raise CheckpointError(
            f"{directory}: the parameters are not those that its manifest lists. {_remedy(directory)}\n"
            f"{listed(problems)}"
        )
    return manifest, stored


def _unlike_manifest(manifest: Mapping[str, Any], stored: Leaves) -> list[str]:
    """How quantized arrays differ from what the manifest says of them."""
    quantized = quantization.kinds_of(stored)
    found = {path_name(path): entry for path, entry in stored.items() if path[:-1] in quantized}
    if not found and not manifest["quantization"]:
        return []
    expected = {
        name: (tuple(entry.get("shape", ())), entry.get("dtype"))
        for name, entry in manifest["parameters"].items()
        if name in found or name.rpartition("/")[2] in KINDS
    }
    problems = [] if manifest["quantization"] else ["quantized weights, of which the manifest says nothing"]
    for name in found.keys() | expected.keys():
        shape, dtype = found.get(name, (None, None))
        if name not in found or expected.get(name) != (tuple(shape), dtype.name):
            problems.append(f"{name}: found {shape} {dtype}, expected {expected.get(name, 'nothing')}")
    return problems


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


def read_weights(
    params: Path, stored: Leaves, config: Config, dtype: np.dtype
) -> Iterator[tuple[LeafPath, np.ndarray]]:
    """Reads an Orbax checkpoint to the host, parameter by parameter: as stored, or of quantized ones values · scale.

    Args:
      dtype: of the latter.

    Raises:
      CheckpointError: the files cannot be read.
    """
    kinds, inputs = quantization.kinds_of(stored), weight_inputs(config)
    host = SingleDeviceSharding(jax.local_devices(backend="cpu")[0])
    plain = jax.jit(functools.partial(dequantize, dtype=dtype))
    order = sorted(stored, key=lambda path: path[:-1] if path[:-1] in kinds else path)  # values and scale together
    parts: dict[LeafPath, dict[str, jax.Array]] = {}
    for path, array in read_leaves(params, {path: stored[path] for path in order}, dict.fromkeys(stored, host)):
        name = path[:-1]
        if name not in kinds:
            yield path, np.asarray(array)
            continue
        part = parts.setdefault(name, {})
        part[path[-1]] = array
        if len(part) == 2:
            del parts[name]
            kind = kinds[name]
            yield name, np.asarray(plain(Quantized(part[kind], part["scale"], kind, inputs[name][-1] - array.ndim)))


def plain_dtype(stored: Leaves) -> np.dtype:
    """In which a checkpoint keeps what is not quantized: that of the embeddings."""
    return stored["language", "embed_tokens"][1]


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
    if problems := quantization.mismatches(config, stored):
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
