"""SHA-256 digests of a checkpoint's files: computing them, keeping them, and naming the files that have changed.

SHA-256 and not a faster checksum because it is what people have: `sha256sum` prints it, the hub names large files by
it, and with the processor's own instructions it is as fast as most disks (1.8 GB/s a core, twice BLAKE2's speed).
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from dsvl2_jax.checkpoint import remote
from dsvl2_jax.errors import CheckpointError
from dsvl2_jax.json_files import read_text
from dsvl2_jax.messages import listed

SUMS_NAME = "SHA256SUMS"  # as sha256sum writes it; where it is present, the files must agree with it
WORKERS = 2  # hashing lets go of the GIL

_LINE = re.compile(r"([0-9a-fA-F]{64}) [ *](.+)")
_SEAL = "sha256_of_this_file"  # computed with zeros in its place
_ZEROS = "0" * 64
_SEAL_AT_END = re.compile(rf'"{_SEAL}": "([0-9a-f]{{64}})"\n}}\n\Z')


def digest(file: Path) -> str:
    """The SHA-256 digest of a file, in hexadecimal. Raises OSError."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def of_files(directory: Path, names: Iterable[str]) -> dict[str, str]:
    """Name → digest of files of a directory, several at a time. Raises OSError."""
    names = list(names)
    with ThreadPoolExecutor(WORKERS, thread_name_prefix="dsvl2-digest") as pool:
        return dict(zip(names, pool.map(lambda name: digest(directory / name), names), strict=True))


def files_below(directory: Path) -> dict[str, int]:
    """Name relative to the directory → bytes, of every file below it, in order."""
    if remote.is_remote(directory):
        return remote.file_sizes(directory)
    files = (file for file in sorted(directory.rglob("*")) if file.is_file())
    return {str(file.relative_to(directory)): file.stat().st_size for file in files}


class Flushing:
    """Puts the files of a directory on the disk and computes their digests, while others are being written.

    So the disk is never idle, and a file is read again while the system still has it in its cache. To be left as a
    context manager, which waits for what is under way.
    """

    def __init__(self, directory: Path):
        self._directory = directory
        self._pool = ThreadPoolExecutor(WORKERS, thread_name_prefix="dsvl2-digest")
        self._known: dict[tuple[int, int, int], Future[str]] = {}  # a renamed file has the same inode

    def __enter__(self) -> Flushing:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def take(self) -> None:
        """Begins with the files that are new or have changed. None may be half written."""
        for file in (file for file in self._directory.rglob("*") if file.is_file()):
            self._begin(file)

    def finish(self) -> dict[str, str]:
        """Name → digest of every file of the directory, all of which are on the disk. Raises OSError."""
        begun = {name: self._begin(self._directory / name) for name in files_below(self._directory)}
        return {name: future.result() for name, future in begun.items()}

    def _begin(self, file: Path) -> Future[str]:
        status = file.stat()
        key = status.st_ino, status.st_size, status.st_mtime_ns
        if key not in self._known:
            descriptor = os.open(file, os.O_RDONLY)  # it may be renamed before its turn comes
            self._known[key] = self._pool.submit(_flush_and_digest, descriptor)
        return self._known[key]


def _flush_and_digest(descriptor: int) -> str:
    with os.fdopen(descriptor, "rb") as file:
        os.fsync(descriptor)
        return hashlib.file_digest(file, "sha256").hexdigest()


def check(directory: Path, expected: Mapping[str, str], source: str, advice: str) -> None:
    """Reads all files that have a digest.

    Args:
      expected: name → digest.
      source: what says so, for the message.
      advice: what to do, for the message.

    Raises:
      CheckpointError: files are missing or have changed; all are named.
    """

    def problem(name: str) -> str | None:
        try:
            if not (directory / name).is_file():
                return f"{name}: missing"
            return None if digest(directory / name) == expected[name] else f"{name}: changed"
        except (OSError, ValueError) as error:  # ValueError: a name that no file can have
            return f"{name}: cannot be read ({getattr(error, 'strerror', None) or error})"

    with ThreadPoolExecutor(WORKERS, thread_name_prefix="dsvl2-digest") as pool:
        problems = [text for text in pool.map(problem, expected) if text is not None]
    if problems:
        raise CheckpointError(
            f"{directory}: its files are not those that {source} lists; {advice}:\n{listed(problems)}"
        )


# SHA256SUMS, beside a released checkpoint.


def sums(directory: Path, names: Sequence[str]) -> str:
    """The text of a ``SHA256SUMS`` for these files of a directory."""
    return "".join(f"{value}  {name}\n" for name, value in of_files(directory, names).items())


def read_sums(directory: Path) -> dict[str, str]:
    """Name → digest, as the directory's ``SHA256SUMS`` says; empty where there is none.

    Raises:
      CheckpointError: it is not as `sha256sum` writes it.
    """
    path = directory / SUMS_NAME
    if not path.is_file():
        return {}
    advice = "Get it again, or remove it to do without."
    expected = {}
    for number, line in enumerate(read_text(path, CheckpointError, advice).split("\n"), 1):
        line = line.removesuffix("\r")
        match = _LINE.fullmatch(line)
        if line and (match is None or Path(match[2]).is_absolute() or ".." in Path(match[2]).parts):
            raise CheckpointError(
                f"{path}:{number}: found {line[:100]!r}, expected 64 hexadecimal digits, two spaces and the name of a "
                f"file in the same directory, as sha256sum writes. {advice}"
            )
        if match is not None:
            expected[match[2]] = match[1].lower()
    return expected


def check_sums(directory: Path) -> dict[str, str]:
    """Compares the files with the directory's ``SHA256SUMS``, if it has one; returns what it lists.

    Raises:
      CheckpointError: a file is missing or has changed, or the list is not as `sha256sum` writes it.
    """
    expected = read_sums(directory)
    advice = f"get them again (or remove {SUMS_NAME} if you changed them on purpose)"
    check(directory, expected, SUMS_NAME, advice)
    return expected


def check_hub_files(directory: Path) -> set[str]:
    """Compares the files of a download in the hub's cache with the digests that the cache names them by.

    Returns:
      The names of those that have one: the cache links to a file named by SHA-256 where the hub stores a file as large,
      and by git's SHA-1 otherwise.

    Raises:
      CheckpointError: files have changed; all are named.
    """
    known, changed = set(), []
    for link in sorted(directory.iterdir()):
        blob = link.resolve()
        if link.is_symlink() and blob.is_file() and blob.parent.name == "blobs":
            if re.fullmatch("[0-9a-f]{64}", blob.name):
                found = digest(blob)
            elif re.fullmatch("[0-9a-f]{40}", blob.name):
                content = blob.read_bytes()
                found = hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
            else:
                continue
            known.add(link.name)
            if found != blob.name:
                changed.append(f"{link.name}: changed ({blob})")
    if changed:
        raise CheckpointError(
            f"{directory}: files of the hub's cache are not those that were downloaded; remove them and download them "
            f"again:\n{listed(changed)}"
        )
    return known


# JSON documents with a digest of themselves.


def sealed(content: Mapping[str, Any]) -> str:
    """The JSON text of an object, with the text's own digest at the end, which `check_seal` checks."""
    text = json.dumps({**content, _SEAL: _ZEROS}, indent=1) + "\n"
    before, _, after = text.rpartition(_ZEROS)
    return before + hashlib.sha256(text.encode()).hexdigest() + after


def is_sealed(content: Mapping[str, Any]) -> bool:
    return _SEAL in content


def check_seal(path: Path, text: str, advice: str) -> None:
    """Raises CheckpointError when the text of `sealed` has been changed since."""
    match = _SEAL_AT_END.search(text)
    before = text[: match.start(1)] + _ZEROS + text[match.end(1) :] if match else text
    if match is None or hashlib.sha256(before.encode()).hexdigest() != match[1]:
        raise CheckpointError(f"{path}: has changed since it was written, by its own digest. {advice}")
