"""Finding a checkpoint, telling which of the three layouts it has, and the files that it needs beside the weights.

A *released* directory holds safetensors; a *converted* one, written by `dsvl2_jax.convert`, holds an
Orbax checkpoint in ``params/`` beside the configuration and tokenizer files, and a manifest that was
written last. The manifest is what makes a converted directory complete. A *run*, written by `dsvl2_jax.train`,
holds an Orbax checkpoint per ``checkpoints/STEP``, with ``params`` among other things, and the configuration
and tokenizer files in ``model/``; its checkpoints appear under their names when they are complete.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsvl2_jax.checkpoint import digests, orbax_io, remote
from dsvl2_jax.checkpoint.rules import FLOAT_DTYPES
from dsvl2_jax.checkpoint.shards import INDEX_NAMES, has_weights, no_weights
from dsvl2_jax.checkpoint.staging import PARTIAL_SUFFIX
from dsvl2_jax.errors import CheckpointError, UsageError
from dsvl2_jax.inputs.processor import Processor
from dsvl2_jax.json_files import read_json_object, read_text
from dsvl2_jax.messages import first_line, listed
from dsvl2_jax.model.config import STORAGE_KEYS, Config
from dsvl2_jax.runtime.terminal import unescaped

if TYPE_CHECKING:
    from dsvl2_jax.model.quantization import Quantization

MANIFEST_NAME = "dsvl2_checkpoint.json"
MANIFEST_VERSION = 1
PARAMS_NAME = "params"  # the parameters inside a converted directory or a run's checkpoint
ADAPTER_NAME = "adapter"  # what a run's checkpoint has instead that trains an adapter: a directory of its files
RUN_NAME = "run.json"  # what makes a directory a run
CHECKPOINTS_NAME = "checkpoints"  # of a run: a directory per step
MODEL_NAME = "model"  # of a run: configuration, processor and tokenizer files

_CONVERT_AGAIN = "Convert the checkpoint again."
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_CARRIED_SUFFIXES = (".json", ".jinja", ".md", ".model", ".txt")
_CARRIED_NAMES = ("LICENSE", "LICENCE", "NOTICE")
_CARRIED_BYTES = 256 << 20  # a larger file is no configuration


def resolve(checkpoint: str | Path | None) -> Path:
    """The directory of a checkpoint.

    Args:
      checkpoint: a directory, the address of one in an object store, such as ``gs://bucket/directory``, a hub id
        such as ``deepseek-ai/deepseek-vl2-tiny`` (downloaded into the hub's cache, unless a directory has that name),
        or None for the built-in micro model. A training run's directory stands for its newest complete checkpoint.

    Raises:
      CheckpointError: there is nothing of that name, it cannot be downloaded, or the run has no checkpoint.
    """
    if checkpoint is None:
        from dsvl2_jax import configs

        return resolve(Path(configs.__file__).parent / "micro")
    path = remote.path_of(checkpoint)
    if remote.is_remote(path):
        found = remote.names(path)
        if not found:
            raise CheckpointError(f"{path}: nothing is stored there. Check the address.")
        return newest_of_run(path) if RUN_NAME in found else path
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
    directory = run / CHECKPOINTS_NAME
    found = remote.names(directory) if remote.is_remote(run) else {path.name for path in directory.glob("*")}
    return sorted(int(name) for name in found if name.isdecimal() and orbax_io.is_checkpoint(directory / name))


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
    """Where the configuration, processor and tokenizer files of a checkpoint are: ``directory``, except in a run.

    Of a checkpoint in a store they are copied to the disk, for the libraries that read them.
    """
    run = run_of(directory)
    return remote.local_copy(directory if run is None else run / MODEL_NAME, _is_carried)


def description(directory: Path) -> str:
    """A line of text that differs where a checkpoint's JSON files do: configuration, tokenizer, index or manifest.

    Args:
      directory: as `resolve` returns it.
    """
    files = {file.name: file for folder in (model_files(directory), directory) for file in folder.glob("*.json")}
    content = b"".join(name.encode() + files[name].read_bytes() for name in sorted(files))
    return f"{directory.name}, {len(files)} JSON files with SHA-256 {hashlib.sha256(content).hexdigest()[:16]}"


def run_of(directory: Path) -> Path | None:
    """The run whose ``checkpoints/STEP`` this is."""
    directory = remote.absolute(directory)
    run = directory.parent.parent
    inside = directory.parent.name == CHECKPOINTS_NAME and (run / RUN_NAME).is_file()
    return run if inside else None


def open_model(directory: Path) -> tuple[Config, Processor]:
    """Configuration and processor of a checkpoint in any layout, after checking that they fit each other.

    Args:
      directory: as `resolve` returns it.

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


def find_adapter(adapter: str | Path) -> Path:
    """The directory of an adapter's files.

    Args:
      adapter: it, or a hub id, which is downloaded unless a directory has that name. A training run's directory stands
        for the adapter of its newest complete checkpoint, and the directory of a checkpoint for its own. Of a run in a
        store, the files are copied to the disk.

    Raises:
      CheckpointError: there is nothing of that name, it cannot be downloaded, or the run has no checkpoint.
    """
    path = remote.path_of(adapter)
    if RUN_NAME in (remote.names(path) if remote.is_remote(path) else [RUN_NAME] * (path / RUN_NAME).is_file()):
        path = newest_of_run(path)
    if run_of(path) is not None and _has_adapter(path):
        return remote.local_copy(path / ADAPTER_NAME, lambda _: True)
    if remote.is_remote(path):
        return remote.local_copy(path, lambda _: True)
    if path.is_dir():
        return path
    if isinstance(adapter, str) and not path.exists() and _HUB_ID.fullmatch(adapter):
        return _download(adapter, ["adapter_config.json", "adapter_model.*", "dsvl2_adapter.json"])
    raise CheckpointError(
        f"{adapter}: no such directory. Give the one that holds an adapter's adapter_config.json and "
        "adapter_model.safetensors, or its hub id."
    )


def _download(hub_id: str, adapter: list[str] | None = None) -> Path:
    """``adapter``: the patterns of an adapter's files; without it, those of a checkpoint."""
    import huggingface_hub

    try:
        patterns = adapter or ["*.json", "*.safetensors", "*.model", "*.md", "*.txt", "LICENSE*"]
        with contextlib.redirect_stderr(unescaped(sys.stderr)):  # where the client draws its own progress bars
            directory = Path(huggingface_hub.snapshot_download(hub_id, allow_patterns=patterns))
            if adapter is None and not any(directory.glob("*.safetensors")):
                patterns.append("pytorch_model*.bin")
                directory = Path(huggingface_hub.snapshot_download(hub_id, allow_patterns=patterns))
        return directory
    except Exception as error:  # the client raises its own, requests' and the operating system's errors
        raise CheckpointError(
            f"{hub_id}: no directory has this name, and it cannot be downloaded from the Hugging Face hub "
            f"({first_line(error)}). Check the name and the network, or download the files elsewhere and give "
            "their directory."
        ) from error


def kind(directory: Path) -> str:
    """ "orbax" for a converted directory, "released" for one with safetensors, "run" for a run's checkpoint.

    Raises:
      CheckpointError: it is none of them, an unfinished conversion or an incomplete checkpoint.
    """
    if directory.name.endswith(PARTIAL_SUFFIX):
        raise CheckpointError(
            f"{directory}: an unfinished conversion; it is incomplete. Run the conversion again: it starts over and "
            "removes this directory."
        )
    if run_of(directory) is not None:
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
    if has_weights(directory):
        if remote.is_remote(directory):
            raise CheckpointError(
                f"{directory}: is in the released layout, which is read from a disk alone. Copy it to one, and "
                "convert it to this store: dsvl2 convert DIRECTORY gs://… or s3://…"
            )
        return "released"
    raise CheckpointError(
        f"{directory}: not a checkpoint: it has no {MANIFEST_NAME}, so is no converted directory, and "
        f"{no_weights(directory)}"
    )


def refuse_adapter(checkpoint: Path) -> None:
    """Raises CheckpointError for a run's checkpoint that holds an adapter instead of a model."""
    if _has_adapter(checkpoint):
        raise CheckpointError(
            f"{checkpoint}: of a run that trains an adapter, which is no model by itself. Give the model that it was "
            f"made for as the checkpoint, and this with --adapter {checkpoint / ADAPTER_NAME}"
        )


def _has_adapter(checkpoint: Path) -> bool:
    """True for a run's checkpoint that holds an adapter."""
    if remote.is_remote(checkpoint):
        return ADAPTER_NAME in remote.names(checkpoint)
    return (checkpoint / ADAPTER_NAME).is_dir()


def read_manifest(directory: Path) -> dict[str, Any]:
    """The manifest of a converted directory, after checking that every file it lists has its size.

    Besides "parameters", "files" (name → bytes) and "mixed_dtypes" it has "notes" (what was tolerated in the source),
    "quantization" ("kind", "group" and "rules", see `dsvl2_jax.model.quantization`; empty where nothing is quantized),
    "sha256" (file → digest) and "source_sha256", which a manifest of an earlier version of this program lacks.

    Raises:
      CheckpointError: the manifest cannot be read, has changed, is of another version, or files are missing or cut off.
    """
    path = directory / MANIFEST_NAME
    manifest = read_json_object(path, CheckpointError, _CONVERT_AGAIN)
    version = manifest.get("version")
    if version != MANIFEST_VERSION:
        raise CheckpointError(
            f"{path}: written in version {version!r} of the layout, this program reads version {MANIFEST_VERSION}. "
            "Convert the released checkpoint again."
        )
    if digests.is_sealed(manifest) or "sha256" in manifest:
        digests.check_seal(path, read_text(path, CheckpointError, _CONVERT_AGAIN), _CONVERT_AGAIN)
    manifest = {"mixed_dtypes": {}, "notes": [], "quantization": {}, "sha256": {}, "source_sha256": {}} | manifest
    for key, kind_of_value, kind_of_items in (
        ("files", dict, int),
        ("parameters", dict, dict),
        ("mixed_dtypes", dict, str),
        ("notes", list, str),
        ("quantization", dict, (str, int, list)),
        ("sha256", dict, str),
        ("source_sha256", dict, str),
    ):
        value = manifest.get(key)
        items = value.values() if isinstance(value, dict) else value
        if not isinstance(value, kind_of_value) or not all(isinstance(item, kind_of_items) for item in items):
            raise CheckpointError(f"{path}: cannot be read ({key} is missing or of another kind). {_CONVERT_AGAIN}")
    if unknown := set(manifest["mixed_dtypes"].values()) - set(FLOAT_DTYPES.values()):
        raise CheckpointError(f"{path}: cannot be read (mixed_dtypes names {unknown.pop()!r}). {_CONVERT_AGAIN}")
    check_sizes(directory, manifest["files"], "the converted checkpoint is damaged; copy or convert it again")
    return manifest


def quantization_in(directory: Path) -> Quantization | None:
    """How the weights of a converted directory are quantized; None where they are not, and of other layouts.

    Raises:
      CheckpointError: the manifest cannot be read.
    """
    from dsvl2_jax.model.quantization import Quantization  # jax, which finding a checkpoint does without

    found = read_manifest(directory)["quantization"] if kind(directory) == "orbax" else {}
    return Quantization.of(found) if found else None


def check_sizes(directory: Path, sizes: Mapping[str, int], problem: str) -> None:
    """Raises CheckpointError, which says ``problem``, when files (name → bytes) are missing or of another size."""
    damaged = []
    stored = remote.file_sizes(directory) if remote.is_remote(directory) else None
    for name, size in sizes.items():
        file = directory / name
        try:
            stored_size = stored.get(name) if stored is not None else file.stat().st_size if file.is_file() else None
        except (OSError, ValueError):  # a name that no file can have
            stored_size = None
        if stored_size != size:
            damaged.append(
                f"{name}: {'missing' if stored_size is None else f'{stored_size} bytes'}, expected {size} bytes"
            )
    if damaged:
        raise CheckpointError(f"{directory}: {problem}:\n{listed(damaged)}")


def carry_files(source: Path, target: Path) -> None:
    """Copies configuration, tokenizer, licence and documentation files, so that ``target`` is complete by itself.

    What config.json says of how others have quantized the weights is left out: here they are written as plain numbers.
    """
    for file in sorted(source.iterdir()):
        if file.is_file() and _is_carried(file) and file.stat().st_size <= _CARRIED_BYTES:
            content = file.read_bytes()
            if file.name == "config.json" and any(key.encode() in content for key in STORAGE_KEYS):
                content = _without_storage_keys(read_json_object(file, CheckpointError))
            (target / file.name).write_bytes(content)


def _without_storage_keys(config: dict[str, Any]) -> bytes:
    for part in (config, config.get("language_config")):
        for key in STORAGE_KEYS if isinstance(part, dict) else ():
            part.pop(key, None)
    return f"{json.dumps(config, indent=2, ensure_ascii=False)}\n".encode()


def _is_carried(file: Path) -> bool:
    carried = file.suffix in _CARRIED_SUFFIXES or file.name.startswith(_CARRIED_NAMES)
    return carried and file.name not in (*INDEX_NAMES, MANIFEST_NAME)
