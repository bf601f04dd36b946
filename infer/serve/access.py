"""The outermost layer: a line in the log for each request, an id for it, and headers that keep browsers safe.

A line has method, path, status, seconds, the key's name, the model's and the id: no query, no body, no header.
"""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Callable

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dsvl2_jax.infer.serve.errors import CLIENT_GONE, api_error

logger = logging.getLogger("dsvl2.serve.access")

_QUIET = frozenset({"/health", "/ready", "/metrics"})  # asked every few seconds
_MOST_LOGGED = 100  # characters of a path


class Access:
    """ASGI layer around everything else."""

    def __init__(self, app: ASGIApp, count: Callable[[str, int], None]):
        """``count`` is told the path of the route and the status of every request."""
        self.app, self._count = app, count

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started, status, identity = time.perf_counter(), CLIENT_GONE, f"req_{uuid.uuid4().hex}"

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = identity
                headers.setdefault("x-content-type-options", "nosniff")
            await send(message)

        try:
            await self.app(scope, receive, noted)
        except Exception as error:
            # It would reach the server, which writes it down with its text; that may be a piece of a prompt.
            answer = api_error(error)
            if status == CLIENT_GONE:
                await answer.response()(scope, receive, noted)
        finally:
            route = scope.get("route")
            self._count(getattr(route, "path", "other"), status)
            level = logging.DEBUG if scope["path"] in _QUIET else logging.INFO
            seconds = time.perf_counter() - started
            path = scope["path"][:_MOST_LOGGED].encode("unicode_escape").decode()
            names = scope.get("owner", "-"), scope.get("model", "-")
            logger.log(level, "%s %s %d %.3fs %s %s %s", scope["method"], path, status, seconds, *names, identity)
