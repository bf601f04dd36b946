"""The text of an optimized XLA program, read into computations of instructions with typed operands.

`jax.stages.Compiled.as_text` writes it; `dsvl2_jax.apps.plan.hlo_walk` counts what it costs.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import re
from collections.abc import Iterator

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


@dataclasses.dataclass(frozen=True)
class Array:
    """A value's type and where it lives."""

    dtype: str
    shape: tuple[int, ...]
    space: int  # 0 is main memory

    @property
    def bytes(self) -> float:
        """In main memory; values that live elsewhere have none."""
        return 0.0 if self.space else self.size

    @property
    def size(self) -> float:
        """Bytes, wherever it lives."""
        bits = 8 if self.dtype.startswith("f8") else 4 if self.dtype.startswith("f4") else _BITS[self.dtype]
        return math.prod(self.shape) * bits / 8


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a program."""

    name: str
    arrays: tuple[Array, ...]
    opcode: str
    operands: tuple[str, ...]
    arguments: str  # text between the parentheses
    attributes: str
    root: bool

    @property
    def bytes(self) -> float:
        """Of its results, in main memory."""
        return sum(array.bytes for array in self.arrays)

    def attribute(self, name: str) -> str | None:
        """The text of a ``name={…}`` attribute without its braces, or of ``name=word``."""
        match = re.search(rf"\b{name}=(?:\{{([^}}]*)\}}|(%?[\w.\->_]+))", self.attributes)
        return None if match is None else match[1] if match[1] is not None else match[2]

    def dimensions(self, name: str) -> list[int]:
        """An attribute that lists dimensions; empty where it is missing."""
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


class Computation(dict[str, Instruction]):
    """Name → instruction, in the program's order."""

    @functools.cached_property
    def root(self) -> Instruction:
        """The instruction whose value the computation returns."""
        return next(instruction for instruction in self.values() if instruction.root)

    @functools.cached_property
    def parameters(self) -> dict[int, Instruction]:
        """Position of an argument → the instruction that stands for it."""
        return {int(i.arguments): i for i in self.values() if i.opcode == "parameter"}

    @functools.cached_property
    def users(self) -> dict[str, list[Instruction]]:
        """Name → the instructions that take its value."""
        users: dict[str, list[Instruction]] = {}
        for instruction in self.values():
            for operand in dict.fromkeys(instruction.operands):
                users.setdefault(operand, []).append(instruction)
        return users


def parse(text: str) -> tuple[dict[str, Computation], str]:
    """Name → computation of a program, and the name of its entry.

    Raises:
      ValueError: the text has no entry computation.
    """
    computations: dict[str, Computation] = {}
    current, entry = None, None
    # An attribute of a kernel may hold text of several lines, which start with `"name":` and end with `}}, …`.
    for line in re.sub(r'\n(?="|\}\})', " ", text).splitlines():
        if current is None:
            if header := _HEADER.match(line):
                current = computations[header[2]] = Computation()
                entry = header[2] if header[1] else entry
        elif line.startswith("}"):
            current = None
        elif instruction := _instruction(line):
            current[instruction.name] = instruction
    if entry is None:
        raise ValueError("no entry computation; expected the text of jax.stages.Compiled.as_text()")
    return computations, entry


def _instruction(line: str) -> Instruction | None:
    start = _INSTRUCTION.match(line)
    if start is None:
        return None
    rest = re.sub(r"/\*.*?\*/", "", line[start.end() :])
    shape, rest = _split(rest) if rest.startswith("(") else rest.split(" ", 1)
    opcode, _, rest = rest.strip().partition("(")
    arguments, attributes = _split(f"({rest}")
    arrays = tuple(
        Array(dtype, tuple(int(d.strip("<=")) for d in sizes.split(",") if d), int(space[1]) if space else 0)
        for dtype, sizes, layout in _ARRAY.findall(shape)
        for space in [_SPACE.search(layout)]
    )
    operands = tuple(_NAME.findall(arguments))
    return Instruction(start[2], arrays, opcode, operands, arguments[1:-1], attributes, start[1] is not None)


def _split(text: str) -> tuple[str, str]:
    """A text that begins with a parenthesis → that up to the one which closes it, and the rest."""
    depth = 0
    for parenthesis in re.finditer(r"[()]", text):
        depth += 1 if parenthesis[0] == "(" else -1
        if not depth:
            return text[: parenthesis.end()], text[parenthesis.end() :]
    return text, ""


def instructions(text: str) -> Iterator[tuple[str, tuple[int, ...], str]]:
    """(opcode, shape, dtype) of every array that a program makes, kernels' and fusions' insides included."""
    for computation in parse(text)[0].values():
        for instruction in computation.values():
            for array in instruction.arrays:
                yield instruction.opcode, array.shape, array.dtype


def buffers(text: str) -> Iterator[tuple[str, tuple[int, ...], str]]:
    """As `instructions`, without the insides of fusions: arrays that memory holds, and views of them."""
    computations, _ = parse(text)
    everything = [instruction for computation in computations.values() for instruction in computation.values()]
    fused = {name for instruction in everything if instruction.opcode == "fusion" for name in instruction.called}
    for name, computation in computations.items():
        for instruction in computation.values() if name not in fused else ():
            for array in instruction.arrays:
                yield instruction.opcode, array.shape, array.dtype
