"""How long the event loop was busy with one thing while others waited for it."""

from __future__ import annotations

import asyncio
from collections import deque

_EVERY = 0.01  # seconds between two looks
_WINDOW = 15.0  # seconds, which is how often metrics are commonly fetched


class LoopLag:
    """Measures by how much a sleep is late. Run `watch` as a task of the loop that is measured."""

    def __init__(self) -> None:
        self.longest = 0.0  # seconds, since the start or `forget`
        self._late: deque[tuple[float, float]] = deque()  # (when, seconds), each longer than those after it

    async def watch(self) -> None:
        """Measures until it is cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            due = loop.time() + _EVERY
            await asyncio.sleep(_EVERY)
            now = loop.time()
            self.note(now, max(0.0, now - due))

    def note(self, now: float, late: float) -> None:
        """Keeps a measurement, ``late`` seconds at the time ``now``."""
        self.longest = max(self.longest, late)
        while self._late and self._late[-1][1] <= late:
            self._late.pop()
        self._late.append((now, late))
        while self._late[0][0] < now - _WINDOW:
            self._late.popleft()

    def forget(self) -> None:
        """Begins anew. While programs are traced the loop waits, and nobody else does."""
        self.longest = 0.0
        self._late.clear()

    @property
    def recent(self) -> float:
        """The longest of the last 15 seconds."""
        return self._late[0][1] if self._late else 0.0
