"""jax's persistent compilation cache, in the user's cache directory."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import jax


def user_cache() -> Path:
    """The user's directory for what we can make again; one that cannot be made where the user has no home."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path(os.path.expanduser("~"), ".cache")) / "dsvl2_jax"


def enable_compilation_cache() -> None:
    """Turns on jax's persistent compilation cache unless the user has set one (JAX_COMPILATION_CACHE_DIR)."""
    if jax.config.jax_compilation_cache_dir is None:
        folder = user_cache() / "xla"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            writable = folder.is_absolute() and os.access(folder, os.W_OK | os.X_OK)
        except OSError:
            writable = False
        if not writable:  # jax would warn of every program
            print(
                f"{folder}: cannot be written, so compiled programs are not kept for the next start. "
                "JAX_COMPILATION_CACHE_DIR names another folder.",
                file=sys.stderr,
            )
            return
        jax.config.update("jax_compilation_cache_dir", str(folder))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
