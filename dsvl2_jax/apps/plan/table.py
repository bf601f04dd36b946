"""`dsvl2 plan MODEL` without a topology: what fits where, and how fast it can be there, as text and as CSV.

Tested in tests/apps/plan/test_planner.py.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from dsvl2_jax.apps.plan.job import Job
from dsvl2_jax.apps.plan.saved_plans import saved_plan
from dsvl2_jax.checkpoint.staging import write_text
from dsvl2_jax.errors import UsageError
from dsvl2_jax.json_files import read_text
from dsvl2_jax.model.config import Config
from dsvl2_jax.model.released import SIZES
from dsvl2_jax.runtime.hardware import topology

TABLE_TOPOLOGIES = (
    *("v5e-4", "v5e-8", "v5e-16", "v5p-8", "v5p-16", "v6e-4", "v6e-8", "v6e-16", "tpu7x-8"),
    *(f"{kind}-{count}" for kind in ("h100", "h200") for count in (1, 2, 4, 8)),
)
_COLUMNS = "{:<9} {:<9} {:<5} {:<28} {:>16} {:>13} {:<8} {}"
HEADER = _COLUMNS.format("topology", "job", "fits", "mesh", "GB a device", "at most", "", "bound by").rstrip()
CSV_COLUMNS = (
    "model", "topology", "job", "batch", "sequence", "mesh", "fits", "compiled", "gb_per_device", "gb_of_memory",
    "per_second", "unit", "bound_by", "flops_ratio", "bytes_ratio",
)  # fmt: skip
_KEY = CSV_COLUMNS[:5]  # what tells the rows of a CSV apart


def table_rows(
    config: Config, jobs: list[Job], say: Callable[[str], None], *, cache: bool = True
) -> Iterator[dict[str, Any]]:
    """A plan for every topology and job, each as soon as it is there."""
    every = [(topology(name), job) for name in TABLE_TOPOLOGIES for job in jobs]
    for number, (place, job) in enumerate(every, start=1):
        what = f"{number} of {len(every)}: {job.kind} on {place.name}"
        yield saved_plan(config, job, place, None, lambda doing, what=what: say(f"{what}: {doing}"), cache=cache)


def table_line(plan: dict[str, Any]) -> str:
    """A row for people. What was not compiled is marked: it is what arithmetic says, without temporaries."""
    row = csv_row("", plan)
    memory = f"{row['gb_per_device']} of {row['gb_of_memory']}"
    speed = f"{int(row['per_second']):,}" if row["per_second"] else "?"
    note = row["bound_by"] + ("" if plan["compiled"] else " (not compiled)")
    cells = row["topology"], row["job"], row["fits"], row["mesh"], memory, speed, f"{row['unit']}/s", note
    return _COLUMNS.format(*cells).rstrip()


def csv_row(model: str, plan: dict[str, Any]) -> dict[str, str]:
    """`CSV_COLUMNS` of a plan (`dsvl2_jax.apps.plan.planner.plan`), as text; what the plan does not have is empty."""
    unit = "tiles" if plan["job"]["kind"] == "encode" else "tokens"
    in_memory = sum(plan["bytes_per_device"].values()) if "bytes_per_device" in plan else plan["resident_bytes"]
    return {
        "model": model,
        "topology": plan["topology"],
        "job": plan["job"]["kind"],
        "batch": str(plan["job"]["batch"]),
        "sequence": str(plan["job"]["sequence"]),
        "mesh": ",".join(f"{axis}={size}" for axis, size in plan["mesh"].items()),
        "fits": "yes" if plan["fits"] else "no",
        "compiled": "yes" if plan["compiled"] else "no",
        "gb_per_device": f"{in_memory / 1e9:.1f}",
        "gb_of_memory": f"{plan['memory'] / 1e9:.0f}",
        "per_second": f"{plan[f'{unit}_per_second']:.0f}" if f"{unit}_per_second" in plan else "",
        "unit": unit,
        "bound_by": plan.get("bound", ""),
        "flops_ratio": f"{plan['flops_ratio']:.2f}" if "flops_ratio" in plan else "",
        "bytes_ratio": f"{plan['bytes_ratio']:.2f}" if "bytes_ratio" in plan else "",
    }


def update_csv(file: Path, rows: list[dict[str, str]]) -> None:
    """Puts rows into a CSV file, in the place of older ones of the same model, topology and job; the others stay.

    A row that could not be compiled here replaces none that was compiled: one machine has the compiler for TPUs,
    another that for GPUs. The file is replaced whole, so that an interruption leaves the older one.

    Raises:
      UsageError: the file is no such table, or cannot be written.
    """
    table = {_key(row): row for row in _read_csv(file)}
    for row in rows:
        before = table.get(_key(row))
        if before is None or row["compiled"] == "yes" or before["compiled"] == "no":
            table[_key(row)] = row
    text = io.StringIO()
    writer = csv.DictWriter(text, CSV_COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(sorted(table.values(), key=_position))
    try:
        write_text(file, text.getvalue())
    except OSError as error:
        raise UsageError(f"--csv {file}: cannot be written ({error.strerror}).") from None


def _read_csv(file: Path) -> list[dict[str, str]]:
    if not file.exists():
        return []
    try:
        reader = csv.DictReader(io.StringIO(read_text(file, UsageError, "Name a new file with --csv.")))
        rows = list(reader)
    except (ValueError, csv.Error) as error:
        raise UsageError(f"--csv {file}: cannot be read ({error}).") from None
    columns = tuple(reader.fieldnames or ())
    if columns != CSV_COLUMNS:
        raise UsageError(
            f"--csv {file}: found columns {','.join(columns)!r}, expected {','.join(CSV_COLUMNS)!r}; name a new file, "
            "or one that this command has written."
        )
    return rows


def _key(row: dict[str, str]) -> tuple[str, ...]:
    return tuple(row[column] for column in _KEY)


def _position(row: dict[str, str]) -> tuple[Any, ...]:
    """Where a row stands: models by size, topologies and jobs as in the table, others behind them."""

    def rank(value: str, order: tuple[str, ...]) -> tuple[int, str]:
        return (order.index(value), "") if value in order else (len(order), value)

    jobs = ("prefill", "decode", "encode")
    return (
        rank(row["model"], SIZES),
        rank(row["topology"], TABLE_TOPOLOGIES),
        rank(row["job"], jobs),
        int(row["batch"]),
        int(row["sequence"]),
    )
