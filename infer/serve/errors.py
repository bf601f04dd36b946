"""Errors as the clients of OpenAI's API know them: ``{"error": {"message", "type", "param", "code"}}`` and a status.

Everything that goes wrong in a request becomes one `ApiError`: a field that cannot be, a refusal of the engine, and
also what nobody thought of, which is logged without the message, as that may hold a piece of a prompt.
"""

from __future__ import annotations

import json
import logging
import math
import traceback
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fastapi import Request, Response
from fastapi.exceptions import HTTPException
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from pydantic_core import ErrorDetails
from starlette.exceptions import HTTPException as StarletteHTTPException

from dsvl2_jax import fields
from dsvl2_jax.errors import ConversationError, DSVL2Error, ImageError, UsageError
from dsvl2_jax.infer.request import FailedError, RefusedError
from dsvl2_jax.infer.serve.media_errors import MediaError
from dsvl2_jax.messages import MAX_LISTED, did_you_mean

logger = logging.getLogger("dsvl2.serve")

CLIENT_GONE = 499  # as nginx logs it; no client reads it
_MOST_FOUND = 80  # characters of a wrong value that a message repeats

_KINDS = {400: "invalid_request_error", 429: "rate_limit_error", 500: "server_error", 503: "server_error"}
_EXPECTED = dict.fromkeys(("model_type", "model_attributes_type", "dict_type"), "an object") | {
    "list_type": "a list",
    "string_type": "a string",
    "bool_type": "true or false",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
}
_CODES = {
    400: "invalid_value",
    401: "invalid_api_key",
    403: "forbidden",
    404: "not_found",
    405: "method_not_allowed",
    408: "request_timeout",
    413: "request_too_large",
    415: "unsupported_media_type",
    429: "rate_limit_exceeded",
    500: "internal_error",
    503: "unavailable",
}
UNSUPPORTED = "unsupported"  # the type of our own problems, in pydantic's list of them


class ApiError(DSVL2Error):
    """What a client is told instead of an answer.

    Attributes:
      status: of HTTP.
      param: the field that is wrong, as in ``messages[0].content``, or None.
      code: a word for programs.
      headers: for the response.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.param, self.headers = status, param, dict(headers or {})
        self.code = code or _CODES.get(status)

    def body(self) -> dict[str, Any]:
        """The JSON object that says it."""
        kind = _KINDS.get(self.status, _KINDS[400] if self.status < 500 else _KINDS[500])
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        return JSONResponse(self.body(), self.status, self.headers)


class ClientGoneError(Exception):
    """The client closed its connection before it had its answer."""


def api_error(error: BaseException, param: str | None = None) -> ApiError:
    """What a client is told of any error; those that are not meant for people are logged.

    Args:
      param: the field that an error about the input is of.
    """
    if isinstance(error, ApiError):
        return error
    if isinstance(error, RefusedError):
        wait = {} if error.retry_after is None else {"Retry-After": str(max(1, math.ceil(error.retry_after)))}
        return ApiError(error.status, str(error), headers=wait)
    if isinstance(error, FailedError):
        return ApiError(error.status, str(error))
    if isinstance(error, MediaError):
        return ApiError(error.status, str(error), param=error.field)
    if isinstance(error, UsageError | ConversationError | ImageError):
        return ApiError(400, str(error), param=param)
    if isinstance(error, ClientGoneError):
        return ApiError(CLIENT_GONE, "The client closed the connection.", code="client_gone")
    if isinstance(error, StarletteHTTPException | HTTPException):
        return ApiError(error.status_code, str(error.detail), headers=error.headers)
    # The text of the error may repeat what the user sent.
    where = "".join(traceback.format_tb(error.__traceback__))
    logger.error("a request failed with %s\n%s", type(error).__name__, where.rstrip())
    return ApiError(500, "The server failed on this request; its log says where. Other requests are not concerned.")


class SafeRoute(APIRoute):
    """A route whose every error is answered in OpenAI's shape, and does not reach the server's own handling."""

    def get_route_handler(self) -> Any:
        handler = super().get_route_handler()

        async def safe(request: Request) -> Response:
            try:
                return await handler(request)
            except Exception as error:
                return api_error(error).response()

        return safe


def invalid(problems: Sequence[ErrorDetails], known: Iterable[str], tags: frozenset[str]) -> ApiError:
    """The 400 for fields that cannot be.

    Args:
      problems: of pydantic.
      known: the body's fields.
      tags: parts of pydantic's paths that name a variant of a type and no field.
    """
    lines = [_line(problem, known, tags) for problem in problems[:MAX_LISTED]]
    if len(problems) > MAX_LISTED:
        lines.append(f"and {len(problems) - MAX_LISTED} more")
    codes = {"extra_forbidden": "unknown_parameter", UNSUPPORTED: "unsupported_value", "missing": "missing_parameter"}
    code = codes.get(problems[0]["type"], "invalid_value")
    return ApiError(400, "\n".join(lines), param=_path(problems[0], tags) or None, code=code)


def found(value: Any) -> str:
    """A value as JSON has it, cut short: for messages to the one who sent it."""
    try:
        text = json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError):
        text = f"a value of type {type(value).__name__}"
    return text if len(text) <= _MOST_FOUND else f"{text[:_MOST_FOUND]}…"


def _path(problem: ErrorDetails, tags: frozenset[str]) -> str:
    return fields.dotted(tuple(key for key in problem["loc"] if key not in tags))


def _line(problem: ErrorDetails, known: Iterable[str], tags: frozenset[str]) -> str:
    path, kind, message = _path(problem, tags), problem["type"], problem["msg"]
    name = path or "the body"
    if kind == "missing":
        return f"{name}: is missing."
    if kind == "extra_forbidden":
        return f"{name}: is no field that is known here{did_you_mean(path, known)}"
    if kind == "value_error":
        return f"{name}: {message.removeprefix('Value error, ')}"
    if kind == UNSUPPORTED:
        return f"{name}: found {found(problem['input'])}, {message}"
    if kind in ("too_long", "too_short") and "actual_length" in problem.get("ctx", {}):
        limits = problem["ctx"]
        limit = f"at most {limits['max_length']}" if kind == "too_long" else f"at least {limits['min_length']}"
        return f"{name}: found {limits['actual_length'] or 'no'} items, expected {limit}."
    message = _EXPECTED.get(kind, message.removeprefix("Input should be "))
    return f"{name}: found {found(problem['input'])}, expected {message[:1].lower() + message[1:]}."
