"""`make soak`: thousands of generate calls and training steps in a process each, whose memory must stay flat.

    python tests/soak.py generate 10000
    python tests/soak.py train 5000

After a warm-up, resident memory, the bytes of jax's arrays, compilations, threads and file descriptors are looked at a
hundred times. A straight line through the second half of the looks says how much each grows; exit status 1
when one does.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import os
import resource
import sys
import tempfile
import threading
import time
from pathlib import Path

import jax
import numpy as np
import toy_run
from PIL import Image

from dsvl2_jax.convert.to_safetensors import export
from dsvl2_jax.infer.loading import LoadOptions, load
from dsvl2_jax.infer.sampling import SamplingParams
from dsvl2_jax.train.run import _Loop, train

LOOKS = 100
PROMPTS = (3, 40, 150)  # words
# What may be gained over the second half. The resident memory of an allocator wavers by a few pages a call.
ALLOWED = {"resident MiB": 12.0, "arrays MiB": 0.1, "compilations": 0.0, "threads": 0.5, "descriptors": 0.5}

_compilations = 0


def _count(event: str, seconds: float, **_: object) -> None:
    global _compilations
    _compilations += event.endswith("backend_compile_duration")


@dataclasses.dataclass
class Looks:
    """The figures of `ALLOWED` over a run of ``total`` repetitions."""

    total: int
    at: list[int] = dataclasses.field(default_factory=list)
    figures: list[list[float]] = dataclasses.field(default_factory=list)

    def look(self, repetition: int) -> None:
        """After a repetition, from 1; most are passed over."""
        if repetition % max(1, self.total // LOOKS):
            return
        gc.collect()
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        arrays = sum(array.nbytes for array in jax.live_arrays())
        descriptors = len(os.listdir("/proc/self/fd"))
        resident = pages * resource.getpagesize() / 2**20
        self.at.append(repetition)
        self.figures.append([resident, arrays / 2**20, _compilations, threading.active_count(), descriptors])
        if len(self.at) % 10 == 0:
            print(repetition, *(f"{figure:.1f}" for figure in self.figures[-1]), flush=True)

    def grows(self) -> bool:
        """Prints the table; True when a figure grows."""
        at, figures = np.array(self.at), np.array(self.figures)
        half = len(at) // 2
        grown = False
        print(f"{'':<14}{'begin':>10}{'middle':>10}{'end':>10}{'second half':>13}")
        for (name, allowed), column in zip(ALLOWED.items(), figures.T, strict=True):
            slope = np.polyfit(at[half:], column[half:], 1)[0] if len(at) - half > 1 else 0.0
            gained = slope * (at[-1] - at[half])
            bad = gained > allowed
            grown |= bool(bad)
            mark = "  GROWS" if bad else ""
            print(f"{name:<14}{column[0]:>10.1f}{column[half]:>10.1f}{column[-1]:>10.1f}{gained:>+13.2f}{mark}")
        return grown


def soak_generate(calls: int, folder: Path) -> Looks:
    """Calls of every mixture of prompt lengths, pictures and sampling."""
    data = _train(folder, 4)
    model = load(str(export(data, folder / "model-with-weights")), LoadOptions())
    random = np.random.default_rng(0)
    image = folder / "picture.png"
    Image.fromarray(random.integers(0, 256, (50, 90, 3), np.uint8)).save(image)
    looks = Looks(calls)
    for call in range(1, calls + 1):
        words = " ".join(random.choice(["red", "blue", "two", "shape"], size=PROMPTS[call % len(PROMPTS)]))
        turn = {"role": "user", "content": words, "images": []}
        if call % 4 == 0:
            turn |= {"content": f"<image>\n{words}", "images": [image]}
        sampling = SamplingParams(temperature=0.7 * (call % 2), seed=call)
        model.generate(model.processor([turn]), 2 + call % 5, sampling)
        looks.look(call)
    return looks


def soak_train(steps: int, folder: Path) -> Looks:
    """Steps with a checkpoint and a validation now and then."""
    looks = Looks(steps)
    settle = _Loop._settle

    def settled(self: _Loop, pending: object) -> None:
        settle(self, pending)
        if pending is not None:
            looks.look(pending.step)

    _Loop._settle = settled
    _train(folder, steps)
    return looks


def _train(folder: Path, steps: int) -> Path:
    model, data = toy_run.make_model(folder / "toy"), toy_run.make_data(folder / "data")
    held = {"data.validation.held": {"path": str(toy_run.make_data(folder / "data", "held.jsonl", 4, 1))}}
    cadence = {"steps": steps, "checkpoint_every": max(2, steps // 25), "validate_every": max(2, steps // 25)}
    run = {"run": cadence | {"log_every": max(1, steps // 10)}}
    train(toy_run.write_config(folder / "train.toml", model, data, folder / "run", held | run))
    return folder / "run"


def main() -> int:
    parser = argparse.ArgumentParser(prog="soak")
    parser.add_argument("what", choices=["generate", "train"])
    parser.add_argument("repetitions", type=int)
    options = parser.parse_args()
    jax.monitoring.register_event_duration_secs_listener(_count)
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="dsvl2-soak-") as folder:
        soak = soak_generate if options.what == "generate" else soak_train
        looks = soak(options.repetitions, Path(folder))
    seconds = time.monotonic() - began
    print(f"\n{options.what}: {options.repetitions} repetitions in {seconds:.0f} s")
    return 1 if looks.grows() else 0


if __name__ == "__main__":
    sys.exit(main())
