"""What `dsvl2 eval --server` sends: to which address, with which key, and a question as the body of a request.

Tested in tests/infer/eval/test_chat_request.py.
"""

from __future__ import annotations

import base64
import dataclasses
import io
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from PIL import Image

from dsvl2_jax import fields
from dsvl2_jax.errors import UsageError
from dsvl2_jax.fields import Problem, setting
from dsvl2_jax.inputs.images import ImageSource
from dsvl2_jax.inputs.tile_budget import TileBudget
from dsvl2_jax.inputs.tokenizer import IMAGE_TOKEN
from dsvl2_jax.json_files import parse_json, read_text

KEY_VARIABLE = "DSVL2_API_KEY"  # of the environment, for the key

_OURS = ("messages", "model", "n", "stream")  # fields of a request that --extra-body may not set

# How image files begin that every server reads; others are sent as PNG.
_FORMATS = (
    (re.compile(rb"\xff\xd8\xff"), "jpeg"),
    (re.compile(rb"\x89PNG\r\n\x1a\n"), "png"),
    (re.compile(rb"GIF8[79]a"), "gif"),
    (re.compile(rb"RIFF....WEBP", re.DOTALL), "webp"),
)


@dataclasses.dataclass(frozen=True)
class ServerOptions:
    """The server that answers; fields as the options of `dsvl2 eval` of these names, `url` as ``--server``.

    Raises UsageError for values that cannot be used.
    """

    url: str
    server_model: str | None = None
    api_key_file: Path | None = None
    concurrency: int = setting(16, least=1)
    timeout: float = setting(600.0, above=0)
    extra_body: str | None = None

    def __post_init__(self) -> None:
        problems = fields.check(self)
        fields.refuse((Problem((f"--{p.path[0].replace('_', '-')}",), p.text) for p in problems), UsageError)
        # Errors come before any work; the values are asked for again, so that no key is kept here.
        base_url(self.url)
        read_key(self.api_key_file)
        self.body_fields()

    def body_fields(self) -> dict[str, Any]:
        """``extra_body`` as an object. Raises UsageError when it is none, or sets what only this program can."""
        try:
            body = parse_json(self.extra_body or "{}")
        except ValueError as error:
            raise UsageError(f"--extra-body: found {self.extra_body!r}, which is not JSON ({error}).") from None
        if not isinstance(body, dict):
            raise UsageError(f"--extra-body: found {self.extra_body!r}, expected a JSON object of request fields.")
        if taken := [name for name in _OURS if name in body]:
            raise UsageError(f"--extra-body: {', '.join(taken)} cannot be set here.")
        return body


def base_url(url: str) -> str:
    """The address under which /chat/completions is: as given, or with /v1 where it names a host alone.

    Raises UsageError for what is no such address, or has a password in it.
    """
    try:
        parts = urlsplit(url.strip())
        fine = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        fine = False
    if not fine:
        raise UsageError(f"--server: found {url!r}, expected an address as in http://127.0.0.1:8000.")
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise UsageError(
            "--server: the address has a user name, a query or a fragment. Give it without; a key comes from "
            f"--api-key-file or {KEY_VARIABLE}."
        )
    path = parts.path.rstrip("/").removesuffix("/chat/completions")
    return f"{parts.scheme}://{parts.netloc}{path or '/v1'}"


def read_key(file: Path | None) -> str:
    """The API key, of a file or the environment; "" where neither has one.

    The file may be that of the server: a line with the key, or with its owner's name and the key; lines that begin with
    # say nothing.

    Raises:
      UsageError: the file cannot be read, or does not have one key. The message shows nothing of what it has.
    """
    if file is None:
        text, where = os.environ.get(KEY_VARIABLE, ""), KEY_VARIABLE
    else:
        where = f"--api-key-file {file}"
        text = read_text(file, UsageError, "Give --api-key-file a text file with one key.")
    lines = [words for line in text.splitlines() if (words := line.split()) and not words[0].startswith("#")]
    if not lines and file is None:
        return ""
    if len(lines) != 1:
        raise UsageError(f"{where}: has {len(lines)} keys, expected one.")
    if len(lines[0]) > 2 or not re.fullmatch(r"[\x21-\x7e]+", lines[0][-1]):
        raise UsageError(f"{where}: expected KEY or NAME KEY, the key of ASCII characters.")
    return lines[0][-1]


def messages(
    conversation: tuple[Mapping[str, str], ...], urls: Sequence[str], budgets: Sequence[TileBudget]
) -> list[dict[str, Any]]:
    """The conversation as a server takes it: each ``<image>`` of a user's turn becomes a part with the next address.

    An image's own budget goes with it, as a server of this project reads it.

    A newline behind a tag goes with it: an image part stands for ``<image>`` and a newline.
    """
    images = ({"url": url, **budget.given()} for url, budget in zip(urls, budgets, strict=True))
    turns = []
    for turn in conversation:
        content: Any = turn["content"]
        if turn["role"] == "user" and IMAGE_TOKEN in content:
            first, *others = content.split(IMAGE_TOKEN)
            content = [{"type": "text", "text": first}]
            for text in others:
                content.append({"type": "image_url", "image_url": next(images)})
                content.append({"type": "text", "text": text.removeprefix("\n")})
            content = [part for part in content if part.get("text") != ""]
        turns.append({"role": turn["role"], "content": content})
    return turns


def data_url(source: ImageSource, image: Image.Image, traits: Sequence[str] = ()) -> str:
    """An image as a data: address, of the file's own bytes where its format is a usual one.

    Args:
      source: a path, or a file's bytes.
      image: the same in RGB, sent as PNG otherwise.
      traits: with any of them readers differ about the file, so that the image is sent as it was read here.
    """
    content = source if isinstance(source, bytes) else Path(source).read_bytes()
    kind = None if traits else next((name for start, name in _FORMATS if start.match(content)), None)
    if kind is None:
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        kind, content = "png", buffer.getvalue()
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
