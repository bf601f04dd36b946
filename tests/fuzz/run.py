"""Broken inputs for everything that reads a user's files, until the time is over: `make fuzz MINUTES=10`.

Each input may be read, or refused with a `DSVL2Error`. Anything else is a finding: another exception, a process that
ends, more than `SECONDS` of processor time or `MEGABYTES` of memory. Inputs run in child processes; a finding is kept
in tests/fuzz/corpus, which tests/test_fuzz_corpus.py replays.
"""

from __future__ import annotations

import argparse
import collections
import hashlib
import os
import random
import resource
import signal
import struct
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path

from dsvl2_jax.errors import DSVL2Error
from fuzz.inputs import changed
from fuzz.targets import TARGETS, Target

PROJECT = str(Path(__file__).parents[2])
CORPUS = Path(__file__).with_name("corpus")
SECONDS, WALL_SECONDS, MEGABYTES = 5, 60, 500
BATCH = 250  # inputs of one child process


def make_input(target: Target, number: int) -> bytes:
    rng = random.Random(f"{target.name}/{number}")
    return changed(rng.choice(target.seeds()), rng, target.kind, target.dictionary)


def attempt(target: Target, content: bytes, folder: Path) -> str | None:
    """Reads one input; what is wrong with how that went, or None."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            target.read(content, folder)
    except DSVL2Error:
        pass
    except BaseException as error:
        frames = [
            f for f in traceback.extract_tb(error.__traceback__) if "dsvl2" in f.filename or "/guard/" in f.filename
        ]
        place = next((f for f in reversed(frames) if "tests/fuzz" not in f.filename), None)
        where = f"{Path(place.filename).name}:{place.name}" if place else "?"
        return f"{type(error).__name__} in {where}: {str(error)[:100]!a}"
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10
    return f"{grown} MB of memory" if grown > MEGABYTES else None


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--minutes", type=float, default=10)
    options.add_argument("--inputs", type=int, default=0, help="end after this many, if the time is not over before")
    options.add_argument("--jobs", type=int, default=2)
    options.add_argument("--start", type=int, default=time.time_ns() // 10**9 % 10**6 * 10**6, help="of the numbering")
    options.add_argument("--keep", action="store_true", help="write findings into the corpus")
    options.add_argument("targets", nargs="*", help=", ".join(TARGETS))
    given = options.parse_args()
    targets = [TARGETS[name] for name in given.targets or TARGETS]
    for target in targets:
        target.seeds()  # made once, before the first child
    print(f"inputs are numbered from {given.start}", file=sys.stderr)
    tried: collections.Counter[str] = collections.Counter()
    found: dict[tuple[str, str], int] = {}
    end, turn, running = time.monotonic() + given.minutes * 60, 0, {}
    while running or time.monotonic() < end:
        enough = given.inputs and sum(tried.values()) + BATCH * len(running) >= given.inputs
        if len(running) < given.jobs and time.monotonic() < end and not enough:
            target = targets[turn % len(targets)]
            first = given.start + turn // len(targets) * BATCH
            running.update([_start(target, first, first + BATCH)])
            turn += 1
            continue
        if not running:
            break
        child, status = os.wait()
        target, first, last, progress, report = running.pop(child)
        number = struct.unpack("<q", os.pread(progress, 8, 0))[0]
        os.close(progress)
        for line in report.read_text().splitlines():
            at, _, what = line.partition(" ")
            _keep(found, target, int(at), what, given.keep)
        report.unlink()
        tried[target.name] += number - first + 1
        if status:
            ended = os.waitstatus_to_exitcode(status)
            what = {-signal.SIGPROF: f"over {SECONDS} s", -signal.SIGALRM: f"over {WALL_SECONDS} s of waiting"}
            _keep(found, target, number, what.get(ended, f"the process ends with status {ended}"), given.keep)
            if number + 1 < last:
                running.update([_start(target, number + 1, last)])
    print(f"{'target':<18}{'inputs':>9}{'findings':>10}")
    for target in targets:
        print(f"{target.name:<18}{tried[target.name]:>9,}{sum(name == target.name for name, _ in found):>10}")
    print(f"{'all':<18}{sum(tried.values()):>9,}{len(found):>10}")
    for (name, what), count in sorted(found.items()):
        print(f"{name}: {what} ({count}×)")
    return 1 if found else 0


def _start(target: Target, first: int, last: int) -> tuple[int, tuple]:
    progress, name = tempfile.mkstemp()
    os.unlink(name)
    os.pwrite(progress, struct.pack("<q", first), 0)
    handle, report = tempfile.mkstemp(suffix=".findings")
    child = os.fork()
    if child:
        os.close(handle)
        return child, (target, first, last, progress, Path(report))
    status = 70
    try:
        silent = os.open(os.devnull, os.O_RDWR)
        for descriptor in (0, 1, 2):
            os.dup2(silent, descriptor)
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + (3 << 30),) * 2)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            for number in range(first, last):
                os.pwrite(progress, struct.pack("<q", number), 0)
                content = make_input(target, number)
                signal.setitimer(signal.ITIMER_PROF, SECONDS)
                signal.setitimer(signal.ITIMER_REAL, WALL_SECONDS)
                problem = attempt(target, content, Path(folder))
                if problem:
                    os.write(handle, f"{number} {problem}\n".encode())
        status = 0
    finally:
        os._exit(status)


def _keep(found: dict[tuple[str, str], int], target: Target, number: int, what: str, keep: bool) -> None:
    kind = (target.name, what.partition(": ")[0])
    if kind not in found:
        content = make_input(target, number)
        print(f"{target.name} {number}: {what}", file=sys.stderr, flush=True)
        if keep:
            folder = CORPUS / target.name
            folder.mkdir(parents=True, exist_ok=True)
            (folder / hashlib.sha256(content).hexdigest()[:12]).write_bytes(content)
    found[kind] = found.get(kind, 0) + 1


if __name__ == "__main__":
    sys.exit(main())
