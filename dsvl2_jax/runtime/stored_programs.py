"""Compiled programs on disk: what is found there is neither traced nor compiled.

jax's own compilation cache spares the compiler alone, and is asked after a program has been traced and lowered: most of
the time that a second start takes.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import pickle
import platform
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jaxlib
from jax.experimental import serialize_executable
from jax.experimental.compilation_cache import compilation_cache

from dsvl2_jax.runtime.compile_cache import others_may_write, private_folder

_KEPT = 30 * 86400  # seconds that a program stays which nobody uses
_MOST_BYTES = 2 << 30  # of all programs in a folder; those that were used last stay
# An option's default. jax keeps in memory, by module and options, what this process has compiled or read from jax's
# cache on disk: a program asked for with options of its own is compiled.
_APART = {"xla_dump_max_hlo_modules": -1}
_FLAGS = ("XLA_FLAGS", "LIBTPU_INIT_ARGS", "JAX_PLATFORMS")


class StoredPrograms:
    """Calls jitted functions by the programs of a folder, which it fills.

    A program's file is named after all that it was made of: our sources, the versions and settings of jax, the devices,
    the table of block sizes, the function, its static arguments, and its arrays' shapes, dtypes and places. One that
    cannot be read is made again.

    Args:
      devices: of the model, all of this process.
      sources: folders of all modules that the programs are written in.
      folder: None: ``programs`` in that of jax's own cache, if it has one. Its files are executed: it is not used where
        others could write to it (see `private_folder`).
      tuning: tells the tables of block sizes apart that programs were traced with.
    """

    def __init__(
        self, devices: Sequence[jax.Device], sources: Sequence[Path], folder: Path | None = None, *, tuning: str = ""
    ):
        self._devices = sorted(devices, key=lambda device: device.id)
        if folder is None and jax.config.jax_compilation_cache_dir:
            folder = Path(jax.config.jax_compilation_cache_dir) / "programs"
        self._folder = None if folder is None else private_folder(folder)
        self._known: dict[tuple, Callable] = {}
        self._client = self._devices[0].client
        kinds = [(device.id, device.device_kind) for device in self._devices]
        self._environment = _environment(sources), self._client.platform_version, kinds, tuning

    def call(self, function: Any, static: Mapping[str, Any], arrays: Mapping[str, Any]) -> Any:
        """``function(**static, **arrays)``.

        Args:
          function: of `jax.jit`, with ``static`` its static arguments; their repr tells them apart.
          arrays: trees of jax and numpy arrays.
        """
        leaves, tree = jax.tree.flatten(arrays)
        key = function, tuple(static.items()), tree, tuple((leaf.shape, leaf.dtype) for leaf in leaves)
        program = self._known.get(key)
        if program is None:
            program = self._known[key] = self._program(function, static, arrays)
        return program(**arrays)

    def _program(self, function: Any, static: Mapping[str, Any], arrays: Mapping[str, Any]) -> Callable:
        if self._folder is None:  # jax's own cache spares the compiler, if it has a folder
            return functools.partial(function, **static)
        path = self._folder / self._name(function, static, arrays)
        program = self._load(path)
        if program is None:
            with _no_compilation_cache():
                program = function.lower(**static, **arrays).compile(compiler_options=_APART)
            try:
                content = pickle.dumps(serialize_executable.serialize(program))
            except (ValueError, NotImplementedError, jax.errors.JaxRuntimeError):
                # Not on this platform, or not with these constants: jax's own cache spares the compiler at least.
                return functools.partial(function, **static)
            self._store(path, content)
        return program

    def _name(self, function: Any, static: Mapping[str, Any], arrays: Mapping[str, Any]) -> str:
        leaves, tree = jax.tree.flatten(arrays)
        places = [(leaf.shape, str(leaf.dtype), str(getattr(leaf, "sharding", None))) for leaf in leaves]
        parts = (
            self._environment,
            f"{function.__module__}.{function.__qualname__}",
            sorted(static.items()),
            str(tree),
            places,
        )
        return f"{function.__name__}-{hashlib.sha256(repr(parts).encode()).hexdigest()}"

    def _load(self, path: Path) -> Callable | None:
        """None: there is none, or none that is whole, or others could have written it."""
        try:
            with path.open("rb") as file:
                if others_may_write(os.fstat(file.fileno())):
                    return None
                digest, content = file.read().split(b"\n", 1)
            if digest.decode() != hashlib.sha256(content).hexdigest():
                return None
            program = serialize_executable.deserialize_and_load(*pickle.loads(content), self._client, self._devices)
            os.utime(path)
            return program
        except Exception:  # no file, or whatever one says that is not ours, or not of this jax
            return None

    def _store(self, path: Path, content: bytes) -> None:
        """Whole or not at all. A disk that takes nothing costs the next start its time, and nothing else."""
        with contextlib.suppress(OSError):
            self._forget_old()
            with tempfile.NamedTemporaryFile(dir=self._folder, delete=False) as file:
                try:
                    file.write(hashlib.sha256(content).hexdigest().encode() + b"\n" + content)
                    file.flush()
                    os.replace(file.name, path)
                except OSError:
                    os.unlink(file.name)
                    raise

    def _forget_old(self) -> None:
        """Removes programs that nobody has used for `_KEPT`, and of the others what exceeds `_MOST_BYTES`."""
        files = []
        for path in self._folder.iterdir():
            with contextlib.suppress(OSError):
                status = path.stat()
                files.append((status.st_mtime, status.st_size, path))
        total = 0
        for used, size, path in sorted(files, reverse=True):
            total += size
            if total > _MOST_BYTES or used < time.time() - _KEPT:
                with contextlib.suppress(OSError):
                    path.unlink()


@contextlib.contextmanager
def _no_compilation_cache() -> Iterator[None]:
    """What jax's cache gives cannot be stored again: a CPU's program would lack its functions."""
    before = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()  # it looks at the setting once
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)
        compilation_cache.reset_cache()


def _environment(sources: Sequence[Path]) -> tuple[Any, ...]:
    """All that a program depends on besides its function, its arguments and the devices."""
    digest = hashlib.sha256()
    for path in sorted(path for folder in sources for path in folder.rglob("*.py")):
        digest.update(path.read_bytes())
    versions = jax.__version__, jaxlib.__version__
    settings = {name: value for name, value in sorted(jax.config.values.items()) if "cache" not in name}
    flags = [os.environ.get(name) for name in _FLAGS]
    return digest.hexdigest(), versions, repr(settings), flags, platform.machine(), _processor()


def _processor() -> str:
    """What the processor can do, where the system tells: a program may use all of it."""
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return platform.processor()
