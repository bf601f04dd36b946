"""Reading the bodies of requests: bounded in bytes and time, parsed beside the event loop, every problem told."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any, TypeVar

from fastapi import Request
from pydantic import ValidationError
from pydantic.json_schema import models_json_schema
from pydantic_core import from_json

from dsvl2_jax.infer.serve.errors import ApiError, invalid
from dsvl2_jax.infer.serve.schemas import TAGS, Body
from dsvl2_jax.infer.serve.state import Serving
from dsvl2_jax.messages import first_line

B = TypeVar("B", bound=Body)

_REFERENCE = "#/components/schemas/{model}"
_SECONDS = 60.0  # within which a body must have come
_DISCARDED = 8  # times the limit that is read, to be able to answer a client that sends before it listens
_SMALL = 1 << 14  # bytes; parsing them takes no longer than handing them to a thread


async def read_body(request: Request, serving: Serving, kind: type[B]) -> B:
    """The body of a request.

    Raises:
      ApiError: it is too large (413), too slow (408), no JSON (400, 415), or has fields that cannot be (400).
    """
    content = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content != "application/json" and not (content.startswith("application/") and content.endswith("+json")):
        found = f"Content-Type {content[:80]!r}" if content else "no Content-Type"
        raise ApiError(415, f"The body: found {found}, expected the header Content-Type: application/json.")
    try:
        async with asyncio.timeout(_SECONDS):
            data = await _read(request, serving.options.max_body)
    except TimeoutError:
        raise ApiError(
            408, f"The body did not come within {_SECONDS:.0f} seconds.", headers={"Connection": "close"}
        ) from None
    if len(data) <= _SMALL:
        return parse(data, kind)
    return await serving.in_pool(parse, data, kind)


def parse(data: bytes, kind: type[B]) -> B:
    """A body's bytes as what they are to be; raises ApiError."""
    try:
        value = from_json(data, allow_inf_nan=False)
    except ValueError as error:
        raise ApiError(400, f"The body is no JSON: {first_line(error)}.", code="invalid_json") from None
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        names = [field.alias or name for name, field in kind.model_fields.items()]
        raise invalid(error.errors(include_url=False), names, TAGS) from None


async def _read(request: Request, most: int) -> bytes:
    pieces, size = [], 0
    async for piece in request.stream():
        size += len(piece)
        if size <= most:
            pieces.append(piece)
        else:
            pieces.clear()
            if size > _DISCARDED * most:
                break
    if size > most:
        raise ApiError(
            413,
            f"The body has more than {most} bytes, the most that is read here. Send fewer or smaller pictures.",
            headers={"Connection": "close"} if size > _DISCARDED * most else {},
        )
    return b"".join(pieces)


def described(kind: type[Body]) -> dict[str, Any]:
    """What a route's ``openapi_extra`` says of its body."""
    schema = {"$ref": _REFERENCE.format(model=kind.__name__)}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


# What a route's ``responses`` says of an answer that may be streamed.
STREAMED: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The answer; with stream: true as events.",
        "content": {"application/json": {"schema": {"type": "object"}}, "text/event-stream": {}},
    }
}


def schemas(kinds: Sequence[type[Body]]) -> dict[str, Any]:
    """The schemas that `described` refers to, by name."""
    _, document = models_json_schema([(kind, "validation") for kind in kinds], ref_template=_REFERENCE)
    return document["$defs"]
