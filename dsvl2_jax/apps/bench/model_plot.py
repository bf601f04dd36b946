"""The shares of `dsvl2 bench model` as one PNG. Tested in tests/apps/bench/test_model.py."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dsvl2_jax.checkpoint.staging import replacing
from dsvl2_jax.errors import UsageError

# Told apart without colour vision too (Okabe and Ito).
_BLUE, _ORANGE = "#0072b2", "#d55e00"


def plot(rows: Sequence[Mapping[str, Any]], title: str, out: Path) -> None:
    """Draws how near each program came to the limit, and PyTorch's time beside ours where it was measured.

    Raises:
      UsageError: the file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    compared = [row for row in rows if "speedup" in row]
    figure = Figure(figsize=(7 + 5 * bool(compared), 1.5 + 0.45 * len(rows)), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    axes = figure.subplots(1, 1 + bool(compared), squeeze=False).ravel()
    names = [" ".join([row["job"], *(f"{size} {name}" for name, size in row["sizes"].items())]) for row in rows]
    at, height = np.arange(len(rows)), 0.38
    kinds = ("ceiling_share", "of product and copy", _BLUE), ("roofline_share", "of the vendor's peaks", _ORANGE)
    for shift, (kind, label, colour) in zip((-0.5, 0.5), kinds, strict=True):
        shares = [100 * (row[kind] or 0) for row in rows]
        if any(shares):
            bars = axes[0].barh(at + shift * height, shares, height, label=label, color=colour)
            axes[0].bar_label(bars, fmt="%.0f", padding=2)
    axes[0].set_yticks(at, names)
    axes[0].set_xlabel("least time the work needs, % of the time it took")
    if compared:
        bars = axes[1].barh(
            [at[i] for i, row in enumerate(rows) if "speedup" in row], [row["speedup"] for row in compared], color=_BLUE
        )
        axes[1].bar_label(bars, fmt="%.2f ×", padding=2)
        axes[1].axvline(1, color="black", linewidth=0.8)
        axes[1].set_yticks(at, [])
        axes[1].set_ylim(axes[0].get_ylim())
        axes[1].set_xlabel("× as fast as PyTorch")
    for axis in axes:
        axis.invert_yaxis()
        axis.margins(x=0.12)
        axis.grid(axis="x", alpha=0.25)
    figure.legend(loc="outside lower left", ncols=2, frameon=False)
    try:
        with replacing(out) as new:
            figure.savefig(new, dpi=130, format="png")
    except OSError as error:
        raise UsageError(f"--plot {out}: cannot be written: {error.strerror or error}.") from error
