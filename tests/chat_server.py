"""A real HTTP server that speaks as much of OpenAI's protocol as `dsvl2 eval --server` uses, for its tests."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple

from PIL import Image

Message = dict[str, Any]


class Reply(NamedTuple):
    """What a server sends back. Without a body it closes the connection instead."""

    status: int = 200
    body: Any = None
    headers: dict[str, str] = {}  # noqa: RUF012 (never changed)


def completion(text: str | None, **usage: Any) -> Reply:
    message = {"role": "assistant", "content": text}
    return Reply(body={"choices": [{"index": 0, "message": message, "finish_reason": "stop"}], "usage": usage})


def failure(status: int, message: str, **headers: str) -> Reply:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return Reply(status, {"error": {"message": message, "type": "x", "param": None, "code": None}}, named)


def prompt_of(body: dict[str, Any]) -> tuple[list[dict[str, str]], list[Image.Image]]:
    """The conversation and images of a request, each image part read as ``<image>`` and a newline."""
    turns, images = [], []
    for message in body["messages"]:
        content = message["content"]
        if not isinstance(content, str):
            parts, content = content, ""
            for part in parts:
                if part["type"] == "text":
                    content += part["text"]
                else:
                    images.append(Image.open(io.BytesIO(content_of(part["image_url"]["url"]))))
                    content += "<image>\n"
        turns.append({"role": message["role"], "content": content})
    return turns, images


def content_of(url: str) -> bytes:
    """The bytes of a data: address."""
    return base64.b64decode(url.partition(",")[2], validate=True)


def question_of(body: dict[str, Any]) -> str:
    """The text of the last turn without its images."""
    return prompt_of(body)[0][-1]["content"].replace("<image>\n", "")


class ChatServer:
    """Answers each request by calling ``answer`` with its body, in a thread of its own; keeps all that it is sent."""

    def __init__(self, answer: Callable[[dict[str, Any]], Reply]):
        self.answer = answer
        self.models: Reply = Reply(body={"object": "list", "data": [{"id": "org/teller"}, {"id": "other"}]})
        self.asked: list[dict[str, Any]] = []  # bodies, in the order of their arrival
        self.keys: list[str | None] = []  # the Authorization header of every request
        self.most_at_once = 0
        self._at_once = 0
        self._lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def questions(self) -> list[str]:
        return [question_of(body) for body in self.asked]

    def reply(self, path: str, body: bytes | None, key: str | None) -> Reply:
        with self._lock:
            self.keys.append(key)
        if path == "/v1/models" and body is None:
            return self.models
        if path != "/v1/chat/completions" or body is None:
            return failure(404, f"no such page: {path}")
        with self._lock:
            self.asked.append(json.loads(body))
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
        try:
            return self.answer(json.loads(body))
        finally:
            with self._lock:
                self._at_once -= 1

    @contextlib.contextmanager
    def running(self) -> Iterator[ChatServer]:
        thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield self
        finally:
            self._server.shutdown()
            thread.join()
            self._server.server_close()


def _handler(server: ChatServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._send(server.reply(self.path, None, self.headers["Authorization"]))

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            self._send(server.reply(self.path, body, self.headers["Authorization"]))

        def _send(self, reply: Reply) -> None:
            self.close_connection = reply.body is None
            if reply.body is None:
                return
            content = reply.body if isinstance(reply.body, bytes) else json.dumps(reply.body).encode()
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # the client has gone
                self.send_response(reply.status)
                for name, value in {"Content-Length": str(len(content)), **reply.headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(content)

        def log_message(self, *_: Any) -> None:
            pass

    return Handler
