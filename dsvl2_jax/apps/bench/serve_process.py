"""The server that `dsvl2 bench serve` measures: `dsvl2 serve` in a process of its own, seen from outside.

Tested in tests/apps/bench/test_serve.py.
"""

from __future__ import annotations

import collections
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from dsvl2_jax.apps.bench.measure import process_bytes
from dsvl2_jax.errors import DSVL2Error

_TOLD = 30  # last lines of the server's log that an error repeats
_STOP = 60.0  # seconds until a server that was told to stop must have ended
_KEYS = "DSVL2_API_KEY"


class ServerProcess:
    """One run of `dsvl2 serve` on a free port.

    Attributes:
      address: as ``http://127.0.0.1:8000``.
      seconds_to_ready: from the start of the process until it answered requests.
      log: the file with its standard error.
    """

    def __init__(self, arguments: Sequence[str], log: Path, environment: Mapping[str, str] | None = None):
        """Starts it and waits until it is ready.

        Args:
          arguments: of `dsvl2 serve`.
          environment: variables beside this process's own.

        Raises:
          DSVL2Error: the server ended instead; the message has the end of its log.
        """
        self.log = log
        inherited = {name: value for name, value in os.environ.items() if name != _KEYS}
        command = [sys.executable, "-m", "dsvl2_jax", "serve", *arguments, "--port", "0"]
        started = time.perf_counter()
        with log.open("w", encoding="utf-8") as errors:
            self._process = subprocess.Popen(
                command,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=inherited | dict(environment or {}),
            )
        try:
            self.address = self._process.stdout.readline().strip()
        except BaseException:
            self._process.kill()
            raise
        self.seconds_to_ready = time.perf_counter() - started
        if not self.address:
            status = self._process.wait()
            raise DSVL2Error(f"dsvl2 serve ended with status {status} before it was ready:\n{self._last_lines()}")

    @property
    def resident_bytes(self) -> int:
        """Resident memory now."""
        return process_bytes(self._process.pid, "VmRSS")

    def check(self) -> None:
        """Raises DSVL2Error when it has ended."""
        if (status := self._process.poll()) is not None:
            raise DSVL2Error(f"dsvl2 serve ended with status {status} under load:\n{self._last_lines()}")

    def stop(self) -> None:
        """Tells it to stop, and waits. Raises DSVL2Error when it does not end with status 0."""
        self.check()
        self._process.terminate()
        try:
            status = self._process.wait(_STOP)
        except subprocess.TimeoutExpired:
            raise DSVL2Error(
                f"dsvl2 serve did not end within {_STOP:.0f} seconds after SIGTERM:\n{self._last_lines()}"
            ) from None
        finally:
            self.kill()
        if status:
            raise DSVL2Error(f"dsvl2 serve ended with status {status} after SIGTERM:\n{self._last_lines()}")

    def kill(self) -> None:
        """Ends it in any case."""
        self._process.kill()
        self._process.wait()
        self._process.stdout.close()

    def _last_lines(self) -> str:
        with self.log.open(encoding="utf-8", errors="replace") as lines:
            return "".join(collections.deque(lines, _TOLD)).rstrip()


@contextlib.contextmanager
def running(
    arguments: Sequence[str], log: Path, environment: Mapping[str, str] | None = None
) -> Iterator[ServerProcess]:
    """A server inside the block; stopped in good order after it, killed when the block fails.

    For the main thread: inside, SIGTERM ends this process as `sys.exit` does, so that no server is left alone.
    """
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        server = ServerProcess(arguments, log, environment)
        try:
            yield server
            server.stop()
        finally:
            server.kill()
    finally:
        signal.signal(signal.SIGTERM, before)
