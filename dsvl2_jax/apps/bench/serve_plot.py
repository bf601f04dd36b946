"""The figures of `dsvl2 bench serve` as one PNG.

Tested in tests/apps/bench/test_serve.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from dsvl2_jax.apps.bench.serve_figures import Findings
from dsvl2_jax.checkpoint.staging import replacing
from dsvl2_jax.errors import UsageError

# Told apart without colour vision too (Okabe and Ito).
_BLUE, _ORANGE = "#0072b2", "#d55e00"


def check_plot(out: Path) -> None:
    """Raises UsageError when nothing can be drawn there: told before minutes of measuring, not after."""
    if not out.absolute().parent.is_dir():
        raise UsageError(f"--plot {out}: there is no folder {out.absolute().parent}.")
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError:
        raise UsageError("--plot: needs matplotlib, which is not installed: pip install matplotlib") from None


def plot(findings: Findings, out: Path) -> None:
    """Draws what was measured; parts that were not have no panel. Raises UsageError when it cannot be written."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    series = findings.series
    panels = [draw for known, draw in _PANELS if known in series or any(name.startswith(known) for name in series)]
    panels = [*panels, _draw_aims] if any(figure.aim for figure in findings.figures) else panels
    columns = 2 if len(panels) > 1 else 1
    rows = max(1, -(-len(panels) // columns))
    figure = Figure(figsize=(6 * columns, 3.4 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis, draw in zip(axes, panels, strict=False):
        axis.grid(alpha=0.25)
        draw(axis, findings)
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    try:
        with replacing(out) as new:
            figure.savefig(new, dpi=130, format="png")
    except OSError as error:
        raise UsageError(f"--plot {out}: cannot be written: {error.strerror or error}.") from error


def _draw_throughput(axis: Any, findings: Findings) -> None:
    names = [str(clients) for clients in findings.series["clients"]]
    bars = axis.bar(names, findings.series["tokens/s"], color=_BLUE)
    axis.bar_label(bars, fmt="{:,.0f}")
    axis.margins(y=0.15)
    axis.set(title="Output tokens per second", xlabel="clients")


def _draw_half_load(axis: Any, findings: Findings) -> None:
    for kind, colour in (("text", _BLUE), ("picture", _ORANGE)):
        name = f"half load, {kind}"
        if name in findings.series:
            _shares(axis, findings.series[name], colour, kind)
            axis.axvline(1000 * findings.series[f"{name}, allowed"][0], color=colour, linestyle=":")
    axis.set(title="Time to first token at half load (dotted: allowed)", xlabel="ms", ylabel="share of requests")
    axis.legend()


def _draw_gaps(axis: Any, findings: Findings) -> None:
    _shares(axis, findings.series["gaps"], _BLUE, "")
    axis.axvline(1000 * findings.series["gaps, allowed"][0], color=_BLUE, linestyle=":")
    axis.set(title="Gaps between tokens while long prompts come", xlabel="ms", ylabel="share of gaps")


def _draw_turns(axis: Any, findings: Findings) -> None:
    for name, colour in (("first turn", _BLUE), ("second turn", _ORANGE)):
        values = 1000 * np.array(findings.series[name])
        axis.plot(np.arange(1, len(values) + 1), values, marker="o", color=colour, label=name)
    axis.set(title="A picture of nine tiles: time to first token", xlabel="conversation", ylabel="ms")
    axis.set_ylim(bottom=0)
    axis.set_xticks(np.arange(1, len(findings.series["first turn"]) + 1))
    axis.legend()


def _draw_memory(axis: Any, findings: Findings) -> None:
    when, sizes = np.array(findings.series["memory"]).T
    axis.plot(when / 60, sizes / 1e6, color=_BLUE)
    axis.set(title="Resident memory of the server", xlabel="minutes of mixed load", ylabel="MB")
    axis.set_ylim(0, 1.1 * sizes.max() / 1e6)


def _draw_soak(axis: Any, findings: Findings) -> None:
    _shares(axis, findings.series["soak"], _BLUE, "")
    axis.set(title="Time to first token under mixed load", xlabel="ms", ylabel="share of requests")


def _draw_aims(axis: Any, findings: Findings) -> None:
    """Each figure over its aim: bars that stay left of the line reach it."""
    aimed = [figure for figure in findings.figures if figure.aim]
    shares = [f.aim / f.value if f.at_least and f.value else f.value / f.aim for f in aimed]
    colours = [_BLUE if figure.reached else _ORANGE for figure in aimed]
    axis.barh(range(len(aimed)), shares, color=colours, alpha=0.5)
    for place, figure in enumerate(aimed):  # names within the panel: beside it they would take half of its width
        axis.text(0.02, place, figure.what, va="center", fontsize=7, transform=axis.get_yaxis_transform())
    axis.axvline(1.0, color="black", linewidth=1)
    axis.set_yticks([])
    axis.invert_yaxis()
    axis.set(title="Figure over aim (left of the line: reached)")


def _shares(axis: Any, seconds: list[float], colour: str, label: str) -> None:
    """The share of values up to each value."""
    values = 1000 * np.sort(seconds)
    axis.step(values, np.arange(1, len(values) + 1) / len(values), where="post", color=colour, label=label)


_PANELS = (
    ("clients", _draw_throughput),
    ("half load", _draw_half_load),
    ("gaps", _draw_gaps),
    ("first turn", _draw_turns),
    ("memory", _draw_memory),
    ("soak", _draw_soak),
)
