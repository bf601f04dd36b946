"""Commands of `dsvl2` as processes of their own that begin with everything imported, so that each takes a second.

The process that forks them has imported jax, but never used it: it has one thread and no device.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import importlib
import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

MODULES = (
    "dsvl2_jax.apps.cli.main",
    "dsvl2_jax.apps.micro.build",
    "dsvl2_jax.apps.micro.demo",
    "dsvl2_jax.convert.to_orbax",
    "dsvl2_jax.convert.to_safetensors",
    "dsvl2_jax.infer.eval.benchmarks",
    "dsvl2_jax.infer.eval.evaluate",
    "dsvl2_jax.infer.eval.loaded",
    "dsvl2_jax.train.data.check",
    "dsvl2_jax.train.log.plot",
    "dsvl2_jax.train.run",
    "matplotlib.backends.backend_agg",
)


def warm_up() -> None:
    """Imports what the commands need."""
    for name in MODULES:
        importlib.import_module(name)
    from jax._src import xla_bridge

    assert not xla_bridge.backends_are_initialized(), "jax has been used before the first fork"
    assert threading.active_count() == 1, "an import has started a thread"


@dataclasses.dataclass
class Process:
    """A running command, the head of a process group."""

    pid: int
    output: Path  # standard output and error
    started: float
    status: int | None = None  # as a shell shows it: negative for a signal

    def poll(self) -> int | None:
        """Its status, or None while it runs."""
        if self.status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.status = os.waitstatus_to_exitcode(status) if pid else None
        return self.status

    def wait(self, patience: float = 300) -> int:
        """Its status; a process that takes longer than ``patience`` seconds is killed, which the status then says."""
        end = time.monotonic() + patience
        while self.poll() is None:
            if time.monotonic() > end:
                self.kill()
                end += 60
            time.sleep(0.003)
        return self.status

    def kill(self) -> None:
        """Kills the process alone, as the system does when memory is out; what it has started ends by itself."""
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)

    def left(self, patience: float = 20) -> bool:
        """True when something of its group still runs after ``patience`` seconds; it is then killed."""
        end = time.monotonic() + patience
        with contextlib.suppress(ProcessLookupError):
            while time.monotonic() < end:
                os.killpg(self.pid, 0)
                time.sleep(0.02)
            os.killpg(self.pid, signal.SIGKILL)
            return True
        return False

    @property
    def text(self) -> str:
        return self.output.read_text(errors="replace")


def start(work: Callable[[], int | None], output: Path, environment: Mapping[str, str] | None = None) -> Process:
    """Runs ``work`` in a forked process, whose status it returns."""
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return Process(pid, output, time.monotonic())
    status = 70
    try:
        os.setpgid(0, 0)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in a shell's background job
        file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(file, 1)
        os.dup2(file, 2)
        os.environ.update(environment or {})
        if os.environ.get("LD_PRELOAD"):
            ctypes.CDLL(None).faults_begin()
        status = work() or 0
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
    except BaseException:
        traceback.print_exc()
    finally:
        _end(status)


def _end(status: int) -> None:
    """As Python ends: threads are waited for, and what is registered for the end is run."""
    import atexit

    with contextlib.suppress(BaseException):
        threading._shutdown()
        atexit._run_exitfuncs()
    with contextlib.suppress(BaseException):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(status)


def command(words: Sequence[str], output: Path, environment: Mapping[str, str] | None = None) -> Process:
    """Runs ``dsvl2`` with these words."""

    def run() -> int:
        from dsvl2_jax.apps.cli.main import main

        return main(list(words))

    return start(run, output, environment)


def value(function: Callable[[], Any], output: Path) -> Any:
    """What ``function`` returns in a process of its own, anything that JSON can hold. Raises AssertionError."""
    result = output.with_suffix(".json")
    process = start(lambda: result.write_text(json.dumps(function())) and 0, output)
    assert process.wait() == 0, f"the result cannot be read:\n{process.text}"
    return json.loads(result.read_text())
