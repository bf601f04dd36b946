"""POST /v1/responses, OpenAI's newer form of a conversation. Nothing is stored: every request has all of it."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, Request, Response

from dsvl2_jax.infer.serve.answers import Answers, News, Wanted, ask
from dsvl2_jax.infer.serve.bodies import STREAMED, described, read_body
from dsvl2_jax.infer.serve.errors import ApiError, SafeRoute
from dsvl2_jax.infer.serve.events import event, respond, stream_error
from dsvl2_jax.infer.serve.grammars import constraint
from dsvl2_jax.infer.serve.prompts import Picture, Text, Turn, Video, chat_prompt
from dsvl2_jax.infer.serve.schemas_responses import InputText, InputVideo, ResponsesRequest
from dsvl2_jax.infer.serve.state import serving_of
from dsvl2_jax.inputs.turns import ROLES

router = APIRouter(route_class=SafeRoute)


@router.post("/v1/responses", tags=["answers"], openapi_extra=described(ResponsesRequest), responses=STREAMED)
async def responses(request: Request) -> Response:
    """Answers a conversation with pictures."""
    arrived = time.perf_counter()
    serving = serving_of(request)
    body = await read_body(request, serving, ResponsesRequest)
    model = serving.model_of(request, body.model)
    if body.stream_options is not None and not body.stream:
        raise ApiError(400, "stream_options: needs stream: true.", param="stream_options")
    form = body.text.format if body.text is not None else None
    schema = None if form is None else form.schema_
    wanted = Wanted(
        model,
        max_tokens=body.max_output_tokens or serving.options.default_max_tokens,
        top_logprobs=(body.top_logprobs or 0) if body.include or body.top_logprobs is not None else None,
        constraint=constraint(body, form and form.type, schema, "text.format.schema" if schema else "text.format"),
    )

    async def asked() -> Answers:
        prompt = await chat_prompt(serving, turns(body), "input", body.budget)
        return await ask(serving, request, body, [prompt], wanted, arrived)

    return await respond(request, stream=bool(body.stream), asked=asked, reply=lambda answers: _Reply(body, answers))


def turns(body: ResponsesRequest) -> list[Turn]:
    """Instructions and input as `chat_prompt` takes them."""
    out = []
    if body.instructions is not None:
        out.append(Turn("system", [[Text(body.instructions, "instructions")]]))
    if isinstance(body.input, str):
        return [*out, Turn("user", [[Text(body.input, "input")]])]
    for number, message in enumerate(body.input):
        here = f"input[{number}].content"
        parts: list[Text | Picture | Video] = []
        if isinstance(message.content, str):
            parts.append(Text(message.content, here))
        else:
            for place, part in enumerate(message.content):
                field = f"{here}[{place}]"
                if isinstance(part, InputText):
                    parts.append(Text(part.text, f"{field}.text"))
                elif isinstance(part, InputVideo):
                    parts.append(
                        Video(part.video_url, f"{field}.video_url", part.frames, part.frame_choice, part.budget)
                    )
                else:
                    parts.append(Picture(part.image_url, f"{field}.image_url", part.detail, part.budget))
        out.append(Turn(ROLES[message.role], [parts]))
    return out


class _Reply:
    """The objects and events that a request is answered with."""

    def __init__(self, body: ResponsesRequest, answers: Answers):
        self._body, self._answers = body, answers
        self._id, self._message_id = f"resp_{uuid.uuid4().hex}", f"msg_{uuid.uuid4().hex}"
        self._created = int(time.time())
        self._number = 0

    @property
    def _answer(self) -> Any:
        return self._answers.all[0]

    def whole(self) -> dict[str, Any]:
        """The response after its answer has ended."""
        cut = self._answer.finish_reason == "length"
        status = "incomplete" if cut else "completed"
        done = {"completed_at": int(time.time())} if not cut else {}
        reason = {"reason": "max_output_tokens"} if cut else None
        return self._response(status, [self._message(status)], incomplete_details=reason, usage=self._usage(), **done)

    async def events(self, news: AsyncIterator[News]) -> AsyncIterator[bytes]:
        """The stream of numbered events, from response.created to response.completed, incomplete or failed."""
        at = {"item_id": self._message_id, "output_index": 0, "content_index": 0}
        try:
            yield self._event("response.created", response=self._response("in_progress", []))
            yield self._event("response.in_progress", response=self._response("in_progress", []))
            opening = {"id": self._message_id, "type": "message", "status": "in_progress", "role": "assistant"}
            yield self._event("response.output_item.added", output_index=0, item={**opening, "content": []})
            yield self._event("response.content_part.added", **at, part=_part("", []))
            async for one in news:
                if one.text or one.logprobs:
                    yield self._event("response.output_text.delta", **at, delta=one.text, logprobs=one.logprobs)
            text, entries = self._answer.text, self._answer.logprobs
            yield self._event("response.output_text.done", **at, text=text, logprobs=entries)
            yield self._event("response.content_part.done", **at, part=_part(text, entries))
            response = self.whole()
            yield self._event("response.output_item.done", output_index=0, item=response["output"][0])
            yield self._event(f"response.{response['status']}", response=response)
        except Exception as error:
            told = stream_error(error)
            yield self._event("error", code=told.code, message=str(told), param=told.param)
            failure = {"code": "server_error", "message": str(told)}
            yield self._event("response.failed", response=self._response("failed", [], error=failure))

    def _event(self, kind: str, **fields: Any) -> bytes:
        number, self._number = self._number, self._number + 1
        return event({"type": kind, "sequence_number": number, **fields}, kind)

    def _message(self, status: str) -> dict[str, Any]:
        answer = self._answer
        boxes = {"boxes": answer.boxes} if answer.boxes or self._body.grounding else {}
        ids = {"token_ids": answer.token_ids} if self._body.return_token_ids else {}
        content = [_part(answer.text, answer.logprobs)]
        head = {"id": self._message_id, "type": "message", "status": status, "role": "assistant"}
        return {**head, "content": content, **boxes, **ids}

    def _usage(self) -> dict[str, Any]:
        usage = self._answers.usage
        return {
            "input_tokens": usage.prompt_tokens,
            "input_tokens_details": {
                "text_tokens": usage.prompt_tokens - usage.image_tokens,
                "image_tokens": usage.image_tokens,
                "cached_tokens": usage.cached_tokens,
                "cache_write_tokens": 0,
                "tiles": usage.tiles,
            },
            "output_tokens": usage.completion_tokens,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        }

    def _response(self, status: str, output: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        body = self._body
        given = (
            body.text.format.model_dump(by_alias=True, exclude_none=True) if body.text and body.text.format else None
        )
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._created,
            "status": status,
            "background": False,
            "error": None,
            "incomplete_details": None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "model": self._answers.model.name,
            "output": output,
            "parallel_tool_calls": False,
            "previous_response_id": None,
            "reasoning": {"effort": None, "summary": None},
            "store": False,
            "temperature": body.temperature or 0.0,
            "text": {"format": given or {"type": "text"}},
            "tool_choice": "none",
            "tools": [],
            "top_logprobs": body.top_logprobs or 0,
            "top_p": 1.0 if body.top_p is None else body.top_p,
            "truncation": "disabled",
            "usage": None,
            "user": body.user,
            "metadata": body.metadata or {},
        } | more


def _part(text: str, entries: list[dict[str, Any]]) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": entries}
