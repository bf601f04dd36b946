"""What all benchmarks share: the machine in one line, a process's memory and bytes read, an empty page cache."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
from pathlib import Path
from typing import Literal

from dsvl2_jax.errors import DSVL2Error, UsageError


def machine() -> str:
    """The machine and the versions that figures hold for, in one line."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("jax", "jaxlib", "numpy"))
    return f"{cores} CPU cores, {memory / 2**30:.0f} GiB memory; Python {platform.python_version()}, {versions}"


def need_at_least(option: str, value: int, least: int) -> None:
    """Raises UsageError for a number that is too small; ``option`` is written as on the command line."""
    if value < least:
        raise UsageError(f"{option}: found {value}, expected at least {least}.")


def need_torch(command: str, *others: str) -> None:
    """Raises UsageError where PyTorch, the library of models for it, or one of the ``others`` is missing."""
    needed = ("torch", "transformers", *others)
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        raise UsageError(
            f"{command} compares with PyTorch, and {' and '.join(missing)} cannot be imported. Install them for this "
            f"measurement (pip install {' '.join(needed)}); nothing else needs them."
        )


def own_bytes(field: Literal["VmRSS", "VmHWM", "rchar"]) -> int:
    """Bytes of this process: resident now, resident at most so far, or read from files.

    Raises:
      DSVL2Error: this system does not say.
    """
    return process_bytes("self", field)


def restart_peak() -> None:
    """Has the kernel begin this process's high-water mark of resident memory (``VmHWM``) anew."""
    Path("/proc/self/clear_refs").write_text("5")


def process_bytes(process: int | Literal["self"], field: Literal["VmRSS", "VmHWM", "rchar"]) -> int:
    """The same of any process, by its id."""
    file = Path("/proc", str(process), "io" if field == "rchar" else "status")
    try:
        lines = file.read_text(encoding="ascii").splitlines()
    except OSError:
        lines = []
    for line in lines:
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * (1024 if value.endswith("kB") else 1)
    raise DSVL2Error(f"{file}: has no {field}; this measurement needs Linux.")


def drop_from_page_cache(directory: Path) -> None:
    """Drops a directory's files from the page cache, so that they are read from the disk again."""
    os.sync()
    for file in filter(Path.is_file, directory.rglob("*")):
        descriptor = os.open(file, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)
