"""jax's persistent compilation cache, in the user's cache directory, and the rule for folders of programs."""

from __future__ import annotations

import os
import stat
import sys
import warnings
from pathlib import Path


def user_cache() -> Path:
    """The user's directory for what we can make again; one that cannot be made where the user has no home."""
    # The XDG base directory specification: a relative path, such as an empty one, does not count.
    chosen = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (chosen if chosen.is_absolute() else Path(os.path.expanduser("~"), ".cache")) / "dsvl2_jax"


def enable_compilation_cache() -> None:
    """Turns on jax's persistent compilation cache unless the user has set one (JAX_COMPILATION_CACHE_DIR)."""
    import jax  # not for those who only ask where the cache is

    if jax.config.jax_compilation_cache_dir is None:
        folder = user_cache() / "xla"
        if not _writable(folder):  # jax would warn of every program
            print(
                f"{folder}: cannot be written, so compiled programs are not kept for the next start. "
                "JAX_COMPILATION_CACHE_DIR names another folder.",
                file=sys.stderr,
            )
            return
        if private_folder(folder) is None:
            return
        jax.config.update("jax_compilation_cache_dir", str(folder))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


def _writable(folder: Path) -> bool:
    """Whether files can be made in a folder, which is made if it is missing (mode 0700)."""
    try:
        if folder.is_absolute():  # it is not where the user has no home
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        return folder.is_absolute() and os.access(folder, os.W_OK | os.X_OK)
    except OSError:
        return False


def private_folder(folder: Path) -> Path | None:
    """A folder for programs that are executed when they are read back, made if it is missing.

    None: it cannot be written; or, with a warning, another user owns it or may write into it, and so could have his
    programs run.
    """
    if not _writable(folder):
        return None
    status = folder.stat()
    if not others_may_write(status):
        return folder
    warnings.warn(
        f"{folder}: compiled programs are neither read from this folder nor kept in it, since others could put theirs "
        f"there: it belongs to user {status.st_uid} and has mode {stat.S_IMODE(status.st_mode):o}. Remove it, or set "
        "XDG_CACHE_HOME to a folder of your own.",
        stacklevel=2,
    )
    return None


def others_may_write(status: os.stat_result) -> bool:
    """Whether any user but this one and root can write what has this status. Windows has no such modes: False."""
    if not hasattr(os, "geteuid"):
        return False
    return status.st_uid not in (0, os.geteuid()) or bool(status.st_mode & (stat.S_IWGRP | stat.S_IWOTH))
