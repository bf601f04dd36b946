"""``dsvl2 plot``: loss, expert balance, retrieval accuracy and throughput of one or several runs, from their logs, as
one PNG."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dsvl2_jax.checkpoint.remote import is_remote, local_file, path_of
from dsvl2_jax.checkpoint.staging import replacing
from dsvl2_jax.errors import RunError, UsageError
from dsvl2_jax.train.log.run_log import LOG_NAME, Line, read

# Told apart without colour vision too (Okabe and Ito).
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")

_FEW = 4  # runs whose curves are all named within a panel
_SMOOTH_FROM = 60  # steps; shorter runs are drawn as they are


@dataclasses.dataclass(frozen=True)
class Curves:
    """What a log says, by step. Values that it does not have are nan."""

    name: str
    steps: np.ndarray  # i64[S]
    losses: dict[str, np.ndarray]  # f64[S] by kind: loss, text_loss, image_loss
    balance: np.ndarray  # f64[S, L], load of the busiest expert over the mean, of each MoE layer
    accuracy: np.ndarray  # f64[S], of contrastive training
    tokens_per_second: np.ndarray  # f64[S]
    mfu: np.ndarray  # f64[S]
    validation_steps: np.ndarray  # i64[V]
    validation_loss: np.ndarray  # f64[V]
    validation_accuracy: np.ndarray  # f64[V]

    @property
    def contrastive(self) -> bool:
        return bool(np.isfinite(self.accuracy).any())


def plot(runs: Sequence[str | Path], out: str | Path) -> None:
    """Draws the runs into the PNG ``out``.

    Raises:
      UsageError: no run is given, or ``out`` is no .png.
      RunError: a directory has no log, or one without steps; or the picture cannot be written.
    """
    out = Path(out)
    if not runs:
        raise UsageError("plot needs the directory of at least one run.")
    if out.suffix.lower() != ".png":
        raise UsageError(f"--out {out}: plots are written as PNG; give a name that ends in .png.")
    paths = [path_of(run) for run in runs]
    names = [(path if is_remote(path) else path.resolve()).name for path in paths]
    unique = len(set(names)) == len(names)
    figure = draw([curves(path, name if unique else str(path)) for path, name in zip(paths, names, strict=True)])
    try:
        with replacing(out) as new:
            figure.savefig(new, dpi=130, format="png")
    except OSError as error:
        raise RunError(f"{out}: cannot be written: {error.strerror or error}.") from error


def curves(directory: Path, name: str) -> Curves:
    """Reads the log of a run's directory. Raises RunError if there is none, or no step in it."""
    log = local_file(directory / LOG_NAME)
    if not log.is_file():
        what = "has no log.jsonl, so it is not the directory of a run" if directory.is_dir() else "no such directory"
        raise RunError(f"{directory}: {what}. Give the run.directory of `dsvl2 train`.")
    lines = list(read(log))
    steps = [line for line in lines if line["kind"] == "step"]
    if not steps:
        raise RunError(f"{log}: no step is logged yet; wait until the run has made one.")
    validations = [line for line in lines if line["kind"] == "validation"]
    # A process compiles during its first step, which says nothing about speed.
    compiling, fresh = [], False
    for line in lines:
        if line["kind"] == "step":
            compiling.append(fresh)
        fresh = line["kind"] in ("start", "resume") or (fresh and line["kind"] != "step")

    def column(lines: list[Line], key: str) -> np.ndarray:
        return np.array([line.get(key) for line in lines], np.float64)  # None becomes nan

    def speed(key: str) -> np.ndarray:
        return np.where(compiling, np.nan, column(steps, key)) if len(steps) > 1 else column(steps, key)

    return Curves(
        name,
        np.array([line["step"] for line in steps]),
        {key: column(steps, key) for key in ("loss", "text_loss", "image_loss")},
        np.array([line.get("load_max_over_mean", ()) for line in steps], np.float64),
        column(steps, "accuracy"),
        speed("tokens_per_second"),
        speed("mfu"),
        np.array([line["step"] for line in validations], np.int64),
        column(validations, "loss"),
        column(validations, "accuracy"),
    )


def draw(runs: Sequence[Curves]) -> Any:
    """A matplotlib figure with panels over steps: loss, balance, accuracy, throughput and MFU, those that are known."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    several, many = len(runs) > 1, len(runs) > _FEW
    kinds = {"loss": True, "balance": not all(run.contrastive for run in runs)}
    kinds["accuracy"] = any(run.contrastive for run in runs)
    kinds |= {"speed": True, "mfu": any(np.isfinite(run.mfu).any() for run in runs)}
    shown = [name for name, known in kinds.items() if known]
    figure = Figure(figsize=(9, 2.5 + 2.5 * len(shown)), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(shown), 1, sharex=True)
    by_name = dict(zip(shown, panels, strict=True))
    for run, colour in zip(runs, _colours(len(runs)), strict=True):
        label = run.name if several else None
        _draw_loss(by_name["loss"], run, colour, label)
        if "balance" in by_name:
            _draw_balance(by_name["balance"], run, colour, label)
        if "accuracy" in by_name:
            _line(by_name["accuracy"], run.steps, run.accuracy, colour, label or "training")
            _draw_validation(by_name["accuracy"], run, run.validation_accuracy, colour, label)
        _line(by_name["speed"], run.steps, run.tokens_per_second, colour, label, robust=True)
        if "mfu" in by_name:
            _line(by_name["mfu"], run.steps, run.mfu, colour, label, robust=True)
    # A contrastive loss is counted in images.
    units = [f"nats per {unit}" for unit in ("supervised token", "image") if any(_unit(run) == unit for run in runs)]
    by_name["loss"].set(title="Loss" if several else f"{runs[0].name}: loss", ylabel="\nor ".join(units))
    if "balance" in by_name:
        balance = by_name["balance"]
        balance.axhline(1.0, color="grey", linewidth=1, linestyle=":")
        balance.set(title="Expert balance", ylabel="busiest expert's load over the mean\n(1 = even)")
        balance.set_ylim(bottom=0.9)
    if "accuracy" in by_name:
        title = "Images that find their caption, regions that find their phrase"
        by_name["accuracy"].set(title=title, ylabel="share of the batch", ylim=(0, 1.02))
        by_name["accuracy"].yaxis.set_major_formatter(PercentFormatter(1.0))
    by_name["speed"].set(title="Throughput", ylabel="tokens per second")
    by_name["speed"].set_ylim(bottom=0, top=1.15 * _high([run.tokens_per_second for run in runs]))
    by_name["speed"].yaxis.set_major_formatter("{x:,.0f}")
    if "mfu" in by_name:
        by_name["mfu"].set(title="Model FLOPs utilisation", ylabel="share of the devices' bf16 peak")
        by_name["mfu"].set_ylim(bottom=0, top=1.15 * _high([run.mfu for run in runs]))
        by_name["mfu"].yaxis.set_major_formatter(PercentFormatter(1.0))
    panels[-1].set_xlabel("step")
    for panel in panels:
        panel.grid(alpha=0.25)
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
        panel.tick_params(labelbottom=True)
        panel.spines[["top", "right"]].set_visible(False)
        if panel.get_legend_handles_labels()[0]:
            # "best" looks at every point of every curve.
            falls = panel in (by_name["loss"], by_name.get("balance"))
            legend: dict[str, Any] = {"loc": "upper right" if falls else "lower right"}
            if many:  # beside the panel; a line for each run, whose other lines have its colour
                handles = {line.get_color(): line for line in reversed(panel.get_legend_handles_labels()[0])}
                legend = {"handles": [*handles.values()][::-1], "loc": "upper left", "bbox_to_anchor": (1.0, 1.02)}
            panel.legend(frameon=False, fontsize="small", **legend)
    return figure


def _draw_loss(axes: Any, run: Curves, colour: str, label: str | None) -> None:
    train = "training" if label is None else label
    if label is None:
        for key, name, other in (("text_loss", "text", COLOURS[2]), ("image_loss", "vision-language", COLOURS[3])):
            # Where all samples are of one kind, its curve is the total.
            if np.isfinite(run.losses[key]).any() and not _same(run.losses[key], run.losses["loss"]):
                _line(axes, run.steps, run.losses[key], other, f"training, {name}")
    _line(axes, run.steps, run.losses["loss"], colour, train)
    _draw_validation(axes, run, run.validation_loss, colour, label)


def _draw_validation(axes: Any, run: Curves, values: np.ndarray, colour: str, label: str | None) -> None:
    if np.isfinite(values).any():
        name = "validation" if label is None else f"{label}, validation"
        marker = {"marker": "o", "markersize": 4, "linestyle": "--", "linewidth": 1}
        dark = COLOURS[1] if label is None else colour
        axes.plot(run.validation_steps, values, color=dark, label=name, **marker)


def _unit(run: Curves) -> str:
    return "image" if run.contrastive else "supervised token"


def _draw_balance(axes: Any, run: Curves, colour: str, label: str | None) -> None:
    known = np.isfinite(run.balance).any(1) if run.balance.size else np.zeros(len(run.steps), bool)
    if not known.any():
        return
    steps, layers = run.steps[known], run.balance[known]
    prefix = "" if label is None else f"{label}, "
    single = layers.shape[1] == 1
    if not single:
        _line(axes, steps, np.nanmax(layers, 1), colour, f"{prefix}worst layer", style="-")
    _line(
        axes, steps, np.nanmean(layers, 1), colour, f"{prefix}{'MoE layer' if single else 'mean of layers'}", style="--"
    )


def _line(
    axes: Any,
    steps: np.ndarray,
    values: np.ndarray,
    colour: str,
    label: str | None,
    *,
    style: str = "-",
    robust: bool = False,
) -> None:
    """A curve; of a long run its running mean (median if robust), over the values themselves in a faint tone."""
    finite = np.isfinite(values)
    steps, values = steps[finite], values[finite]
    if not len(values):
        return
    if len(values) >= _SMOOTH_FROM:
        axes.plot(steps, values, color=colour, alpha=0.22, linewidth=0.8)
        values = _running_median(values) if robust else _running_mean(values)
    marker = "." if len(values) == 1 else None
    axes.plot(steps, values, color=colour, label=label, linewidth=1.6, linestyle=style, marker=marker)


def _half_window(count: int) -> int:
    return max(count // 80, 2)


def _running_mean(values: np.ndarray) -> np.ndarray:
    """The mean over a fortieth of the values; at both ends over those of them that exist."""
    half, steps = _half_window(len(values)), np.arange(len(values))
    first, end = np.maximum(steps - half, 0), np.minimum(steps + half + 1, len(values))
    sums = np.concatenate([[0.0], np.cumsum(values)])
    return (sums[end] - sums[first]) / (end - first)


def _running_median(values: np.ndarray) -> np.ndarray:
    half = min(_half_window(len(values)), 50)
    padded = np.pad(values, half, constant_values=np.nan)
    return np.nanmedian(np.lib.stride_tricks.sliding_window_view(padded, 2 * half + 1), axis=1)


def _high(columns: Sequence[np.ndarray]) -> float:
    """The largest value that is no outlier; at least a little."""
    values = np.concatenate(columns)
    values = values[np.isfinite(values)]
    return max(float(np.quantile(values, 0.995)), 1e-9) if len(values) else 1.0


def _same(a: np.ndarray, b: np.ndarray) -> bool:
    return bool(np.array_equal(a, b, equal_nan=True))


def _colours(count: int) -> list[Any]:
    if count <= len(COLOURS):
        return list(COLOURS[:count])
    from matplotlib import colormaps

    return [tuple(map(float, colour)) for colour in colormaps["turbo"](np.linspace(0.05, 0.95, count))]
