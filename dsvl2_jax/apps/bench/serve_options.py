"""What `dsvl2 bench serve` measures, and how much load it makes.

Tested in tests/apps/bench/test_serve.py.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from dsvl2_jax import fields
from dsvl2_jax.errors import UsageError
from dsvl2_jax.fields import Problem, setting

PARTS = ("start", "throughput", "half-load", "gaps", "second-turn", "loop", "soak")


@dataclasses.dataclass(frozen=True)
class ServeLoad:
    """Options of `dsvl2 bench serve` alone. Raises UsageError for values that cannot be; all of them are listed."""

    only: tuple[str, ...] = setting((), choices=PARTS)
    """parts to measure: start, throughput, half-load, gaps, second-turn, loop, soak; without it, all."""
    clients: tuple[int, ...] = setting((1, 32), least=1, expected="one or more positive whole numbers")
    """how many clients ask at the same time: throughput is measured with each, the rest with the last."""
    slots: int = setting(8, least=1)
    """answers that the server writes at the same time."""
    seconds: float = setting(20.0, above=0)
    """how long throughput is measured with each number of clients; half load takes three times as long."""
    input_tokens: int = setting(64, least=1)
    """the tokens of a prompt without a picture, about."""
    output_tokens: int = setting(64, least=2)
    """the tokens of an answer."""
    picture_share: float = setting(0.5, least=0, most=1)
    """the share of the prompts that have a picture."""
    trials: int = setting(5, least=1)
    """how often what is not under load is measured, and how many long prompts and second turns there are."""
    long_tokens: int = setting(4000, least=64)
    """the tokens of a long prompt."""
    megapixels: float = setting(12.0, above=0)
    """the size of the pictures that the event loop must bear."""
    soak: float = setting(600.0, above=0)
    """seconds of mixed load."""
    soak_requests: int = setting(10_000, least=1)
    """requests of the mixed load, spread over its seconds; more than the server can do take longer."""
    soak_distinct: int = setting(100, least=10)
    """how many of them differ, at most; the answer to each is computed beforehand."""
    seed: int = 0
    """of the requests."""
    json: bool = False
    """print one JSON object instead of tables."""
    plot: Path | None = None
    """draw the figures into this PNG file."""

    def __post_init__(self) -> None:
        problems = fields.check(self)
        if not self.clients:
            problems.append(Problem(("clients",), "must be one or more positive whole numbers."))
        if self.plot is not None and self.plot.suffix.lower() != ".png":
            problems.append(Problem(("plot",), f"must be a name that ends in .png, not {self.plot}."))
        fields.refuse((Problem((f"--{p.path[0].replace('_', '-')}",), p.text) for p in problems), UsageError)

    @property
    def parts(self) -> tuple[str, ...]:
        """What is measured, in the order in which it is."""
        return tuple(part for part in PARTS if not self.only or part in self.only)

    @property
    def most_clients(self) -> int:
        return self.clients[-1]
