"""What an optimized XLA program costs: FLOPs of its matrix products, bytes through main memory, collectives.

`jax.stages.Compiled.cost_analysis` counts a loop's body once, and a whole array where only a slice of it is read.
`walk` reads the program's text instead: a loop's body counts as often as it runs, a slice by its own size, a kernel by
the cost that it declares.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Mapping

import numpy as np

from dsvl2_jax.apps.plan.hlo_gpu import custom_call_flops, declared_cost, splash_flops
from dsvl2_jax.apps.plan.hlo_text import Computation, Instruction, parse

# Names for values or reinterpretations of them: nothing is moved.
FREE = frozenset(
    [
        "parameter",
        "constant",
        "tuple",
        "get-tuple-element",
        "bitcast",
        "after-all",
        "partition-id",
        "replica-id",
        "opt-barrier",
        "domain",
        "add-dependency",
        "get-dimension-size",
    ]
)
FREE_TARGETS = frozenset(
    {"AllocateBuffer", "ConcatBitcast", "Sharding", "SPMDFullToShardShape", "SPMDShardToFullShape"}
)
_VALUE_PRESERVING = frozenset({"bitcast", "copy", "convert", "reshape", "optimization-barrier", "opt-barrier"})
COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)


@dataclasses.dataclass(frozen=True)
class Collective:
    """How often a kind of collective runs, and the bytes of its larger side on one device, in all."""

    count: float = 0.0
    bytes: float = 0.0


@dataclasses.dataclass(frozen=True)
class Cost:
    """What one device does in one run of a program.

    Attributes:
      flops: of matrix products, convolutions and kernels that declare theirs; a multiplication with its addition is 2.
      bytes: read from and written to main memory, each operation's operands and results once.
      collectives: kind → how often and how much.
      unknown_loops: loops whose trip count depends on data; their bodies count once, or as often as `walk` was told.
    """

    flops: float = 0.0
    bytes: float = 0.0
    collectives: Mapping[str, Collective] = dataclasses.field(default_factory=dict)
    unknown_loops: tuple[str, ...] = ()

    def __add__(self, other: Cost) -> Cost:
        kinds = dict(self.collectives)
        for kind, added in other.collectives.items():
            before = kinds.get(kind, Collective())
            kinds[kind] = Collective(before.count + added.count, before.bytes + added.bytes)
        unknown = (*self.unknown_loops, *(name for name in other.unknown_loops if name not in self.unknown_loops))
        return Cost(self.flops + other.flops, self.bytes + other.bytes, kinds, unknown)

    def __mul__(self, times: float) -> Cost:
        kinds = {kind: Collective(c.count * times, c.bytes * times) for kind, c in self.collectives.items()}
        return Cost(self.flops * times, self.bytes * times, kinds, self.unknown_loops)


def walk(text: str, unknown_trip_count: float = 1.0, named: Mapping[str, float] | None = None) -> Cost:
    """The cost of a compiled program.

    Args:
      text: of `jax.stages.Compiled.as_text`: the optimized program of one device.
      unknown_trip_count: how often a loop runs whose trip count depends on data.
      named: named scope → how often such a loop in it runs.

    Raises:
      ValueError: the text has no entry computation.
    """
    computations, entry = parse(text)
    return Walk(computations, unknown_trip_count, named).computation(entry, {})


class Walk:
    """One walk over a program. ``bound``: tuple index → value, of a loop's parameters that are known constants."""

    def __init__(
        self,
        computations: Mapping[str, Computation],
        unknown_trip_count: float,
        named: Mapping[str, float] | None = None,
    ):
        self._all = computations
        self._unknown_trip_count = unknown_trip_count
        self._named = named or {}
        # Channel of a collective that runs beside other work, part by part in several fusions → the first of them.
        self._first_part: dict[str, str] = {}

    def computation(self, name: str, bound: Mapping[int, int]) -> Cost:
        """All of a computation that runs by itself: the entry, a loop's body, a branch."""
        cost = Cost()
        for instruction in self._all[name].values():
            cost += self._cost(instruction, self._all[name], bound)
        return cost

    def _cost(self, i: Instruction, inside: Computation, bound: Mapping[int, int]) -> Cost:
        if i.opcode in FREE or i.opcode.endswith("-done") or i.opcode.endswith("-update"):
            return Cost()
        if i.opcode == "while":
            return self._loop(i, inside, bound)
        if i.opcode == "conditional":
            branches = [self.computation(name, {}) for name in i.called]
            return max(branches, key=lambda cost: (cost.flops, cost.bytes))
        if i.opcode in ("call", "async-start"):
            return sum((self.computation(name, {}) for name in i.called), Cost())
        if i.opcode == "fusion":
            (name,) = i.called
            return self._fused_arithmetic(name) + Cost(bytes=self._fusion_bytes(i, inside, name))
        return self._arithmetic(i, inside) + Cost(bytes=self._moved(i, inside))

    # ---- loops

    def _loop(self, i: Instruction, inside: Computation, bound: Mapping[int, int]) -> Cost:
        body, condition = (self._all[name] for name in self._body_and_condition(i))
        start = self._constants(i.operands[0], inside, bound)
        unchanged = {index: value for index, value in start.items() if self._is_carried_unchanged(body, index)}
        trip_count = self._trip_count(i, body, condition, start, unchanged)
        once = sum((self.computation(name, unchanged) for name in self._body_and_condition(i)), Cost())
        if trip_count is None:
            trip_count = next((count for name, count in self._named.items() if name in i.attributes), None)
        if trip_count is None:
            return once * self._unknown_trip_count + Cost(unknown_loops=(i.name,))
        return once * trip_count

    @staticmethod
    def _body_and_condition(loop: Instruction) -> tuple[str, str]:
        """The names of a loop's computations."""
        return (loop.attribute("body") or "").lstrip("%"), (loop.attribute("condition") or "").lstrip("%")

    def _trip_count(
        self,
        i: Instruction,
        body: Computation,
        condition: Computation,
        start: Mapping[int, int],
        unchanged: Mapping[int, int],
    ) -> int | None:
        """How often a loop runs: as declared, or as a counter says that rises by a constant up to another."""
        known = i.config.get("known_trip_count")
        if isinstance(known, dict):
            return int(known["n"])
        comparison = self._comparison(condition.root, condition)
        if comparison is None:
            return None
        direction, left, right = comparison
        counter = self._tuple_index(left, condition)
        end = self._value(right, condition, unchanged)
        if counter is None or end is None or counter not in start:
            return None
        step = self._step(body, counter, unchanged)
        if not step:
            return None
        rises = direction in ("LT", "LE", "NE")
        distance = end - start[counter] if rises else start[counter] - end
        step = step if rises else -step
        return max(0, math.ceil((distance + (direction in ("LE", "GE"))) / step)) if step > 0 else None

    def _comparison(self, root: Instruction, inside: Computation) -> tuple[str, str, str] | None:
        """Direction and operands of what a condition compares, also when it is fused."""
        if root.opcode == "compare":
            return root.attribute("direction") or "", *root.operands  # type: ignore[return-value]
        if root.opcode != "fusion":
            return None
        (name,) = root.called
        fused = self._all[name]
        comparison = self._comparison(fused.root, fused)
        if comparison is None:
            return None
        direction, left, right = comparison
        outer_left, outer_right = (self._outer(operand, fused, root) for operand in (left, right))
        if outer_left is None:
            return None
        if outer_right is None and (value := self._value(right, fused, {})) is not None:
            outer_right = f"constant of {root.name}"
            inside[outer_right] = Instruction("", (), "constant", (), str(value), "", False)
        return None if outer_right is None else (direction, outer_left, outer_right)

    @staticmethod
    def _origin(name: str, inside: Computation) -> Instruction:
        """The instruction whose value a name has, behind copies and conversions of it."""
        origin = inside[name]
        while origin.opcode in _VALUE_PRESERVING:
            origin = inside[origin.operands[0]]
        return origin

    def _outer(self, name: str, fused: Computation, fusion: Instruction) -> str | None:
        """The operand of a fusion that a value inside it is."""
        origin = self._origin(name, fused)
        return fusion.operands[int(origin.arguments)] if origin.opcode == "parameter" else None

    def _tuple_index(self, name: str, inside: Computation) -> int | None:
        """The element of a computation's tuple that a value is."""
        origin = self._origin(name, inside)
        if origin.opcode == "get-tuple-element" and inside[origin.operands[0]].opcode == "parameter":
            return int(origin.attribute("index") or 0)
        return None

    def _value(self, name: str, inside: Computation, bound: Mapping[int, int]) -> int | None:
        """The whole number that a value always is."""
        origin = self._origin(name, inside)
        if origin.opcode == "constant":
            return int(origin.arguments) if re.fullmatch(r"-?\d+", origin.arguments) else None
        if origin.opcode == "get-tuple-element":
            source, index = inside[origin.operands[0]], int(origin.attribute("index") or 0)
            if source.opcode == "parameter":
                return bound.get(index)
            if source.opcode == "while":
                body = self._all[self._body_and_condition(source)[0]]
                unchanged = self._is_carried_unchanged(body, index)
                return self._element(source.operands[0], index, inside, bound) if unchanged else None
        return None

    def _element(self, name: str, index: int, inside: Computation, bound: Mapping[int, int]) -> int | None:
        """`_value` of one element of a tuple."""
        origin = self._origin(name, inside)
        if origin.opcode == "parameter":
            return bound.get(index)
        return self._value(origin.operands[index], inside, bound) if origin.opcode == "tuple" else None

    def _constants(self, name: str, inside: Computation, bound: Mapping[int, int]) -> dict[int, int]:
        """Tuple index → value, of the elements of a tuple that are constants."""
        count = len(inside[name].arrays)
        values = {index: self._element(name, index, inside, bound) for index in range(count)}
        return {index: value for index, value in values.items() if value is not None}

    def _is_carried_unchanged(self, body: Computation, index: int) -> bool:
        """Whether a loop's body returns an element of its tuple as it was."""
        root = body.root
        return root.opcode == "tuple" and self._tuple_index(root.operands[index], body) == index

    def _step(self, body: Computation, index: int, unchanged: Mapping[int, int]) -> int | None:
        """The constant by which a loop's body raises an element of its tuple."""
        if body.root.opcode != "tuple":
            return None
        update = self._origin(body.root.operands[index], body)
        if update.opcode == "fusion":
            return self._fused_step(update, body, index, unchanged)
        if update.opcode != "add":
            return None
        for a, b in (update.operands, update.operands[::-1]):
            if self._tuple_index(a, body) == index:
                return self._value(b, body, unchanged)
        return None

    def _fused_step(
        self, fusion: Instruction, body: Computation, index: int, unchanged: Mapping[int, int]
    ) -> int | None:
        """`_step` where the addition is fused."""
        (name,) = fusion.called
        fused = self._all[name]
        if fused.root.opcode != "add":
            return None
        for a, b in (fused.root.operands, fused.root.operands[::-1]):
            counter = self._outer(a, fused, fusion)
            if counter is not None and self._tuple_index(counter, body) == index:
                added = self._outer(b, fused, fusion)
                return self._value(b, fused, {}) if added is None else self._value(added, body, unchanged)
        return None

    # ---- arithmetic

    def _fused_arithmetic(self, name: str) -> Cost:
        """FLOPs and collectives of what is fused into one operation."""
        cost = Cost()
        for i in self._all[name].values():
            if i.opcode == "fusion":
                cost += sum((self._fused_arithmetic(called) for called in i.called), Cost())
            elif i.opcode not in FREE and not self._is_continued(i, name):
                cost += self._arithmetic(i, self._all[name])
        return cost

    def _is_continued(self, i: Instruction, name: str) -> bool:
        """True for a fused collective that an earlier fusion began."""
        channel = i.attribute("channel_id") if i.opcode in COLLECTIVES else None
        return channel is not None and self._first_part.setdefault(channel, name) != name

    def _arithmetic(self, i: Instruction, inside: Computation) -> Cost:
        """FLOPs and collectives of one operation."""
        if i.opcode == "dot":
            left = inside[i.operands[0]].arrays[0].shape
            contracted = math.prod(left[d] for d in i.dimensions("lhs_contracting_dims"))
            return Cost(flops=2.0 * math.prod(i.arrays[0].shape) * contracted)
        if i.opcode == "ragged-dot":
            left, right = (inside[operand].arrays[0].shape for operand in i.operands[:2])
            return Cost(flops=2.0 * math.prod(left) * right[-1])
        if i.opcode == "convolution":
            return Cost(flops=_convolution(i, *(inside[operand].arrays[0].shape for operand in i.operands)))
        if i.opcode == "custom-call":
            if metadata := self._cost_metadata(i):
                return Cost(flops=float(metadata.get("flops", 0)))
            shapes = [array.shape for operand in i.operands for array in inside[operand].arrays]
            return Cost(flops=custom_call_flops(i.attributes, i.config, shapes) or splash_flops(i.name, shapes))
        kind = i.opcode.removesuffix("-start")
        if kind in COLLECTIVES:
            sent = sum(array.size for operand in i.operands for array in inside[operand].arrays)
            arrays = i.arrays[len(i.operands) :] if i.opcode.endswith("-start") and kind != "all-reduce" else i.arrays
            received = sum(array.size for array in arrays if array.shape or len(arrays) == 1)
            return Cost(collectives={kind: Collective(1.0, max(sent, received))})
        return Cost()

    @staticmethod
    def _cost_metadata(i: Instruction) -> dict[str, str]:
        """What a kernel declares to cost."""
        call = i.config.get("custom_call_config")
        return call.get("cost_estimate", {}) if isinstance(call, dict) else declared_cost(i.attributes)

    # ---- memory

    def _moved(self, i: Instruction, inside: Computation) -> float:
        """Bytes of an operation that is not fused."""
        if i.opcode == "custom-call":
            if any(f'"{target}"' in i.attributes for target in FREE_TARGETS):
                return 0.0
            if accessed := self._cost_metadata(i).get("bytes_accessed"):
                arrays = (*i.arrays, *(array for operand in i.operands for array in inside[operand].arrays))
                return max(0.0, float(accessed) - sum(array.size - array.bytes for array in arrays))
        if i.opcode == "slice-start":  # its result holds the source, the slice and a context
            source, taken = i.arrays[:2]
            return min(source.bytes, taken.size) + taken.bytes
        if i.opcode == "copy-start":  # its result holds the copy, its source and a context
            return i.arrays[0].bytes + inside[i.operands[0]].bytes
        if i.opcode.endswith("-start"):
            return i.bytes
        at = range(len(i.operands))
        if i.opcode == "custom-call":  # one that is given an array twice reads other parts of it
            at = [n for n in at if i.operands[n] not in i.operands[:n]]
        return sum(self._read(i, n, inside) for n in at) + self._written(i, inside)

    def _read(self, i: Instruction, at: int, inside: Computation) -> float:
        """Bytes that an operation reads of one of its operands."""
        operand = inside[i.operands[at]]
        if operand.arrays and all(array.space for array in operand.arrays):
            return 0.0
        if at == 0 and i.opcode in ("dynamic-slice", "slice", "gather"):
            return min(operand.bytes, sum(array.size for array in i.arrays))
        if at == 0 and i.opcode == "dynamic-update-slice":
            return 0.0
        if at == 0 and i.opcode == "scatter":
            return sum(inside[name].arrays[0].size for name in i.operands[2:])
        return operand.bytes

    @staticmethod
    def _written(i: Instruction, inside: Computation) -> float:
        if i.opcode in ("dynamic-update-slice", "scatter") and i.bytes:
            changed = i.operands[1] if i.opcode == "dynamic-update-slice" else i.operands[-1]
            return min(i.bytes, inside[changed].arrays[0].size)
        return i.bytes

    def _fusion_bytes(self, i: Instruction, inside: Computation, called: str) -> float:
        """Bytes that a fused operation reads and writes."""
        fused, moved = self._all[called], 0.0
        if '"AsyncCollectiveDone"' in fused.root.attributes:
            return 0.0
        if '"AsyncCollectiveStart"' in fused.root.attributes:  # counts what all the collective's parts read and write
            received = sum(fused[name].bytes for name in fused.root.operands)
            return received + sum(inside[name].bytes for name in i.operands)
        in_place = "output_to_operand_aliasing" in i.attributes
        for at, name in enumerate(i.operands):
            whole = inside[name].bytes
            if whole:
                moved += min(whole, self._used(fused.parameters[at], fused, called))
        results = fused.root.operands if fused.root.opcode == "tuple" else (fused.root.name,)
        for array, name in zip(i.arrays, results, strict=False):
            if in_place and fused[name].opcode == "parameter":
                continue
            if not array.space and not self._is_continued(fused[name], called):
                moved += min(array.size, self._result(name, fused))
        return moved

    def _used(self, parameter: Instruction, fused: Computation, called: str) -> float:
        """Bytes that a fused computation takes of a parameter: the slices, when slices are all it takes.

        ``called``: the computation's name.
        """
        total = 0.0
        for user in fused.users.get(parameter.name, ()):
            if user.opcode in ("dynamic-slice", "slice", "gather") and user.operands[0] == parameter.name:
                total += user.arrays[0].size
            elif user.opcode == "dynamic-update-slice" and user.operands[0] == parameter.name:
                continue  # changed in place
            elif user.opcode == "scatter" and user.operands[0] == parameter.name:
                total += fused[user.operands[-1]].arrays[0].size
            elif user.opcode == "bitcast" and not user.root:
                total += self._used(user, fused, called)
            elif user.opcode == "fusion":
                (name,) = user.called
                inner = self._all[name]
                positions = [at for at, operand in enumerate(user.operands) if operand == parameter.name]
                received = [inner.parameters[at] for at in positions]
                if all(self._is_only_reshaped(value, inner) for value in received):
                    total += self._used(user, fused, called)
                else:
                    total += sum(self._used(value, inner, name) for value in received)
            elif user.opcode in ("tuple", "get-tuple-element") or self._is_continued(user, called):
                continue
            else:
                return math.inf
        return total

    @staticmethod
    def _is_only_reshaped(parameter: Instruction, fused: Computation) -> bool:
        """True when a fused computation gives a parameter another shape and nothing else."""
        origin = fused.root
        while origin.opcode == "bitcast":
            origin = fused[origin.operands[0]]
        return origin is parameter

    def _result(self, name: str, fused: Computation) -> float:
        """Bytes that a fused computation writes of a result: an update, when it changes an array in place."""
        origin = fused[name]
        while origin.opcode == "bitcast":
            origin = fused[origin.operands[0]]
        if origin.opcode == "dynamic-update-slice":
            return fused[origin.operands[1]].arrays[0].size
        if origin.opcode == "scatter":
            return fused[origin.operands[-1]].arrays[0].size
        if origin.opcode == "fusion":
            (called,) = origin.called
            return self._result(self._all[called].root.name, self._all[called])
        return math.inf


def _convolution(i: Instruction, left: tuple[int, ...], kernel: tuple[int, ...]) -> float:
    """FLOPs of a convolution without those on padding and between dilated entries.

    The TPU compiler writes all matrix products as convolutions; batches become spatial dimensions, dilated and padded
    so that each position of the kernel meets one entry.
    """
    inputs, weights_and_outputs = (i.attribute("dim_labels") or "").split("_")
    weights, outputs = weights_and_outputs.split("->")
    out = i.arrays[0].shape
    terms = 2.0 * out[outputs.index("b")] * out[outputs.index("f")] * kernel[weights.index("i")]
    window = _window(i.attribute("window") or "")
    for d, label in enumerate(sorted(set(inputs) - set("bf"))):
        options = {name: values[d] for name, values in window.items() if d < len(values)}
        terms *= _positions(
            out[outputs.index(label)],
            kernel[weights.index(label)],
            left[inputs.index(label)],
            options.get("stride", "1"),
            options.get("pad", "0_0"),
            options.get("lhs_dilate", "1"),
            options.get("rhs_dilate", "1"),
        )
    return terms


def _window(text: str) -> dict[str, list[str]]:
    """Option of a convolution's window → its value in each spatial dimension."""
    return {name: values.split("x") for name, _, values in (part.partition("=") for part in text.split()) if values}


@functools.lru_cache(maxsize=4096)
def _positions(out: int, kernel: int, size: int, stride: str, pad: str, dilate: str, kernel_dilate: str) -> int:
    """Pairs of an output's and a kernel's position along one dimension that meet an entry of the input."""
    low = int(pad.split("_")[0])
    kernels = np.arange(kernel) * int(kernel_dilate) - low
    pairs = 0
    for block in np.array_split(np.arange(out) * int(stride), max(1, out * kernel >> 22)):
        at = block[:, None] + kernels[None, :]
        pairs += int(((at >= 0) & (at <= (size - 1) * int(dilate)) & (at % int(dilate) == 0)).sum())
    return pairs
