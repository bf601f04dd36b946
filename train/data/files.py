"""Data files with random access: where each sample lies is found once, by reading the file through, hashing it as well.

JSON Lines (or a JSON array of the same records), tables, plain text (a file is one document) and tar shards of samples
look alike from here on: a length, a name for each sample, and `read`.

Tested in tests/train/data/test_pipeline.py.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from dsvl2_jax.errors import DataError, SampleError
from dsvl2_jax.inputs.image_sources import IMAGE_SUFFIXES, FilePool, TarIndex, expand_paths, index_tar
from dsvl2_jax.inputs.records import BAD_RECORD
from dsvl2_jax.json_files import parse_json, read_json_object
from dsvl2_jax.train.data.tables import open_table
from dsvl2_jax.train.data.unpacked import COMPRESSED, decompress, unpacked

# "image", "images", "image_url", and so for videos: without any of them no line of a file has images.
_IMAGE_KEYS = (b'"image', b'"video')

# Of the files of a folder that is given as a data set, and how the parts of a split are named there.
_SET_SUFFIXES = (".parquet", ".arrow", ".jsonl", ".jsonl.gz", ".jsonl.zst")
_PART = re.compile(r"(.+)-\d{5}-of-\d{5}\.")

_BLOCK = 1 << 24  # bytes read at a time
_SPACES = np.frombuffer(b" \t\r\n\v\f", np.uint8)


class DataFile(Protocol):
    """A file of samples. Pickles into worker processes, without open handles."""

    path: str
    digest: str  # of all that makes the samples what they are
    may_have_images: bool

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """ "file:line", for messages."""

    def read(self, index: int, pool: FilePool) -> tuple[Mapping[str, Any], list[bytes]]:
        """The record, and the images that come with it. Raises SampleError or OSError."""


@dataclasses.dataclass(frozen=True)
class JsonFile:
    """Records in JSON: one a line, or the elements of one array."""

    path: str
    digest: str
    may_have_images: bool
    starts: np.ndarray  # i64[samples], bytes
    sizes: np.ndarray  # i64[samples], bytes
    lines: np.ndarray | None  # i64[samples], from 1; None: every line is a sample
    plain: str = ""  # the copy that is read, of a compressed file

    def __len__(self) -> int:
        return len(self.starts)

    def name(self, index: int) -> str:
        return f"{self.path}:{index + 1 if self.lines is None else self.lines[index]}"

    def read(self, index: int, pool: FilePool) -> tuple[Mapping[str, Any], list[bytes]]:
        text = pool.read(self.plain or self.path, int(self.starts[index]), int(self.sizes[index]))
        try:
            return parse_json(text), []
        except ValueError as error:
            raise SampleError(BAD_RECORD, f"not valid JSON in UTF-8 ({error}).") from None


@dataclasses.dataclass(frozen=True)
class TextFile:
    """A plain-text file: one document."""

    path: str
    digest: str
    size: int
    plain: str = ""  # the copy that is read, of a compressed file
    may_have_images = False

    def __len__(self) -> int:
        return 1

    def name(self, index: int) -> str:
        return f"{self.path}:1"

    def read(self, index: int, pool: FilePool) -> tuple[Mapping[str, Any], list[bytes]]:
        try:
            return {"text": pool.read(self.plain or self.path, 0, self.size).decode("utf-8-sig").strip()}, []
        except UnicodeDecodeError as error:
            raise SampleError(BAD_RECORD, f"not UTF-8 text ({error.reason} at byte {error.start}).") from None


_JSON, _TEXT, _IMAGE = range(3)


@dataclasses.dataclass(frozen=True)
class TarFile:
    """A shard in WebDataset's naming: members that share the name up to the first dot are one sample.

    ``KEY.json`` is the record, or ``KEY.txt`` a text; ``KEY.jpg``, ``KEY.1.png`` … are its images, in archive order.
    """

    index: TarIndex
    members: np.ndarray  # i64[used members], of the index, sample by sample
    kinds: np.ndarray  # u8[used members]
    ends: np.ndarray  # i64[samples], into members

    @property
    def path(self) -> str:
        return self.index.path

    @property
    def digest(self) -> str:
        return self.index.digest

    @property
    def may_have_images(self) -> bool:
        return bool((self.kinds == _IMAGE).any() or (self.kinds == _JSON).any())  # a record may have inline images

    def __len__(self) -> int:
        return len(self.ends)

    def name(self, index: int) -> str:
        return f"{self.path}:{_split_key(self.index.name(int(self._own(index)[0][0])))[0]}"

    def read(self, index: int, pool: FilePool) -> tuple[Mapping[str, Any], list[bytes]]:
        members, kinds = self._own(index)
        of_kind = {kind: [int(m) for m, k in zip(members, kinds, strict=True) if k == kind] for kind in range(3)}
        texts = of_kind[_JSON] or of_kind[_TEXT]
        if len(texts) != 1:
            names = ", ".join(self.index.name(int(member)) for member in members)
            raise SampleError(BAD_RECORD, f"a sample has one .json or one .txt member; found {names}.")
        text = self._contents(texts[0], pool)
        images = [self._contents(member, pool) for member in of_kind[_IMAGE]]
        try:
            record = parse_json(text) if of_kind[_JSON] else {"text": text.decode("utf-8").strip()}
        except ValueError as error:
            raise SampleError(BAD_RECORD, f"{self.index.name(texts[0])}: not valid ({error}).") from None
        return record, images

    def _own(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        span = slice(self.ends[index - 1] if index else 0, self.ends[index])
        return self.members[span], self.kinds[span]

    def _contents(self, member: int, pool: FilePool) -> bytes:
        return pool.read(self.path, int(self.index.offsets[member]), int(self.index.sizes[member]))


def data_paths(pattern: str, what: str) -> list[str]:
    """The data files that a source's path names: a file, a glob pattern, or a folder of Hugging Face's `datasets`.

    Such a folder is what ``save_to_disk`` wrote, or holds files of tables or JSON Lines, itself or under ``data``, as a
    download does. Raises DataError when there is no file, or when a folder has several splits.
    """
    if not os.path.isdir(pattern):
        return expand_paths(pattern, what)
    folder = Path(pattern)
    if (folder / "dataset_dict.json").is_file():
        splits = read_json_object(folder / "dataset_dict.json", DataError, "Save the data set again.").get("splits")
        raise _has_splits(folder, [str(folder / str(split)) for split in splits or ["SPLIT"]], what)
    if (folder / "state.json").is_file():
        state = read_json_object(folder / "state.json", DataError, "Save the data set again.")
        if state.get("_indices_data_files") or state.get("_indices_files"):
            raise DataError(f"{folder}: its rows are chosen by an index. Save it again: dataset.flatten_indices().")
        named = [file.get("filename") for file in state.get("_data_files") or [] if isinstance(file, Mapping)]
        paths = [folder / os.path.basename(name) for name in named if isinstance(name, str)]
        if missing := [path for path in paths if not path.is_file()]:
            raise DataError(f"{missing[0]}: no such file, though {folder}/state.json names it. Copy the folder again.")
    else:
        inside = [path for place in (folder, folder / "data") if place.is_dir() for path in place.iterdir()]
        paths = sorted(path for path in inside if path.name.lower().endswith(_SET_SUFFIXES) and path.is_file())
    splits = {match[1]: path for path in paths if (match := _PART.match(path.name))}
    if len(splits) > 1:
        raise _has_splits(folder, [str(path.with_name(f"{name}-*")) for name, path in splits.items()], what)
    if not paths:
        expected = ", ".join(f"*{suffix}" for suffix in _SET_SUFFIXES)
        raise DataError(f"{folder}: a folder without data files ({what}). Expected {expected} in it or in its data/.")
    return list(map(str, paths))


def _has_splits(folder: Path, paths: list[str], what: str) -> DataError:
    return DataError(f"{folder}: has several splits ({what}). Give one of them: {', '.join(sorted(paths))}.")


def open_data_file(path: str) -> DataFile:
    """Indexes a data file by its suffix: ``.txt``, ``.tar``, ``.parquet``, ``.arrow``, and everything else as JSON.

    Of ``.gz`` and ``.zst`` files an unpacked copy is read. Raises DataError when it cannot be read, is compressed in
    another way, or is a broken JSON array, table or tar.
    """
    stem, suffix = os.path.splitext(path.lower())
    if suffix in (".xz", ".bz2", ".tgz", ".zip", ".7z") or (suffix in COMPRESSED and stem.endswith(".tar")):
        raise DataError(f"{path}: {suffix} is not read at random. Unpack or convert it to JSON Lines, .txt or .tar.")
    try:
        status = os.stat(path)
        return _open(path, suffix, status.st_size, status.st_mtime_ns)
    except OSError as error:
        raise DataError.unreadable(path, error) from None


@functools.cache
def _open(path: str, suffix: str, size: int, mtime: int) -> DataFile:
    """One pass for every state of a file: the fingerprint, training and validation share it."""
    if suffix == ".tar":
        return _group(index_tar(path))
    if suffix in (".parquet", ".arrow"):
        return open_table(path, suffix, _digest(path))
    if suffix in COMPRESSED:
        inner = os.path.splitext(path[: -len(suffix)])[1].lower()
        plain = unpacked(path, f"{_digest(path)}.{'txt' if inner == '.txt' else 'jsonl'}", decompress)
        file = _open_json_or_text(plain, os.path.getsize(plain))
        return dataclasses.replace(file, path=path, plain=plain)
    return _open_json_or_text(path, size)


def _open_json_or_text(path: str, size: int) -> JsonFile | TextFile:
    if path.lower().endswith(".txt"):
        return TextFile(path, _digest(path), size)
    with open(path, "rb") as file:
        start = file.read(64).removeprefix(b"\xef\xbb\xbf").lstrip()
    return _index_array(path) if start.startswith(b"[") else _index_lines(path, size)


def _digest(path: str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _index_lines(path: str, size: int) -> JsonFile:
    data = np.memmap(path, np.uint8, "r") if size else np.zeros(0, np.uint8)
    digest, images, ends = hashlib.sha256(), False, []
    for start in range(0, size, _BLOCK):
        block = data[start : start + _BLOCK]
        digest.update(block)
        ends.append(np.flatnonzero(block == ord("\n")) + start + 1)
        # A key may lie across the edge of two blocks.
        images = images or _names_images(data[start : start + _BLOCK + len(_IMAGE_KEYS[0])].tobytes())
    ends.append(np.array([size]))
    bounds = np.unique(np.concatenate(ends))  # the last line may end without a newline
    starts = np.concatenate([[0], bounds[:-1]]).astype(np.int64)[: len(bounds) if size else 0]
    sizes = bounds[: len(starts)] - starts
    doubtful = np.flatnonzero(np.isin(data[starts], _SPACES))
    blank = [line for line in doubtful if data[starts[line] : starts[line] + sizes[line]].tobytes().isspace()]
    lines = np.delete(np.arange(1, len(starts) + 1), blank) if blank else None
    return JsonFile(path, digest.hexdigest(), images, np.delete(starts, blank), np.delete(sizes, blank), lines)


def _index_array(path: str) -> JsonFile:
    with open(path, "rb") as file:
        data = file.read()
    decoder, starts, sizes, lines = json.JSONDecoder(), [], [], []
    try:
        text = data.decode("utf-8-sig")
        offset = len(data) - len(text.encode())  # of a byte order mark
        position, known, line = text.index("[") + 1, 0, 1
        while True:
            position += len(text[position : position + 4096]) - len(text[position : position + 4096].lstrip(" \t\r\n"))
            if text[position : position + 1].isspace():
                continue
            if text[position : position + 1] == "]":
                break
            _, end = decoder.raw_decode(text, position)
            # Bytes, not characters, are what a file is read by.
            offset += len(text[known:position].encode())
            line += text.count("\n", known, position)
            size = len(text[position:end].encode())
            starts.append(offset)
            sizes.append(size)
            lines.append(line)
            offset, line, known = offset + size, line + text.count("\n", position, end), end
            position = end
            while text[position : position + 1] in (" ", "\t", "\r", "\n"):
                position += 1
            if text[position : position + 1] == ",":
                position += 1
            elif text[position : position + 1] != "]":
                raise ValueError(f'expected "," or "]" at line {line}')
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: begins with [ but is no JSON array of records ({error}). Repair the file.") from None
    columns = [np.array(column, np.int64) for column in (starts, sizes, lines)]
    return JsonFile(path, hashlib.sha256(data).hexdigest(), _names_images(data), *columns)


def _names_images(data: bytes) -> bool:
    return any(key in data for key in _IMAGE_KEYS)


def _split_key(name: str) -> tuple[str, str]:
    """(key, suffix) of a member: the name's first dot after the last slash divides them."""
    folder, _, base = name.rpartition("/")
    stem, _, rest = base.partition(".")
    return f"{folder}/{stem}" if folder else stem, rest.lower()


def _group(index: TarIndex) -> TarFile:
    samples: dict[str, int] = {}
    owners, members, kinds = [], [], []
    for member in range(len(index)):
        key, rest = _split_key(index.name(member))
        suffix = rest.rpartition(".")[2]
        kind = {"json": _JSON, "txt": _TEXT}.get(suffix, _IMAGE if suffix in IMAGE_SUFFIXES else None)
        if kind is not None:  # other members, such as KEY.cls, are no part of training
            owners.append(samples.setdefault(key, len(samples)))
            members.append(member)
            kinds.append(kind)
    order = np.argsort(np.array(owners, np.int64), kind="stable")
    ends = np.cumsum(np.bincount(np.array(owners, np.int64), minlength=len(samples))) if owners else []
    return TarFile(
        index, np.array(members, np.int64)[order], np.array(kinds, np.uint8)[order], np.array(ends, np.int64)
    )
