"""What the parts of `dsvl2 bench serve` share: the server under load, ways to ask, and what it takes when it is idle.

Tested in tests/apps/bench/test_serve.py.
"""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence

from dsvl2_jax.apps.bench.serve_client import CHAT, COMPLETIONS, Client, Reply
from dsvl2_jax.apps.bench.serve_figures import Findings, middle
from dsvl2_jax.apps.bench.serve_options import ServeLoad
from dsvl2_jax.apps.bench.serve_process import ServerProcess
from dsvl2_jax.apps.bench.serve_requests import Body, Requests, fixed_length, streamed
from dsvl2_jax.errors import DSVL2Error
from dsvl2_jax.infer.slots import PAGE

_RAMP = 0.2  # of the measured time, before it: answers begin at different times then


@dataclasses.dataclass
class ClosedLoop:
    """Clients that each ask again as soon as they have their answer, and what came within the measured time.

    It ends at ``end``, or where the server is slow, when each client has had an answer, and one of them two.
    """

    clients: int
    begin: float
    end: float
    replies: list[Reply] = dataclasses.field(default_factory=list)
    _over: bool = False

    def over(self) -> bool:
        """Whether nobody should ask any more; fixes the measured time's end."""
        now = time.perf_counter()
        if self._over or now < self.end:
            return self._over
        self._over = sum(reply.ended >= self.begin for reply in self.replies) > self.clients
        self.end = max(self.end, now)
        return self._over

    def _per_second(self, count: int) -> float:
        return count / (self.end - self.begin)

    @property
    def tokens_per_second(self) -> float:
        within = (
            count
            for reply in self.replies
            for when, count in zip(reply.times, reply.counts, strict=True)
            if self.begin <= when < self.end
        )
        return self._per_second(sum(within))

    @property
    def requests_per_second(self) -> float:
        return self._per_second(sum(self.begin <= reply.ended < self.end for reply in self.replies))

    @property
    def first_tokens(self) -> list[float]:
        """Seconds to the first token of what was asked within the measured time."""
        return [reply.first_token_seconds for reply in self.replies if self.begin <= reply.sent < self.end]

    @property
    def per_token(self) -> list[float]:
        values = (reply.seconds_per_token for reply in self.replies if self.begin <= reply.sent < self.end)
        return [value for value in values if value is not None]


class Load:
    """One server, one client, and what was found so far.

    Attributes:
      requests: makes what is asked.
      context: the most tokens of a prompt and its answer.
      compiled: programs that the server had compiled when it was ready.
    """

    def __init__(
        self,
        server: ServerProcess,
        client: Client,
        options: ServeLoad,
        requests: Requests,
        context: int,
        findings: Findings,
    ):
        self.server, self.client, self.options, self.requests = server, client, options, requests
        self.context, self.findings = context, findings
        self._loops: dict[int, ClosedLoop] = {}
        self._known: dict[str, list[float]] = {}

    async def begin(self) -> None:
        """Has every way of asking tried once."""
        self.compiled = (await self.client.metrics())["compilations_total"]
        for body in (self.requests.about_text(self.options.input_tokens), self.requests.about_picture()):
            await self.ask(fixed_length(body, self.options.output_tokens))

    async def ask(self, body: Body, path: str = CHAT) -> Reply:
        """A whole streamed answer. Raises DSVL2Error when there is none."""
        return self.expect(await self.client.stream(path, streamed(body)))

    async def ask_tokens(self, prompt_tokens: int, output_tokens: int) -> Reply:
        """The same to a new prompt of exactly so many tokens, all of them text."""
        return await self.ask(self.of_tokens(prompt_tokens, output_tokens), COMPLETIONS)

    def of_tokens(self, prompt_tokens: int, output_tokens: int) -> Body:
        """A request for a completion of a new prompt of exactly so many tokens."""
        return fixed_length({"prompt": self.requests.token_ids(prompt_tokens)}, output_tokens)

    def expect(self, reply: Reply) -> Reply:
        """Raises DSVL2Error for an answer that did not come whole."""
        if not reply.whole:
            self.server.check()
            why = reply.broken or reply.error or "it ended too early"
            raise DSVL2Error(f"{self.server.address}: no answer (HTTP {reply.status or 'no status'}): {why}")
        return reply

    def mixed(self) -> Iterator[tuple[str, Body]]:
        """(kind, request) of answers that all have the same length."""
        for kind, body in self.requests.mixed(self.options.picture_share, self.options.input_tokens):
            yield kind, fixed_length(body, self.options.output_tokens)

    async def closed_loop(self, clients: int) -> ClosedLoop:
        """So many clients with the mixed load; measured once."""
        if clients not in self._loops:
            bodies, seconds = self.mixed(), self.options.seconds
            begin = time.perf_counter() + _RAMP * seconds
            loop = ClosedLoop(clients, begin, begin + seconds)

            async def work() -> None:
                while not loop.over():
                    _, body = next(bodies)
                    loop.replies.append(await self.ask(body))

            await together(work() for _ in range(clients))
            self._loops[clients] = loop
        return self._loops[clients]

    async def own_seconds(self, kind: str) -> float:
        """Seconds that the server needs to encode and prefill one request of a kind of `mixed` when it is idle."""

        async def asked() -> float:
            body = next(body for of, body in self.mixed() if of == kind)
            return await self._prefill_seconds(fixed_length(body, 1), CHAT)

        return await self._median(f"own {kind}", asked)

    async def prefill_seconds(self, tokens: int) -> float:
        """Seconds that a prompt of so many tokens takes when nothing else runs."""

        async def asked() -> float:
            return await self._prefill_seconds(self.of_tokens(tokens, 1), COMPLETIONS)

        return await self._median(f"prefill {tokens}", asked)

    async def _median(self, name: str, measure: Callable[[], Awaitable[float]]) -> float:
        if name not in self._known:
            self._known[name] = [await measure() for _ in range(self.options.trials)]
        return middle(self._known[name])

    async def _prefill_seconds(self, body: Body, path: str) -> float:
        name = "request_prefill_time_seconds_sum"
        before = (await self.client.metrics())[name]
        await self.ask(body, path)
        return (await self.client.metrics())[name] - before

    async def chunk_seconds(self, *, last: bool) -> float:
        """Seconds of a prompt's first chunk of `PAGE` tokens; last: of a long prompt's last one, which reads most."""
        long = self.long_prompt(1)
        if not last:
            return await self.prefill_seconds(min(PAGE, long))
        begins = (long - 1) // PAGE * PAGE  # of the last chunk
        whole = await self.prefill_seconds(long)
        before = await self.prefill_seconds(begins) if begins else 0.0
        # The last one takes no less than the mean of all; where the machine is not quiet, the difference may.
        return max(whole - before, whole / (begins // PAGE + 1))

    async def group_seconds(self, *, long: bool) -> float:
        """Median seconds between two pieces of an answer when all slots write and nothing else is done.

        Args:
          long: one of the prompts is so long that all of the cache is read.
        """
        name = f"group {long}"
        if name not in self._known:
            tokens = min(128, self.context // 8)
            sizes = [self.long_prompt(tokens) if long else 32, *[32] * (self.options.slots - 1)]
            replies = await together(self.ask_tokens(size, tokens) for size in sizes)
            begun, over = max(reply.times[0] for reply in replies), min(reply.times[-1] for reply in replies)
            within = [seconds for reply in replies for when, seconds in reply.gaps if begun < when - seconds < over]
            # Where the last one began after the first one's end, the answers were too short to meet.
            self._known[name] = within or [seconds for reply in replies for _, seconds in reply.gaps]
        return middle(self._known[name])

    def long_prompt(self, output_tokens: int) -> int:
        """Tokens of a long prompt that leaves room for an answer."""
        return min(self.options.long_tokens, self.context - output_tokens)


async def together(work: Iterator[Awaitable] | Sequence[Awaitable]) -> list:
    """The results of all; after the first failure the others are cancelled."""
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(one) for one in work]
    return [task.result() for task in tasks]


def rounds(values: Sequence[float]) -> list[float]:
    """Values as they are drawn: seconds to a tenth of a millisecond."""
    return [round(value, 4) for value in itertools.islice(values, 20_000)]
