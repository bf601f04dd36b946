"""A directory that appears under its name only when it is complete.

It is written under a temporary sibling name, locked by the process that writes it, and renamed at the
end. The kernel drops the lock when the process dies, so a temporary directory without a lock is the
remains of a dead run and may be removed; a locked one belongs to a live run and is left alone.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from rich import filesize

from dsvl2_jax.checkpoint import remote
from dsvl2_jax.errors import CheckpointError

PARTIAL_SUFFIX = ".dsvl2-partial"  # of the name under which a directory is written before it is complete
NEW_SUFFIX = ".new"  # of the name under which a file is

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
_MARGIN = 16 << 20  # bytes beyond the tensors: metadata, indices, file-system blocks


@contextlib.contextmanager
def staged(destination: str | Path, need_bytes: int, last: str | None = None) -> Iterator[Path]:
    """Yields an empty directory that becomes ``destination`` when the block ends without an exception.

    On an exception the directory is removed; on a kill it stays, and the next run removes it. What goes to a store is
    made in the directory for temporary files first.

    Args:
      destination: must not exist; its parent must.
      need_bytes: how much will be written, to refuse early when the disk has less.
      last: in a store, the file by which the directory is known to be complete; None: it cannot be in a store.

    Raises:
      CheckpointError: the destination exists, its parent does not, another run is writing to it, or the
        disk is full (before or while writing).
    """
    destination = remote.absolute(remote.path_of(destination))
    refuse_existing(destination)
    if remote.is_remote(destination):
        if last is None:
            raise CheckpointError(
                f"{destination}: this is written to a disk alone. Give a directory, and copy it to the store."
            )
        remote.check_writable(destination)
        with tempfile.TemporaryDirectory(prefix="dsvl2-upload-") as work:
            _check_space(Path(work), need_bytes)
            yield Path(work)
            remote.upload(Path(work), destination, last)
        return
    with scratch(destination) as partial:
        try:
            _check_space(destination.parent, need_bytes)
            yield partial
            sync_tree(partial)
            refuse_existing(destination)
            partial.rename(destination)
            _sync(destination.parent)
        except Exception as error:
            if is_disk_full(error):
                raise CheckpointError(
                    f"{destination}: the disk filled up while writing; {filesize.decimal(need_bytes)} are needed. "
                    "Nothing was left behind. Free some space or choose another disk, and run it again."
                ) from error
            raise


@contextlib.contextmanager
def scratch(destination: Path) -> Iterator[Path]:
    """Yields an empty directory beside ``destination`` for what is not complete yet, which no other run uses.

    It is removed when the block ends; on a kill it stays, and the next run for this destination removes it.

    Raises:
      CheckpointError: another run uses it, or it cannot be made.
    """
    partial = destination.with_name(f".{destination.name}{PARTIAL_SUFFIX}")
    with locked(partial, f"{destination}: another run is writing it (into {partial}). Wait for it to finish."):
        ours = partial.stat()
        try:
            _clear(partial)
            yield partial
        finally:
            # Once we have renamed it, another run may have made its own of the same name.
            with contextlib.suppress(OSError):
                if os.path.samestat(ours, partial.stat()):
                    shutil.rmtree(partial)


def refuse_existing(destination: Path) -> None:
    """Raises CheckpointError when ``destination`` exists or cannot be made because its parent is missing."""
    if remote.is_remote(destination):
        if remote.names(destination):
            raise CheckpointError(
                f"{destination}: exists already and was not touched; it may be what is left of an upload "
                "that was killed. Choose another name, or remove it first."
            )
        return
    if os.path.lexists(destination):
        raise CheckpointError(
            f"{destination}: exists already and was not touched. Choose another name, or remove it first."
        )
    if not destination.parent.is_dir():
        raise CheckpointError(f"{destination.parent}: no such directory to write into. Create it first.")


def is_disk_full(error: BaseException | None) -> bool:
    """True when the disk being full caused ``error``, also by way of Orbax, which only passes on the text."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if isinstance(error, OSError) and error.errno in _DISK_FULL:
            return True
        if any(os.strerror(code) in str(error) for code in _DISK_FULL):
            return True
        error = error.__cause__ or error.__context__
    return False


def sync_tree(directory: Path) -> None:
    """Flushes every file and directory below ``directory`` to disk."""
    for parent, _, files in os.walk(directory):
        for name in files:
            _sync(Path(parent, name))
        _sync(Path(parent))


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields the name of a new file beside ``path``, which takes its place when the block ends without an exception.

    Several threads and processes may do so at once: they take turns, and the last one's file stays. What a kill leaves
    of the new file is overwritten by the next one for the same path. Raises OSError.
    """
    new = path.with_name(f"{path.name}{NEW_SUFFIX}")
    descriptor = _locked_file(new)
    try:
        yield new
        new.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):  # the first error is the one to report
            new.unlink()
        raise
    finally:
        os.close(descriptor)


def _locked_file(path: Path) -> int:
    """The descriptor of a file that is made when needed, locked, after waiting for whoever holds it."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            # While we waited, its owner has renamed it, or removed it.
            if os.path.samestat(os.fstat(descriptor), path.stat()):
                return descriptor
        except FileNotFoundError:
            pass
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Writes a file that is there either whole, and on disk, or not at all. Raises OSError."""
    if remote.is_remote(path):
        path.write_text(text)
        return
    with replacing(path) as new, new.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


@contextlib.contextmanager
def locked(directory: Path, busy: str) -> Iterator[None]:
    """Creates ``directory`` when needed and holds its lock, which the kernel drops when the process dies.

    Raises:
      CheckpointError: another process holds it (with the message ``busy``), or it cannot be made.
    """
    while True:
        try:
            directory.mkdir(exist_ok=True)
            descriptor = os.open(directory, os.O_RDONLY)
        except FileNotFoundError:
            continue  # the run that owned it has just removed or renamed it
        except OSError as error:
            raise CheckpointError(f"{directory.parent}: cannot write into it ({error.strerror}).") from error
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise CheckpointError(busy) from None
            # Between opening and locking the directory may have been renamed or removed by its owner.
            if directory.exists() and os.path.samestat(os.fstat(descriptor), directory.stat()):
                yield
                return
        finally:
            os.close(descriptor)


def _clear(directory: Path) -> None:
    for child in directory.iterdir():
        if child.is_dir() and not child.is_symlink():
            shutil.rmtree(child)
        else:
            child.unlink()


def _check_space(directory: Path, need_bytes: int) -> None:
    """Raises CheckpointError when the disk of ``directory`` has no room for ``need_bytes`` and a margin."""
    free, needed = shutil.disk_usage(directory).free, need_bytes + _MARGIN
    if free < needed:
        raise CheckpointError(
            f"{directory}: {filesize.decimal(free)} are free on this disk, {filesize.decimal(needed)} are needed. "
            "Free some space or choose another disk."
        )


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
