"""The soak of `dsvl2 bench serve`: mixed load for minutes, every answer compared with the engine's alone.

Tested in tests/apps/bench/test_serve.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import itertools
import json
import time
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from dsvl2_jax.apps.bench.serve_cases import Bad, order
from dsvl2_jax.apps.bench.serve_client import CHAT, Reply
from dsvl2_jax.apps.bench.serve_expected import Expected
from dsvl2_jax.apps.bench.serve_load import Load, rounds, together
from dsvl2_jax.apps.bench.serve_parts import milliseconds
from dsvl2_jax.apps.bench.serve_requests import Body, streamed

_FLAT = 2.0  # per cent that resident memory may grow by after the first minute
_SETTLED = 60.0  # seconds after which it should not grow any more
_SAMPLES = 600  # of the memory, about, over the whole load
_FREE = 30.0  # seconds after the last answer within which all slots must be free
_KEPT = 20  # descriptions of what went wrong
_PATIENCE = 20  # tries of a request that the server has no room for


@dataclasses.dataclass(frozen=True)
class Known:
    """A good request and its answer."""

    kind: str
    body: Body
    expected: Expected


class Soak:
    """One run.

    Args:
      good: by kind. bad: malformed and oversized ones.
    """

    def __init__(self, load: Load, good: Mapping[str, Sequence[Known]], bad: Mapping[str, Sequence[Bad]]):
        self._load, self._good = load, good
        self._bad = {kind: itertools.cycle(some) for kind, some in bad.items()}
        self._all = [known for some in good.values() for known in some]
        self._random = load.requests.rng
        self.counts: Counter[str] = Counter()
        self._firsts: list[float] = []
        self._memory: list[tuple[float, float]] = []  # (seconds since the beginning, bytes)

    async def run(self) -> None:
        """Sends everything, and notes the figures."""
        options = self._load.options
        kinds = iter(order(self._load.requests, options.soak_requests))
        begun = time.perf_counter()
        numbers = itertools.count()

        async def work() -> None:
            for kind in kinds:
                due = begun + next(numbers) * options.soak / options.soak_requests
                await asyncio.sleep(max(0.0, due - time.perf_counter()))
                self._load.server.check()
                await self._one(kind)

        watching = asyncio.create_task(self._watch(begun))
        try:
            await together(work() for _ in range(options.most_clients))
        finally:
            watching.cancel()
        seconds = time.perf_counter() - begun
        self._remember(begun)
        await self._figures(seconds)

    async def _one(self, kind: str) -> None:
        if kind in self._bad:
            await self._refused(next(self._bad[kind]))
            return
        among = self._good.get(kind, self._all)
        known = among[self._random.integers(len(among))]
        if kind == "cancelled":
            await self._left(known)
        elif kind == "slow":
            await self._compared(known, pause=float(self._random.uniform(0.02, 0.2)))
        else:
            await self._compared(known)

    async def _compared(self, known: Known, pause: float = 0.0) -> None:
        """Asks, as a stream or not, and compares; a server that is full is asked again."""
        for _ in range(_PATIENCE):
            if pause or self._random.random() < 0.7:
                reply = await self._load.client.stream(CHAT, streamed(known.body), pause=pause)
            else:
                reply = await self._load.client.post(CHAT, json.dumps(known.body | {"return_token_ids": True}).encode())
            if reply.status != 429:
                break
            self.counts["refused for now"] += 1
            await asyncio.sleep(1.0)
        if not reply.whole:
            self._note("lost", known.kind, reply, status=reply.status, broken=reply.broken, error=reply.error)
            return
        if reply.times:
            self._firsts.append(reply.first_token_seconds)
        got = Expected(reply.token_ids, reply.text, reply.finish_reason, reply.logprobs)
        if got == known.expected:
            self.counts["right"] += 1
            return
        self._note("wrong", known.kind, reply, expected=dataclasses.asdict(known.expected), got=dataclasses.asdict(got))

    async def _left(self, known: Known) -> None:
        """Goes away before the answer has come, or in the middle of it."""
        body = streamed(known.body)
        if self._random.random() < 0.5:
            await self._load.client.stream(CHAT, body, leave_after=int(self._random.integers(1, 6)))
        else:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(float(self._random.uniform(0.0, 0.5))):
                    await self._load.client.stream(CHAT, body)
        self.counts["cancelled"] += 1

    async def _refused(self, bad: Bad) -> None:
        reply = await self._load.client.post(bad.path, bad.body, {"Content-Type": bad.content_type})
        if reply.status in bad.statuses and reply.error:
            self.counts["refused rightly"] += 1
        else:
            self._note("refused wrongly", bad.name, reply, status=reply.status, error=reply.error, broken=reply.broken)

    def _note(self, what: str, kind: str, reply: Reply, **details: object) -> None:
        self.counts[what] += 1
        wrong = self._load.findings.wrong
        if len(wrong) < _KEPT:
            wrong.append({"what": what, "kind": kind, "seconds": reply.ended - reply.sent, **details})

    async def _watch(self, begun: float) -> None:
        every = self._load.options.soak / _SAMPLES
        while True:
            self._remember(begun)
            await asyncio.sleep(every)

    def _remember(self, begun: float) -> None:
        self._memory.append((time.perf_counter() - begun, self._load.server.resident_bytes))

    async def _figures(self, seconds: float) -> None:
        options, counts, findings = self._load.options, self.counts, self._load.findings
        add = functools.partial(findings.add, "soak")
        metrics = await self._until_free()
        told = ", ".join(f"{count:,} {what}" for what, count in counts.most_common())
        add("requests of mixed load", sum(counts.values()) - counts["refused for now"], "", note=told)
        # The last requests begin at the end of the time: they may take what they take.
        add("seconds that they took", seconds, "s", aim=1.02 * options.soak)
        compared = counts["right"] + counts["wrong"]
        add("answers that differ from the engine's alone", counts["wrong"], f"of {compared:,}", aim=0)
        add("answers that did not come", counts["lost"], "", aim=0)
        add("bad requests that were not refused as such", counts["refused wrongly"], "", aim=0)
        add("time to first token, p95", milliseconds(self._firsts), "ms")
        left = metrics["num_requests_running"] + metrics["num_requests_waiting"]
        add("slots that are taken afterwards", left, "", aim=0)
        growth, first, last = growth_of_memory(self._memory)
        note = f"{first / 1e6:.0f} MB, in the end {last / 1e6:.0f} MB"
        add("growth of resident memory after the first minute", growth, "%", aim=_FLAT, note=note)
        findings.series["memory"] = [[round(when, 1), int(size)] for when, size in self._memory]
        findings.series["soak"] = rounds(self._firsts)

    async def _until_free(self) -> dict[str, float]:
        """The metrics, once nothing runs or waits any more or `_FREE` seconds are over."""
        until = time.perf_counter() + _FREE
        while True:
            metrics = await self._load.client.metrics()
            if not metrics["num_requests_running"] + metrics["num_requests_waiting"] or time.perf_counter() > until:
                return metrics
            await asyncio.sleep(0.2)


def growth_of_memory(samples: Sequence[tuple[float, float]]) -> tuple[float, float, float]:
    """(growth in per cent, bytes after the first minute, bytes in the end), medians over a tenth of the time.

    Of a load that is shorter than ten minutes the first tenth counts as the first minute.
    """
    times, sizes = np.array(samples).T
    settled, tenth = min(_SETTLED, times[-1] / 10), times[-1] / 10
    first = float(np.median(sizes[(times >= settled) & (times <= settled + tenth)]))
    last = float(np.median(sizes[times >= times[-1] - tenth]))
    return 100 * (last / first - 1), first, last
