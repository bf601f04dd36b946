"""The campaign: kills and faults drawn from a seed, and after each of them what must hold.

After a disturbance nothing half-written is accepted, the same command finishes, its result is that of an undisturbed
run, and nothing else is left beside it.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import errno
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from chaos import faults, warm
from chaos.faults import Fault
from chaos.operations import Operation, make_inputs

AGAIN = 0.3  # share of the kills after which the next run of the same command is killed too
EXISTS = "exists already"  # what a command says that does not write over what is there


@dataclasses.dataclass
class Undisturbed:
    """An operation's run that nothing happens to."""

    result: Any
    seconds: float
    calls: int  # on files below the folder that it writes to


class Broken(Exception):
    """Something that must hold does not."""


class Campaign:
    """Runs operations in ``folder``, disturbed."""

    def __init__(self, folder: Path, seed: int, layer: bool):
        """``layer``: the fault layer is loaded into this process."""
        self.folder, self.seed, self.layer = folder, seed, layer
        self.inputs = folder / "inputs"
        self.outputs = folder / "outputs"
        self.kills: collections.Counter[tuple[str, str]] = collections.Counter()  # operation, phase
        self.faults: collections.Counter[tuple[str, str, str]] = collections.Counter()  # operation, fault, what it did
        self.broken: list[str] = []
        self._undisturbed: dict[str, Undisturbed] = {}
        self._number = 0

    def prepare(self, operations: Sequence[Operation]) -> None:
        """Makes the inputs of the operations."""
        self.inputs.mkdir()
        self.outputs.mkdir()
        make_inputs(self.inputs, operations, lambda words: self._must(warm.command(words, self._output())))

    def undisturbed(self, operation: Operation) -> Undisturbed:
        """The second of two runs: the first one compiles."""
        if operation.name not in self._undisturbed:
            for _ in range(2):
                with self._work(operation) as work:
                    counts = faults.new_counts(self.folder / "counts")
                    process = self._start(operation, work, Fault(), counts)
                    self._must(process)
                    seconds = time.monotonic() - process.started
                    result = self._result(operation, work)
                    self._undisturbed[operation.name] = Undisturbed(result, seconds, faults.calls(counts))
        return self._undisturbed[operation.name]

    def kill(self, operation: Operation, round_: int) -> None:
        """Kills the operation once or more at random moments, and looks at what comes of it."""
        draw = random.Random(f"{self.seed} kill {operation.name} {round_}")
        usual = self.undisturbed(operation)
        with self._checked(f"kill {operation.name!r} {round_}"), self._work(operation) as work:
            story = []
            while True:
                counts = faults.new_counts(self.folder / "counts")
                if self.layer and usual.calls and draw.random() < 0.6:
                    call = draw.randrange(usual.calls)
                    story.append(f"killed at call {call}")
                    process = self._start(operation, work, Fault(faults.EVERY, kill=True, after=call), counts)
                    process.wait()
                else:
                    moment = draw.uniform(0, usual.seconds * 1.05)
                    story.append(f"killed after {moment:.3f} s")
                    process = self._start(operation, work, Fault(), counts)
                    while process.poll() is None and time.monotonic() < process.started + moment:
                        time.sleep(0.001)
                    process.kill()
                status = process.wait()
                story[-1] += f", {operation.phase(work)}"
                if process.left():
                    raise Broken(f"{story}: a process that it had started runs on")
                if status == 0 or (not operation.again and EXISTS in process.text):
                    self.kills[operation.name, "after its end"] += 1
                elif status == -9:
                    self.kills[operation.name, operation.phase(work)] += 1
                else:
                    raise Broken(f"{story}: status {status}:\n{process.text}")
                if draw.random() > AGAIN:
                    break
            self._finishes(operation, work, "; ".join(story))

    def fault(self, operation: Operation, name: str, round_: int) -> None:
        """One kind of fault, at a random place."""
        draw = random.Random(f"{self.seed} {name} {operation.name} {round_}")
        usual = self.undisturbed(operation)
        with self._checked(f"{name} {operation.name!r} {round_}"), self._work(operation) as work:
            story, survived = FAULTS[name](self, operation, work, usual, draw)
            self.faults[operation.name, name, survived] += 1
            self._finishes(operation, work, f"{name}: {story}")

    def run_to_end(self, operation: Operation, work: Path, fault: Fault, *, must: bool = False) -> str:
        """Runs under a fault: it ends well with the right result, or with one message. Returns which it was."""
        process = self._start(operation, work, fault, faults.new_counts(self.folder / "counts"))
        return self.ended(operation, process, str(fault), must=must)

    def ended(self, operation: Operation, process: warm.Process, story: str, *, must: bool = False) -> str:
        """What a process came to: "finished" or "refused"; raises Broken for anything else."""
        status, text = process.wait(), process.text
        if status == 0:
            return "finished"
        if must or status not in (1, 2) or "Traceback" in text or "dsvl2: " not in text or "--debug shows" in text:
            raise Broken(f"{story}: status {status}:\n{text}")
        return "refused"

    def _finishes(self, operation: Operation, work: Path, story: str) -> None:
        """The same command finishes, with the result of an undisturbed run."""
        if operation.again or not (work / operation.target).exists():
            process = self._start(operation, work, Fault(), faults.new_counts(self.folder / "counts"))
            if process.wait() != 0:
                raise Broken(f"{story}; the same command then fails:\n{process.text}")
        try:
            found = self._result(operation, work)
        except AssertionError as error:
            raise Broken(f"{story}; {error}") from None
        if found != (expected := self.undisturbed(operation).result):
            raise Broken(f"{story}; then the result differs:\n{_difference(expected, found)}")

    def _start(
        self, operation: Operation, work: Path, fault: Fault, counts: Path, before: Callable[[], None] | None = None
    ) -> warm.Process:
        words = operation.words(self.inputs, work)
        environment = fault.environment(work, counts) if self.layer else None
        return warm.command(words, self._output(), environment, self.inputs / operation.stdin, before)

    def in_surroundings(self, operation: Operation, work: Path, before: Callable[[], None]) -> warm.Process:
        """Runs after ``before`` in the command's process."""
        return self._start(operation, work, Fault(), faults.new_counts(self.folder / "counts"), before)

    def _result(self, operation: Operation, work: Path) -> Any:
        return warm.value(lambda: operation.result(work), self._output())

    def _must(self, process: warm.Process) -> None:
        if process.wait() != 0:
            raise AssertionError(f"an undisturbed command fails:\n{process.text}")

    def _output(self) -> Path:
        self._number += 1
        return self.outputs / f"{self._number}.txt"

    @contextlib.contextmanager
    def _work(self, operation: Operation) -> Iterator[Path]:
        """The same path every time, as some results hold it."""
        work = self.folder / "work"
        work.mkdir()
        for name in operation.given:
            shutil.copyfile(self.inputs / name, work / name)
        try:
            yield work
        finally:
            while os.path.ismount(work):
                subprocess.run(["umount", "-l", work], check=True)
            shutil.rmtree(work)

    @contextlib.contextmanager
    def _checked(self, what: str) -> Iterator[None]:
        try:
            yield
        except Broken as broken:
            self.broken.append(f"{what} (seed {self.seed}): {broken}")
            print(f"BROKEN {self.broken[-1]}\n", flush=True)


# ---- The kinds of faults: (campaign, operation, folder, undisturbed run, random) → what was drawn, what it came to.

_Outcome = tuple[str, str]


def _failing(error: int) -> Callable[..., _Outcome]:
    def fault(
        campaign: Campaign, operation: Operation, work: Path, usual: Undisturbed, draw: random.Random
    ) -> _Outcome:
        # A removal does not need space.
        kinds = faults.CREATE | faults.WRITE | faults.SYNC | faults.RENAME
        times = draw.choice([1, -1])
        drawn = Fault(kinds, error, after=draw.randrange(max(1, usual.calls)), times=times)
        return str(drawn), campaign.run_to_end(operation, work, drawn)

    return fault


def _partial_writes(campaign: Campaign, operation: Operation, work: Path, usual: Undisturbed, draw: Any) -> _Outcome:
    drawn = Fault(partial_writes=True)
    return str(drawn), campaign.run_to_end(operation, work, drawn, must=True)


def _slow_writes(campaign: Campaign, operation: Operation, work: Path, usual: Undisturbed, draw: Any) -> _Outcome:
    drawn = Fault(slow=draw.choice([2_000, 20_000]))
    return str(drawn), campaign.run_to_end(operation, work, drawn, must=True)


def _clock(campaign: Campaign, operation: Operation, work: Path, usual: Undisturbed, draw: random.Random) -> _Outcome:
    hours = draw.choice([-30, -2, 2, 30, 24 * 400])
    drawn = Fault(clock_after=draw.choice([0, 1, 5, 50, 500]), clock_offset=hours * 3600)
    # Orbax measures its patience by this clock: it may give up.
    return str(drawn), campaign.run_to_end(operation, work, drawn)


def _full_disk(campaign: Campaign, operation: Operation, work: Path, usual: Undisturbed, draw: Any) -> _Outcome:
    """A file system of its own, on which room for only a part of the result is left."""
    given = [(file.name, file.read_bytes()) for file in work.iterdir()]
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=48m", "tmpfs", work], check=True)
    for name, content in given:
        (work / name).write_bytes(content)
    left = draw.choice([0, 4096, 40_000, 400_000, 2_000_000])
    free = shutil.disk_usage(work).free
    with (work / "filler").open("wb") as filler:
        filler.write(bytes(max(0, free - left)))
    came_to = campaign.run_to_end(operation, work, Fault())
    (work / "filler").unlink()
    return f"{left} bytes left", came_to


def _read_only(campaign: Campaign, operation: Operation, work: Path, usual: Undisturbed, draw: Any) -> _Outcome:
    subprocess.run(["mount", "--bind", work, work], check=True)
    subprocess.run(["mount", "-o", "remount,bind,ro", work], check=True)
    came_to = campaign.run_to_end(operation, work, Fault())
    subprocess.run(["umount", work], check=True)
    return "read-only", came_to


def _vanishing(campaign: Campaign, operation: Operation, work: Path, usual: Undisturbed, draw: Any) -> _Outcome:
    """The folder that is written into is moved away, or removed, in the middle of the run."""
    moment, how = draw.uniform(0, usual.seconds), draw.choice(["moved", "removed"])
    process = campaign._start(operation, work, Fault(), faults.new_counts(campaign.folder / "counts"))
    while process.poll() is None and time.monotonic() < process.started + moment:
        time.sleep(0.001)
    away = work.with_name("away")
    work.rename(away)
    given = {name: (away / name).read_bytes() for name in operation.given}
    if how == "removed":
        shutil.rmtree(away, ignore_errors=True)
    story = f"{how} after {moment:.3f} s"
    came_to = campaign.ended(operation, process, story)
    if how == "moved":
        shutil.rmtree(work, ignore_errors=True)
        away.rename(work)
    work.mkdir(exist_ok=True)
    for name, content in given.items():
        (work / name).write_bytes(content)
    shutil.rmtree(away, ignore_errors=True)
    if how == "removed" and came_to == "finished" and not operation.again:
        shutil.rmtree(work / operation.target, ignore_errors=True)
    return story, came_to


def _two_at_once(campaign: Campaign, operation: Operation, work: Path, usual: Undisturbed, draw: Any) -> _Outcome:
    first = campaign._start(operation, work, Fault(), faults.new_counts(campaign.folder / "counts"))
    time.sleep(draw.uniform(0, usual.seconds * 0.7))
    second = campaign._start(operation, work, Fault(), faults.new_counts(campaign.folder / "counts-2"))
    came_to = [campaign.ended(operation, process, "two at once") for process in (first, second)]
    if "finished" not in came_to:
        raise Broken(f"neither of two processes has finished:\n{first.text}\n{second.text}")
    return "two at once", " and ".join(came_to)


def _interrupted(campaign: Campaign, operation: Operation, work: Path, usual: Undisturbed, draw: Any) -> _Outcome:
    """Ctrl-C: status 130 and a line; training finishes its step and writes a checkpoint."""
    moment = draw.uniform(0.1, usual.seconds)
    process = campaign.in_surroundings(operation, work, lambda: None)
    while process.poll() is None and time.monotonic() < process.started + moment:
        time.sleep(0.001)
    if process.poll() is None:
        os.kill(process.pid, signal.SIGINT)
    status, text = process.wait(), process.text
    if status not in (0, 130) or "Traceback" in text or (status == 130) != ("dsvl2: interrupted" in text):
        raise Broken(f"Ctrl-C after {moment:.3f} s: status {status}:\n{text}")
    return f"after {moment:.3f} s", "finished" if status == 0 else "interrupted"


def _closed_pipe(campaign: Campaign, operation: Operation, work: Path, usual: Undisturbed, draw: Any) -> _Outcome:
    """Whoever reads standard output has gone: no word about it."""

    def close() -> None:
        reading, writing = os.pipe()
        os.dup2(writing, 1)
        os.close(reading)

    process = campaign.in_surroundings(operation, work, close)
    status, text = process.wait(), process.text
    if status not in (0, 1, 141) or "Traceback" in text or "Exception" in text or "BrokenPipe" in text:
        raise Broken(f"standard output is closed: status {status}:\n{text}")
    return "closed pipe", f"status {status}"


def _no_home(campaign: Campaign, operation: Operation, work: Path, usual: Undisturbed, draw: Any) -> _Outcome:
    """A home that cannot be written, and no other folder for caches: at most one warning."""

    def leave() -> None:
        import jax

        for name in ("XDG_CACHE_HOME", "JAX_COMPILATION_CACHE_DIR"):
            os.environ.pop(name, None)
        os.environ["HOME"] = "/proc/1/home"
        jax.config.update("jax_compilation_cache_dir", None)

    process = campaign.in_surroundings(operation, work, leave)
    came_to = campaign.ended(operation, process, "no home", must=operation.name != "plan")
    said = [line for line in process.text.splitlines() if "/proc/1/home" in line or "cache" in line]
    if len(said) > 1:
        raise Broken(f"more than one warning without a home:\n{process.text}")
    return "no home", came_to


def _ascii(campaign: Campaign, operation: Operation, work: Path, usual: Undisturbed, draw: Any) -> _Outcome:
    """The streams of LC_ALL=C without Python's UTF-8 mode."""

    def narrow() -> None:
        sys.stdout.reconfigure(encoding="ascii", errors="strict")
        sys.stderr.reconfigure(encoding="ascii", errors="backslashreplace")

    return "ascii", campaign.ended(operation, campaign.in_surroundings(operation, work, narrow), "ascii", must=True)


def _full_tmp(campaign: Campaign, operation: Operation, work: Path, usual: Undisturbed, draw: Any) -> _Outcome:
    """A temporary folder that takes nothing."""
    folder = campaign.folder / "tmp"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4k,nr_inodes=1", "tmpfs", folder], check=True)

    def point() -> None:
        os.environ["TMPDIR"] = str(folder)
        tempfile.tempdir = None

    try:
        process = campaign.in_surroundings(operation, work, point)
        return "full /tmp", campaign.ended(operation, process, "full /tmp", must=True)
    finally:
        subprocess.run(["umount", "-l", folder], check=True)
        folder.rmdir()


FAULTS: dict[str, Callable[..., _Outcome]] = {
    "disk full": _failing(errno.ENOSPC),
    "I/O error": _failing(errno.EIO),
    "turns read-only": _failing(errno.EROFS),
    "partial writes": _partial_writes,
    "slow writes": _slow_writes,
    "clock jumps": _clock,
    "small disk": _full_disk,
    "read-only folder": _read_only,
    "folder vanishes": _vanishing,
    "two at once": _two_at_once,
    "Ctrl-C": _interrupted,
    "closed pipe": _closed_pipe,
    "no home": _no_home,
    "ascii": _ascii,
    "full /tmp": _full_tmp,
}
MOUNTING = ("small disk", "read-only folder", "full /tmp")
SURROUNDINGS = ("Ctrl-C", "closed pipe", "no home", "ascii", "full /tmp")  # also of commands that write nothing
LAYERED = ("disk full", "I/O error", "turns read-only", "partial writes", "slow writes", "clock jumps")


def usable_faults(layer: bool) -> list[str]:
    """The faults that can be made here; says which cannot."""
    left_out = [] if layer else list(LAYERED)
    if os.geteuid() != 0:
        left_out += MOUNTING
    if left_out:
        print(f"left out, without gcc or without root: {', '.join(left_out)}", flush=True)
    return [name for name in FAULTS if name not in left_out]


def _difference(expected: Any, found: Any, limit: int = 12) -> str:
    from dsvl2_jax.messages import changes, listed

    if isinstance(expected, dict) and isinstance(found, dict):
        return listed(changes(expected, found), limit)[:4000]
    return f"{expected!r:.500}\n{found!r:.500}"


def shares(kills: int, operations: Sequence[Operation]) -> list[tuple[Operation, int]]:
    """(operation, its number of the kill) for every round."""
    turns = [operation for operation in operations for _ in range(operation.share)]
    return [(turns[i % len(turns)], i) for i in range(kills)]
