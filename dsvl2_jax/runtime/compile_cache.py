"""jax's persistent compilation cache, in the user's cache directory."""

from __future__ import annotations

import os
from pathlib import Path

import jax


def user_cache() -> Path:
    """The user's directory for what we can make again."""
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "dsvl2_jax"


def enable_compilation_cache() -> None:
    """Turns on jax's persistent compilation cache unless the user has set one (JAX_COMPILATION_CACHE_DIR)."""
    if jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str(user_cache() / "xla"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
