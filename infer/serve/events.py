"""Server-sent events: the wire form of streamed answers, and the response that frees the engine when it ends."""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any, Protocol

from fastapi import Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.types import Receive, Scope, Send

from dsvl2_jax.infer.serve.answers import Answers, News, unless_gone
from dsvl2_jax.infer.serve.errors import ApiError, api_error

logger = logging.getLogger("dsvl2.serve")

DONE = b"data: [DONE]\n\n"
# A proxy that collects the stream (nginx does) would undo it.
_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


def event(data: Mapping[str, Any], name: str | None = None) -> bytes:
    """One event; ``name``: its type, which OpenAI's chat has none of."""
    head = "" if name is None else f"event: {name}\n"
    return f"{head}data: {json.dumps(data, ensure_ascii=False, separators=(',', ':'))}\n\n".encode()


class EventStream(StreamingResponse):
    """A response of events. When it ends, or the client goes away, what the engine still does for it is ended."""

    media_type = "text/event-stream"

    def __init__(self, answers: Answers, events: AsyncIterator[bytes]):
        super().__init__(events, headers=_HEADERS)
        self._answers = answers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._answers.close()


class Reply(Protocol):
    """The objects that a request is answered with."""

    def whole(self) -> Mapping[str, Any]:
        """All at once, when the answers have ended."""

    def events(self, news: AsyncIterator[News]) -> AsyncIterator[bytes]:
        """One after the other."""


async def respond(
    http: Request, *, stream: bool, asked: Callable[[], Awaitable[Answers]], reply: Callable[[Answers], Reply]
) -> Response:
    """Answers a request whole or as a stream of events; a client that goes away before ends what was begun.

    Args:
      asked: asks the engine.
      reply: makes the reply of what was asked for.
    """

    async def work() -> tuple[Answers, AsyncIterator[News] | None]:
        answers = await asked()
        if stream:
            return answers, await begun(answers)
        await answers.finish()
        return answers, None

    answers, news = await unless_gone(http, work())
    told = reply(answers)
    return JSONResponse(told.whole()) if news is None else EventStream(answers, told.events(news))


async def begun(answers: Answers) -> AsyncIterator[News]:
    """`Answers.news`, after the first has come: what fails before that is answered with a status of its own."""
    news = answers.news()
    first = await anext(news)

    async def chained() -> AsyncIterator[News]:
        yield first
        async for one in news:
            yield one

    return chained()


def stream_error(error: Exception) -> ApiError:
    """What a client is told of an error after its stream has begun; the status is on its way already."""
    told = api_error(error)
    logger.warning("a stream ended early with status %d (%s)", told.status, told.code)
    return told
