"""Addresses in object stores, ``gs://BUCKET/…`` and ``s3://BUCKET/…``, beside directories of a disk.

`path_of` gives a path for either: a `pathlib.Path`, or an `epath.Path`, which has the same methods. Parameters are
written and read there by Orbax. What else an object store is not (a disk with locks, renames and files that grow) is
here: a file is written whole or not at all, a directory is there while there is an object below it, and whatever has
to be known for sure is asked by `names`, since `exists` and its like call a store that does not answer empty.
Tested in tests/checkpoint/test_remote.py and tests/train/test_remote_run.py.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import importlib.util
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from dsvl2_jax.errors import CheckpointError, DSVL2Error, UsageError
from dsvl2_jax.messages import first_line

_ADDRESS = re.compile(r"(gs|s3):/+(.*)", re.DOTALL)  # pathlib leaves one slash of the two
_CLIENTS = {"gs": "gcsfs", "s3": "s3fs"}  # the packages that list, read and write small files
_EXTRAS = {"gs": "gcs", "s3": "s3"}
_SEND_EVERY = 60.0  # seconds


def is_remote(path: str | Path) -> bool:
    """True for an address in an object store."""
    return _ADDRESS.match(str(path)) is not None


def path_of(path: str | Path) -> Path:
    """The path that a user gave: of the disk, or in an object store.

    Raises:
      UsageError: it names no bucket, or the client of the store is not installed.
    """
    match = _ADDRESS.match(str(path))
    if match is None:
        return Path(path)
    scheme, place = match[1], match[2].strip("/")
    if not place:
        raise UsageError(f"{path}: names no bucket; expected {scheme}://BUCKET/DIRECTORY.")
    if importlib.util.find_spec(_CLIENTS[scheme]) is None:
        raise UsageError(
            f"{scheme}://{place}: needs the package {_CLIENTS[scheme]}. Install it: "
            f"pip install 'dsvl2-jax[{_EXTRAS[scheme]}]'"
        )
    return _path(scheme, place)


def absolute(path: Path) -> Path:
    """`Path.absolute`, which takes an address for a relative path."""
    return path if is_remote(path) else path.absolute()


def _path(scheme: str, place: str) -> Path:
    import fsspec
    from etils import epath

    for protocol in ("gs", "gcs", "s3"):
        # Other processes write there too, so that what was listed before says nothing.
        fsspec.config.conf.setdefault(protocol, {}).setdefault("use_listings_cache", False)
    if scheme == "s3":
        from dsvl2_jax.checkpoint import orbax_s3

        orbax_s3.install()
    return epath.Path(f"{scheme}://{place}")


def _client(path: Path) -> Any:
    import fsspec

    return fsspec.filesystem(_ADDRESS.match(str(path))[1])


@contextlib.contextmanager
def reaching(path: Path, error: type[DSVL2Error] = CheckpointError) -> Iterator[None]:
    """Raises ``error`` for what a store or its client raises in the block; nothing changes for a path of the disk."""
    try:
        yield
    except DSVL2Error:
        raise
    except Exception as problem:  # the clients raise their own, their HTTP libraries' and the system's errors
        if not is_remote(path):
            raise
        raise error(
            f"{path}: the store does not let us ({type(problem).__name__}: {first_line(problem)}). Check the bucket's "
            "name, the credentials and their permissions, and the network."
        ) from problem


def names(directory: Path) -> set[str]:
    """Names of the files and directories in a directory of a store; none where there is no such directory.

    Raises:
      CheckpointError: the store cannot be asked, or there is no such bucket.
    """
    with reaching(directory):
        try:
            found = _client(directory).ls(str(directory), detail=False)
        except FileNotFoundError:
            bucket = str(directory).split("/")[2]
            _client(directory).ls(bucket, detail=False)  # raises when there is no such bucket
            return set()
        below = str(directory).split("://")[1] + "/"
        return {name.removeprefix(below).strip("/") for name in found if name.startswith(below)} - {""}


def file_sizes(directory: Path) -> dict[str, int]:
    """Name → bytes of all files below a directory of a store, by one listing. Raises CheckpointError as `names`."""
    with reaching(directory):
        found = _client(directory).find(str(directory), detail=True)
    start = len(str(directory).split("://")[1]) + 1
    return {name[start:]: info["size"] for name, info in sorted(found.items()) if name[start:]}


def remove(directory: Path) -> None:
    """Removes a directory of a store, or a file. Nothing happens where there is none."""
    with reaching(directory), contextlib.suppress(FileNotFoundError):
        _client(directory).rm(str(directory), recursive=True)


def check_writable(directory: Path) -> None:
    """Raises CheckpointError where nothing can be written: better before the work than after it."""
    with reaching(directory):
        probe = directory / ".dsvl2-probe"
        probe.write_bytes(b"")
        probe.unlink()


def upload(source: Path, destination: Path, last: str) -> None:
    """Copies a directory of the disk into a store. The file named ``last`` goes last: it says that all are there.

    Raises:
      CheckpointError: it cannot be written; what has been is removed.
    """
    client = _client(destination)
    files = sorted(file for file in source.rglob("*") if file.is_file() and file != source / last)
    try:
        with reaching(destination):
            client.put([str(file) for file in files], [str(destination / file.relative_to(source)) for file in files])
            client.put_file(str(source / last), str(destination / last))
    except BaseException:
        with contextlib.suppress(Exception):  # the first error is the one to report
            remove(destination)
        raise


def local_copy(directory: Path, wanted: Callable[[Path], bool]) -> Path:
    """The files of a directory that are ``wanted``, on the disk: those of the disk as they are, others copied.

    Copies last as long as the process, and are made again when the store has others.
    """
    if not is_remote(directory):
        return directory
    import fsspec

    with reaching(directory):
        entries = _client(directory).ls(str(directory), detail=True)
        entries = [entry for entry in entries if entry["type"] == "file" and wanted(Path(entry["name"]))]
        copy = _copies() / fsspec.utils.tokenize(entries) / str(directory).replace("://", "/")
        if not copy.is_dir():
            new = copy.with_name(f"{copy.name}.new-{time.monotonic_ns()}")
            new.mkdir(parents=True)
            for entry in entries:
                name = Path(entry["name"]).name
                (new / name).write_bytes((directory / name).read_bytes())
            with contextlib.suppress(OSError):  # another thread was first
                new.rename(copy)
    return copy


def local_file(file: Path) -> Path:
    """A file on the disk: as it is, or the copy of one in a store. Where there is none, there is none after it."""
    return local_copy(file.parent, lambda path: path.name == file.name) / file.name


@functools.cache
def _copies() -> Path:
    directory = Path(tempfile.mkdtemp(prefix="dsvl2-remote-"))
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    return directory


class Mirror:
    """A directory of the disk whose files are in a store too: for files that grow, as those in a store cannot."""

    def __init__(self, remote: Path):
        self._remote = remote
        self.directory = Path(tempfile.mkdtemp(prefix="dsvl2-logs-"))
        atexit.register(shutil.rmtree, self.directory, ignore_errors=True)
        self._sent: dict[Path, tuple[int, int]] = {}
        self._time = time.monotonic()

    def fetch(self, name: str) -> None:
        """Goes on with a file that the store may have. Raises CheckpointError when it cannot be read."""
        if name in names(self._remote):
            with reaching(self._remote):
                (self.directory / name).write_bytes((self._remote / name).read_bytes())

    def send(self, *, now: bool = True) -> None:
        """Sends the files that have changed; with ``now`` False at most once a minute.

        What fails is told and tried again the next time: a run need not stop for its log.
        """
        if not now and time.monotonic() - self._time < _SEND_EVERY:
            return
        self._time = time.monotonic()
        for file in sorted(self.directory.rglob("*")):
            state = (file.stat().st_size, file.stat().st_mtime_ns)
            if not file.is_file() or self._sent.get(file) == state:
                continue
            target = self._remote / file.relative_to(self.directory)
            try:
                with reaching(target):
                    _client(target).put_file(str(file), str(target))
                self._sent[file] = state
            except CheckpointError as error:
                print(f"warning: {error} It is tried again.", file=sys.stderr)
                return
