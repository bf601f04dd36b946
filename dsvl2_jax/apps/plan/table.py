"""`dsvl2 plan MODEL` without a topology: what fits where, and how fast it can be there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from dsvl2_jax.apps.plan.cache import planned
from dsvl2_jax.apps.plan.planner import Job
from dsvl2_jax.model.config import Config
from dsvl2_jax.runtime.hardware import topology

PLACES = (
    *("v5e-4", "v5e-8", "v5e-16", "v5p-8", "v5p-16", "v6e-4", "v6e-8", "v6e-16", "tpu7x-8"),
    *(f"{kind}-{count}" for kind in ("h100", "h200") for count in (1, 2, 4, 8)),
)
_COLUMNS = "{:<9} {:<9} {:<5} {:<28} {:>16} {:>13} {:<8} {}"
HEADER = _COLUMNS.format("topology", "job", "fits", "mesh", "GB a device", "at most", "", "bound by").rstrip()


def rows(
    config: Config, jobs: list[Job], say: Callable[[str], None], *, cache: bool = True
) -> Iterator[dict[str, Any]]:
    """A plan for every place and job, each as soon as it is there."""
    every = [(topology(name), job) for name in PLACES for job in jobs]
    for number, (place, job) in enumerate(every, start=1):
        what = f"{number} of {len(every)}: {job.kind} on {place.name}"
        yield planned(config, job, place, None, lambda doing, what=what: say(f"{what}: {doing}"), cache=cache)


def line(row: dict[str, Any]) -> str:
    """A row for people. What was not compiled is marked: it is what arithmetic says, without temporaries."""
    mesh = ",".join(f"{axis}={size}" for axis, size in row["mesh"].items())
    held = sum(row["bytes_per_device"].values()) if "bytes_per_device" in row else row["resident_bytes"]
    memory = f"{held / 1e9:.1f} of {row['memory'] / 1e9:.0f}"
    unit = "tiles" if row["job"]["kind"] == "encode" else "tokens"
    speed = f"{row[f'{unit}_per_second']:,.0f}" if f"{unit}_per_second" in row else "?"
    note = row.get("bound", "") + ("" if row["compiled"] else " (not compiled)")
    fits = "yes" if row["fits"] else "no"
    cells = row["topology"], row["job"]["kind"], fits, mesh, memory, speed, f"{unit}/s", note
    return _COLUMNS.format(*cells).rstrip()
