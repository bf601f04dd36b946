"""What `dsvl2 bench model` says: JSON lines, or lines for people. Tested in tests/apps/bench/test_model.py."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from dsvl2_jax.apps.plan.scopes import scope_lines

HEADER = (
    f"{'':34}{'time':>12}{'speed':>20}{'limit':>8}{'reached':>9}{'FLOPs':>8}{'bytes':>8}{'launches':>10}{'sorts':>7}"
)


class Report:
    """Prints each figure as soon as it is there."""

    def __init__(self, as_json: bool):
        self._json = as_json
        self._headed = False

    def add(self, row: Mapping[str, Any]) -> None:
        """``row``: has "job", or is the first one, about the run."""
        if self._json:
            print(json.dumps({name: _rounded(value) for name, value in row.items()}), flush=True)
            return
        for line in self._lines(row):
            print(line, flush=True)

    def _lines(self, row: Mapping[str, Any]) -> list[str]:
        job = row.get("job")
        if job is None:
            return [str(row["about"])]
        if job == "ceilings":
            return [
                f"dense product {row['product_flops'] / 1e12:.3g} TFLOP/s, copy {row['copy_bandwidth'] / 1e9:.4g} GB/s"
            ]
        if job == "compiled":
            return [f"compiled in {row['compile_seconds']:.1f} s: {row['program']}"]
        name = _name(row)
        if job == "check":
            distances = ", ".join(f"{output} {distance:.1e}" for output, distance in row["distances"].items())
            return [f"PyTorch {row['torch']} gives the same on two layers with the same weights: {distances}"]
        if "error" in row or "skipped" in row:
            return [f"{name:34}  {'failed: ' + row['error'] if 'error' in row else 'left out: ' + row['skipped']}"]
        if "scopes" in row:
            return scope_lines(name, row["scopes"])
        if job == "kernel":
            return [_kernel_line(name, row)]
        return self._job_lines(name, row)

    def _job_lines(self, name: str, row: Mapping[str, Any]) -> list[str]:
        head = [] if self._headed else [HEADER]
        self._headed = True
        made = next(key for key in row if key.endswith("_per_second"))
        speed = f"{row[made]:,.4g} {made.removesuffix('_per_second')}/s"
        line = f"{name:34}{_time(row['seconds']):>12}{speed:>20}"
        line += f"{_share(row.get('roofline_share')):>8}{_share(row.get('ceiling_share')):>9}"
        if "program_flops" in row:
            line += f"{_ratio(row['flops_ratio']):>8}{_ratio(row['bytes_ratio']):>8}"
            line += f"{row['launches']:>10}{row['sorts']:>7}"
        lines = [*head, line]
        if "torch_seconds" in row:
            theirs = f"PyTorch {_time(row['torch_seconds'])} ({row['torch_setting']})"
            lines.append(f"{'':34}{theirs}: {row['speedup']:.3g} × as fast as PyTorch")
        return lines


def _name(row: Mapping[str, Any]) -> str:
    side = f"{row['side']}: " if row.get("side") else ""
    sizes = " ".join(f"{key} {value}" for key, value in row["sizes"].items())
    return f"{side}{row.get('kernel', row['job'])} {sizes}"


def _kernel_line(name: str, row: Mapping[str, Any]) -> str:
    return (
        f"{name:58}{_time(row['seconds']):>12}{row['flops_per_second'] / 1e12:>10.3g} TFLOP/s"
        f"{row['bytes_per_second'] / 1e9:>9.4g} GB/s  error {row['error_of_float32']:.1e}"
    )


def _time(seconds: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.4g} {unit}"
    return f"{seconds * 1e6:.4g} µs"


def _share(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.3g} %"


def _ratio(ratio: float | None) -> str:
    return "–" if ratio is None else f"{ratio:.3g} ×"


def _rounded(value: Any) -> Any:
    """Numbers as JSON has them, with six digits."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, Mapping):
        return {name: _rounded(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(part) for part in value]
    return value
