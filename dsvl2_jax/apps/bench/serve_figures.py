"""What `dsvl2 bench serve` found: figures with the aims of docs/serving.md, and what is drawn of them.

Tested in tests/apps/bench/test_serve.py.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Figure:
    """One figure.

    Attributes:
      part: of `serve_options.PARTS`.
      unit: "s", "ms", "×", "tokens/s", …
      aim: None: there is none. at_least: the aim is a lower bound, not an upper one.
      p50, p95: of what the figure was made of, in its unit.
      note: what else is to be known.
    """

    part: str
    what: str
    value: float
    unit: str
    aim: float | None = None
    at_least: bool = False
    p50: float | None = None
    p95: float | None = None
    note: str = ""

    @property
    def reached(self) -> bool | None:
        """Whether the aim was; None without one."""
        if self.aim is None:
            return None
        return self.value >= self.aim if self.at_least else self.value <= self.aim

    def line(self) -> str:
        aim = ""
        if self.aim is not None:
            aim = f"{'≥' if self.at_least else '≤'} {_number(self.aim)}  {'reached' if self.reached else 'MISSED'}"
        middle = "" if self.p50 is None else f"{_number(self.p50)} / {_number(self.p95)}"
        value = f"{_number(self.value)} {self.unit}".rstrip()
        return f"{self.what:58}{value:>18}{middle:>20}   {aim}{f'   ({self.note})' if self.note else ''}".rstrip()


@dataclasses.dataclass
class Findings:
    """Everything that was found.

    Attributes:
      say: told each figure in a line of text.
      series: by name, the values that are drawn.
      wrong: what each wrong or lost answer was, the first ones.
    """

    say: Callable[[str], None]
    figures: list[Figure] = dataclasses.field(default_factory=list)
    series: dict[str, list[Any]] = dataclasses.field(default_factory=dict)
    wrong: list[dict[str, Any]] = dataclasses.field(default_factory=list)

    def add(self, part: str, what: str, values: float | Sequence[float], unit: str, **more: Any) -> None:
        """Notes a figure, with further fields of `Figure`; of several values the p95 counts."""
        if not isinstance(values, float | int):
            more |= {"p50": middle(values), "p95": p95(values)}
            values = p95(values)
        self.figures.append(Figure(part, what, float(values), unit, **more))
        self.say(self.figures[-1].line())

    def as_json(self) -> dict[str, Any]:
        return {
            "figures": [dataclasses.asdict(figure) | {"reached": figure.reached} for figure in self.figures],
            "series": self.series,
            "wrong": self.wrong,
        }


def middle(values: Sequence[float]) -> float:
    """The median; nan without values."""
    return float(np.median(values)) if len(values) else math.nan


def p95(values: Sequence[float]) -> float:
    return float(np.percentile(values, 95)) if len(values) else math.nan


HEADING = f"{'':58}{'measured':>18}{'p50 / p95':>20}   aim"


def _number(value: float) -> str:
    if math.isnan(value):
        return "-"
    if value == int(value) and abs(value) < 1e9:
        return f"{int(value):,}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
