"""Memory that a program has freed, kept by the C library for the next one."""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
from pathlib import Path

from dsvl2_jax.runtime.lazy import LazyModule

jax = LazyModule("jax")

# Numbers of glibc's mallopt(3).
_M_TRIM_THRESHOLD = -1
_M_MMAP_MAX = -4
_M_ARENA_MAX = -8

# Without such a device file no accelerator can be used: NVIDIA's, AMD's, and two kinds of TPU machines'.
_ACCELERATORS = ("nvidia*", "kfd", "accel*", "vfio/[0-9]*")

# What a user may have chosen himself: these are then left as they are.
_CHOSEN = ("MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_ARENA_MAX")


_kept = False


def keep_freed_memory() -> bool:
    """Has glibc keep large arrays that are freed, and give them out again; where programs run on CPUs.

    XLA takes and frees its temporary arrays in every execution. glibc would return them to the system at once, which
    clears all their pages before it gives them out again: a tenth of the time of encoding a picture. The process then
    stays as large as it was at most. To be called before jax has begun to run: threads keep what they began with.

    Returns:
      Whether it does: not where programs run elsewhere, not without glibc, nor where GLIBC_TUNABLES or MALLOC_*
      variables say how memory is kept.
    """
    if not _programs_run_on_cpus():
        return False
    if "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", "") or any(name in os.environ for name in _CHOSEN):
        return False
    if platform.libc_ver()[0] != "glibc":
        return False
    # One arena, since others cannot hold arrays of more than 64 MB; no array in a mapping of its own; nothing returned.
    settings = (_M_ARENA_MAX, 1), (_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, -1)
    global _kept
    mallopt = ctypes.CDLL(None).mallopt
    _kept = all(mallopt(name, value) for name, value in settings)
    return _kept


def _programs_run_on_cpus() -> bool:
    """True where jax's programs run on CPUs: asked of jax, which starts its threads then, only if it cannot be told."""
    platforms = jax.config.jax_platforms
    if platforms:
        return platforms.split(",")[0] == "cpu"
    accelerators = (path for pattern in _ACCELERATORS for path in Path("/dev").glob(pattern))
    return not any(accelerators) or jax.default_backend() == "cpu"


def give_freed_memory_back(*, always: bool = False) -> None:
    """Returns what is free to the system, unless `keep_freed_memory` has it kept for the next array.

    ``always``: also then. For what nothing asks for again, such as a compiler's memory.
    """
    if always or not _kept:
        with contextlib.suppress(AttributeError, OSError):  # another C library
            ctypes.CDLL(None).malloc_trim(0)
