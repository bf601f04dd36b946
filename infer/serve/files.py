"""Pictures from folders that the operator names: their files, and what links lead to within them, and no others."""

from __future__ import annotations

import errno
import os
import re
import stat
import urllib.parse
from collections.abc import Sequence

from dsvl2_jax.infer.serve.media_errors import MediaError, shown, too_many_bytes

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*(?=:)")


def scheme_of(reference: str) -> str:
    """A URL's scheme in lower case; "" of a path."""
    match = _SCHEME.match(reference)
    return match[0].lower() if match else ""


def read_file(reference: str, roots: Sequence[str], max_bytes: int, field: str, kind: str = "picture") -> bytes:
    """The regular file that a ``file:`` URL or a path names.

    Args:
      reference: a relative path is looked up in each root in turn.
      roots: folders, absolute and without links.
      field, kind: for errors.

    Raises:
      MediaError: it is no path, in none of the folders, not there, not readable, or larger than ``max_bytes``.
    """
    try:
        path = _local_path(reference)
        # Links are followed here, and where they lead is what counts.
        resolved = [(root, os.path.realpath(os.path.join(root, path))) for root in roots]
        inside = [(root, file) for root, file in resolved if os.path.commonpath([root, file]) == root != file]
        if not inside:
            raise MediaError(
                field, 403, f"{shown(reference)} is not in a folder that this server reads from (--media-path)."
            )
        for root, file in inside:
            if (data := _read_below(root, file, max_bytes)) is not None:
                break
        else:
            raise MediaError(field, 400, f"{shown(reference)}: no such file.")
    except OSError as error:
        raise MediaError(field, 400, f"{shown(reference)} cannot be read ({error.strerror}).") from None
    except ValueError as error:  # also of paths that the system cannot spell
        raise MediaError(field, 400, f"{shown(reference)} is no file's path: {error}.") from None
    if len(data) > max_bytes:
        raise MediaError(field, 413, too_many_bytes(max_bytes, kind))
    return data


def _local_path(reference: str) -> str:
    """The path that a ``file:`` URL stands for, or that is given as one. Raises ValueError."""
    path = reference
    if scheme_of(reference):
        parts = urllib.parse.urlsplit(reference)
        if parts.netloc.lower() not in ("", "localhost"):
            raise ValueError("it names another host; this machine's have three slashes, as in file:///folder/a.png")
        if parts.query or parts.fragment or not parts.path.startswith("/"):
            raise ValueError("expected an absolute path, with # and ? as %23 and %3F, as in file:///folder/a.png")
        path = urllib.parse.unquote(parts.path, errors="surrogateescape")
    if "\0" in path:
        raise ValueError("it has a null character")
    return path


def _read_below(root: str, file: str, most: int) -> bytes | None:
    """A regular file's contents, cut off after ``most`` + 1 bytes; None where there is no such file.

    ``file`` is below ``root`` and its links are resolved. None is followed any more: one that someone has put there
    since then is an OSError.
    """
    *folders, name = os.path.relpath(file, root).split(os.sep)
    folder = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
    try:
        for inner in folders:
            outer, folder = folder, os.open(inner, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=folder)
            os.close(outer)
        # A pipe without a writer would block.
        handle = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=folder)
    except FileNotFoundError:
        return None
    finally:
        os.close(folder)
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise OSError(errno.EINVAL, "it is not a regular file")
    with open(handle, "rb") as stream:
        return stream.read(most + 1)
