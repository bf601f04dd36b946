"""The only file that knows Orbax, with `orbax_s3` beside it.

Two kinds of ordinary Orbax v1 checkpoints: one nested dict of parameters, written by partial saves so that
the whole tree never has to be in memory (a converted directory), and several named trees with a JSON
document, written asynchronously from arrays on devices (a training run). Leaves are named by tuples of keys.
Tested in tests/checkpoint/test_load.py, tests/convert/test_to_orbax.py and tests/train/test_run_directory.py.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dsvl2_jax.checkpoint import remote
from dsvl2_jax.model.parameter_paths import LeafPath
from dsvl2_jax.runtime.lazy import LazyModule
from dsvl2_jax.runtime.malloc import give_freed_memory_back

# What neither reads nor writes such checkpoints does without.
jax = LazyModule("jax")
ocp = LazyModule("orbax.checkpoint.experimental.v1")
tensorstore_utils = LazyModule("orbax.checkpoint._src.serialization.tensorstore_utils")
traverse_util = LazyModule("flax.traverse_util")

# Larger leaves are cut into pieces of at most this size, so that a sharded restore reads little more than
# it needs: a piece is always read whole.
CHUNK_BYTES = 1 << 20

_DOCUMENT = "data"  # the JSON document among the named trees of a checkpoint
_METADATA = "_CHECKPOINT_METADATA"  # the file in a checkpoint that Orbax writes last
_COMPLETE = "commit_success.txt"  # the file that it writes last in a store, where it cannot rename
_UNFINISHED = ".orbax-checkpoint-tmp"  # added to a checkpoint's name while it is written


class ParamWriter:
    """Writes a tree of parameters to ``path``, which appears when `finalize` is called.

    At most one batch is being written while the next is prepared; arrays are not copied, so they must
    not change before `wait` returns. Nothing is flushed to disk: whoever writes does so, while the next batch is
    prepared. To be left as a context manager, after which nothing is written any more.
    """

    def __init__(self, path: Path, entries: Mapping[LeafPath, int]):
        """``entries``: leaf → its axis of experts or heads, of which large leaves store each entry by itself."""
        self._path = remote.absolute(path)
        self._pending: Any = None
        self._show_late_errors = _hide_late_errors()
        self._context = _saving_context(entries)
        self._context.memory_options.deepcopy_host_arrays = False
        self._flush_again = _leave_flushing_to_the_caller()

    def __enter__(self) -> ParamWriter:
        return self

    def __exit__(self, *exc_info: object) -> None:
        with contextlib.suppress(Exception):  # the first error is the one to report
            self.wait()
        self._flush_again()

    def write(self, leaves: Mapping[LeafPath, np.ndarray]) -> None:
        """Starts to write a batch, after the previous one has been written."""
        self.wait()
        with self._context:
            self._pending = ocp.partial.save_async(self._path, traverse_util.unflatten_dict(leaves))

    def wait(self) -> None:
        """Returns when everything given to `write` is in files. Raises what the write raised."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.result()

    def finalize(self) -> None:
        """Makes the checkpoint appear at ``path``."""
        self.wait()
        with self._context:
            ocp.partial.finalize(self._path)
        self._show_late_errors()


class Saving:
    """A checkpoint of several trees that is being written to ``path``, which appears when it is complete."""

    def __init__(
        self,
        path: Path,
        trees: Mapping[str, Any],
        document: Mapping[str, Any],
        entries: Mapping[LeafPath, int] | None = None,
    ):
        """Copies the arrays to the host and begins to write; called by every process.

        Args:
          path: must not exist.
          trees: name → nested dicts, tuples and lists of `jax.Array`, which may be donated or deleted at once; or
            `Files`.
          document: anything JSON can hold; each process keeps its own.
          entries: as for `ParamWriter`, of the leaves of every tree.
        """
        self._show_late_errors = _hide_late_errors()
        self._started = time.monotonic()
        self.seconds: float | None = None  # from the call to the end of writing, when `done` has seen it
        with _saving_context(entries or {}):
            self._response = ocp.save_checkpointables_async(
                remote.absolute(path), {**trees, _DOCUMENT: _Document(document)}
            )

    def done(self) -> bool:
        """True when the checkpoint is complete. Raises what the writing raised."""
        return self._finished(timeout=0)

    def wait(self) -> None:
        """Returns when the checkpoint is complete. Raises what the writing raised."""
        self._finished(timeout=None)

    def _finished(self, timeout: float | None) -> bool:
        if self.seconds is None:
            try:
                self._response.result(timeout)
            except TimeoutError:
                if timeout is None:
                    raise
                return False
            self.seconds = time.monotonic() - self._started
            self._show_late_errors()
        return True


def _leave_flushing_to_the_caller() -> Callable[[], None]:
    """tensorstore flushes each file before it goes on, for which a conversion waited most of its time.

    Orbax has no setting for it, so that its own default is changed; what is returned changes it back. Another release
    of Orbax may keep it elsewhere, and is slower then.
    """
    defaults = [getattr(tensorstore_utils, name, {}) for name in ("_BASE_TS_CONTEXT", "_DEFAULT_OCDBT_TS_CONTEXT")]
    for default in defaults:
        default["file_io_sync"] = False

    def undo() -> None:
        for default in defaults:
            default.pop("file_io_sync", None)

    return undo


def _is_not_raised_too(record: logging.LogRecord) -> bool:
    """False for what Orbax's threads log, with a traceback each, and raise where we wait for them."""
    return record.levelno != logging.ERROR or "orbax" not in record.pathname


def _is_no_second_failure(record: logging.LogRecord) -> bool:
    """False for what asyncio logs of reads that failed beside the one whose error is raised."""
    return not ("exception was never retrieved" in (text := record.getMessage()) and "orbax" in text)


class _Document:
    """A JSON document of each process, in Orbax's protocol for objects that save themselves.

    Reading gives those of all processes, as there may be more or fewer now.
    """

    def __init__(self, value: Any = None):
        self.value = value

    async def save(self, directory: Any) -> Awaitable[None]:
        text = json.dumps(self.value)

        async def write() -> None:
            self._file(await directory.await_creation()).write_text(text, encoding="utf-8")

        return write()

    async def load(self, directory: Any) -> Awaitable[None]:
        async def read() -> None:
            self.value = _documents(remote.path_of(str(directory)))

        return read()

    @staticmethod
    def _file(directory: Any) -> Path:
        return remote.path_of(str(directory)) / f"process-{jax.process_index()}.json"


class Files:
    """Files that a function writes, as one thing of a checkpoint of several: a directory of their own in it."""

    def __init__(self, write: Callable[[Path], None], nbytes: int):
        """``write``: makes the directory that it is given, called in the first process. ``nbytes``: of the files."""
        self.write = write
        self.nbytes = nbytes

    async def save(self, directory: Any) -> Awaitable[None]:
        async def write() -> None:
            target = remote.path_of(str(await directory.await_creation()))
            if jax.process_index() == 0:
                with tempfile.TemporaryDirectory(prefix="dsvl2-files-") as parent:
                    made = Path(parent) / target.name
                    self.write(made)
                    for file in sorted(made.iterdir()):
                        (target / file.name).write_bytes(file.read_bytes())

        return write()

    async def load(self, directory: Any) -> Awaitable[None]:
        raise NotImplementedError("the files are read as files")


def _documents(directory: Path) -> list[Any]:
    return [json.loads(file.read_text(encoding="utf-8")) for file in sorted(directory.glob("process-*.json"))]


def is_checkpoint(path: Path) -> bool:
    """True for a complete checkpoint (`ocp.is_orbax_checkpoint` takes an empty directory for one)."""
    if remote.is_remote(path):
        return _COMPLETE in remote.names(path)
    return _UNFINISHED not in path.name and (path / _METADATA).is_file()


def unfinished(directory: Path) -> list[Path]:
    """The directories in ``directory`` of checkpoints that are being written, or never were finished.

    In a store they have their final names already.
    """
    if remote.is_remote(directory):
        return sorted(directory / name for name in remote.names(directory) if not is_checkpoint(directory / name))
    return sorted(path for path in directory.glob(f"*{_UNFINISHED}*") if path.is_dir())


def remove(path: Path) -> None:
    """Removes a checkpoint from a store; it counts as unfinished first."""
    remote.remove(path / _COMPLETE)
    remote.remove(path)


def read_tree(path: Path, name: str, abstract: Any) -> Any:
    """One tree of a checkpoint of several: arrays with the dtypes and shardings of ``abstract``'s structs."""
    return _load(remote.absolute(path), abstract, checkpointable_name=name)


def read_documents(path: Path) -> list[Any]:
    """The JSON documents that the processes kept in a checkpoint of several trees.

    Any process may read them by itself, whereas Orbax's loading waits for all. Raises OSError when there is none.
    """
    if documents := _documents(path / _DOCUMENT):
        return documents
    raise FileNotFoundError(f"{path / _DOCUMENT}: no document")


def read_shapes(path: Path) -> dict[LeafPath, tuple[tuple[int, ...], np.dtype]]:
    """Leaf path → (shape, dtype) of the tree at ``path``, without reading arrays.

    ``path``: a checkpoint of one tree, or CHECKPOINT/NAME for one of several.
    """
    checkpoint, options = _checkpoint_of(path)
    tree = ocp.metadata(checkpoint, **options).metadata
    return {
        leaf_path: (tuple(meta.shape), np.dtype(meta.dtype))
        for leaf_path, meta in traverse_util.flatten_dict(tree).items()
    }


def read(path: Path, leaves: Mapping[LeafPath, jax.ShapeDtypeStruct]) -> dict[LeafPath, jax.Array]:
    """Reads some leaves of the tree at ``path``, cast to the dtype and placed by the sharding of each struct.

    Only the pieces that this process's devices hold are read. ``path``: as for `read_shapes`.
    """
    checkpoint, options = _checkpoint_of(path)
    context = ocp.Context()
    context.pytree_options.loading.partial_load = True
    with context:
        arrays = traverse_util.flatten_dict(_load(checkpoint, traverse_util.unflatten_dict(leaves), **options))
    give_freed_memory_back()  # tensorstore's: 0.5 GB of a load on tiny's scale
    return arrays


def _load(*args: Any, **options: Any) -> Any:
    """`ocp.load`, of which a read that fails prints one error."""
    show_late_errors = _hide_late_errors()
    tree = ocp.load(*args, **options)
    show_late_errors()
    return tree


def _hide_late_errors() -> Callable[[], None]:
    """After a read or write that fails, those beside it end later, in a closed event loop, with a traceback of each.

    Called before reading or writing; what it returns undoes it, for when that has succeeded.
    """
    logging.getLogger("asyncio").addFilter(_is_no_second_failure)
    logging.getLogger("absl").addFilter(_is_not_raised_too)
    show = sys.unraisablehook

    def hook(late: Any) -> None:
        if not (isinstance(late.exc_value, RuntimeError) and str(late.exc_value) == "Event loop is closed"):
            show(late)

    def undo() -> None:
        if sys.unraisablehook is hook:
            sys.unraisablehook = show

    sys.unraisablehook = hook
    return undo


def _checkpoint_of(path: Path) -> tuple[Path, dict[str, str]]:
    """The checkpoint that holds the tree at ``path``, and what to tell Orbax to find the tree in it."""
    path = remote.absolute(path)
    return (path.parent, {"checkpointable_name": path.name}) if is_checkpoint(path.parent) else (path, {})


def _saving_context(entries: Mapping[LeafPath, int]) -> ocp.Context:
    def storage_options(keys: Any, value: Any) -> Any:
        storage = ocp.options.ArrayOptions.Saving.StorageOptions
        axis = entries.get(tuple(getattr(key, "key", None) for key in keys))
        large = math.prod(value.shape) * value.dtype.itemsize > CHUNK_BYTES
        # Orbax cuts an axis named here down to single entries: right for experts and heads, ruinous for a vocabulary.
        return storage(chunk_byte_size=CHUNK_BYTES, shard_axes=(axis,) if large and axis is not None else ())

    context = ocp.Context()
    saving = context.array_options.saving
    # Measured on normal bfloat16 weights: compression saves 22 % of the bytes for 6 times the processor time.
    saving.use_compression = False
    saving.storage_options.chunk_byte_size = CHUNK_BYTES
    saving.scoped_storage_options_creator = storage_options
    return context
