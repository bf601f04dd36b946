"""What an optimized XLA program costs: FLOPs of its matrix products, bytes through main memory, collectives.

`jax.stages.Compiled.cost_analysis` counts a loop's body once and a sliced array whole (DESIGN §6). `walk` reads the
program's text instead: a loop's body counts as often as the loop turns, a slice as what it takes, a kernel as it
declares itself.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import re
from collections.abc import Iterator, Mapping

import numpy as np

from dsvl2_jax.apps.plan.hlo_gpu import custom_call_flops, splash_flops

_BITS = {
    "pred": 8, "token": 0, "opaque": 0,
    "s2": 2, "u2": 2, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "s16": 16, "u16": 16, "s32": 32, "u32": 32, "s64": 64,
    "u64": 64, "f16": 16, "bf16": 16, "f32": 32, "f64": 64, "c64": 64, "c128": 128,
}  # fmt: skip
_ARRAY = re.compile(r"(\w+)\[([\d,<=]*)\](?:\{([^}]*)\})?")
_SPACE = re.compile(r"S\((\d+)\)")
_NAME = re.compile(r"%([\w.\-]+)")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_INSTRUCTION = re.compile(r"^\s*(ROOT )?%?([\w.\-]+) = ")
_CALLED = re.compile(r"(?:calls|to_apply|called_computations|branch_computations|true_computation|false_computation)=")

# Names for values or reinterpretations of them: nothing is moved.
_FREE = frozenset(
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
_FREE_TARGETS = frozenset(
    {"AllocateBuffer", "ConcatBitcast", "Sharding", "SPMDFullToShardShape", "SPMDShardToFullShape"}
)
_PASSED_ON = frozenset({"bitcast", "copy", "convert", "reshape", "optimization-barrier", "opt-barrier"})
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
      unknown_loops: loops whose number of turns depends on data; their bodies count once, or as `walk` was told.
    """

    flops: float = 0.0
    bytes: float = 0.0
    collectives: Mapping[str, Collective] = dataclasses.field(default_factory=dict)
    unknown_loops: tuple[str, ...] = ()

    def __add__(self, other: Cost) -> Cost:
        kinds = dict(self.collectives)
        for kind, found in other.collectives.items():
            mine = kinds.get(kind, Collective())
            kinds[kind] = Collective(mine.count + found.count, mine.bytes + found.bytes)
        unknown = (*self.unknown_loops, *(name for name in other.unknown_loops if name not in self.unknown_loops))
        return Cost(self.flops + other.flops, self.bytes + other.bytes, kinds, unknown)

    def __mul__(self, times: float) -> Cost:
        kinds = {kind: Collective(c.count * times, c.bytes * times) for kind, c in self.collectives.items()}
        return Cost(self.flops * times, self.bytes * times, kinds, self.unknown_loops)


@dataclasses.dataclass(frozen=True)
class _Array:
    dtype: str
    shape: tuple[int, ...]
    space: int  # 0 is main memory

    @property
    def bytes(self) -> float:
        """In main memory; values that live elsewhere have none."""
        return 0.0 if self.space else self.size

    @property
    def size(self) -> float:
        bits = 8 if self.dtype.startswith("f8") else 4 if self.dtype.startswith("f4") else _BITS[self.dtype]
        return math.prod(self.shape) * bits / 8


@dataclasses.dataclass(frozen=True)
class _Instruction:
    name: str
    arrays: tuple[_Array, ...]
    opcode: str
    operands: tuple[str, ...]
    arguments: str  # text between the parentheses
    attributes: str
    root: bool

    @property
    def bytes(self) -> float:
        return sum(array.bytes for array in self.arrays)

    def attribute(self, name: str) -> str | None:
        """The text of a ``name={…}`` attribute without its braces, or of ``name=word``."""
        found = re.search(rf"\b{name}=(?:\{{([^}}]*)\}}|(%?[\w.\->_]+))", self.attributes)
        return None if found is None else found[1] if found[1] is not None else found[2]

    def dimensions(self, name: str) -> list[int]:
        text = self.attribute(name)
        return [int(number) for number in text.split(",")] if text else []

    @property
    def called(self) -> list[str]:
        """The computations that it calls, by name."""
        at = _CALLED.search(self.attributes)
        if at is None:
            return []
        if self.opcode == "conditional" and "branch_computations" not in at[0]:
            return re.findall(r"(?:true|false)_computation=%([\w.\-]+)", self.attributes)
        rest = self.attributes[at.end() :]
        return _NAME.findall(rest[: rest.index("}")]) if rest.startswith("{") else _NAME.findall(rest)[:1]

    @functools.cached_property
    def config(self) -> dict[str, object]:
        """``backend_config``, empty when there is none."""
        at = self.attributes.find("backend_config={")
        if at < 0:
            return {}
        try:
            return json.JSONDecoder().raw_decode(self.attributes, at + len("backend_config="))[0]
        except json.JSONDecodeError:
            return {}


class _Computation(dict[str, _Instruction]):
    """Name → instruction, in the program's order."""

    @functools.cached_property
    def root(self) -> _Instruction:
        return next(instruction for instruction in self.values() if instruction.root)

    @functools.cached_property
    def parameters(self) -> dict[int, _Instruction]:
        return {int(i.arguments): i for i in self.values() if i.opcode == "parameter"}

    @functools.cached_property
    def users(self) -> dict[str, list[_Instruction]]:
        found: dict[str, list[_Instruction]] = {}
        for instruction in self.values():
            for operand in dict.fromkeys(instruction.operands):
                found.setdefault(operand, []).append(instruction)
        return found


def walk(text: str, unknown_turns: float = 1.0) -> Cost:
    """The cost of a compiled program.

    Args:
      text: of `jax.stages.Compiled.as_text`: the optimized program of one device.
      unknown_turns: of a loop whose number of turns depends on data.

    Raises:
      ValueError: the text has no entry computation.
    """
    computations, entry = _parse(text)
    return _Walk(computations, unknown_turns).computation(entry, {})


def _parse(text: str) -> tuple[dict[str, _Computation], str]:
    computations: dict[str, _Computation] = {}
    current, entry = None, None
    # An attribute of a kernel may hold text of several lines, which go on with `"name":` and end with `}}, …`.
    for line in re.sub(r'\n(?="|\}\})', " ", text).splitlines():
        if current is None:
            if header := _HEADER.match(line):
                current = computations[header[2]] = _Computation()
                entry = header[2] if header[1] else entry
        elif line.startswith("}"):
            current = None
        elif instruction := _instruction(line):
            current[instruction.name] = instruction
    if entry is None:
        raise ValueError("no entry computation; expected the text of jax.stages.Compiled.as_text()")
    return computations, entry


def _instruction(line: str) -> _Instruction | None:
    start = _INSTRUCTION.match(line)
    if start is None:
        return None
    rest = re.sub(r"/\*.*?\*/", "", line[start.end() :])
    shape, rest = _split(rest) if rest.startswith("(") else rest.split(" ", 1)
    opcode, _, rest = rest.strip().partition("(")
    arguments, attributes = _split(f"({rest}")
    arrays = tuple(
        _Array(dtype, tuple(int(d.strip("<=")) for d in sizes.split(",") if d), int(space[1]) if space else 0)
        for dtype, sizes, layout in _ARRAY.findall(shape)
        for space in [_SPACE.search(layout)]
    )
    operands = tuple(_NAME.findall(arguments))
    return _Instruction(start[2], arrays, opcode, operands, arguments[1:-1], attributes, start[1] is not None)


def _split(text: str) -> tuple[str, str]:
    """A text that begins with a parenthesis → that up to the one which closes it, and the rest."""
    depth = 0
    for found in re.finditer(r"[()]", text):
        depth += 1 if found[0] == "(" else -1
        if not depth:
            return text[: found.end()], text[found.end() :]
    return text, ""


class _Walk:
    """One walk over a program. ``bound``: tuple index → value, of a loop's parameters that are known constants."""

    def __init__(self, computations: Mapping[str, _Computation], unknown_turns: float):
        self._all = computations
        self._unknown_turns = unknown_turns
        # Channel of a collective that runs beside other work, part by part in several fusions → the first of them.
        self._begun: dict[str, str] = {}

    def computation(self, name: str, bound: Mapping[int, int]) -> Cost:
        """All of a computation that runs by itself: the entry, a loop's body, a branch."""
        cost = Cost()
        for instruction in self._all[name].values():
            cost += self._cost(instruction, self._all[name], bound)
        return cost

    def _cost(self, i: _Instruction, inside: _Computation, bound: Mapping[int, int]) -> Cost:
        if i.opcode in _FREE or i.opcode.endswith("-done") or i.opcode.endswith("-update"):
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
            return self._matmuls(name) + Cost(bytes=self._fusion_bytes(i, inside, name))
        return self._own(i, inside) + Cost(bytes=self._moved(i, inside))

    # ---- loops

    def _loop(self, i: _Instruction, inside: _Computation, bound: Mapping[int, int]) -> Cost:
        body, condition = (self._all[i.attribute(name).lstrip("%")] for name in ("body", "condition"))
        start = self._constants(i.operands[0], inside, bound)
        kept = {index: value for index, value in start.items() if self._passed_on(body, index)}
        turns = self._turns(i, body, condition, start, kept)
        names = [i.attribute(name).lstrip("%") for name in ("body", "condition")]
        once = sum((self.computation(name, kept) for name in names), Cost())
        return once * turns if turns is not None else once * self._unknown_turns + Cost(unknown_loops=(i.name,))

    def _turns(
        self,
        i: _Instruction,
        body: _Computation,
        condition: _Computation,
        start: Mapping[int, int],
        kept: Mapping[int, int],
    ) -> int | None:
        """How often a loop turns: as declared, or of a counter that rises by a constant up to another."""
        known = i.config.get("known_trip_count")
        if isinstance(known, dict):
            return int(known["n"])
        test = self._comparison(condition.root, condition)
        if test is None:
            return None
        direction, left, right = test
        index = self._tuple_index(left, condition)
        end = self._value(right, condition, kept)
        if index is None or end is None or index not in start:
            return None
        step = self._step(body, index, kept)
        if not step:
            return None
        distance = (end - start[index]) if direction in ("LT", "LE", "NE") else (start[index] - end)
        step = step if direction in ("LT", "LE", "NE") else -step
        return max(0, math.ceil((distance + (direction in ("LE", "GE"))) / step)) if step > 0 else None

    def _comparison(self, root: _Instruction, inside: _Computation) -> tuple[str, str, str] | None:
        """Direction and operands of what a condition compares, also when it is fused."""
        if root.opcode == "compare":
            return root.attribute("direction") or "", *root.operands  # type: ignore[return-value]
        if root.opcode == "fusion":
            (name,) = root.called
            fused = self._all[name]
            found = self._comparison(fused.root, fused)
            if found is None:
                return None
            outer = [self._outer(operand, fused, root) for operand in found[1:]]
            if outer[0] is None:
                return None
            if outer[1] is None and (value := self._value(found[2], fused, {})) is not None:
                inside[f"constant of {root.name}"] = _Instruction("", (), "constant", (), str(value), "", False)
                return found[0], outer[0], f"constant of {root.name}"
            return None if outer[1] is None else (found[0], outer[0], outer[1])
        return None

    @staticmethod
    def _outer(name: str, fused: _Computation, fusion: _Instruction) -> str | None:
        """The operand of a fusion that a value inside it is."""
        found = fused[name]
        while found.opcode in _PASSED_ON:
            found = fused[found.operands[0]]
        return fusion.operands[int(found.arguments)] if found.opcode == "parameter" else None

    def _tuple_index(self, name: str, inside: _Computation) -> int | None:
        """The element of a computation's tuple that a value is."""
        found = inside[name]
        while found.opcode in _PASSED_ON:
            found = inside[found.operands[0]]
        if found.opcode == "get-tuple-element" and inside[found.operands[0]].opcode == "parameter":
            return int(found.attribute("index") or 0)
        return None

    def _value(self, name: str, inside: _Computation, bound: Mapping[int, int]) -> int | None:
        """The whole number that a value always is."""
        found = inside[name]
        while found.opcode in _PASSED_ON:
            found = inside[found.operands[0]]
        if found.opcode == "constant":
            return int(found.arguments) if re.fullmatch(r"-?\d+", found.arguments) else None
        if found.opcode == "get-tuple-element":
            source, index = inside[found.operands[0]], int(found.attribute("index") or 0)
            if source.opcode == "parameter":
                return bound.get(index)
            if source.opcode == "while":
                body = self._all[(source.attribute("body") or "").lstrip("%")]
                return self._element(source.operands[0], index, inside, bound) if self._passed_on(body, index) else None
        return None

    def _element(self, name: str, index: int, inside: _Computation, bound: Mapping[int, int]) -> int | None:
        """`_value` of one element of a tuple."""
        made = inside[name]
        while made.opcode in _PASSED_ON:
            made = inside[made.operands[0]]
        if made.opcode == "parameter":
            return bound.get(index)
        return self._value(made.operands[index], inside, bound) if made.opcode == "tuple" else None

    def _constants(self, name: str, inside: _Computation, bound: Mapping[int, int]) -> dict[int, int]:
        """Tuple index → value, of the elements of a tuple that are constants."""
        count = len(inside[name].arrays)
        values = {index: self._element(name, index, inside, bound) for index in range(count)}
        return {index: value for index, value in values.items() if value is not None}

    def _passed_on(self, body: _Computation, index: int) -> bool:
        """Whether a loop's body hands an element of its tuple on as it is."""
        root = body.root
        return root.opcode == "tuple" and self._tuple_index(root.operands[index], body) == index

    def _step(self, body: _Computation, index: int, kept: Mapping[int, int]) -> int | None:
        if body.root.opcode != "tuple":
            return None
        found = body[body.root.operands[index]]
        while found.opcode in _PASSED_ON:
            found = body[found.operands[0]]
        if found.opcode == "fusion":
            (name,) = found.called
            fused = self._all[name]
            added = fused.root
            if added.opcode != "add":
                return None
            for a, b in (added.operands, added.operands[::-1]):
                outer = self._outer(a, fused, found)
                if outer is not None and self._tuple_index(outer, body) == index:
                    inner = self._outer(b, fused, found)
                    return self._value(b, fused, {}) if inner is None else self._value(inner, body, kept)
            return None
        if found.opcode != "add":
            return None
        for a, b in (found.operands, found.operands[::-1]):
            if self._tuple_index(a, body) == index:
                return self._value(b, body, kept)
        return None

    # ---- arithmetic

    def _matmuls(self, name: str) -> Cost:
        """FLOPs and collectives of what is fused into one operation."""
        cost = Cost()
        for i in self._all[name].values():
            if i.opcode == "fusion":
                cost += sum((self._matmuls(called) for called in i.called), Cost())
            elif i.opcode not in _FREE and not self._is_continued(i, name):
                cost += self._own(i, self._all[name])
        return cost

    def _is_continued(self, i: _Instruction, name: str) -> bool:
        """True for a fused collective that an earlier fusion began."""
        channel = i.attribute("channel_id") if i.opcode in COLLECTIVES else None
        return channel is not None and self._begun.setdefault(channel, name) != name

    def _own(self, i: _Instruction, inside: _Computation) -> Cost:
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
            if declared := self._declared(i):
                return Cost(flops=float(declared.get("flops", 0)))
            shapes = [array.shape for operand in i.operands for array in inside[operand].arrays]
            return Cost(flops=custom_call_flops(i.attributes, i.config, shapes) or splash_flops(i.name, shapes))
        kind = i.opcode.removesuffix("-start")
        if kind in COLLECTIVES:
            given = sum(array.size for operand in i.operands for array in inside[operand].arrays)
            arrays = i.arrays[len(i.operands) :] if i.opcode.endswith("-start") and kind != "all-reduce" else i.arrays
            taken = sum(array.size for array in arrays if array.shape or len(arrays) == 1)
            return Cost(collectives={kind: Collective(1.0, max(given, taken))})
        return Cost()

    @staticmethod
    def _declared(i: _Instruction) -> dict[str, str]:
        call = i.config.get("custom_call_config")
        return call.get("cost_estimate", {}) if isinstance(call, dict) else {}

    # ---- memory

    def _moved(self, i: _Instruction, inside: _Computation) -> float:
        """Bytes of an operation that is not fused."""
        if i.opcode == "custom-call":
            if any(f'"{target}"' in i.attributes for target in _FREE_TARGETS):
                return 0.0
            if declared := self._declared(i).get("bytes_accessed"):
                elsewhere = (*i.arrays, *(array for operand in i.operands for array in inside[operand].arrays))
                return max(0.0, float(declared) - sum(array.size - array.bytes for array in elsewhere))
        if i.opcode == "slice-start":  # its result holds the source, the slice and a context
            source, taken = i.arrays[:2]
            return min(source.bytes, taken.size) + taken.bytes
        if i.opcode == "copy-start":  # its result holds the copy, its source and a context
            return i.arrays[0].bytes + inside[i.operands[0]].bytes
        if i.opcode.endswith("-start"):
            return i.bytes
        read = sum(self._read(i, at, inside) for at in range(len(i.operands)))
        return read + self._written(i, inside)

    def _read(self, i: _Instruction, at: int, inside: _Computation) -> float:
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
    def _written(i: _Instruction, inside: _Computation) -> float:
        if i.opcode in ("dynamic-update-slice", "scatter") and i.bytes:
            changed = i.operands[1] if i.opcode == "dynamic-update-slice" else i.operands[-1]
            return min(i.bytes, inside[changed].arrays[0].size)
        return i.bytes

    def _fusion_bytes(self, i: _Instruction, inside: _Computation, called: str) -> float:
        fused, moved = self._all[called], 0.0
        for at, name in enumerate(i.operands):
            held = inside[name].bytes
            if held:
                moved += min(held, self._used(fused.parameters[at], fused))
        results = fused.root.operands if fused.root.opcode == "tuple" else (fused.root.name,)
        for array, name in zip(i.arrays, results, strict=False):
            if not array.space and not self._is_continued(fused[name], called):
                moved += min(array.size, self._result(name, fused))
        return moved

    def _used(self, parameter: _Instruction, fused: _Computation) -> float:
        """Bytes that a fused computation takes of a parameter: the slices, when slices are all it takes."""
        total = 0.0
        for user in fused.users.get(parameter.name, ()):
            if user.opcode in ("dynamic-slice", "slice", "gather") and user.operands[0] == parameter.name:
                total += user.arrays[0].size
            elif user.opcode == "dynamic-update-slice" and user.operands[0] == parameter.name:
                continue  # changed in place
            elif user.opcode == "bitcast" and not user.root:
                total += self._used(user, fused)
            elif user.opcode == "fusion":
                (name,) = user.called
                inner = self._all[name]
                places = [at for at, operand in enumerate(user.operands) if operand == parameter.name]
                given = [inner.parameters[at] for at in places]
                if all(self._handed_on(value, inner) for value in given):
                    total += self._used(user, fused)
                else:
                    total += sum(self._used(value, inner) for value in given)
            elif user.opcode == "tuple" or user.opcode == "get-tuple-element":
                continue
            else:
                return math.inf
        return total

    @staticmethod
    def _handed_on(parameter: _Instruction, fused: _Computation) -> bool:
        """True when a fused computation gives a parameter another shape and nothing else."""
        made = fused.root
        while made.opcode == "bitcast":
            made = fused[made.operands[0]]
        return made is parameter

    def _result(self, name: str, fused: _Computation) -> float:
        """Bytes that a fused computation writes of a result: an update, when it changes an array in place."""
        made = fused[name]
        while made.opcode == "bitcast":
            made = fused[made.operands[0]]
        if made.opcode == "dynamic-update-slice":
            return fused[made.operands[1]].arrays[0].size
        if made.opcode == "scatter":
            return fused[made.operands[-1]].arrays[0].size
        if made.opcode == "fusion":
            (called,) = made.called
            return self._result(self._all[called].root.name, self._all[called])
        return math.inf


def _convolution(i: _Instruction, left: tuple[int, ...], kernel: tuple[int, ...]) -> float:
    """FLOPs of a convolution without those on padding and between dilated entries.

    The TPU compiler writes all matrix products as convolutions; batches become spatial dimensions, dilated and padded
    so that each position of the kernel meets one entry.
    """
    inputs, rest = (i.attribute("dim_labels") or "").split("_")
    weights, outputs = rest.split("->")
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
    return {name: values.split("x") for name, _, values in (part.partition("=") for part in text.split()) if values}


@functools.lru_cache(maxsize=4096)
def _positions(out: int, kernel: int, size: int, stride: str, pad: str, dilate: str, spread: str) -> int:
    """Pairs of an output's and a kernel's position along one dimension that meet an entry of the input."""
    low = int(pad.split("_")[0])
    kernels = np.arange(kernel) * int(spread) - low
    found = 0
    for block in np.array_split(np.arange(out) * int(stride), max(1, out * kernel >> 22)):
        at = block[:, None] + kernels[None, :]
        found += int(((at >= 0) & (at <= (size - 1) * int(dilate)) & (at % int(dilate) == 0)).sum())
    return found


def instructions(text: str) -> Iterator[tuple[str, tuple[int, ...], str]]:
    """(opcode, shape, dtype) of every array that a program makes, kernels' and fusions' insides included."""
    for computation in _parse(text)[0].values():
        for instruction in computation.values():
            for array in instruction.arrays:
                yield instruction.opcode, array.shape, array.dtype


def buffers(text: str) -> Iterator[tuple[str, tuple[int, ...], str]]:
    """As `instructions`, without the insides of fusions: arrays that memory holds, and views of them."""
    computations, _ = _parse(text)
    every = [instruction for computation in computations.values() for instruction in computation.values()]
    fused = {name for instruction in every if instruction.opcode == "fusion" for name in instruction.called}
    for name, computation in computations.items():
        for instruction in computation.values() if name not in fused else ():
            for array in instruction.arrays:
                yield instruction.opcode, array.shape, array.dtype
