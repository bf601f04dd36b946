"""Serves the page and as much of the API as it uses, with the bundled model's answers."""

from __future__ import annotations

import dataclasses
import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dsvl2_jax
from dsvl2_jax import SamplingParams, configs
from dsvl2_jax.errors import DSVL2Error
from dsvl2_jax.infer.serve.page import load_page
from dsvl2_jax.inputs.image_sources import FolderImages, resolve_image

IMAGES = Path(configs.__file__).parent / "images"
SAMPLING = ("temperature", "top_p", "top_k", "repetition_penalty", "seed")


class PageServer(http.server.ThreadingHTTPServer):
    """``requests`` holds the questions' bodies, and ``gone`` counts the clients that went away before an answer's end.

    With ``key`` set, the API wants it; what it answers is `dsvl2_jax.Model.generate`'s, in OpenAI's shape.
    """

    def __init__(self, model: dsvl2_jax.Model):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.model, self.key = model, ""
        self.requests: list[dict[str, Any]] = []
        self.gone = 0
        self.device = threading.Lock()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/"


class _Handler(http.server.BaseHTTPRequestHandler):
    server: PageServer

    def log_message(self, *_: Any) -> None: ...

    def do_GET(self) -> None:
        if self.path == "/":
            content, headers = load_page()
            self._send(200, content, headers)
        elif not self._is_allowed():
            self._refuse(401, "Incorrect API key. Give the server's key as a bearer token.")
        elif self.path == "/v1/models":
            self._send_json(200, {"object": "list", "data": [{"id": "micro", "object": "model", "created": 0}]})
        elif (file := IMAGES / self.path.removeprefix("/examples/")).is_file():
            self._send(200, file.read_bytes(), {"Content-Type": "image/png"})
        else:
            self._refuse(404, f"{self.path}: there is no such address.")

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if not self._is_allowed():
            return self._refuse(401, "Incorrect API key. Give the server's key as a bearer token.")
        self.server.requests.append(body)
        try:
            inputs = self.server.model.processor(_conversation(body["messages"]))
            self.server.model.check_context(inputs)
            settings = {name: body[name] for name in SAMPLING if name in body}
            sampling = SamplingParams(**settings, stop=tuple(body.get("stop", ())))
        except DSVL2Error as error:
            return self._refuse(400, str(error))
        self._send(200, b"", {"Content-Type": "text/event-stream"})
        try:
            with self.server.device:
                self._chunk({"role": "assistant", "content": ""})
                answer = self.server.model.generate(
                    inputs, body["max_tokens"], sampling, on_text=lambda _, text: self._chunk({"content": text})
                )
            boxes = [dataclasses.asdict(box) for box in answer.boxes]
            self._chunk({}, finish_reason=answer.finish_reason, **({"boxes": boxes} if body.get("grounding") else {}))
            details = {"image_tokens": answer.image_tokens, "tiles": len(inputs.tiles), "cached_tokens": 0}
            new = len(answer.token_ids)
            usage = {
                "prompt_tokens": answer.prompt_tokens,
                "completion_tokens": new,
                "total_tokens": answer.prompt_tokens + new,
            }
            self._event({"choices": [], "usage": usage | {"prompt_tokens_details": details}})
            self.wfile.write(b"data: [DONE]\n\n")
        except OSError:
            self.server.gone += 1

    def _is_allowed(self) -> bool:
        return not self.server.key or self.headers["Authorization"] == f"Bearer {self.server.key}"

    def _chunk(self, delta: dict[str, Any], **fields: Any) -> None:
        self._event({"choices": [{"index": 0, "delta": delta, "finish_reason": None} | fields]})

    def _event(self, event: dict[str, Any]) -> None:
        self.wfile.write(f"data: {json.dumps({'object': 'chat.completion.chunk'} | event)}\n\n".encode())

    def _refuse(self, status: int, message: str) -> None:
        self._send_json(status, {"error": {"message": message, "type": "invalid_request_error", "param": None}})

    def _send_json(self, status: int, value: Any) -> None:
        self._send(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)


def _conversation(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """OpenAI's messages as the processor's turns."""
    store = FolderImages(str(IMAGES))
    turns = []
    for message in messages:
        parts = message["content"]
        parts = [{"type": "text", "text": parts}] if isinstance(parts, str) else parts
        text = "".join("<image>\n" if part["type"] == "image_url" else part["text"] for part in parts)
        images = [resolve_image(part["image_url"]["url"], store) for part in parts if part["type"] == "image_url"]
        turns.append({"role": message["role"], "content": text} | ({"images": images} if images else {}))
    return turns


def serving(model: dsvl2_jax.Model) -> Iterator[PageServer]:
    """One server, closed afterwards."""
    with PageServer(model) as server:
        yield server
        server.shutdown()
