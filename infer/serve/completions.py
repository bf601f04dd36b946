"""POST /v1/completions: text that the model goes on with."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, Request, Response

from dsvl2_jax.infer.serve import logprobs
from dsvl2_jax.infer.serve.answers import Answers, News, Wanted, ask
from dsvl2_jax.infer.serve.bodies import STREAMED, described, read_body
from dsvl2_jax.infer.serve.chat import check_stream_options, constraint_of, usage_object
from dsvl2_jax.infer.serve.errors import SafeRoute
from dsvl2_jax.infer.serve.events import DONE, event, respond, stream_error
from dsvl2_jax.infer.serve.prompts import Prompt, text_prompt, token_prompt
from dsvl2_jax.infer.serve.schemas_chat import CompletionRequest
from dsvl2_jax.infer.serve.state import Serving, serving_of

router = APIRouter(route_class=SafeRoute)

_MAX_TOKENS = 16  # of an answer when the request names no number, as OpenAI has it


@router.post("/v1/completions", tags=["answers"], openapi_extra=described(CompletionRequest), responses=STREAMED)
async def completions(request: Request) -> Response:
    """Goes on with one or several texts, without roles and pictures."""
    arrived = time.perf_counter()
    serving = serving_of(request)
    body = await read_body(request, serving, CompletionRequest)
    model = serving.model_of(request, body.model)
    check_stream_options(body)
    wanted = Wanted(
        model,
        max_tokens=body.max_tokens or _MAX_TOKENS,
        n=body.n or 1,
        stop=body.stops,
        top_logprobs=body.logprobs,
        constraint=constraint_of(body),
    )

    async def asked() -> Answers:
        return await ask(serving, request, body, await _prompts(serving, body), wanted, arrived)

    return await respond(request, stream=bool(body.stream), asked=asked, reply=lambda answers: _Reply(body, answers))


async def _prompts(serving: Serving, body: CompletionRequest) -> list[Prompt]:
    given = body.prompt
    if isinstance(given, str):
        return [await text_prompt(serving, given, "prompt")]
    if isinstance(given[0], int):
        return [token_prompt(serving, given, "prompt")]
    fields = [f"prompt[{i}]" for i in range(len(given))]
    return [
        await text_prompt(serving, one, field) if isinstance(one, str) else token_prompt(serving, one, field)
        for one, field in zip(given, fields, strict=True)
    ]


class _Reply:
    """The objects that a request is answered with."""

    def __init__(self, body: CompletionRequest, answers: Answers):
        self._body, self._answers = body, answers
        self._head = {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": answers.model.name,
        }

    def whole(self) -> dict[str, Any]:
        choices = [
            self._choice(i, answer.text, self._logprobs(answer.logprobs, 0), answer.finish_reason, answer.token_ids)
            for i, answer in enumerate(self._answers.all)
        ]
        return self._head | {"choices": choices, "usage": usage_object(self._answers.usage)}

    async def events(self, news: AsyncIterator[News]) -> AsyncIterator[bytes]:
        """The stream of all answers' pieces."""
        counts = self._body.stream_options is not None and bool(self._body.stream_options.include_usage)
        offsets = [0] * len(self._answers.all)
        try:
            async for one in news:
                entries = self._logprobs(one.logprobs, offsets[one.index])
                offsets[one.index] += sum(len(entry["token"]) for entry in one.logprobs)
                choice = self._choice(one.index, one.text, entries, one.finish_reason, one.token_ids)
                yield event(self._head | {"choices": [choice]} | ({"usage": None} if counts else {}))
            if counts:
                yield event(self._head | {"choices": [], "usage": usage_object(self._answers.usage)})
        except Exception as error:
            yield event(stream_error(error).body(), "error")
        yield DONE

    def _logprobs(self, entries: list[dict[str, Any]], offset: int) -> dict[str, Any] | None:
        return None if self._body.logprobs is None else logprobs.legacy(entries, offset)

    def _choice(
        self, index: int, text: str, entries: dict[str, Any] | None, reason: str | None, tokens: list[int]
    ) -> dict[str, Any]:
        ids = {"token_ids": tokens} if self._body.return_token_ids else {}
        return {"index": index, "text": text, "logprobs": entries, "finish_reason": reason} | ids
