"""The files that hold a checkpoint's tensors in the released layout, and which tensor is where.

They are safetensors, or else what `torch.save` wrote as ``pytorch_model*.bin``; one file or several, with or without
an index.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from dsvl2_jax.checkpoint import pytorch_file, safetensors_file
from dsvl2_jax.checkpoint.safetensors_file import Tensor
from dsvl2_jax.errors import CheckpointError
from dsvl2_jax.json_files import read_json_object
from dsvl2_jax.messages import listed

INDEX_NAME = "model.safetensors.index.json"

_ADAPTER_NAMES = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
_OTHER_WEIGHTS = (".bin", ".ckpt", ".gguf", ".h5", ".msgpack", ".npz", ".pt", ".pth")
_NUMBERED = re.compile(r"(.*)-(\d{1,9})-of-(\d{1,9})(\..*)")

MERGE = (
    "give it as --adapter to generate, chat, eval or serve, beside the checkpoint that it was trained on; or merge the "
    "two, dsvl2 merge CHECKPOINT ADAPTER MERGED, and give MERGED"
)


class _Format(NamedTuple):
    """A kind of file that tensors are stored in."""

    pattern: str  # of file names
    index: str
    read_header: Callable[[Path], dict[str, Tensor]]


_FORMATS = (
    _Format("*.safetensors", INDEX_NAME, safetensors_file.read_header),
    _Format("pytorch_model*.bin", "pytorch_model.bin.index.json", pytorch_file.read_header),
)
INDEX_NAMES = tuple(form.index for form in _FORMATS)


class Shards(NamedTuple):
    """``tensors`` by the names that they have in the files; ``notes`` say what was left unread, and why."""

    tensors: dict[str, Tensor]
    notes: list[str]


def has_weights(directory: Path) -> bool:
    """True where there are files to read tensors from, or an index that says so."""
    return any((directory / form.index).is_file() or _files(directory, form) for form in _FORMATS)


def open_shards(directory: Path) -> Shards:
    """Reads the headers of all files that hold tensors.

    Raises:
      CheckpointError: there are none, or they are incomplete, damaged, or contradict the index or each other.
    """
    found = [form for form in _FORMATS if (directory / form.index).is_file() or _files(directory, form)]
    if not found:
        raise CheckpointError(f"{directory}: {no_weights(directory)}")
    form = found[0]
    notes = [f"{other.pattern} is not read: the same directory has {form.pattern}" for other in found[1:]]
    if (directory / form.index).is_file():
        tensors = _open_indexed(directory, form)
        unlisted = {file.name for file in _files(directory, form)} - {t.file.name for t in tensors.values()}
        if unlisted:
            notes.append(f"not listed in {form.index}, so not read: {', '.join(sorted(unlisted))}")
    else:
        tensors = _open_unindexed(directory, form)
        if len(_files(directory, form)) > 1:
            notes.append(f"no {form.index}: all {len(_files(directory, form))} files {form.pattern} are read")
    return Shards(tensors, notes)


def no_weights(directory: Path) -> str:
    """Why there is nothing to read: a sentence that tells what there is instead."""
    if any((directory / name).is_file() for name in _ADAPTER_NAMES):
        return f"holds an adapter, which is no model by itself: {MERGE}."
    expected = (
        f"found neither {INDEX_NAME} nor a .safetensors file, nor pytorch_model.bin. Expected a checkpoint in the "
        "released layout: download all files of the release into this directory."
    )
    try:
        others = sorted(file.name for file in directory.iterdir() if file.suffix in _OTHER_WEIGHTS)
    except OSError:
        others = []
    if others:
        expected += f" What it has, {', '.join(others[:5])}, is of a kind that is not read: write it as safetensors."
    return expected


def _files(directory: Path, form: _Format) -> list[Path]:
    return sorted(file for file in directory.glob(form.pattern) if file.name not in _ADAPTER_NAMES)


def _open_unindexed(directory: Path, form: _Format) -> dict[str, Tensor]:
    files = _files(directory, form)
    missing = missing_numbers(file.name for file in files)
    if missing:
        raise CheckpointError(
            f"{directory}: files are missing, by the numbers in the names of the others: {', '.join(missing[:5])}"
            f"{' …' if len(missing) > 5 else ''}. Download them too."
        )
    tensors: dict[str, Tensor] = {}
    twice, problems = [], []
    for file in files:
        try:
            header = form.read_header(file)
        except CheckpointError as error:
            problems.append(str(error))
            continue
        twice += [f"{name}: in {tensors[name].file.name} and in {file.name}" for name in header if name in tensors]
        tensors |= header
    if problems:
        raise CheckpointError("\n".join(problems))
    if twice:
        raise CheckpointError(
            f"{directory}: {len(twice)} tensors are in more than one of {len(files)} files, and no {form.index} says "
            f"which is meant. Remove the files that do not belong to the checkpoint:\n{listed(twice)}"
        )
    return tensors


def missing_numbers(names: Iterable[str]) -> list[str]:
    """Names that the numbering of others (``…-00002-of-00004…``) asks for, the first thousand of each series."""
    present = list(names)
    series: dict[tuple[str, int, str], tuple[set[int], int, str]] = {}
    for name in present:
        if match := _NUMBERED.fullmatch(name):
            stem, number, count, suffix = match.groups()
            numbers, _, _ = series.setdefault((stem, int(count), suffix), (set(), len(number), count))
            numbers.add(int(number))
    return [
        f"{stem}-{number:0{width}d}-of-{written}{suffix}"
        for (stem, count, suffix), (numbers, width, written) in series.items()
        for number in range(1, min(count, 1000) + 1)
        if number not in numbers
    ]


def _open_indexed(directory: Path, form: _Format) -> dict[str, Tensor]:
    index = directory / form.index
    weight_map = read_index(index, form.pattern.rpartition(".")[2])
    listed_in: dict[str, list[str]] = {}
    for name, file_name in weight_map.items():
        listed_in.setdefault(file_name, []).append(name)
    problems: list[str] = []
    tensors: dict[str, Tensor] = {}
    for file_name, names in sorted(listed_in.items()):
        file = directory / file_name
        try:
            header = form.read_header(file)
        except CheckpointError as error:
            problems.append(str(error))
            continue
        for name, tensor in header.items():
            if name not in weight_map:
                problems.append(f"{file}: tensor {name} is not in {index.name}. Download both again.")
            elif weight_map[name] == file_name:
                tensors[name] = tensor
        problems += [
            f"{index}: says that tensor {name} is in {file_name}, which does not have it. Download both again."
            for name in names
            if name not in header
        ]
    if problems:
        raise CheckpointError(
            f"{directory}: the shards are not those of {index.name}:\n{listed(problems, indent='  ')}"
        )
    return {name: tensors[name] for name in weight_map}


def read_index(index: Path, suffix: str = "safetensors") -> dict[str, str]:
    """Tensor name → shard file name. Raises CheckpointError when the index cannot be one."""
    advice = "It is not an index of shards: download the file again."
    weight_map = read_json_object(index, CheckpointError, advice).get("weight_map")
    if not isinstance(weight_map, dict):
        kind = type(weight_map).__name__
        raise CheckpointError(f'{index}: "weight_map" is {kind}, expected an object of tensor names to files. {advice}')
    for name, file_name in weight_map.items():
        # An index is downloaded data: it must not be able to name files outside its directory.
        if not isinstance(file_name, str) or not re.fullmatch(rf"[^/\\\0]{{1,240}}\.{suffix}", file_name):
            raise CheckpointError(
                f"{index}: tensor {name} is said to be in {file_name!r}; expected the name of a .{suffix} file in "
                "the same directory. Download the file again."
            )
    if not weight_map:
        raise CheckpointError(f"{index}: lists no tensor. Download the file again.")
    return weight_map
