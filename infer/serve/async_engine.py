"""The engine beside an event loop: one thread makes the turns, and answers arrive as asynchronous iterators.

The loop's own thread never waits for the device. Submitting and cancelling leave a word for the engine's thread; what a
turn gave comes back in one call into the loop.
"""

from __future__ import annotations

import asyncio
import collections
import concurrent.futures
import dataclasses
import itertools
import logging
import os
import threading
import time
from collections.abc import Callable

from dsvl2_jax import fields
from dsvl2_jax.errors import DSVL2Error, UsageError
from dsvl2_jax.fields import Problem, setting
from dsvl2_jax.infer.buckets import cache_bucket
from dsvl2_jax.infer.constraints import GrammarCompiler
from dsvl2_jax.infer.engine import SLOTS, Model
from dsvl2_jax.infer.request import Delta, FailedError, RefusedError, Request
from dsvl2_jax.infer.scheduler import Event, Scheduler
from dsvl2_jax.infer.serve.turns import Turns, Word
from dsvl2_jax.infer.slots import PAGE
from dsvl2_jax.infer.speculation import MAX_DRAFTS
from dsvl2_jax.inputs.tile_budget import MAX_TILES
from dsvl2_jax.messages import first_line
from dsvl2_jax.runtime import processes
from dsvl2_jax.runtime.timing import compile_log

log = logging.getLogger("dsvl2.serve.engine")

_FAILURES = 3  # of the device, one after the other without an answer between them, that are taken for its end


@dataclasses.dataclass(frozen=True)
class EngineOptions:
    """How much an engine takes on.

    Attributes:
      slots: answers that grow at a time.
      speculate: the most tokens that a step drafts for an answer; see `dsvl2_jax.infer.speculation`.
      prefix_bytes: of device memory for the beginnings of prompts. feature_bytes: for pictures' features.
      max_queue: requests that may wait; max_queued_tokens: their prompts and answers together.
      max_tiles: of one request's pictures, global views included.
      max_image_tiles: local tiles that a request may ask for of one picture; None: the checkpoint's largest number.
      max_wait: seconds that a request may wait for a slot.
      hang_timeout: seconds without an answer from the device after which it is taken for dead.

    Raises:
      UsageError: a value is out of range; all of them are listed.
    """

    slots: int = setting(SLOTS, least=1)
    speculate: int = setting(0, least=0, most=MAX_DRAFTS)
    prefix_bytes: int = setting(1 << 30, least=0)
    feature_bytes: int = setting(1 << 30, least=0)
    max_queue: int = setting(256, least=0)
    max_queued_tokens: int = setting(1 << 20, least=1)
    max_tiles: int = setting(64, least=1)
    max_image_tiles: int | None = setting(None, least=1, most=MAX_TILES)
    max_wait: float = setting(120.0, above=0)
    hang_timeout: float = setting(300.0, above=0)

    def __post_init__(self) -> None:
        problems = fields.check(self)
        fields.refuse((Problem((f"--{p.path[0].replace('_', '-')}",), p.text) for p in problems), UsageError)


class Answer:
    """One answer as it grows: an asynchronous iterator of `Delta`, for the loop in which it was asked for.

    Attributes:
      request: what was asked.
      prompt_tokens, image_tokens: of the prompt.
      cached_tokens: prompt tokens that were not computed again; known once the first delta is there.
      timing: seconds: ``queue``, ``prefill``, ``first_token`` (both together) and ``decode``, as they become known.
    """

    def __init__(self, engine: AsyncEngine, number: int, request: Request):
        self.request = request
        self.prompt_tokens = len(request.inputs.input_ids)
        self.image_tokens = int(request.inputs.image_mask.sum())
        self.cached_tokens = 0
        self.timing: dict[str, float] = {}
        self.number = number
        self._engine = engine
        self._arrived: collections.deque[Delta | DSVL2Error] = collections.deque()
        self._more = asyncio.Event()
        self.ended = False

    def cancel(self) -> None:
        """Nothing more is wanted of it; its slot is free for the next request within one group of steps."""
        if not self.ended:
            self.ended = True
            self._engine.forget(self)
        self._more.set()

    def push(self, news: Delta | DSVL2Error) -> None:
        """Called by the engine, in the loop."""
        self.ended |= isinstance(news, DSVL2Error) or news.finish_reason is not None
        self._arrived.append(news)
        self._more.set()

    def __aiter__(self) -> Answer:
        return self

    async def __anext__(self) -> Delta:
        while not self._arrived:
            if self.ended:
                raise StopAsyncIteration
            self._more.clear()
            await self._more.wait()
        news = self._arrived.popleft()
        if isinstance(news, DSVL2Error):
            raise news
        return news


def follow(model: Model, options: EngineOptions, grammars: GrammarCompiler | None) -> None:
    """What the other processes do while the `AsyncEngine` of process 0 serves; all of them have the same options."""
    scheduler = make_scheduler(model, options)
    scheduler.executor.warm_up(_tile_counts(model, options), lambda text: None)
    Turns(scheduler, grammars).follow()


def make_scheduler(model: Model, options: EngineOptions) -> Scheduler:
    """For answers of any length that the context allows."""
    context = model.context
    return Scheduler(
        model,
        model.whole_slots(options.slots),
        cache_bucket(context, PAGE, context),
        prefix_bytes=options.prefix_bytes,
        feature_bytes=options.feature_bytes,
        drafts=options.speculate,
    )


def _tile_counts(model: Model, options: EngineOptions) -> range:
    """Tiles of the pictures that may come: two at least, the global view and one local; not more than the context."""
    fitting = model.context // model.config.tokens_per_tile
    return range(2, min(options.max_tiles, 1 + max_image_tiles(model, options), fitting) + 1)


def max_image_tiles(model: Model, options: EngineOptions) -> int:
    """The most local tiles that a request may ask for of one picture."""
    asked = options.max_image_tiles
    return model.processor.config.largest if asked is None else asked


class AsyncEngine:
    """`Scheduler` in a thread of its own.

    Attributes:
      model: the model that answers.
      pool: threads for work that the loop must not wait for: tokenising, and pictures.
      health: "starting", "ok", "recovering" (the device failed, its caches are being made anew), "stopping", or
        "failed" (it hangs or keeps failing: the process should end).
    """

    def __init__(self, model: Model, options: EngineOptions):
        self.model = model
        self.options = options
        self.pool = concurrent.futures.ThreadPoolExecutor(max(2, os.cpu_count() or 1), "dsvl2-inputs")
        self._scheduler = make_scheduler(model, options)
        self._state = "starting"
        self._turns = Turns(self._scheduler)
        self._words: list[Word] = []  # for the thread
        self._wake = threading.Condition()
        self._answers: dict[int, Answer] = {}  # by number, until they end; the loop's alone
        self._waiting: dict[int, int] = {}  # number of what has no token yet → its tokens; the loop's alone
        self._numbers = itertools.count(1)
        self._turn_began: float | None = None
        self._end, self._deadline = False, 0.0
        self._thread = threading.Thread(target=self._run, name="dsvl2-engine", daemon=True)
        self._seconds = 1.0  # that an answer takes, about
        self._recoveries = 0
        self._warm_compilations = 0

    @property
    def max_image_tiles(self) -> int:
        """The most local tiles that a request may ask for of one picture."""
        return max_image_tiles(self.model, self.options)

    @property
    def health(self) -> str:
        began = self._turn_began
        if began is not None and time.perf_counter() - began > self.options.hang_timeout:
            self._state = "failed"
        return self._state

    async def start(self, say: Callable[[str], None] = lambda text: None) -> None:
        """Compiles every program, then takes requests.

        Args:
          say: told what is being compiled, in the loop.
        """
        self._loop = asyncio.get_running_loop()
        counts = _tile_counts(self.model, self.options)

        def warm_up() -> None:
            self._scheduler.executor.warm_up(counts, lambda text: self._loop.call_soon_threadsafe(say, text))

        await asyncio.wrap_future(concurrent.futures.ThreadPoolExecutor(1, "dsvl2-warm-up").submit(warm_up))
        self._warm_compilations = compile_log().count
        self._state = "ok"
        self._thread.start()

    def check_tiles(self, tiles: int) -> None:
        """Raises RefusedError for a prompt with more tiles than a request may have."""
        if tiles > self.options.max_tiles:
            raise RefusedError(
                f"the pictures have {tiles} tiles, but a request may have {self.options.max_tiles}; "
                "send fewer, smaller or less elongated ones, or a lower max_tiles.",
                413,
            )

    def submit(self, request: Request) -> Answer:
        """Asks for an answer; called in the loop.

        Raises:
          RefusedError: the engine does not take the request, now or ever.
          ConversationError: the prompt does not fit the context.
        """
        state = self.health
        if state != "ok":
            raise RefusedError(f"the server is {state}; try again later.", 503, retry_after=5.0)
        self.model.check_context(request.inputs)
        self.check_tiles(len(request.inputs.tiles))
        tokens = self.model.last_position(request)
        queued = sum(self._waiting.values()) + tokens
        free = self._scheduler.rows.count(None) - len(self._waiting)
        if free <= 0 and (len(self._waiting) >= self.options.max_queue or queued > self.options.max_queued_tokens):
            seconds = self._seconds * (len(self._waiting) + 1) / len(self._scheduler.rows)
            raise RefusedError(
                f"{len(self._waiting)} requests are waiting already; try again in {seconds:.0f} seconds.",
                429,
                retry_after=max(1.0, round(seconds)),
            )
        answer = Answer(self, next(self._numbers), request)
        self._answers[answer.number] = answer
        self._waiting[answer.number] = tokens
        self._tell(Word(answer.number, request))
        return answer

    def forget(self, answer: Answer) -> None:
        """Cancels an answer; called in the loop."""
        self._waiting.pop(answer.number, None)
        self._answers.pop(answer.number, None)
        self._tell(Word(answer.number))

    def _tell(self, word: Word) -> None:
        with self._wake:
            self._words.append(word)
            self._wake.notify()

    async def stop(self, timeout: float) -> None:
        """Takes nothing new, lets what runs end within ``timeout`` seconds, and cuts off what has not."""
        if self._state != "failed":
            self._state = "stopping"
        if not self._thread.is_alive():
            self.pool.shutdown(wait=False, cancel_futures=True)
            return
        with self._wake:
            self._end = True
            self._deadline = time.perf_counter() + timeout
            self._wake.notify()
        await asyncio.to_thread(self._thread.join, timeout + 2 * self.options.hang_timeout)
        self.pool.shutdown(wait=False, cancel_futures=True)

    def statistics(self) -> dict[str, float]:
        """Gauges and counters by name, for /metrics."""
        scheduler = self._scheduler
        running = [ticket for ticket in list(scheduler.rows) if ticket is not None]
        positions = len(scheduler.rows) * scheduler.executor.cache_length
        return {
            "num_requests_running": len(running),
            "num_requests_waiting": len(self._waiting),
            "kv_cache_usage_perc": sum(ticket.limit for ticket in running) / positions,
            "prefix_cache_queries": scheduler.prompt_tokens,
            "prefix_cache_hits": scheduler.cached_tokens,
            "mm_cache_queries": scheduler.features.queries,
            "mm_cache_hits": scheduler.features.hits,
            "tiles": scheduler.tiles,
            "spec_decode_num_draft_tokens": scheduler.drafted,
            "spec_decode_num_accepted_tokens": scheduler.accepted,
            "compilations": compile_log().count,
            "recoveries": self._recoveries,
        }

    @property
    def compiled_since_ready(self) -> int:
        return compile_log().count - self._warm_compilations

    # The engine's thread

    def _run(self) -> None:
        failures = 0
        while True:
            words = self._next_words()
            idle = self._scheduler.idle and not words
            if self._end and (idle or time.perf_counter() > self._deadline):
                break
            if idle:
                continue
            self._turn_began = time.perf_counter()
            try:
                for events in self._turns.make(words + self._late()):
                    self._hand_over(events)
                    failures = 0 if events else failures
            except Exception as error:
                failures += 1
                log.error("the device failed: %s: %s", type(error).__name__, first_line(error))
                events = self._recover(failures)
                if events is None:
                    return
                self._hand_over(events)
            self._turn_began = None
        self._cut_off("the server has been stopped.")
        self._turns.end()

    def _next_words(self) -> list[Word]:
        """What came since the last turn; waits a moment when there is nothing else to do."""
        with self._wake:
            if not self._words and self._scheduler.idle and not self._end:
                self._wake.wait()
            words, self._words = self._words, []
        return words

    def _late(self) -> list[Word]:
        """Ends what has waited for a slot too long."""
        now = time.perf_counter()
        late = {
            number: ticket
            for number, ticket in self._turns.tickets.items()
            if "begun" not in ticket.times and now - ticket.times["submitted"] > self.options.max_wait
        }
        message = f"no slot became free within {self.options.max_wait:.0f} seconds; try again later."
        for ticket in late.values():
            ticket.error = RefusedError(message, 429, retry_after=max(1.0, round(self._seconds)))
        self._hand_over([(number, (ticket, None)) for number, ticket in late.items()])
        return [Word(number) for number in late]

    def _recover(self, failures: int) -> list[tuple[int, Event]] | None:
        """Makes caches and slots anew. None: that is no use any more."""
        error = FailedError("the device failed while it computed this answer; try again.", 503)
        self._state = "recovering" if self._state == "ok" else self._state
        # Several processes do not fail at the same point of their turns: they are started again together.
        if failures < _FAILURES and not processes.joined():
            try:
                events = self._turns.reset(error)
                self._recoveries += 1
                self._state = "ok" if self._state == "recovering" else self._state
                return events
            except Exception as again:
                log.error("the device cannot be brought back: %s: %s", type(again).__name__, first_line(again))
        self._state = "failed"
        self._cut_off("the device failed, and could not be brought back.")
        return None

    def _cut_off(self, message: str) -> None:
        """Ends all that is not done, with an error."""
        events: list[tuple[int, Event]] = []
        for number, ticket in list(self._turns.tickets.items()):
            ticket.error = FailedError(message, 503)
            events.append((number, (ticket, None)))
        self._hand_over(events)

    def _hand_over(self, events: list[tuple[int, Event]]) -> None:
        if events:
            self._loop.call_soon_threadsafe(self._push, events)

    # In the loop

    def _push(self, events: list[tuple[int, Event]]) -> None:
        for number, (ticket, delta) in events:
            self._waiting.pop(number, None)
            answer = self._answers.get(number)
            if answer is None:
                continue
            times = ticket.times
            answer.cached_tokens = ticket.cached_tokens
            if "first_token" in times:
                answer.timing["queue"] = times["begun"] - times["submitted"]
                answer.timing["prefill"] = times["first_token"] - times["begun"]
                answer.timing["first_token"] = times["first_token"] - times["submitted"]
            if "done" in times:
                answer.timing["decode"] = times["done"] - times["first_token"]
                self._seconds += 0.1 * (times["done"] - times["begun"] - self._seconds)
            answer.push(ticket.error if delta is None else delta)
            if answer.ended:
                del self._answers[number]
