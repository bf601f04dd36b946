"""Finding a checkpoint and loading its parameters, from either layout.

A *released* directory holds safetensors; a *converted* one, written by `dsvl2_jax.convert`, holds an
Orbax checkpoint in ``params/`` beside the configuration and tokenizer files, and a manifest that was
written last. The manifest is what makes a converted directory complete. A *run*, written by `dsvl2_jax.train`,
holds an Orbax checkpoint per ``checkpoints/STEP``, with ``params`` among other things, and the configuration
and tokenizer files in ``model/``; its checkpoints appear under their names when they are complete.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, Sharding, SingleDeviceSharding

from dsvl2_jax.checkpoint.load import orbax_io, rules
from dsvl2_jax.checkpoint.safetensors_source import INDEX_NAME, Source, numpy_dtype
from dsvl2_jax.errors import CheckpointError, UsageError
from dsvl2_jax.inputs.processor import Processor
from dsvl2_jax.model.config import Config
from dsvl2_jax.model.deepseek_vl2 import Params, param_shardings

MANIFEST_NAME = "dsvl2_checkpoint.json"
MANIFEST_VERSION = 1
PARAMS_NAME = "params"  # the parameters inside a converted directory or a run's checkpoint
RUN_NAME = "run.json"  # what makes a directory a run
CHECKPOINTS_NAME = "checkpoints"  # of a run: a directory per step
MODEL_NAME = "model"  # of a run: configuration, processor and tokenizer files
PARTIAL_SUFFIX = ".dsvl2-partial"  # the name under which a directory is written before it is complete

DTYPES = ("float32", "bfloat16")

# Leaves are read one Orbax call at a time up to this size together: calls cost about 40 ms each.
BATCH_BYTES = 64 << 20

Shardings = Mapping[orbax_io.LeafPath, Sharding]
# Leaf path → (shape, dtype).
Stored = Mapping[orbax_io.LeafPath, tuple[tuple[int, ...], np.dtype]]

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def resolve(checkpoint: str | Path | None) -> Path:
    """The directory of a checkpoint.

    Args:
      checkpoint: a directory, a hub id such as ``deepseek-ai/deepseek-vl2-tiny`` (downloaded into the
        hub's cache, unless a directory has that name), or None for the built-in micro model. A training run's
        directory stands for its newest complete checkpoint.

    Raises:
      CheckpointError: there is nothing of that name, it cannot be downloaded, or the run has no checkpoint.
    """
    if checkpoint is None:
        from dsvl2_jax import configs

        return resolve(Path(configs.__file__).parent / "micro")
    path = Path(checkpoint)
    if path.is_dir():
        return newest_of_run(path) if (path / RUN_NAME).is_file() else path
    if path.exists():
        raise CheckpointError(f"{path}: is a file; expected the directory that holds the checkpoint's files.")
    if isinstance(checkpoint, str) and _HUB_ID.fullmatch(checkpoint):
        return _download(checkpoint)
    raise CheckpointError(
        f"{checkpoint}: no such directory. Give a converted directory, a directory in the released layout, or a hub "
        "id such as deepseek-ai/deepseek-vl2-tiny."
    )


def run_steps(run: Path) -> list[int]:
    """The steps of a run's complete checkpoints, ascending."""
    directories = (run / CHECKPOINTS_NAME).glob("*")
    return sorted(int(d.name) for d in directories if d.name.isdecimal() and orbax_io.is_checkpoint(d))


def newest_of_run(run: Path) -> Path:
    """The directory of a run's newest complete checkpoint.

    Raises:
      CheckpointError: it has none.
    """
    if steps := run_steps(run):
        return run / CHECKPOINTS_NAME / str(steps[-1])
    raise CheckpointError(
        f"{run}: a training run that has not written a complete checkpoint yet. Wait for its first one, or start the "
        "run again: it writes one every run.checkpoint_every steps and when it is stopped by SIGTERM or Ctrl-C."
    )


def model_files(directory: Path) -> Path:
    """Where the configuration, processor and tokenizer files of a checkpoint are: ``directory``, except in a run."""
    run = _run_of(directory)
    return directory if run is None else run / MODEL_NAME


def description(directory: Path) -> str:
    """Tells apart what a checkpoint's JSON files say: configuration, tokenizer, and index or manifest of the weights.

    Args:
      directory: of `resolve`.
    """
    files = {file.name: file for place in (model_files(directory), directory) for file in place.glob("*.json")}
    content = b"".join(name.encode() + files[name].read_bytes() for name in sorted(files))
    return f"{directory.name}, {len(files)} JSON files with SHA-256 {hashlib.sha256(content).hexdigest()[:16]}"


def _run_of(directory: Path) -> Path | None:
    """The run whose ``checkpoints/STEP`` this is."""
    directory = directory.absolute()
    run = directory.parent.parent
    inside = directory.parent.name == CHECKPOINTS_NAME and (run / RUN_NAME).is_file()
    return run if inside else None


def open_model(directory: Path) -> tuple[Config, Processor]:
    """Configuration and processor of a checkpoint in any layout, after checking that they fit each other.

    Args:
      directory: of `resolve`.

    Raises:
      ConfigError, TokenizerError: a file is missing or cannot be used.
      UsageError: the processor makes tiles of another size than the encoder takes.
    """
    directory = model_files(directory)
    config = Config.from_file(directory)
    processor = Processor.from_dir(directory)
    processor.tokenizer.check_fits(config.language.vocab_size)
    if processor.config.tile_size != config.vision.image_size:
        raise UsageError(
            f"{directory}: processor_config.json makes tiles of {processor.config.tile_size} pixels "
            f"(candidate_resolutions[0][0]), but config.json's encoder takes {config.vision.image_size} "
            "(vision_config.image_size); make them equal."
        )
    return config, processor


def _download(hub_id: str) -> Path:
    import huggingface_hub

    try:
        patterns = ["*.json", "*.safetensors", "*.model", "*.md", "*.txt", "LICENSE*"]
        return Path(huggingface_hub.snapshot_download(hub_id, allow_patterns=patterns))
    except Exception as error:  # the client raises its own, requests' and the operating system's errors
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"{hub_id}: no directory has this name, and it cannot be downloaded from the Hugging Face hub ({reason}). "
            "Check the name and the network, or download the files elsewhere and give their directory."
        ) from error


def kind(directory: Path) -> str:
    """ "orbax" for a converted directory, "released" for one with safetensors, "run" for a run's checkpoint.

    Raises:
      CheckpointError: it is none of them, an unfinished conversion or an incomplete checkpoint.
    """
    if directory.name.endswith(PARTIAL_SUFFIX):
        raise CheckpointError(
            f"{directory}: an unfinished conversion; it is incomplete. Run the conversion again: it starts anew and "
            "removes this directory."
        )
    if _run_of(directory) is not None:
        if directory.name.isdecimal() and orbax_io.is_checkpoint(directory):
            return "run"
        raise CheckpointError(
            f"{directory}: not a complete checkpoint of the run. Name one of the numbered directories beside it, or "
            "the run itself for its newest checkpoint."
        )
    if (directory / MANIFEST_NAME).is_file():
        return "orbax"
    if (directory / PARAMS_NAME).exists():
        raise CheckpointError(
            f"{directory}: has {PARAMS_NAME}/ but no {MANIFEST_NAME}, so its conversion did not finish or it was "
            "copied in part. Convert the released checkpoint again, or copy the whole directory."
        )
    if (directory / INDEX_NAME).is_file() or any(directory.glob("*.safetensors")):
        return "released"
    raise CheckpointError(
        f"{directory}: not a checkpoint: found neither {MANIFEST_NAME} (a converted directory) nor safetensors files "
        "(the released layout). Download or convert the checkpoint into it."
    )


def read_manifest(directory: Path) -> dict[str, Any]:
    """The manifest of a converted directory, after checking that every file it lists has its size.

    Raises:
      CheckpointError: the manifest cannot be read, is of another version, or files are missing or cut off.
    """
    path = directory / MANIFEST_NAME
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        version, files, parameters = (manifest[key] for key in ("version", "files", "parameters"))
        sizes = {name: int(size) for name, size in files.items()}
        parameters.items()
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{path}: cannot be read ({type(error).__name__}: {error}). Convert the checkpoint again."
        ) from None
    if version != MANIFEST_VERSION:
        raise CheckpointError(
            f"{path}: written in version {version!r} of the layout, this program reads version {MANIFEST_VERSION}. "
            "Convert the released checkpoint again."
        )
    damaged = []
    for name, size in sizes.items():
        file = directory / name
        found = file.stat().st_size if file.is_file() else None
        if found != size:
            damaged.append(f"{name}: {'missing' if found is None else f'{found} bytes'}, expected {size} bytes")
    if damaged:
        raise CheckpointError(
            f"{directory}: the converted checkpoint is damaged; copy or convert it again:\n{rules.listed(damaged)}"
        )
    return manifest


def stays_float32(path: orbax_io.LeafPath) -> bool:
    """True for the router's parameters, which compute in float32 whatever the model's dtype (FACTS §4)."""
    return len(path) > 1 and path[-2] == "router"


def load_params(
    directory: Path, config: Config, dtype: str | None = None, mesh: Mesh | None = None, *, fsdp: bool = False
) -> Params:
    """Loads every parameter, one large leaf at a time.

    Args:
      directory: of `resolve`, in either layout.
      config: of the same directory.
      dtype: "float32" or "bfloat16" casts (the router's parameters are float32 always); None keeps
        each parameter's stored dtype.
      mesh: places each parameter by `param_shardings`; None: on the first device. A process reads only what its
        devices hold (of the released layout also the rest of the tensors' rows that this is in).
      fsdp: split large parameters over ``data`` too, as training does.

    Returns:
      A nested dict of `jax.Array`. Peak memory is that of the parameters and about one leaf.

    Raises:
      CheckpointError: incomplete, damaged, or not a checkpoint of this configuration.
      UsageError: an unknown dtype.
    """
    if dtype is not None and dtype not in DTYPES:
        raise UsageError(f"dtype {dtype!r}: expected one of {', '.join(DTYPES)}.")
    directory = Path(directory)
    if mesh is None:
        first = SingleDeviceSharding(jax.devices()[0])
        shardings: Shardings = {leaf.path: first for leaf in rules.expand(config)}
    else:
        shardings = dict(orbax_io.unnest(param_shardings(config, mesh, fsdp=fsdp)))
    read = _read_released if kind(directory) == "released" else _read_orbax
    return orbax_io.nest(dict(read(directory, config, shardings, dtype)))


def _target_dtype(path: orbax_io.LeafPath, stored: np.dtype, dtype: str | None) -> np.dtype:
    return np.dtype(np.float32) if stays_float32(path) else stored if dtype is None else numpy_dtype(dtype)


def _read_released(
    directory: Path, config: Config, shardings: Shardings, dtype: str | None
) -> Iterator[tuple[orbax_io.LeafPath, jax.Array]]:
    with Source(directory) as source:
        rules.check(source.shapes_and_dtypes, config, str(directory))
        for leaf in rules.expand(config):
            array = _place(source, leaf, shardings[leaf.path], dtype)
            yield leaf.path, array.block_until_ready()  # transfers may not pile up in host memory


def _place(source: Source, leaf: rules.Leaf, sharding: Sharding, dtype: str | None) -> jax.Array:
    """A parameter on the devices, of which this process reads the slices that its own devices hold."""
    target = _target_dtype(leaf.path, source.leaf_dtype(leaf), dtype)
    read: dict[tuple[tuple[int, int], ...], np.ndarray] = {}  # several devices may hold the same slice

    def part(where: tuple[slice, ...]) -> np.ndarray:
        bounds = tuple(one.indices(size)[:2] for one, size in zip(where, leaf.shape, strict=True))
        if bounds not in read:
            read[bounds] = source.read_slice(leaf, tuple(slice(*pair) for pair in bounds), target)
        return read[bounds]

    return jax.make_array_from_callback(leaf.shape, sharding, part)


def _read_orbax(
    directory: Path, config: Config, shardings: Shardings, dtype: str | None
) -> Iterator[tuple[orbax_io.LeafPath, jax.Array]]:
    _, stored = open_orbax(directory, config)
    dtypes = {path: _target_dtype(path, kept, dtype) for path, (_, kept) in stored.items()}
    yield from read_leaves(directory / PARAMS_NAME, stored, shardings, dtypes)


def open_orbax(directory: Path, config: Config) -> tuple[dict[str, Any], Stored]:
    """The manifest (empty for a run's checkpoint) and the leaves, both checked against files and configuration.

    Raises:
      CheckpointError: incomplete, damaged, or of another model.
    """
    manifest = read_manifest(directory) if kind(directory) == "orbax" else {}
    return manifest, _stored(directory / PARAMS_NAME, config)


def read_leaves(
    params: Path,
    stored: Stored,
    shardings: Shardings,
    dtypes: Mapping[orbax_io.LeafPath, np.dtype] | None = None,
) -> Iterator[tuple[orbax_io.LeafPath, jax.Array]]:
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
            names = ", ".join("/".join(path) for path in batch[:3])
            raise CheckpointError(
                f"{params}: damaged: {_reason(error)} (while {names}{' …' if len(batch) > 3 else ''} were read). "
                f"{_remedy(params.parent)}"
            ) from error
        for path in batch:
            array = arrays.pop(path)
            yield path, array if dtypes is None else array.astype(dtypes[path]).block_until_ready()


def _stored(params: Path, config: Config) -> Stored:
    """The leaves of a converted checkpoint, checked against those of the configuration."""
    try:
        stored = orbax_io.read_shapes(params)
    except Exception as error:
        raise CheckpointError(
            f"{params}: not a readable Orbax checkpoint ({_reason(error)}). {_remedy(params.parent)}"
        ) from error
    leaves = {leaf.path: leaf for leaf in rules.expand(config)}
    problems = [f"missing: {'/'.join(path)}" for path in leaves if path not in stored]
    problems += [f"unexpected: {'/'.join(path)}" for path in stored if path not in leaves]
    problems += [
        f"{leaf.name}: found {list(stored[path][0])}, expected {list(leaf.shape)}"
        for path, leaf in leaves.items()
        if path in stored and stored[path][0] != leaf.shape
    ]
    if problems:
        raise CheckpointError(
            f"{params}: the parameters are not those of the model that config.json describes; convert again from one "
            f"release:\n{rules.listed(problems)}"
        )
    return stored


def batches(stored: Stored, batch_bytes: int = BATCH_BYTES) -> Iterator[list[orbax_io.LeafPath]]:
    """Groups leaves, in order, up to ``batch_bytes`` together; a larger leaf is alone."""
    batch: list[orbax_io.LeafPath] = []
    total = 0
    for path, (shape, dtype) in stored.items():
        size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        if batch and total + size > batch_bytes:
            yield batch
            batch, total = [], 0
        batch.append(path)
        total += size
    if batch:
        yield batch


def _reason(error: BaseException) -> str:
    """The first line of the error that led to this one: Orbax wraps tensorstore's, which names array and file."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def _remedy(directory: Path) -> str:
    if _run_of(directory) is None:
        return "Copy or convert the checkpoint again."
    return f"Copy it again, or remove {directory}: the run then goes on from the checkpoint before it."
