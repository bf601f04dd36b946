"""The progress bar of every long command, on standard error."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Literal

from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.text import Text

from dsvl2_jax.runtime.console import PrintableConsole


class _ItemSpeedColumn(ProgressColumn):
    """Items a second, as rich's own column has it for bytes."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:.1f}/s")


@contextlib.contextmanager
def progress(
    what: str, total: int, *, done: int = 0, unit: Literal["bytes", "items"] = "bytes", transient: bool = False
) -> Iterator[Callable[[int], None]]:
    """Shows a bar with amount, speed, time taken and time left; shows nothing where standard error is no terminal.

    Args:
      what: the text before the bar.
      total, done: in ``unit``; all that there is, and how much of it was done before.
      transient: the bar goes when the block ends.

    Yields:
      advance(count): says that ``count`` more are done.
    """
    amounts = (
        (DownloadColumn(), TransferSpeedColumn()) if unit == "bytes" else (MofNCompleteColumn(), _ItemSpeedColumn())
    )
    columns = (TextColumn(what), BarColumn(), *amounts, TimeElapsedColumn(), TimeRemainingColumn())
    console = PrintableConsole(stderr=True)
    with Progress(*columns, console=console, transient=transient, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=total, completed=done)
        yield lambda count: bar.advance(task, count)
