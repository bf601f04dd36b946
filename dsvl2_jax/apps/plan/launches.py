"""How many kernels one run of an optimized program launches, and what makes the host wait, from the program's text.

With little work each, a launch costs more than the work: about 3 µs on an H100 where the host makes it, a third of
that within a command buffer (a CUDA graph).
"""

from __future__ import annotations

import collections
import dataclasses
import re
from collections.abc import Iterator, Mapping

from dsvl2_jax.apps.plan.hlo_text import Computation, Instruction, parse
from dsvl2_jax.apps.plan.hlo_walk import FREE, FREE_TARGETS

HOST_SPACE = 5  # memory space of arrays in the host's memory
_TRANSFERS = frozenset({"infeed", "outfeed", "send", "recv"})
_OP_NAME = re.compile(r'op_name="([^"]*)"')
_CONTROL = re.compile(r"cond|while|body|branch_\d+_fun|closed_call|checkpoint|rematted_computation")
_TRANSFORMED = re.compile(r"((?:transpose|jvp|vmap)\()+(\w+)\)+")
_TARGET = re.compile(r'custom_call_target="([^"]+)"')


@dataclasses.dataclass(frozen=True)
class Launches:
    """Of one run of a program; loops count as often as they run, or once where data decide.

    Attributes:
      by_kind: opcode → launches: fusion, custom-call, copy, sort …
      by_scope: beginning of the operation's name, as ``layers_1/self_attn`` → launches.
      sorts: of these, those that sort: by themselves, fused or in a library.
      captured: of these, those within command buffers.
      host_transfers: what the host and the device exchange, on which the host waits: copies to its memory, conditions
        of loops and branches that the host takes.
      branches: further launches, where each branch is the dearest; the other figures count the cheapest ones.
    """

    by_kind: Mapping[str, int]
    by_scope: Mapping[str, int]
    sorts: int
    captured: int
    host_transfers: int
    branches: int

    @property
    def total(self) -> int:
        return sum(self.by_kind.values())


@dataclasses.dataclass
class _Count:
    by_kind: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    by_scope: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    numbers: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)

    @property
    def total(self) -> int:
        return sum(self.by_kind.values())

    def add(self, other: _Count, times: int = 1) -> None:
        for field in ("by_kind", "by_scope", "numbers"):
            mine = getattr(self, field)
            for key, value in getattr(other, field).items():
                mine[key] += times * value


def count_launches(text: str, scope_depth: int = 2) -> Launches:
    """Counts the launches of a compiled program.

    Args:
      text: of `jax.stages.Compiled.as_text`: the optimized program of one device.
      scope_depth: parts of a name that ``by_scope`` keeps, beside those of functions and of modules' classes.

    Raises:
      ValueError: the text has no entry computation.
    """
    computations, entry = parse(text)
    count = _computation(computations, entry, scope_depth)
    numbers = {name: count.numbers[name] for name in ("sorts", "captured", "host_transfers", "branches")}
    return Launches(dict(count.by_kind), dict(count.by_scope), **numbers)


def _computation(computations: Mapping[str, Computation], name: str, depth: int) -> _Count:
    count = _Count()
    for i in computations[name].values():
        count.add(*_instruction(computations, i, depth))
    return count


def _instruction(computations: Mapping[str, Computation], i: Instruction, depth: int) -> tuple[_Count, int]:
    """What an instruction launches once, and how often."""
    count = _Count()
    if i.opcode == "while":
        for part in ("condition", "body"):
            count.add(_computation(computations, (i.attribute(part) or "").lstrip("%"), depth))
        known = i.config.get("known_trip_count")
        if isinstance(known, dict):
            return count, int(known["n"])
        count.numbers["host_transfers"] += 1
        return count, 1
    if i.opcode == "conditional":
        branches = sorted((_computation(computations, name, depth) for name in i.called), key=lambda b: b.total)
        count.add(branches[0])
        count.numbers["branches"] += branches[-1].total + branches[-1].numbers["branches"] - branches[0].total
        count.numbers["host_transfers"] += 1
        return count, 1
    if i.opcode in ("call", "async-start"):
        for name in i.called:
            inner = _computation(computations, name, depth)
            if name.startswith("command_buffer"):
                inner.numbers["captured"] = inner.total
            count.add(inner)
        return count, 1
    target = _TARGET.search(i.attributes)
    free = target is not None and target[1] in FREE_TARGETS
    if i.opcode in FREE or free or i.opcode.endswith(("-done", "-update")):
        return count, 1
    kind = i.opcode.removesuffix("-start")
    count.by_kind[kind] += 1
    count.by_scope[scope_of(i, depth)] += 1
    count.numbers["sorts"] += _sorts(computations, i, target[1] if target else "")
    on_host = any(array.space == HOST_SPACE for array in i.arrays)
    count.numbers["host_transfers"] += kind in _TRANSFERS or on_host
    return count, 1


def _sorts(computations: Mapping[str, Computation], i: Instruction, target: str) -> bool:
    """Whether a launch sorts."""
    if i.opcode == "fusion":
        return any(inner.opcode == "sort" for name in i.called for inner in computations[name].values())
    return i.opcode == "sort" or "sort" in target.lower() or "topk" in target.lower()


def scope_of(i: Instruction, depth: int) -> str:
    """The first parts of an operation's name; "unnamed" where it has none."""
    named = _OP_NAME.search(i.attributes)
    parts = list(_parts(named[1])) if named else []
    return "/".join(parts[:depth]) or "unnamed"


def _parts(name: str) -> Iterator[str]:
    """``jit(step)/layers_1/DecoderLayer/mlp/router/div`` → layers_1, mlp, router: neither functions nor operations.

    ``transpose(jvp(layers_1))``, of a gradient, → backward, layers_1.
    """
    if "transpose(" in name:
        yield "backward"
    parts = [_TRANSFORMED.sub(r"\2", part) for part in name.split("/")]
    for part in parts[:-1] if len(parts) > 1 else parts:
        if "(" not in part and part[:1].islower() and not _CONTROL.fullmatch(part):
            yield part
        elif "." in part:  # Module.method
            yield part.rpartition(".")[2]


@dataclasses.dataclass(frozen=True)
class Thunks:
    """What XLA's GPU runtime does for a program, in its own steps.

    Attributes:
      launches: steps that launch something, each counted once.
      captured: of these, those within command buffers.
      command_buffers: how many there are.
      conditionals: branches that the host takes.
    """

    launches: int
    captured: int
    command_buffers: int
    conditionals: int


_THUNK = re.compile(r"( *)\d+: (k\w+)")
_CONTAINERS = frozenset({"kWhile", "kConditional", "kCommandBuffer", "kSequential", "kDynamicSliceFusion"})


def count_thunks(text: str) -> Thunks:
    """Counts the steps in ``…thunk_sequence_after_thunk_passes.txt``, which XLA's GPU compiler writes.

    It does so with the options ``xla_dump_to`` (a directory) and ``xla_dump_hlo_as_text``, of
    `jax.stages.Lowered.compile`, for a GPU that is not here too: but then without a driver, whose version decides
    whether loops, branches and libraries' calls can be captured.
    """
    kinds: collections.Counter[str] = collections.Counter()
    captured, within = 0, None  # indentation of the command buffer that we are in
    for line in text.splitlines():
        found = _THUNK.match(line)
        if found is None:
            continue
        depth, kind = len(found[1]), found[2]
        if within is not None and depth <= within:
            within = None
        kinds[kind] += 1
        captured += within is not None and kind not in _CONTAINERS
        if kind == "kCommandBuffer":
            within = depth
    launches = sum(count for kind, count in kinds.items() if kind not in _CONTAINERS)
    return Thunks(launches, captured, kinds["kCommandBuffer"], kinds["kConditional"])
