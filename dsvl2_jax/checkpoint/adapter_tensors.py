"""The tensors of an adapter's file, put into the places of parameters; see `dsvl2_jax.checkpoint.adapters`.

Tested in tests/checkpoint/test_adapters.py.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from dsvl2_jax.checkpoint import peft_names, rules
from dsvl2_jax.checkpoint.peft_config import CONFIG_NAME, PeftConfig
from dsvl2_jax.checkpoint.safetensors_file import Tensor
from dsvl2_jax.checkpoint.safetensors_source import numpy_dtype
from dsvl2_jax.errors import CheckpointError
from dsvl2_jax.messages import listed
from dsvl2_jax.model.config import Config
from dsvl2_jax.model.parameter_paths import LeafPath, path_name


class Placed(NamedTuple):
    """``arrays``: path → what `read_adapter` returns for it; ``ranks`` and ``alphas`` by parameters' names; ``notes``:
    what was tolerated."""

    arrays: dict[LeafPath, Any]
    ranks: dict[str, int]
    alphas: dict[str, float]
    notes: list[str]


def place(tensors: Mapping[str, Tensor], peft: PeftConfig, config: Config, source: str) -> Placed:
    """Reads the tensors of an adapter for a model.

    Raises:
      CheckpointError: the adapter is for another model, or of a kind that is not computed here; ``source`` is named.
    """
    reader = _Reader(tensors, peft, config, source)
    return Placed(reader.read(), reader.ranks, reader.alphas, reader.notes)


def read_tensor(tensor: Tensor) -> np.ndarray:
    """The array of a tensor, as stored. Raises CheckpointError: its file has become shorter."""
    count = math.prod(tensor.shape)
    array = np.fromfile(tensor.file, numpy_dtype(rules.FLOAT_DTYPES[tensor.dtype]), count, offset=tensor.start)
    if array.size != count:
        raise CheckpointError(f"{tensor.file}: ends while it is being read. Copy the adapter again.")
    return array.reshape(tensor.shape)


def scale_factor(alpha: float, rank: int, rslora: bool) -> float:
    """By which lora_a · lora_b is multiplied."""
    return alpha / (math.sqrt(rank) if rslora else rank)


@dataclasses.dataclass(frozen=True)
class _Pair:
    """Of one released matrix: a [in, r], b [r, out], magnitude [out] or None, and its alpha."""

    a: np.ndarray
    b: np.ndarray
    magnitude: np.ndarray | None
    alpha: float


class _Reader:
    """Puts the tensors of an adapter's file into the places of parameters, whose ``ranks`` and ``alphas`` it notes."""

    def __init__(self, tensors: Mapping[str, Tensor], peft: PeftConfig, config: Config, source: str):
        self._tensors, self._peft, self._source = tensors, peft, source
        self._leaves = {leaf.path: leaf for leaf in rules.expand(config)}
        self._linear = rules.linear_leaves(config)
        self._places = {
            name: (leaf, i) for leaf in rules.expand(config) for i, name in enumerate(leaf.sources)
        }  # released tensor → where it lies
        self.ranks: dict[str, int] = {}
        self.alphas: dict[str, float] = {}
        self.notes: list[str] = []
        self._problems: list[str] = []
        self._pairs: dict[LeafPath, dict[int, _Pair]] = {}  # path → index of the expert → its pair
        self._whole: dict[LeafPath, np.ndarray] = {}

    def read(self) -> dict[LeafPath, Any]:
        fused = {name.rsplit(".", 3)[0] for name, (leaf, _) in self._places.items() if leaf.stacked}
        modules = {name.rpartition(".")[0] for name in self._places} | fused
        keys = peft_names.resolve(self._tensors, modules, self._source)
        trained = {key.module: key.trained for key in keys.values()}
        wrong = [f"{name}: {t.dtype}" for name, t in self._tensors.items() if t.dtype not in rules.FLOAT_DTYPES]
        if wrong:
            raise CheckpointError(
                f"{self._source}: {len(wrong)} tensors are not floating point (F32, F16, BF16):\n{listed(wrong)}"
            )
        for (module, inner), parts in peft_names.by_module(keys).items():
            for kind in parts.keys() & {"weight", "bias"}:
                self._add_whole(f"{module}.{kind}", parts[kind])
            parts = {part: stored for part, stored in parts.items() if part not in ("weight", "bias")}
            if parts and module in fused:
                self._add_fused(module, trained[module], parts)
            elif parts and inner:
                self._problems.append(f"{module}: an adapter inside another one; save each into a directory of its own")
            elif parts:
                self._add_pair(module, trained[module], parts)
        adapter: dict[LeafPath, Any] = {}
        if not self._problems:
            adapter = {path: self._stacked(path, pairs) for path, pairs in self._pairs.items()}
        if not self._problems and not adapter and not self._whole:
            self._problems.append("it has no tensors (its targets may have matched nothing)")
        if self._problems:
            raise CheckpointError(
                f"{self._source}: the adapter cannot be used with the model that config.json describes. Check that it "
                f"was trained on this checkpoint{f' ({self._peft.base})' if self._peft.base else ''}:\n"
                f"{listed(self._problems)}"
            )
        self._note_what_is_left_out()
        for path in adapter.keys() & self._whole.keys():
            adapter[path]["base"] = self._whole.pop(path)
        return adapter | self._whole

    def _note_what_is_left_out(self) -> None:
        """Experts without an adapter beside others that have one, and modules that were named and are not there."""
        some = [path for path, pairs in self._pairs.items() if self._linear[path].stacked]
        some = [path for path in some if len(self._pairs[path]) < self._linear[path].shape[0]]
        if some:
            self.notes.append(
                f"{len(some)} parameters have an adapter for some of their experts alone, such as {path_name(some[0])} "
                f"for {len(self._pairs[some[0]])} of {self._linear[some[0]].shape[0]}"
            )
        sources = {path: leaf.sources for path, leaf in self._linear.items()}
        absent = [
            name.removesuffix(".weight")
            for path, names in sources.items()
            for i, name in enumerate(names)
            if i not in self._pairs.get(path, {}) and self._peft.names_target(name.removesuffix(".weight"))
        ]
        if absent:
            self.notes.append(
                f"{len(absent)} modules that target_modules names have no tensors in it, such as {absent[0]}: they "
                "stay as they are in the checkpoint"
            )

    def _array(self, stored: str) -> np.ndarray:
        array = read_tensor(self._tensors[stored])
        if not np.isfinite(array).all():
            self._problems.append(f"{stored}: has numbers that are none (inf or nan); train or copy the adapter again")
        return array

    def _add_pair(self, module: str, trained: str, parts: Mapping[str, str]) -> None:
        leaf, index = self._places.get(f"{module}.weight", (None, 0))
        if leaf is None or leaf.path not in self._linear:
            self._problems.append(f"{module}: cannot have an adapter here; merge it with peft")
            return
        wanted = {"A", "B", *(["magnitude"] if self._peft.dora else [])}
        if lacks := wanted - parts.keys():
            self._problems.append(f"{module}: lacks {', '.join(f'lora_{part}' for part in sorted(lacks))}")
            return
        if extra := parts.keys() - wanted:
            self._problems.append(
                f"{module}: has {', '.join(sorted(extra))} too, which {CONFIG_NAME} does not speak of"
            )
            return
        outputs, inputs = leaf.layout.source_shape
        rank, alpha = self._peft.rank_of(trained), self._peft.alpha_of(trained)
        expected = {"A": (rank, inputs), "B": (outputs, rank), "magnitude": (outputs,)}
        right = [self._has_shape(module, part, stored, expected[part]) for part, stored in parts.items()]
        if not all(right):
            return
        magnitude = self._array(parts["magnitude"]) if self._peft.dora else None
        self._put(leaf, index, _Pair(self._array(parts["A"]).T, self._array(parts["B"]).T, magnitude, alpha))

    def _put(self, leaf: rules.Leaf, index: int, pair: _Pair) -> None:
        if index in self._pairs.setdefault(leaf.path, {}):
            self._problems.append(f"{leaf.sources[index]}: has two adapters; remove the one that is not meant")
        self._pairs[leaf.path][index] = pair

    def _has_shape(self, module: str, part: str, stored: str, expected: tuple[int, ...]) -> bool:
        found = self._tensors[stored].shape
        if found != expected:
            self._problems.append(f"{module}.lora_{part}: found {list(found)}, expected {list(expected)}")
        return found == expected

    def _add_whole(self, name: str, stored: str) -> None:
        leaf, _ = self._places.get(name, (None, 0))
        found = self._tensors[stored].shape
        if leaf is None or leaf.stacked or leaf.layout.source_shape != found:
            shape = None if leaf is None or leaf.stacked else list(leaf.layout.source_shape)
            expected = "is not replaced here" if shape is None else f"expected {shape}"
            self._problems.append(f"{name}: a whole weight {list(found)}, {expected}")
            return
        self._whole[leaf.path] = np.empty(leaf.shape, numpy_dtype(rules.FLOAT_DTYPES[self._tensors[stored].dtype]))
        leaf.layout.view(self._whole[leaf.path])[...] = self._array(stored)

    def _add_fused(self, module: str, trained: str, parts: Mapping[str, str]) -> None:
        """Of all experts of a layer at once, as transformers 5 keeps them: gate and up are one parameter.

        lora_A is [r · experts, in], expert by expert; lora_B [out, r · experts], rank by rank.
        """
        if parts.keys() != {"A", "B"}:
            self._problems.append(f"{module}: has {', '.join(sorted(parts))}, expected lora_A and lora_B")
            return
        leaves = [self._places[f"{module}.0.{name}.weight"][0] for name in ("gate_proj", "up_proj", "down_proj")]
        experts, (width, size) = leaves[0].shape[0], leaves[0].layout.source_shape
        shapes = [self._tensors[parts[part]].shape for part in ("A", "B")]
        (rows, inputs), (outputs, columns) = (shape if len(shape) == 2 else (0, 0) for shape in shapes)
        which = {(size, 2 * width): "gate_up_proj", (width, size): "down_proj"}.get((inputs, outputs))
        if which is None or rows != columns:
            self._problems.append(
                f"{module}: lora_A {[rows, inputs]} and lora_B {[outputs, columns]} are neither of gate_up_proj "
                f"{[2 * width, size]} nor of down_proj {[size, width]} of {experts} experts"
            )
            return
        rank, alpha = self._peft.rank_of(f"{trained}.{which}"), self._peft.alpha_of(f"{trained}.{which}")
        if rows != rank * experts:
            self._problems.append(f"{module}.{which}: lora_A has {rows} rows, expected rank {rank} · {experts} experts")
            return
        a_eri = self._array(parts["A"]).reshape(experts, rank, inputs)
        b_ero = self._array(parts["B"]).reshape(outputs, rank, experts).transpose(2, 1, 0)
        halves = [(leaves[2], b_ero)]
        if which == "gate_up_proj":
            halves = [(leaves[0], b_ero[..., :width]), (leaves[1], b_ero[..., width:])]
        for leaf, b in halves:
            for e in range(experts):
                self._put(leaf, e, _Pair(a_eri[e].T, b[e], None, alpha))

    def _stacked(self, path: LeafPath, pairs: Mapping[int, _Pair]) -> dict[str, np.ndarray]:
        """The arrays of one parameter: experts that have no adapter, or fewer ranks than others, get zeros."""
        leaf, name = self._linear[path], path_name(path)
        rank = max(pair.a.shape[-1] for pair in pairs.values())
        alpha = next(pair.alpha for pair in pairs.values() if pair.a.shape[-1] == rank)
        self.ranks[name], self.alphas[name] = rank, alpha
        input_shape = tuple(leaf.shape[axis] for axis in leaf.inputs)
        output_shape = tuple(leaf.shape[axis] for axis in leaf.outputs)
        if not leaf.stacked:
            (pair,) = pairs.values()
            arrays = {"lora_a": pair.a.reshape(*input_shape, rank), "lora_b": pair.b.reshape(rank, *output_shape)}
            return arrays | ({} if pair.magnitude is None else {"magnitude": pair.magnitude.reshape(output_shape)})
        experts = leaf.shape[0]
        if self._peft.dora and len(pairs) < experts:
            self._problems.append(f"{name}: {len(pairs)} of {experts} experts have a magnitude; DoRA needs all of them")
            return {}
        dtypes = {x.dtype for pair in pairs.values() for x in (pair.a, pair.b)}
        dtype = dtypes.pop() if len(dtypes) == 1 else np.dtype(np.float32)
        whole = scale_factor(alpha, rank, self._peft.rslora)
        a = np.zeros((experts, math.prod(input_shape), rank), dtype)
        b = np.zeros((experts, rank, math.prod(output_shape)), dtype)
        for e, pair in pairs.items():
            own = pair.a.shape[-1]
            factor = scale_factor(pair.alpha, own, self._peft.rslora) / whole
            a[e, :, :own] = pair.a
            b[e, :own] = pair.b if factor == 1 else pair.b.astype(np.float32) * np.float32(factor)
        arrays = {"lora_a": a.reshape(experts, *input_shape, rank), "lora_b": b.reshape(experts, rank, *output_shape)}
        if self._peft.dora:
            arrays["magnitude"] = np.stack([pairs[e].magnitude.reshape(output_shape) for e in range(experts)])
        return arrays
