"""`dsvl2 bench convert`: speed against `cp` of the same files, and peak resident memory, at a released size.

The checkpoint is random, at the released shapes: what conversion costs does not depend on the values.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Literal

from dsvl2_jax.apps.bench.measure import drop_from_page_cache, machine, need_at_least
from dsvl2_jax.apps.bench.random_checkpoint import random_checkpoint
from dsvl2_jax.checkpoint.staging import refuse_existing, sync_tree
from dsvl2_jax.errors import CheckpointError
from dsvl2_jax.model.released import released_config


@dataclasses.dataclass(frozen=True)
class ConvertBench:
    """Medians over the repeats: seconds of cp and of the conversion, and the conversion's peak memory in bytes."""

    size: str
    bytes: int
    cp_seconds: float
    convert_seconds: float
    peak_bytes: int

    @property
    def ratio(self) -> float:
        """Speed of the conversion over that of cp."""
        return self.cp_seconds / self.convert_seconds


def bench_convert(
    *,
    size: Literal["tiny", "small", "base"] = "tiny",
    directory: str | Path | None = None,
    keep: str | Path | None = None,
    repeats: int = 2,
) -> ConvertBench:
    """Converts a random bfloat16 checkpoint of a released size, in a process of its own, and prints figures.

    cp and the conversion run in turn, each from files that are not in the page cache and until everything
    is on disk. The conversion's time includes starting Python.

    Args:
      size: which released model's shapes.
      directory: where to work; needs twice the checkpoint's size (tiny: 14 GB). Default: the system's
        temporary directory. Everything made there is removed again.
      keep: moves the last converted checkpoint here.
      repeats: how often both are measured.

    Raises:
      CheckpointError: not enough disk, ``keep`` exists, or the conversion failed.
      UsageError: ``repeats`` is not positive.
    """
    need_at_least("--repeats", repeats, 1)
    if keep is not None:
        keep = Path(keep).absolute()
        refuse_existing(keep)
    with tempfile.TemporaryDirectory(prefix="dsvl2-bench-", dir=directory) as work:
        source, copy, converted = (Path(work, name) for name in ("released", "copy", "converted"))
        total = random_checkpoint(source, released_config(size))
        if shutil.disk_usage(work).free < 1.1 * total:
            raise CheckpointError(
                f"{work}: the disk has too little space for a second copy of the {total / 1e9:.1f} GB checkpoint. Name "
                "another place with --directory."
            )
        print(f"{machine()}\n{size}: {total / 1e9:.2f} GB of random bfloat16 tensors in {source}")
        _time_copy(source, copy)  # not counted: on a virtual machine the first use of memory is several times slower
        shutil.rmtree(copy)
        copies, conversions, peaks = [], [], []
        for repeat in range(repeats):
            copies.append(_time_copy(source, copy))
            print(f"  cp       {copies[-1]:7.1f} s   {total / copies[-1] / 1e6:6.0f} MB/s", flush=True)
            shutil.rmtree(copy)
            seconds, peak = _time_conversion(source, converted)
            conversions.append(seconds)
            peaks.append(peak)
            print(
                f"  convert  {seconds:7.1f} s   {total / seconds / 1e6:6.0f} MB/s   peak {peak / 1e9:.2f} GB",
                flush=True,
            )
            if keep is None or repeat < repeats - 1:
                shutil.rmtree(converted)
        if keep is not None:
            shutil.move(converted, keep)
    result = ConvertBench(size, total, statistics.median(copies), statistics.median(conversions), max(peaks))
    print(
        f"convert {total / result.convert_seconds / 1e6:.0f} MB/s, {result.ratio:.2f} × the speed of cp, peak resident "
        f"memory {result.peak_bytes / 1e9:.2f} GB"
    )
    return result


def _time_copy(source: Path, target: Path) -> float:
    drop_from_page_cache(source)
    started = time.perf_counter()
    subprocess.run(["cp", "-r", source, target], check=True)
    sync_tree(target)
    return time.perf_counter() - started


def _time_conversion(source: Path, target: Path) -> tuple[float, int]:
    """(seconds, peak resident bytes) of a conversion in a process of its own, which syncs by itself."""
    drop_from_page_cache(source)
    started = time.perf_counter()
    child = subprocess.Popen([sys.executable, "-m", "dsvl2_jax", "convert", str(source), str(target)])
    _, status, usage = os.wait4(child.pid, 0)
    seconds = time.perf_counter() - started
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise CheckpointError(f"{source}: the conversion ended with status {child.returncode}; its message is above.")
    return seconds, usage.ru_maxrss * 1024
