"""POST /v1/chat/completions."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator, Mapping
from types import MappingProxyType
from typing import Any

from fastapi import APIRouter, Request, Response

from dsvl2_jax.infer.serve.answers import Answers, News, Usage, Wanted, ask
from dsvl2_jax.infer.serve.bodies import STREAMED, described, read_body
from dsvl2_jax.infer.serve.errors import ApiError, SafeRoute
from dsvl2_jax.infer.serve.events import DONE, event, respond, stream_error
from dsvl2_jax.infer.serve.grammars import Constraint, constraint
from dsvl2_jax.infer.serve.prompts import Picture, Text, Turn, Video, chat_prompt
from dsvl2_jax.infer.serve.schemas import Streamed
from dsvl2_jax.infer.serve.schemas_chat import ChatRequest, Message, TextPart, VideoPart
from dsvl2_jax.infer.serve.state import serving_of
from dsvl2_jax.inputs.turns import ROLES

router = APIRouter(route_class=SafeRoute)


@router.post("/v1/chat/completions", tags=["answers"], openapi_extra=described(ChatRequest), responses=STREAMED)
async def chat_completions(request: Request) -> Response:
    """Answers a conversation with pictures."""
    arrived = time.perf_counter()
    serving = serving_of(request)
    body = await read_body(request, serving, ChatRequest)
    model = serving.model_of(request, body.model)
    check_stream_options(body)
    if body.max_tokens is not None and body.max_completion_tokens is not None:
        field = "max_completion_tokens"
        raise ApiError(400, f"{field}: is given beside max_tokens, which means the same; give one.", param=field)
    if body.top_logprobs is not None and not body.logprobs:
        raise ApiError(400, "top_logprobs: needs logprobs: true.", param="top_logprobs")
    wanted = Wanted(
        model,
        max_tokens=body.max_completion_tokens or body.max_tokens or serving.options.default_max_tokens,
        n=body.n or 1,
        stop=body.stops,
        top_logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        constraint=constraint_of(body),
    )

    async def asked() -> Answers:
        prompt = await chat_prompt(serving, turns(body.messages), "messages", body.budget)
        return await ask(serving, request, body, [prompt], wanted, arrived)

    return await respond(
        request,
        stream=bool(body.stream),
        asked=asked,
        reply=lambda answers: _Reply(body, answers, "chat.completion"),
    )


def turns(messages: list[Message], field: str = "messages") -> list[Turn]:
    """The messages as `chat_prompt` takes them; raises ApiError for one without content."""
    out = []
    for number, message in enumerate(messages):
        here = f"{field}[{number}].content"
        if message.content is None and message.role != "assistant":
            raise ApiError(400, f"{here}: is missing.", param=here, code="missing_parameter")
        parts: list[Text | Picture | Video] = []
        if isinstance(message.content, str):
            parts.append(Text(message.content, here))
        for place, part in enumerate(message.content if isinstance(message.content, list) else []):
            if isinstance(part, TextPart):
                parts.append(Text(part.text, f"{here}[{place}].text"))
            elif isinstance(part, VideoPart):
                where, video = f"{here}[{place}].video_url", part.video_url
                if isinstance(video, str):
                    parts.append(Video(video, where))
                else:
                    parts.append(Video(video.url, f"{where}.url", video.frames, video.frame_choice, video.budget))
            elif isinstance(part.image_url, str):
                parts.append(Picture(part.image_url, f"{here}[{place}].image_url", None))
            else:
                where = f"{here}[{place}].image_url.url"
                parts.append(Picture(part.image_url.url, where, part.image_url.detail, part.image_url.budget))
        out.append(Turn(ROLES[message.role], [parts]))
    return out


def check_stream_options(body: Streamed) -> None:
    """Raises ApiError for options of a stream that is not asked for."""
    if body.stream_options is not None and not body.stream:
        raise ApiError(400, "stream_options: needs stream: true.", param="stream_options")


def constraint_of(body: Streamed) -> Constraint | None:
    """What the answer must obey; raises ApiError."""
    given = body.response_format
    if given is None or given.json_schema is None:
        return constraint(body, given and given.type, None, "response_format")
    field = "response_format.json_schema.schema"
    if given.json_schema.schema_ is None:
        raise ApiError(400, f"{field}: is missing.", param=field, code="missing_parameter")
    return constraint(body, given.type, given.json_schema.schema_, field)


def usage_object(usage: Usage) -> dict[str, Any]:
    """Usage as chat and completions tell it."""
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {
            "text_tokens": usage.prompt_tokens - usage.image_tokens,
            "image_tokens": usage.image_tokens,
            "cached_tokens": usage.cached_tokens,
            "tiles": usage.tiles,
        },
        "completion_tokens_details": {"reasoning_tokens": 0},
    }


class _Reply:
    """The objects that a request to the chat is answered with."""

    def __init__(self, body: ChatRequest, answers: Answers, kind: str):
        self._body, self._answers = body, answers
        self._head = {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "object": kind,
            "created": int(time.time()),
            "model": answers.model.name,
        }

    def whole(self) -> dict[str, Any]:
        choices = []
        for index, answer in enumerate(self._answers.all):
            message = {"role": "assistant", "content": answer.text, "refusal": None}
            logprobs = {"content": answer.logprobs, "refusal": None} if self._body.logprobs else None
            choice = {"index": index, "message": message, "logprobs": logprobs, "finish_reason": answer.finish_reason}
            choices.append(choice | self._boxes(index) | self._ids(answer.token_ids))
        return self._head | {"choices": choices, "usage": usage_object(self._answers.usage)} | self._prompt_ids()

    async def events(self, news: AsyncIterator[News]) -> AsyncIterator[bytes]:
        """The stream: for each answer its role, its text piece by piece, and how it ended; then what it took."""
        self._head["object"] = "chat.completion.chunk"
        begun: set[int] = set()
        try:
            async for one in news:
                if one.index not in begun:
                    begun.add(one.index)
                    first = {"role": "assistant", "content": "", "refusal": None}
                    yield self._chunk(one.index, first, None, None, top=self._prompt_ids())
                if one.text or one.token_ids:
                    logprobs = {"content": one.logprobs, "refusal": None} if self._body.logprobs else None
                    yield self._chunk(one.index, {"content": one.text}, logprobs, None, self._ids(one.token_ids))
                if one.finish_reason is not None:
                    yield self._chunk(one.index, {}, None, one.finish_reason, self._boxes(one.index))
            if self._counts:
                yield event(self._head | {"choices": [], "usage": usage_object(self._answers.usage)})
        except Exception as error:
            yield event(stream_error(error).body(), "error")
        yield DONE

    @property
    def _counts(self) -> bool:
        options = self._body.stream_options
        return bool(options and options.include_usage)

    def _chunk(
        self,
        index: int,
        delta: Mapping[str, Any],
        logprobs: Mapping[str, Any] | None,
        reason: str | None,
        more: Mapping[str, Any] = MappingProxyType({}),  # of the choice
        top: Mapping[str, Any] = MappingProxyType({}),  # of the chunk
    ) -> bytes:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason, **more}
        usage = {"usage": None} if self._counts else {}
        return event({**self._head, "choices": [choice], **usage, **top})

    def _boxes(self, index: int) -> dict[str, Any]:
        """Boxes, where there are some or they were asked for."""
        boxes = self._answers.all[index].boxes
        return {"boxes": boxes} if boxes or self._body.grounding else {}

    def _ids(self, tokens: list[int]) -> dict[str, Any]:
        return {"token_ids": tokens} if self._body.return_token_ids else {}

    def _prompt_ids(self) -> dict[str, Any]:
        if not self._body.return_token_ids:
            return {}
        return {"prompt_token_ids": self._answers.all[0].prompt.inputs.input_ids.tolist()}
