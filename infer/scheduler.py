"""Continuous batching: answers join and leave between groups of decode steps (Orca, OSDI 2022).

A turn is at most one picture encoded or one chunk of a prompt prefilled, and one group of decode steps, a short one
while somebody could begin. The next turn's work is given to the device before the last one's results are fetched, so
that neither waits for the other.

What is done depends on the requests and their order alone, never on the clock: processes that share a model all make
the same turns.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import hashlib
import itertools
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from dsvl2_jax.errors import DSVL2Error
from dsvl2_jax.infer.adapters import BASE, Adapters
from dsvl2_jax.infer.answer import AnswerBuilder
from dsvl2_jax.infer.constraints import ConstraintError
from dsvl2_jax.infer.executor import Executor, LoadedModel
from dsvl2_jax.infer.request import Delta, FailedError, Request, image_tiles
from dsvl2_jax.infer.slots import GROUP, PAGE, Steps
from dsvl2_jax.infer.stores import Store
from dsvl2_jax.inputs.processor import ModelInputs
from dsvl2_jax.runtime.timing import Timing

_SHORT_PROMPT = 2  # turns that a prompt may take for which groups are shortened


@dataclasses.dataclass(eq=False)
class Ticket:
    """One request on its way.

    Attributes:
      answer: what there is of it so far.
      error: why it ended without an answer.
      done: nothing more will come.
      cached_tokens: of the prompt, tokens that were not computed again.
      times: when it was submitted, when its prefill began, and when its first token and its end were known, by
        `time.perf_counter`.
    """

    request: Request
    answer: AnswerBuilder
    limit: int  # the last position that a token of the answer may have
    error: DSVL2Error | None = None
    done: bool = False
    cached_tokens: int = 0
    times: dict[str, float] = dataclasses.field(default_factory=dict)
    given: int = 0  # decode steps whose tokens are not fetched yet
    drafted: int = 0  # tokens that were proposed
    accepted: int = 0  # those of them that the answer has
    allowed: np.ndarray | None = (
        None  # bool[V], what a grammar allows next; None: nothing is known before a token comes
    )

    def __post_init__(self) -> None:
        self.matcher = None if self.request.grammar is None else self.request.grammar.matcher()
        self.allowed = None if self.matcher is None else self.matcher.mask()

    @property
    def length(self) -> int:
        return len(self.request.inputs.input_ids)

    def position(self, tokens_a_step: int = 1) -> int:
        """The newest token's, if each step that was given has made so many."""
        known = self.length + max(len(self.answer.tokens) - 1, 0)
        return min(known + self.given * tokens_a_step, self.limit)

    def follow_grammar(self, tokens: Sequence[int]) -> None:
        """Looks at the answer's new tokens, and at what may come next."""
        for token in tokens:
            self.matcher.advance(token)
        self.answer.stopped = self.matcher.finished
        self.allowed = None if self.answer.stopped else self.matcher.mask()


@dataclasses.dataclass
class _Prefill:
    """The prompt that is being prefilled."""

    ticket: Ticket
    slot: int
    start: int  # tokens that are in the row
    pages: list[bytes]  # keys of its full pages
    first_tiles: np.ndarray  # of each picture, among the prompt's tiles
    pictures: collections.deque[int]  # whose features are to be placed yet


class _Row(NamedTuple):
    """What steps are about."""

    row: int  # in the steps
    slot: int
    ticket: Ticket
    budget: int  # decode steps that the ticket was given


Event = tuple[Ticket, Delta | None]  # None: the ticket's error says why it ended


class FairQueue:
    """Requests that wait: owners in turn, the oldest first within one."""

    def __init__(self) -> None:
        self._by_owner: collections.OrderedDict[str, collections.deque[Ticket]] = collections.OrderedDict()

    def __len__(self) -> int:
        return sum(map(len, self._by_owner.values()))

    def __iter__(self) -> Iterator[Ticket]:
        return (ticket for waiting in self._by_owner.values() for ticket in waiting)

    def push(self, ticket: Ticket) -> None:
        self._by_owner.setdefault(ticket.request.owner, collections.deque()).append(ticket)

    def pop(self) -> Ticket:
        owner, waiting = next(iter(self._by_owner.items()))
        ticket = waiting.popleft()
        del self._by_owner[owner]
        if waiting:
            self._by_owner[owner] = waiting  # behind the others
        return ticket

    def remove(self, ticket: Ticket) -> bool:
        """False: it does not wait."""
        waiting = self._by_owner.get(ticket.request.owner, ())
        if ticket not in waiting:
            return False
        waiting.remove(ticket)
        if not waiting:
            del self._by_owner[ticket.request.owner]
        return True


class Scheduler:
    """Decides what the device does next, and makes answers of what it gives.

    Args:
      model: to answer with.
      slots: rows that decode together.
      cache_length: positions of each, a multiple of `PAGE` that holds every prompt with its answer.
      prefix_bytes: of prompts' pages that are kept on the device, besides the slots.
      feature_bytes: of pictures' features that are kept there.
      chunk: tokens of a prompt to prefill at a time, at most `PAGE`.
      timing: filled with the seconds of encode, prefill, decode and compile; each is then waited for.
      drafts: the most tokens that a step drafts for an answer (see `dsvl2_jax.infer.speculation`); 0: none.
    """

    def __init__(
        self,
        model: LoadedModel,
        slots: int,
        cache_length: int,
        *,
        prefix_bytes: int = 0,
        feature_bytes: int = 0,
        chunk: int = PAGE,
        timing: Timing | None = None,
        drafts: int = 0,
    ):
        self.model = model
        self.executor = Executor(model, slots, cache_length, drafts)
        self.chunk = chunk
        # The largest position that a token may have: a chunk that begins within a page may reach into the next one.
        self.last_position = cache_length - (0 if chunk == PAGE else PAGE)
        self.timing = timing
        self.queue = FairQueue()
        self.rows: list[Ticket | None] = [None] * slots
        self.pages = Store(prefix_bytes, self.executor.drop_page)
        self.features = Store(feature_bytes, self.executor.drop_features)
        # How much was done: tiles encoded; prompt tokens, and those of them that kept pages had.
        self.tiles = self.prompt_tokens = self.cached_tokens = 0
        self.drafted = self.accepted = 0  # tokens that were proposed; those of them that answers have
        self._prefill: _Prefill | None = None
        self._given: list[tuple[Steps, list[_Row]]] = []  # not fetched

    @property
    def idle(self) -> bool:
        return not (self.queue or self._prefill or self._given or any(self.rows))

    def submit(self, request: Request) -> Ticket:
        """Queues a request. Raises ConversationError when its prompt does not fit the context."""
        self.model.check_context(request.inputs)
        count = 0 if self.model.adapters is None else len(self.model.adapters.names)
        if not BASE <= request.adapter < count:
            raise ValueError(f"the request is for adapter {request.adapter}, but the model has {count}")
        length = len(request.inputs.input_ids)
        new_tokens = min(request.max_new_tokens, self.model.context - length + 1)
        ticket = Ticket(request, AnswerBuilder(self.model.processor, request.sampling), length + new_tokens - 1)
        if ticket.limit > self.last_position:
            raise ValueError(f"an answer may end at position {ticket.limit}, but the cache has {self.last_position}")
        ticket.times["submitted"] = time.perf_counter()
        self.queue.push(ticket)
        return ticket

    def cancel(self, ticket: Ticket) -> None:
        """Ends a request at once: nothing more comes of it, and its slot is free for the next."""
        if ticket.done:
            return
        ticket.done = True
        if self.queue.remove(ticket):
            return
        if self._prefill is not None and self._prefill.ticket is ticket:
            self.rows[self._prefill.slot] = None
            self._prefill = None
        elif ticket in self.rows:
            self.rows[self.rows.index(ticket)] = None

    def turn(self) -> list[Event]:
        """Gives the device its next work, then fetches what the turn before gave it."""
        return [event for events in self.advance() for event in events]

    def advance(self) -> Iterator[list[Event]]:
        """A turn whose events come as soon as each program has ended: a first token does not wait for a group."""
        fetched, self._given = self._given, []
        self._advance_prefill()
        self._decode()
        for steps, rows in fetched:
            yield self._receive(self.executor.fetch(steps), rows)

    def reset(self, error: DSVL2Error) -> list[Event]:
        """After a failure of the device: what was running has failed, what waits stays."""
        running = [ticket for ticket in self.rows if ticket is not None]
        self.rows = [None] * len(self.rows)
        self._prefill, self._given = None, []
        self.pages.clear()
        self.features.clear()
        self.executor.reset()
        for ticket in running:
            ticket.done, ticket.error = True, error
        return [(ticket, None) for ticket in running]

    # Prefill

    def _advance_prefill(self) -> None:
        if self._prefill is None and self.queue and None in self.rows:
            self._prefill = self._begin(self.queue.pop(), self.rows.index(None))
        job = self._prefill
        if job is None:
            return
        while job.pictures:
            with self._phase("encode"):
                if self._place(job, job.pictures.popleft()):
                    return
        request, end = job.ticket.request, min(job.start + self.chunk, job.ticket.length)
        chunk = request.inputs.input_ids[job.start : end], request.inputs.image_index[job.start : end]
        with self._phase("prefill"):
            self.executor.prefill(*chunk, job.start, len(request.inputs.input_ids), request.adapter)
            page = job.start // PAGE
            whole = job.pages and end - job.start == PAGE and job.pages[page] not in self.pages
            if whole and self.pages.make_room(job.pages[page], self.executor.page_bytes):
                self.executor.take_page(job.pages[page], page)
            job.start = end
            if end == job.ticket.length:
                self._insert(job)

    def _begin(self, ticket: Ticket, slot: int) -> _Prefill:
        ticket.times["begun"] = time.perf_counter()
        self.rows[slot] = ticket
        request, per_tile = ticket.request, self.model.config.tokens_per_tile
        pages = self._page_keys(request) if self.pages.capacity and self.chunk == PAGE else []
        start = 0
        self.executor.new_row()
        # The last token is computed in any case: its logits are needed.
        for key in pages[: (ticket.length - 1) // PAGE]:
            if not self.pages.touch(key):
                break
            self.executor.put_page(key, start // PAGE)
            start += PAGE
        ticket.cached_tokens = start
        self.prompt_tokens += ticket.length
        self.cached_tokens += start
        first_tiles = _first_tiles(request.inputs)
        tiles = request.inputs.image_index[start:] // per_tile
        pictures = np.unique(np.searchsorted(first_tiles, tiles[tiles >= 0], side="right") - 1)
        return _Prefill(ticket, slot, start, pages, first_tiles, collections.deque(pictures.tolist()))

    def _place(self, job: _Prefill, picture: int) -> bool:
        """Puts a picture's features where its prompt needs them; returns whether they had to be computed."""
        request = job.ticket.request
        key = picture_keys(request, self.model.adapters)[picture]
        first_tile = int(job.first_tiles[picture])
        if self.features.touch(key):
            self.executor.place(key, first_tile)
            return False
        tiles = image_tiles(request.inputs)[picture]
        self.executor.encode(key, tiles, request.adapter)
        self.tiles += len(tiles)
        self.executor.place(key, first_tile)
        if not self.features.make_room(key, self.executor.feature_bytes(len(tiles))):
            self.executor.drop_features(key)
        return True

    def _insert(self, job: _Prefill) -> None:
        ticket, request = job.ticket, job.ticket.request
        ids, sampling = request.inputs.input_ids, request.sampling
        is_text = ~request.inputs.image_mask
        chosen = sampling, request.choice, ticket.allowed, request.adapter
        step = self.executor.insert(job.slot, ids, is_text, ticket.limit, *chosen)
        ticket.allowed = None
        self._given.append((step, [_Row(0, job.slot, ticket, 0)]))
        self._prefill = None

    # Decode

    def _group(self) -> int:
        """Steps of the next group.

        Half of `GROUP` while a slot is free, for who comes meanwhile waits for it; a quarter or less while short
        prompts could be in slots already. A long prompt waits for its own chunks most of all, and shortens nothing.
        """
        upcoming = [] if self._prefill is None else [self._prefill.ticket]
        upcoming += itertools.islice(self.queue, self.rows.count(None))
        if not upcoming:
            return GROUP // 2 if None in self.rows else GROUP
        short = len(list(itertools.takewhile(self._is_short, upcoming)))
        return max(1, GROUP // (4 * short)) if short else GROUP

    def _is_short(self, ticket: Ticket) -> bool:
        """Whether a prompt takes few turns, though nothing is kept of it."""
        turns = len(ticket.request.image_digests) + -(-ticket.length // self.chunk)
        return turns <= _SHORT_PROMPT

    def _decode(self) -> None:
        group = self._group()
        prefilling = None if self._prefill is None else self._prefill.slot
        rows: list[_Row] = []
        for slot, ticket in enumerate(self.rows):
            if ticket is None or slot == prefilling or ticket.position() >= ticket.limit:
                continue
            if ticket.matcher is None:
                rows.append(_Row(slot, slot, ticket, group))
            elif ticket.allowed is not None:
                rows.append(_Row(slot, slot, ticket, 1))
        if not rows:
            return
        allowed = None
        if any(row.ticket.matcher is not None for row in rows):
            allowed = np.ones((len(self.rows), self.model.config.language.vocab_size), np.bool_)
        budget, may_draft = np.zeros(len(self.rows), np.int32), np.zeros(len(self.rows), np.bool_)
        for _, slot, ticket, steps in rows:
            budget[slot], may_draft[slot] = steps, ticket.matcher is None
            ticket.given += steps
            if ticket.matcher is not None:
                allowed[slot], ticket.allowed = ticket.allowed, None
        needed = max(row.ticket.position(1 + self.executor.drafts) for row in rows)
        top = any(row.ticket.request.top_logprobs is not None for row in rows)
        with self._phase("decode"):
            steps = self.executor.decode(budget, allowed, needed, top=top, may_draft=may_draft)
            self._given.append((steps, rows))

    # Results

    def _receive(self, steps: Steps, rows: list[_Row]) -> list[Event]:
        events: list[Event] = []
        for row, slot, ticket, budget in rows:
            ticket.given -= budget
            if ticket.done:
                continue
            if steps.drafted is not None:
                self._count_drafts(ticket, int(steps.drafted[row]), int(steps.accepted[row]))
            if steps.failed[row]:
                self._fail(ticket)
                events.append((ticket, None))
            elif count := int(steps.counts[row]):
                try:
                    events.append((ticket, self._extend(ticket, steps, row, count)))
                except ConstraintError as error:
                    ticket.done, ticket.error = True, FailedError(str(error), 400)
                    events.append((ticket, None))
            if ticket.done and self.rows[slot] is ticket:
                self.rows[slot] = None
        return events

    def _count_drafts(self, ticket: Ticket, drafted: int, accepted: int) -> None:
        ticket.drafted, ticket.accepted = ticket.drafted + drafted, ticket.accepted + accepted
        self.drafted, self.accepted = self.drafted + drafted, self.accepted + accepted

    def _extend(self, ticket: Ticket, steps: Steps, row: int, count: int) -> Delta:
        answer, before = ticket.answer, len(ticket.answer.tokens)
        if not before:
            ticket.times["first_token"] = time.perf_counter()
        text = answer.extend(steps.tokens[row, :count], steps.logprobs[row, :count])
        new = answer.tokens[before:]
        if ticket.matcher is not None and not answer.stopped:
            ticket.follow_grammar(new)
        ticket.done = answer.stopped or bool(steps.finished[row])
        if ticket.done:
            text += answer.finish()
            ticket.times["done"] = time.perf_counter()
        wanted, reason = ticket.request.top_logprobs, None
        if ticket.done:
            reason = "stop" if answer.stopped else "length"
        logprobs = answer.logprobs[before:] if wanted is not None else []
        tops = [_most_likely(steps, row, i, wanted) for i in range(len(new))] if wanted else []
        return Delta(text, new, logprobs, tops, reason)

    def _fail(self, ticket: Ticket) -> None:
        """Ends a request whose numbers are none, and forgets what was kept of it."""
        ticket.done = True
        ticket.error = FailedError("the model computed what is no number (inf or nan) for this request alone.", 500)
        for key in self._page_keys(ticket.request):
            if self.pages.forget(key):
                self.executor.drop_page(key)
        for key in picture_keys(ticket.request, self.model.adapters):
            if self.features.forget(key):
                self.executor.drop_features(key)

    def _page_keys(self, request: Request) -> list[bytes]:
        """As `page_keys`; where positions depend on a prompt's length, its pages are for prompts as long only."""
        stretches = self.model.config.language.stretches(len(request.inputs.input_ids))
        return page_keys(request, self.model.config.tokens_per_tile, self.model.adapters, of_length=stretches)

    @contextlib.contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        """With a timing, the work inside is waited for and its seconds are counted under this name."""
        if self.timing is None:
            yield
            return
        with self.timing.phase(name):
            yield
            self.executor.wait()


def _first_tiles(inputs: ModelInputs) -> np.ndarray:
    """i64[pictures], the first tile of each among the prompt's tiles."""
    return np.cumsum([0, *(1 + inputs.tile_grid.prod(axis=1))])[:-1]


def picture_keys(request: Request, adapters: Adapters | None = None) -> list[bytes]:
    """A key for each picture: its digest, and the adapter with which it is encoded."""
    suffix = b"" if adapters is None else adapters.picture_key(request.adapter)
    return [digest + suffix for digest in request.image_digests]


def page_keys(
    request: Request, tokens_per_tile: int, adapters: Adapters | None = None, *, of_length: bool = False
) -> list[bytes]:
    """A key for each full page of a prompt: a digest of its adapter, tokens and pictures, and of all before it.

    With ``of_length`` of the prompt's length too.
    """
    inputs, pictures = request.inputs, picture_keys(request, adapters)
    first_rows = _first_tiles(inputs) * tokens_per_tile
    key, keys, told = b"" if adapters is None else adapters.text_key(request.adapter), [], 0
    key += b"%d" % len(inputs.input_ids) if of_length else b""
    for start in range(0, len(inputs.input_ids) - PAGE + 1, PAGE):
        page = slice(start, start + PAGE)
        digest = hashlib.sha256(key)
        digest.update(np.ascontiguousarray(inputs.input_ids[page]))
        digest.update(np.ascontiguousarray(inputs.image_index[page]))
        begun = int((first_rows <= inputs.image_index[page].max()).sum())
        for picture in pictures[told:begun]:
            digest.update(picture)
        told = max(told, begun)
        key = digest.digest()
        keys.append(key)
    return keys


def _most_likely(steps: Steps, row: int, step: int, count: int) -> list[tuple[int, float]]:
    """The ``count`` most likely tokens of a step, and their log-probabilities."""
    ids, values = steps.top_ids[row, step, :count], steps.top_logprobs[row, step, :count]
    return list(zip(ids.tolist(), values.tolist(), strict=True))
