"""How a compiled program splits up by named scope: launches, FLOPs and bytes of each part of the model.

Tested in tests/apps/plan/test_scopes.py.
"""

from __future__ import annotations

import collections
import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from dsvl2_jax.apps.plan.hlo_text import Computation, Instruction, parse
from dsvl2_jax.apps.plan.hlo_walk import Cost, Walk
from dsvl2_jax.apps.plan.launches import count_launches, scope_of

_DEPTH = 16  # more parts than a name has
_ADDED = re.compile(r".*,.*|.*->.*")
LEAST_SHARE = 0.002  # of a scope that has a line of its own
_LAYER = re.compile(r"^(layers|blocks)_\d+(_to_\d+)?")


@dataclasses.dataclass(frozen=True)
class Scope:
    """What one named scope does in a run of a program; loops count as `walk` counts them."""

    launches: int = 0
    flops: float = 0.0
    bytes: float = 0.0


def scopes_of(text: str) -> dict[str, Scope]:
    """Named scope → what it does, the one that moves most bytes first.

    Layers are taken together: ``layers_3/self_attn`` is ``layers/self_attn``; the first, where it is another than the
    rest, too.

    Args:
      text: of `jax.stages.Compiled.as_text`.

    Raises:
      ValueError: the text has no entry computation.
    """
    computations, entry = parse(text)
    cost = _ScopeWalk(computations, 1.0).computation(entry, {})
    launches: collections.Counter[str] = collections.Counter()
    for name, count in count_launches(text, scope_depth=_DEPTH).by_scope.items():
        launches[_merged(name)] += count
    costs: dict[str, Cost] = getattr(cost, "scopes", {})
    found = {
        name: Scope(launches[name], costs.get(name, Cost()).flops, costs.get(name, Cost()).bytes)
        for name in {*launches, *costs}
    }
    return dict(sorted(found.items(), key=lambda item: (-item[1].bytes, -item[1].launches, item[0])))


def _merged(name: str) -> str:
    """Without numbers of layers, and without what einsum adds to names."""
    parts = (_LAYER.sub(r"\1", part) for part in name.split("/"))
    return "/".join(part for part in parts if not _ADDED.fullmatch(part)) or "unnamed"


def scope_rows(text: str, seconds: Callable[[float, float], float]) -> list[dict[str, Any]]:
    """The scopes of a program as JSON objects, that of the largest share first.

    Args:
      text: as of `scopes_of`.
      seconds: the time that so many FLOPs and bytes take; a scope's ``share`` is of the sum of all scopes' times.
    """
    scopes = scopes_of(text)
    times = {name: seconds(scope.flops, scope.bytes) for name, scope in scopes.items()}
    total = sum(times.values())
    return [
        {"scope": name} | dataclasses.asdict(scopes[name]) | {"share": times[name] / total}
        for name in sorted(scopes, key=lambda name: -times[name])
    ]


def scope_lines(name: str, scopes: Sequence[Mapping[str, Any]]) -> list[str]:
    """`scope_rows` for people, small ones summed up."""
    lines = [f"{name}, by named scope", f"  {'':52}{'launches':>10}{'FLOPs':>10}{'bytes':>10}{'share':>8}"]
    shown = [scope for scope in scopes if scope["share"] >= LEAST_SHARE]
    if rest := [scope for scope in scopes if scope["share"] < LEAST_SHARE]:
        sums = {key: sum(scope[key] for scope in rest) for key in ("launches", "flops", "bytes", "share")}
        shown.append({"scope": f"{len(rest)} others"} | sums)
    for scope in shown:
        lines.append(
            f"  {scope['scope'][-52:]:52}{scope['launches']:>10}{scope['flops']:>10.2e}{scope['bytes']:>10.2e}"
            f"{100 * scope['share']:>7.3g} %"
        )
    return lines


@dataclasses.dataclass(frozen=True)
class _ScopedCost(Cost):
    """A cost, and which scope has which part of it."""

    scopes: Mapping[str, Cost] = dataclasses.field(default_factory=dict)

    def __add__(self, other: Cost) -> Cost:
        whole = Cost.__add__(self, other)
        parts = dict(self.scopes)
        for name, cost in getattr(other, "scopes", {}).items():
            parts[name] = parts[name] + cost if name in parts else cost
        return _ScopedCost(whole.flops, whole.bytes, whole.collectives, whole.unknown_loops, parts)

    def __radd__(self, other: Cost) -> Cost:
        return self + other

    def __mul__(self, times: float) -> Cost:
        whole = Cost.__mul__(self, times)
        parts = {name: cost * times for name, cost in self.scopes.items()}
        return _ScopedCost(whole.flops, whole.bytes, whole.collectives, whole.unknown_loops, parts)


class _ScopeWalk(Walk):
    """A walk that keeps the costs of scopes apart."""

    def _cost(self, i: Instruction, inside: Computation, bound: Mapping[int, int]) -> Cost:
        cost = super()._cost(i, inside, bound)
        if isinstance(cost, _ScopedCost) or not (cost.flops or cost.bytes):
            return cost  # of a loop, a branch or a call, whose instructions have been told apart
        plain = Cost(cost.flops, cost.bytes, cost.collectives, cost.unknown_loops)
        name = _merged(scope_of(i, _DEPTH))
        return _ScopedCost(cost.flops, cost.bytes, cost.collectives, cost.unknown_loops, {name: plain})
