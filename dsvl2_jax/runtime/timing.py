"""Wall-clock phases of a run, with XLA compilation told apart from work."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Iterator

import jax

_COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"


class CompileLog:
    """Counts backend compilations (persistent-cache hits included) of this process and their seconds."""

    def __init__(self) -> None:
        self.count = 0
        self.seconds = 0.0

    def __call__(self, event: str, duration: float, **_: object) -> None:
        if event == _COMPILE_EVENT:
            self.count += 1
            self.seconds += duration


@functools.cache
def compile_log() -> CompileLog:
    """The process's log; jax has no way to unregister a listener, so there is one."""
    log = CompileLog()
    jax.monitoring.register_event_duration_secs_listener(log)
    return log


class Timing(dict[str, float]):
    """Seconds per phase; compilation inside a phase counts under ``compile`` instead."""

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        log = compile_log()
        started, compiled = time.perf_counter(), log.seconds
        try:
            yield
        finally:
            compiling = log.seconds - compiled
            self["compile"] = self.get("compile", 0.0) + compiling
            self[name] = self.get(name, 0.0) + time.perf_counter() - started - compiling
