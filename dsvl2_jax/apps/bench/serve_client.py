"""The client of `dsvl2 bench serve`: asks, notes when each piece of an answer came, and reads it only afterwards.

Tested in tests/apps/bench/test_serve.py.
"""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import json
import socket
import time
from typing import Any

import httpx2
from prometheus_client.parser import text_string_to_metric_families

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
_JSON = {"Content-Type": "application/json"}
_SMALL_BUFFER = 4096  # bytes that the kernel takes for a slow reader
_PREFIX = "dsvl2:"


@dataclasses.dataclass
class Reply:
    """What came of one request. Times are by `time.perf_counter`.

    Attributes:
      status: of HTTP; 0: none came.
      times: when each piece with tokens came; counts: how many tokens it had.
      error: the message of an error, in the body or in the stream.
      broken: how the connection failed, or "".
      whole: the answer came to its end.
    """

    sent: float = dataclasses.field(default_factory=time.perf_counter)
    ended: float = 0.0
    status: int = 0
    times: list[float] = dataclasses.field(default_factory=list)
    counts: list[int] = dataclasses.field(default_factory=list)
    token_ids: list[int] = dataclasses.field(default_factory=list)
    text: str = ""
    logprobs: list[float] = dataclasses.field(default_factory=list)
    finish_reason: str | None = None
    usage: dict[str, Any] = dataclasses.field(default_factory=dict)
    error: str = ""
    broken: str = ""
    whole: bool = False

    @property
    def first_token_seconds(self) -> float:
        return self.times[0] - self.sent

    @property
    def seconds_per_token(self) -> float | None:
        """Mean of the tokens after the first piece's; None: there are none."""
        after = sum(self.counts[1:])
        return (self.times[-1] - self.times[0]) / after if after else None

    @property
    def gaps(self) -> list[tuple[float, float]]:
        """(when it ended, seconds) of each time between two pieces."""
        return [(later, later - earlier) for earlier, later in itertools.pairwise(self.times)]

    def _read_choice(self, choice: dict[str, Any], content: str | None, when: float | None) -> None:
        tokens = choice.get("token_ids") or []
        if tokens and when is not None:
            self.times.append(when)
            self.counts.append(len(tokens))
        self.token_ids += tokens
        self.text += content or choice.get("text") or ""
        self.logprobs += [entry["logprob"] for entry in (choice.get("logprobs") or {}).get("content") or []]
        self.finish_reason = choice.get("finish_reason") or self.finish_reason

    def read_events(self, events: list[tuple[float, str]]) -> None:
        """Takes in a stream's events: when each came, and its data."""
        for when, data in events:
            if data == "[DONE]":
                self.whole = self.finish_reason is not None and not self.error
                continue
            chunk = json.loads(data)
            if "error" in chunk:
                self.error = _message(chunk)
            for choice in chunk.get("choices", ()):
                self._read_choice(choice, (choice.get("delta") or {}).get("content"), when)
            self.usage = chunk.get("usage") or self.usage

    def read_body(self, body: bytes) -> None:
        """Takes in a response that is no stream."""
        try:
            value = json.loads(body)
        except ValueError:
            self.broken = "the body is no JSON"
            return
        if self.status != 200:
            self.error = _message(value)
            return
        (choice,) = value["choices"]
        self._read_choice(choice, (choice.get("message") or {}).get("content"), None)
        self.usage = value["usage"]
        self.whole = self.finish_reason is not None


class Client:
    """Asks one server, with as many connections as needed. Use it in an ``async with``."""

    def __init__(self, address: str):
        limits = httpx2.Limits(max_connections=None, max_keepalive_connections=None, keepalive_expiry=60)
        common = {"base_url": address, "headers": _JSON, "timeout": None, "trust_env": False}
        self._http = httpx2.AsyncClient(limits=limits, **common)
        # What a slow reader has not read must wait in the server, not in the kernel.
        narrow = [(socket.SOL_SOCKET, socket.SO_RCVBUF, _SMALL_BUFFER)]
        self._slow = httpx2.AsyncClient(transport=httpx2.AsyncHTTPTransport(socket_options=narrow), **common)

    async def __aenter__(self) -> Client:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._http.aclose()
        await self._slow.aclose()

    async def stream(self, path: str, body: bytes, *, leave_after: int | None = None, pause: float = 0.0) -> Reply:
        """Asks for a stream.

        Args:
          leave_after: closes the connection after so many events.
          pause: seconds between reading two events, through a narrow connection.
        """
        reply, events = Reply(), []
        try:
            async with (self._slow if pause else self._http).stream("POST", path, content=body) as response:
                reply.status = response.status_code
                if reply.status != 200:
                    reply.read_body(await response.aread())
                    return reply
                async for line in response.aiter_lines():
                    if line.startswith("data: "):
                        events.append((time.perf_counter(), line.removeprefix("data: ")))
                        if leave_after is not None and len(events) >= leave_after:
                            break
                        if pause:
                            await asyncio.sleep(pause)
        except httpx2.HTTPError as error:
            reply.broken = f"{type(error).__name__}: {error}"
        finally:
            reply.ended = time.perf_counter()
        reply.read_events(events)
        return reply

    async def post(self, path: str, body: bytes, headers: dict[str, str] | None = None) -> Reply:
        """Asks for an answer in one piece."""
        reply = Reply()
        try:
            response = await self._http.post(path, content=body, headers=headers)
        except httpx2.HTTPError as error:
            reply.broken = f"{type(error).__name__}: {error}"
            return reply
        finally:
            reply.ended = time.perf_counter()
        reply.status = response.status_code
        reply.read_body(response.content)
        return reply

    async def metrics(self) -> dict[str, float]:
        """The server's figures by name, without our prefix, summed over their labels; no histogram's buckets."""
        text = (await self._http.get("/metrics")).raise_for_status().text
        values: dict[str, float] = {}
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                if not sample.name.endswith("_bucket"):
                    name = sample.name.removeprefix(_PREFIX)
                    values[name] = values.get(name, 0.0) + sample.value
        return values


def _message(value: Any) -> str:
    """The message of an error in OpenAI's shape, or "" where it is in none."""
    error = value.get("error") if isinstance(value, dict) else None
    return str(error.get("message") or "") if isinstance(error, dict) else ""
