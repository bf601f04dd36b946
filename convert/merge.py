"""An adapter merged into its checkpoint, parameter by parameter: what comes out needs no adapter any more.

Tested in tests/convert/test_merge.py.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from flax.traverse_util import flatten_dict
from jax.sharding import SingleDeviceSharding
from rich import filesize

from dsvl2_jax.checkpoint import digests, orbax_io, rules
from dsvl2_jax.checkpoint.adapters import AdapterSettings, read_adapter
from dsvl2_jax.checkpoint.apply_adapter import BaseDigest, check_base, merged_weight
from dsvl2_jax.checkpoint.leaves import Leaves, batches, leaf_bytes
from dsvl2_jax.checkpoint.load import absent_leaves, open_orbax, read_leaves
from dsvl2_jax.checkpoint.locate import MANIFEST_NAME, PARAMS_NAME, carry_files, kind, model_files, open_model, resolve
from dsvl2_jax.checkpoint.remote import absolute, path_of
from dsvl2_jax.checkpoint.safetensors_source import Source, numpy_dtype
from dsvl2_jax.checkpoint.staging import refuse_existing, staged
from dsvl2_jax.checkpoint.verify import tell
from dsvl2_jax.checkpoint.verify import verify as verify_files
from dsvl2_jax.convert.to_orbax import WRITE_BATCH_BYTES, mixed_dtypes, write_manifest
from dsvl2_jax.convert.to_safetensors import ShardWriter
from dsvl2_jax.errors import CheckpointError, UsageError
from dsvl2_jax.kernels.quantized import KINDS
from dsvl2_jax.model.config import Config
from dsvl2_jax.model.deepseek_vl2 import entry_axes
from dsvl2_jax.model.parameter_paths import LeafPath
from dsvl2_jax.runtime.progress import progress

LAYOUTS = ("orbax", "released")


def merge(
    ckpt: str | Path | None,
    adapter: str | Path,
    dst: str | Path,
    *,
    layout: Literal["orbax", "released"] | None = None,
    verify: bool = False,
) -> Path:
    """Writes a checkpoint with an adapter merged into its weights.

    Sums are in float32; each tensor then has the dtype that it has in the checkpoint. Memory for a parameter or two is
    needed, and for the adapter.

    Args:
      ckpt: what `dsvl2_jax.load` takes; None: the bundled model.
      adapter: what `dsvl2_jax.load` takes as its ``adapter``.
      dst: the directory to make. It appears when it is complete.
      layout: "orbax", as `convert` writes it, or "released", as `export` does; None: that of ``ckpt``.
      verify: read every file of the checkpoint before, and compare it with its digest.

    Returns:
      The directory.

    Raises:
      CheckpointError: the checkpoint or the adapter is incomplete, damaged or quantized, they do not belong together,
        ``dst`` exists, or the disk is full.
      UsageError: an unknown layout.
      ConfigError, TokenizerError: the checkpoint's config or tokenizer cannot be used.
    """
    if layout is not None and layout not in LAYOUTS:
        raise UsageError(f"--layout {layout}: expected one of {', '.join(LAYOUTS)}.")
    dst = absolute(path_of(dst))
    refuse_existing(dst)
    directory = resolve(ckpt)
    if verify:
        tell(directory, verify_files(directory))
    config, _ = open_model(directory)
    arrays, settings = read_adapter(adapter, config)
    layout = layout or ("released" if kind(directory) == "released" else "orbax")
    with _opened(directory, config) as base:
        merging = _Merging(base, config, arrays, settings, str(adapter))
        total = sum(leaf_bytes(*entry) for entry in base.stored.values())
        with staged(dst, total, last=MANIFEST_NAME if layout == "orbax" else None) as partial:
            carry_files(model_files(directory), partial)
            write = _write_orbax if layout == "orbax" else _write_released
            write(partial, base, config, merging, f"merged with the adapter {adapter}")
            merging.check_base()
        tell(directory, base.notes)
    count = len(merging.changed)
    print(f"wrote {dst}: {count} parameters merged, {filesize.decimal(total)}", file=sys.stderr)
    return dst


@dataclasses.dataclass(frozen=True)
class _Base:
    """The checkpoint to merge into, whatever its layout.

    Attributes:
      name: as the user calls it.
      stored: path → shape and dtype. mixed: released name → dtype, where it is not that of the parameter.
      absent: parameters of the unused part that the checkpoint was made without.
      source: of a directory in the released layout. params: of an Orbax checkpoint.
    """

    name: str
    stored: Leaves
    mixed: Mapping[str, str]
    absent: frozenset[LeafPath]
    notes: tuple[str, ...]
    source: Source | None = None
    params: Path | None = None

    def read(self, order: Iterable[LeafPath], leaves: Mapping[LeafPath, rules.Leaf]) -> Iterator[np.ndarray]:
        """The parameters in this order, on the host."""
        if self.source is not None:
            for path in order:
                yield self.source.read_leaf(leaves[path], self.stored[path][1])
            return
        host = SingleDeviceSharding(jax.local_devices(backend="cpu")[0])
        entries = {path: self.stored[path] for path in order}
        for _, array in read_leaves(self.params, entries, dict.fromkeys(entries, host)):
            yield np.asarray(array)
            del array  # before the next one is read


@contextlib.contextmanager
def _opened(directory: Path, config: Config) -> Iterator[_Base]:
    if kind(directory) != "released":
        manifest, stored = open_orbax(directory, config)
        if quantized := sorted({path[-1] for path in stored} & set(KINDS)):
            raise CheckpointError(
                f"{directory}: its weights are in {', '.join(quantized)}, to which an adapter cannot be added without "
                "rounding it away. Merge it into the checkpoint that this one was quantized from, and quantize the "
                "result (dsvl2 convert --quantize); or leave the two apart (--adapter)."
            )
        params = directory / PARAMS_NAME
        absent = frozenset(absent_leaves(params, stored))
        notes = tuple(manifest.get("notes", ()))
        yield _Base(str(directory), stored, manifest.get("mixed_dtypes", {}), absent, notes, params=params)
        return
    with Source(directory) as source:
        source.fit(config)
        rules.check(source.shapes_and_dtypes, config, str(directory))
        leaves = {leaf.path: leaf for leaf in rules.expand(config)}
        stored = {path: (leaf.shape, source.leaf_dtype(leaf)) for path, leaf in leaves.items()}
        lacks = rules.lacks_unused(source.tensors)
        absent = frozenset(path for path in leaves if lacks and path[: len(rules.UNUSED_PATH)] == rules.UNUSED_PATH)
        mixed = mixed_dtypes(source, leaves, stored)
        yield _Base(str(directory), stored, mixed, absent, tuple(source.notes), source=source)


class _Merging:
    """Reads parameters and adds the adapter to them."""

    def __init__(self, base: _Base, config: Config, arrays: Mapping[str, Any], settings: AdapterSettings, adapter: str):
        self._base, self._settings, self._adapter = base, settings, adapter
        self.leaves = {leaf.path: leaf for leaf in rules.expand(config)}
        self.changed = flatten_dict(arrays, is_leaf=lambda _, value: "lora_a" in value)
        self._digest = BaseDigest()

    def parameters(self, order: Iterable[LeafPath]) -> Iterator[tuple[LeafPath, np.ndarray]]:
        order = list(order)
        arrays = self._base.read(order, self.leaves)
        for path in order:
            yield path, self._merged(path, next(arrays))

    def _merged(self, path: LeafPath, array: np.ndarray) -> np.ndarray:
        self._digest.add(path, array)
        change = self.changed.get(path)
        if change is None:
            return array
        if not isinstance(change, Mapping):
            return change.astype(array.dtype)
        base = change["base"].astype(array.dtype) if "base" in change else array
        return merged_weight(base, self.leaves[path], change, self._settings.factor(self.leaves[path].name))

    def check_base(self) -> None:
        """Raises CheckpointError when the parameters, all of which have been read, are not those trained on."""
        check_base(self._settings, self._digest.result(), self._adapter)


def _write_orbax(partial: Path, base: _Base, config: Config, merging: _Merging, note: str) -> None:
    total = sum(leaf_bytes(*entry) for entry in base.stored.values())
    # Large ones first: a partial save costs time in the number of those saved before.
    by_size = dict(sorted(base.stored.items(), key=lambda item: -leaf_bytes(*item[1])))
    parameters = merging.parameters(by_size)
    with digests.Flushing(partial) as flushing:
        with (
            orbax_io.ParamWriter(partial / PARAMS_NAME, entry_axes(config)) as writer,
            progress("merge", total) as advance,
        ):
            for batch in batches(by_size, WRITE_BATCH_BYTES):
                writer.write(dict(next(parameters) for _ in batch))
                writer.wait()
                flushing.take()
                advance(sum(leaf_bytes(*by_size[path]) for path in batch))
            writer.finalize()
        own_digests = flushing.finish()
    write_manifest(
        partial,
        base.stored,
        source=base.name,
        mixed=base.mixed,
        notes=[*base.notes, note],
        own_digests=own_digests,
    )


def _write_released(partial: Path, base: _Base, config: Config, merging: _Merging, note: str) -> None:
    leaves = {path: leaf for path, leaf in merging.leaves.items() if path not in base.absent}
    tensors = {
        name: (leaf.layout.source_shape, numpy_dtype(base.mixed.get(name, base.stored[path][1].name)))
        for path, leaf in leaves.items()
        for name in leaf.sources
    }
    with (
        ShardWriter(partial, tensors) as writer,
        progress("merge", sum(leaf_bytes(*t) for t in tensors.values())) as advance,
    ):
        for path, array in merging.parameters(leaves):
            parts = leaves[path].parts(array)
            writer.write({name: part.astype(tensors[name][1], copy=False) for name, part in parts})
            advance(sum(leaf_bytes(*tensors[name]) for name in leaves[path].sources))
            del array, parts  # before the next one is read
        writer.finish()
