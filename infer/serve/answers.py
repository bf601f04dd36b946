"""The answers to one HTTP request: asked for together, awaited in the order in which they grow, cancelled together."""

from __future__ import annotations

import asyncio
import dataclasses
import secrets
import time
from collections.abc import AsyncIterator, Coroutine, Sequence
from typing import Any, TypeVar

from fastapi import Request as HttpRequest

from dsvl2_jax.errors import UsageError
from dsvl2_jax.infer.request import Delta, Request
from dsvl2_jax.infer.serve import logprobs
from dsvl2_jax.infer.serve.errors import ApiError, ClientGoneError
from dsvl2_jax.infer.serve.grammars import Constraint
from dsvl2_jax.infer.serve.models import ServedModel
from dsvl2_jax.infer.serve.prompts import Prompt
from dsvl2_jax.infer.serve.schemas import Sampling
from dsvl2_jax.infer.serve.state import Serving
from dsvl2_jax.inputs.grounding import parse_boxes

T = TypeVar("T")


@dataclasses.dataclass
class Growing:
    """One answer as far as it has come."""

    prompt: Prompt
    asked: Any  # the engine's `Answer`
    text: str = ""
    token_ids: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    finish_reason: str | None = None

    @property
    def boxes(self) -> list[dict[str, Any]]:
        """The boxes in the text so far, in pixels of their picture."""
        return [dataclasses.asdict(box) for box in parse_boxes(self.text, self.prompt.sizes)]


@dataclasses.dataclass(frozen=True)
class News:
    """What an answer has grown by."""

    index: int
    text: str
    token_ids: list[int]
    logprobs: list[dict[str, Any]]
    finish_reason: str | None


@dataclasses.dataclass(frozen=True)
class Usage:
    """What a request took; a prompt counts once, however many answers it got."""

    prompt_tokens: int
    image_tokens: int
    cached_tokens: int
    tiles: int
    completion_tokens: int


@dataclasses.dataclass(frozen=True)
class Wanted:
    """How answers are wanted, beside what `Sampling` says; ``max_tokens``, ``top_logprobs``: as `Request` has them."""

    model: ServedModel
    max_tokens: int
    n: int = 1
    stop: tuple[str, ...] = ()
    top_logprobs: int | None = None
    constraint: Constraint | None = None


async def ask(
    serving: Serving, http: HttpRequest, body: Sampling, prompts: Sequence[Prompt], wanted: Wanted, arrived: float
) -> Answers:
    """Asks the engine for ``wanted.n`` answers to each prompt, in order.

    Args:
      arrived: when the HTTP request came, by `time.perf_counter`.

    Raises:
      ApiError: a setting cannot be.
      RefusedError: the engine does not take them; none of them is left in it.
    """
    _check_bias(serving, body)
    try:
        sampling = body.sampling(wanted.stop, secrets.randbits(32))
    except UsageError as error:
        raise ApiError(400, str(error)) from None
    constraint = wanted.constraint
    grammar = None
    if constraint is not None:
        if serving.grammars is None:
            message = "answers cannot be constrained with this checkpoint's tokenizer, which has no tokenizer.json"
            raise ApiError(400, f"{constraint.field}: {message}.", param=constraint.field, code="unsupported_value")
        grammar = await serving.in_pool(constraint.compile, serving.grammars)
    context = serving.engine.model.context

    def build() -> list[Request]:
        return [
            Request(
                prompt.inputs,
                min(wanted.max_tokens, context - len(prompt.inputs.input_ids) + 1),
                sampling,
                choice=choice,
                top_logprobs=wanted.top_logprobs,
                grammar=grammar,
                owner=http.scope.get("owner", ""),
                adapter=wanted.model.adapter,
            )
            for prompt in prompts
            for choice in range(wanted.n)
        ]

    requests = await serving.in_pool(build)
    answers = Answers(serving, wanted.model, arrived)
    try:
        for number, request in enumerate(requests):
            answers.add(prompts[number // wanted.n], serving.engine.submit(request))
    except BaseException:
        answers.close()
        raise
    return answers


class Answers:
    """Answers of one model that grow. `close` them, whatever happens: the engine goes on until then."""

    def __init__(self, serving: Serving, model: ServedModel, arrived: float):
        self.all: list[Growing] = []
        self.model = model
        self._serving, self._arrived = serving, arrived
        self._failed = False
        self._closed = False

    def add(self, prompt: Prompt, asked: Any) -> None:
        self.all.append(Growing(prompt, asked))

    async def news(self) -> AsyncIterator[News]:
        """What becomes certain of any of the answers, until all have ended.

        Raises:
          FailedError: one of them failed.
        """
        streams = [aiter(answer.asked) for answer in self.all]
        waiting = {asyncio.ensure_future(anext(stream)): i for i, stream in enumerate(streams)}
        try:
            while waiting:
                done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                for task in sorted(done, key=waiting.__getitem__):
                    index = waiting.pop(task)
                    try:
                        delta = task.result()
                    except StopAsyncIteration:
                        continue
                    if delta.finish_reason is None:
                        waiting[asyncio.ensure_future(anext(streams[index]))] = index
                    yield self._grow(index, delta)
        except Exception:
            self._failed = True
            raise
        finally:
            for task in waiting:
                task.cancel()
            self.close()

    async def finish(self) -> None:
        """Waits until all answers have ended; raises what `news` does."""
        async for _ in self.news():
            pass

    def close(self) -> None:
        """Frees what answers that have not ended hold."""
        if self._closed:
            return
        self._closed = True
        for answer in self.all:
            if answer.finish_reason is None:
                answer.asked.cancel()
                self._count(answer, "error" if self._failed else "abort")

    @property
    def usage(self) -> Usage:
        """What the answers took so far."""
        firsts = list({id(answer.prompt): answer for answer in reversed(self.all)}.values())
        inputs = [answer.prompt.inputs for answer in firsts]
        return Usage(
            prompt_tokens=sum(len(one.input_ids) for one in inputs),
            image_tokens=sum(int(one.image_mask.sum()) for one in inputs),
            cached_tokens=sum(answer.asked.cached_tokens for answer in firsts),
            tiles=sum(len(one.tiles) for one in inputs),
            completion_tokens=sum(len(answer.token_ids) for answer in self.all),
        )

    def _grow(self, index: int, delta: Delta) -> News:
        answer, serving = self.all[index], self._serving
        if not answer.token_ids and delta.token_ids:
            serving.metrics.first_token(self.model.name, time.perf_counter() - self._arrived)
            inputs = answer.prompt.inputs
            if not any(other.token_ids for other in self.all if other.prompt is answer.prompt):
                serving.metrics.prompt(self.model.name, len(inputs.input_ids), int(inputs.image_mask.sum()))
        entries = logprobs.content(serving.processor.tokenizer, delta)
        answer.text += delta.text
        answer.token_ids += delta.token_ids
        answer.logprobs += entries
        answer.finish_reason = delta.finish_reason
        if delta.finish_reason is not None:
            self._count(answer, delta.finish_reason)
        return News(index, delta.text, delta.token_ids, entries, delta.finish_reason)

    def _count(self, answer: Growing, reason: str) -> None:
        seconds = time.perf_counter() - self._arrived
        tokens = len(answer.token_ids)
        self._serving.metrics.answer(self.model.name, reason, tokens, seconds, answer.asked.timing)


async def unless_gone(http: HttpRequest, work: Coroutine[Any, Any, T]) -> T:
    """What ``work`` returns; when the client goes away first, ``work`` is cancelled.

    Raises:
      ClientGoneError: the client has gone.
    """
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_gone(http))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGoneError
        return task.result()
    finally:
        gone.cancel()
        if not task.done():
            task.cancel()
            await asyncio.wait({task})


async def _gone(http: HttpRequest) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass


def _check_bias(serving: Serving, body: Sampling) -> None:
    most = len(serving.processor.tokenizer) - 1
    for token in body.logit_bias or {}:
        # Not int(): it takes "+1", " 1" and digits of other scripts.
        if not (token.isascii() and token.isdecimal() and len(token) < 10 and int(token) <= most):
            field = f"logit_bias.{token[:40]}"
            raise ApiError(400, f"{field}: found no token, expected the id of one, 0 to {most}.", param="logit_bias")
