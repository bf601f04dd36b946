"""What a run tells: a live view in a terminal or plain lines elsewhere, JSON lines always, TensorBoard on request.

All of it is about the whole step; data counts of streams that only other processes read are taken to be like those
that the first one reads, which alone reports.
"""

from __future__ import annotations

import collections
import datetime
import math
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.progress_bar import ProgressBar
from rich.table import Table

from dsvl2_jax.messages import printable
from dsvl2_jax.runtime.console import PrintableConsole
from dsvl2_jax.runtime.hardware import peak_flops
from dsvl2_jax.train.flops import StepFlops
from dsvl2_jax.train.log.run_log import Line, RunLog
from dsvl2_jax.train.optimizer import learning_rate
from dsvl2_jax.train.settings.schema import Settings

if TYPE_CHECKING:
    from dsvl2_jax.train.data.pipeline import DataStats
    from dsvl2_jax.train.objectives.contrastive import ContrastiveMetrics
    from dsvl2_jax.train.objectives.language import LanguageMetrics

TENSORBOARD_NAME = "tensorboard"

_RECENT = 20  # steps over which speed is averaged for people
_COUNTED = ("samples", "tokens", "tiles")
# What an objective may report, of a step and of a validation or of a step alone.
_MEASURES = ("loss", "text_loss", "image_loss", "accuracy")
_OF_STEPS = ("balance_loss", "scale", "bias")


class Report:
    """The report of one run, from `event` "start" or "resume" on. A context manager."""

    def __init__(
        self,
        run_directory: str | Path,
        settings: Settings,
        *,
        devices: int,
        flops: StepFlops | None,
        parts: float = 1,
        console: Console | None = None,
    ):
        """``devices`` share the work of ``flops`` (None: no MFU). ``console``: standard error when not given.

        ``parts``: the data counts given are those of one part of this many.
        """
        self._settings = settings
        self._directory = Path(run_directory)
        self._active = jax.process_index() == 0
        self._devices = devices
        self._flops = flops
        self._parts = parts
        self._peak = peak_flops(jax.devices()[0].device_kind)
        self._schedule = learning_rate(settings.optimizer, settings.run.steps)
        self._rates = sorted({rule.lr_multiplier for rule in settings.stage.parameters if rule.train}, reverse=True)
        self._log = RunLog(self._directory)
        self._board: Any = None
        self._console = console or PrintableConsole(stderr=True)
        self._live: Live | None = None
        self._begun = time.monotonic()
        self._first_step: tuple[int, float] | None = None  # number and time of the first step of this process
        self._recent: collections.deque[Line] = collections.deque(maxlen=_RECENT)
        self._counts: dict[str, int] | None = dict.fromkeys(_COUNTED, 0)  # of the data, up to the last step
        self._validation: Line | None = None
        self._skipped: Mapping[str, int] = {}

    def __enter__(self) -> Report:
        return self

    def __exit__(self, *unused: object) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None
        if self._board is not None:
            self._board.close()
        self._log.close()

    def event(self, kind: str, step: int, **fields: Any) -> None:
        """Logs what is no step: "start" and "resume" (of a run, at a step), "checkpoint", "stop".

        Start and resume cut the log back to their step, so that no step appears twice.

        Raises:
          RunError: the log cannot be written.
        """
        if not self._active:
            return
        if kind in ("start", "resume"):
            last = self._log.cut(step)
            self._counts = last.get("data") if last else None if step else dict.fromkeys(_COUNTED, 0)
            if self._settings.run.tensorboard:
                self._open_board(step)
            if self._console.is_terminal:
                self._live = Live(self._view(), console=self._console, refresh_per_second=4)
                self._live.start()
        self._log.write({"kind": kind, "step": step, "time": self._time(), **fields})

    def step(self, step: int, metrics: LanguageMetrics | ContrastiveMetrics, data: DataStats, seconds: float) -> None:
        """Logs and shows a step.

        Args:
          step: its number, from 1.
          metrics: on the host, as numpy.
          data: counts of the data pipeline up to this step.
          seconds: that it took.

        Raises:
          RunError: the log cannot be written.
        """
        if not self._active:
            return
        line = self._line(step, metrics, data, seconds)
        self._log.write(line)
        self._skipped = data.skipped
        self._recent.append(line)
        self._first_step = self._first_step or (step, time.monotonic())
        if self._board is not None:
            self._draw(line)
        if self._live is not None:
            self._live.update(self._view())
        elif step % self._settings.run.log_every == 0 or step == self._settings.run.steps:
            self._print(self._plain(line))

    def validation(self, step: int, **values: float) -> None:
        """Logs and shows a validation: the ``average`` of its batches' metrics (nan where there is none).

        Raises:
          RunError: the log cannot be written.
        """
        if not self._active:
            return
        line = {"kind": "validation", "step": step, "time": self._time(), **values}
        self._log.write(line)
        self._validation = line
        if self._board is not None:
            for name in _MEASURES:
                if math.isfinite(values.get(name, math.nan)):
                    self._board.add_scalar(f"validation/{name}", values[name], step)
        if self._live is not None:
            self._live.update(self._view())
        else:
            self._print(f"step {step}: validation {_losses(line)}")

    def _time(self) -> float:
        return round(time.monotonic() - self._begun, 3)

    def _line(self, step: int, metrics: LanguageMetrics | ContrastiveMetrics, data: DataStats, seconds: float) -> Line:
        counts = {name: getattr(data, name) for name in _COUNTED}
        # After a resume without a log, what one step took of the data is not known.
        step_counts = None if self._counts is None else {name: counts[name] - self._counts[name] for name in _COUNTED}
        self._counts = counts
        tokens = int(metrics.tokens)
        samples, tiles = (
            (round(step_counts[name] * self._parts) for name in ("samples", "tiles")) if step_counts else (None, None)
        )
        mfu = None
        if self._flops and self._peak and step_counts and seconds > 0:
            mfu = self._flops.step(tokens, samples, tiles) / (seconds * self._devices * self._peak)
        return {
            "kind": "step",
            "step": step,
            "time": self._time(),
            **metrics.logged(),
            "gradient_norm": float(metrics.gradient_norm),
            "learning_rate": float(self._schedule(step - 1)),
            "tokens": tokens,
            "tokens_per_second": tokens / seconds if seconds > 0 else None,
            "mfu": mfu,
            "samples": samples,
            "tiles": tiles,
            "step_seconds": seconds,
            "skipped": data.skipped_samples,
            "padding_share": data.padding_share,
            "tile_padding_share": data.tile_padding_share,
            "data": counts,
        }

    def _left(self) -> str:
        """Time left, at the pace since the first step of this process, which alone compiles."""
        if not self._recent or self._first_step is None or self._recent[-1]["step"] == self._first_step[0]:
            return "–"
        done, (first, since) = self._recent[-1]["step"], self._first_step
        seconds = (time.monotonic() - since) / (done - first) * (self._settings.run.steps - done)
        return str(datetime.timedelta(seconds=round(seconds)))

    def _speed(self) -> tuple[str, str, str]:
        """Tokens per second, MFU and seconds per step of the recent steps, without the first one's compilation."""
        recent = [line for line in self._recent if not self._first_step or line["step"] != self._first_step[0]]
        recent = recent or list(self._recent)
        seconds = sum(line["step_seconds"] for line in recent)
        if not seconds:
            return "–", "–", "–"
        rate = f"{sum(line['tokens'] for line in recent) / seconds:,.0f}"
        known = [line for line in recent if line["mfu"] is not None]
        busy = sum(line["step_seconds"] for line in known)
        mfu = f"{sum(line['mfu'] * line['step_seconds'] for line in known) / busy:.1%}" if busy else "–"
        return rate, mfu, f"{seconds / len(recent):.2f}"

    def _learning_rates(self, line: Line) -> str:
        rate = line["learning_rate"]
        others = [f"×{factor:g}: {factor * rate:.3g}" for factor in self._rates if factor != 1]
        return f"{rate:.3g}" + (f" ({', '.join(others)})" if others else "")

    def _plain(self, line: Line) -> str:
        rate, mfu, seconds = self._speed()
        parts = [
            f"step {line['step']}/{self._settings.run.steps}: {_losses(line)}",
            f"{rate} tokens/s" + (f", MFU {mfu}" if mfu != "–" else "") + f", {seconds} s/step",
            f"gradient norm {line['gradient_norm']:.3g}",
            f"learning rate {self._learning_rates(line)}",
            *([f"max/mean load {_balance(line)}"] if "load_max_over_mean" in line else []),
            f"tiles {_count(line['tiles'])}",
            f"padding {line['padding_share']:.1%}",
        ]
        if line["skipped"]:
            parts.append(f"skipped {line['skipped']:,}")
        return "; ".join([*parts, f"left {self._left()}"])

    def _print(self, text: str) -> None:
        print(printable(text), file=self._console.file or sys.stderr, flush=True)

    def _view(self) -> Table:
        steps = self._settings.run.steps
        table = Table.grid(padding=(0, 2))
        table.add_column(style="bold")
        table.add_column()
        if not self._recent:
            table.add_row(escape(str(self._directory)), "compiling the first step …")
            return table
        line = self._recent[-1]
        rate, mfu, seconds = self._speed()
        header = Table.grid(padding=(0, 2))
        header.add_row(
            f"{line['step']:,}/{steps:,}", ProgressBar(steps, line["step"], width=30), f"{self._left()} left"
        )
        skipped = ", ".join(f"{count:,} {escape(reason)}" for reason, count in self._skipped.items() if count)
        tile_padding = f", {line['tile_padding_share']:.1%} of tile places" if line["tiles"] else ""
        table.add_row("step", header)
        table.add_row("loss", _losses(line).removeprefix("loss "))
        if self._validation is not None:
            losses = _losses(self._validation).removeprefix("loss ")
            table.add_row("validation", f"{losses} at step {self._validation['step']:,}")
        table.add_row("speed", f"{rate} tokens/s, {seconds} s/step, MFU {mfu}")
        if "load_max_over_mean" in line:
            table.add_row("max/mean load", f"{_balance(line)}, balance loss {line['balance_loss']:.3g}")
        if "scale" in line:
            table.add_row("sigmoid", f"scale {line['scale']:.4g}, bias {line['bias']:.4g}")
        table.add_row("gradient norm", f"{line['gradient_norm']:.4g}")
        table.add_row("learning rate", self._learning_rates(line))
        table.add_row(
            "data", f"{line['tokens']:,} tokens, {_count(line['tiles'])} tiles in {_count(line['samples'])} samples"
        )
        table.add_row("padding", f"{line['padding_share']:.1%} of tokens{tile_padding}")
        table.add_row("skipped", skipped or "no samples")
        return table

    def _open_board(self, step: int) -> None:
        from tensorboardX import SummaryWriter

        self._board = SummaryWriter(str(self._directory / TENSORBOARD_NAME), purge_step=step + 1)

    def _draw(self, line: Line) -> None:
        step = line["step"]
        scalars = {
            **{f"train/{name}": line[name] for name in (*_MEASURES, *_OF_STEPS) if name in line},
            "train/gradient_norm": line["gradient_norm"],
            "speed/tokens_per_second": line["tokens_per_second"],
            "speed/mfu": line["mfu"],
            "speed/step_seconds": line["step_seconds"],
            "data/tiles": line["tiles"],
            "data/skipped": line["skipped"],
            "data/padding_share": line["padding_share"],
            "data/tile_padding_share": line["tile_padding_share"],
        }
        scalars |= {f"learning_rate/rate_{rate:g}": rate * line["learning_rate"] for rate in self._rates}
        scalars |= {
            f"load_max_over_mean/moe_{i + 1}": value for i, value in enumerate(line.get("load_max_over_mean", ()))
        }
        for name, value in scalars.items():
            if value is not None and math.isfinite(value):
                self._board.add_scalar(name, value, step)


def _losses(line: Line) -> str:
    parts = [
        f"{name} {line[key]:.4f}"
        for name, key in (("text", "text_loss"), ("vision-language", "image_loss"), ("accuracy", "accuracy"))
        if math.isfinite(line.get(key, math.nan))
    ]
    return f"loss {line['loss']:.4f}" + (f" ({', '.join(parts)})" if parts else "")


def _balance(line: Line) -> str:
    """The worst MoE layer's load of its busiest expert over the mean, and all layers' mean of that."""
    known = [(value, i + 1) for i, value in enumerate(line["load_max_over_mean"]) if math.isfinite(value)]
    if not known:
        return "–"
    worst, layer = max(known)
    return f"{worst:.2f} (MoE layer {layer}), {sum(value for value, _ in known) / len(known):.2f} on average"


def _count(value: int | None) -> str:
    return "–" if value is None else f"{value:,}"
