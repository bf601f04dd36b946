"""Answers of an OpenAI-compatible server: one request to /chat/completions a question, many at once.

What a failure means is decided here: a question that the server refuses (HTTP 400 and the like) has no answer; a server
that is busy or away is waited for; one that does not know the key or the model ends the run.

Tested in tests/infer/eval/test_client.py.
"""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import io
import json
import os
import random
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from PIL import Image

from dsvl2_jax import fields
from dsvl2_jax.errors import RunError, UsageError
from dsvl2_jax.fields import Problem, setting
from dsvl2_jax.infer.eval.answers import Questions, Result, answered, unanswered
from dsvl2_jax.infer.eval.samples import Sample
from dsvl2_jax.inputs.grounding import parse_boxes
from dsvl2_jax.inputs.images import ImageSource
from dsvl2_jax.inputs.tokenizer import IMAGE_TOKEN
from dsvl2_jax.messages import first_line

if TYPE_CHECKING:
    import httpx2

KEY_VARIABLE = "DSVL2_API_KEY"  # of the environment, for the key

_OURS = ("messages", "model", "n", "stream")  # fields of a request that --extra-body may not set
_CONNECT = 10.0  # seconds to reach the server
_LONGEST_REASON = 500  # characters of a server's message

# HTTP statuses. Others from 400 are the question's own fault below 500, the server's from there.
_NO_ACCESS = (401, 403)
_NOT_HERE = (301, 302, 303, 307, 308, 404, 405)
_BUSY = (429, 502, 503)
_TRY_AGAIN = (408, 409, 425)

_BUSY_TRIES = 10  # of a question while the server answers nothing at all: four minutes or so
_OWN_TRIES = 3  # of a question that makes the server fail
_FAILURES = 20  # questions in a row that made the server fail: it is not the questions
_FIRST_WAIT, _LONGEST_WAIT = 1.0, 60.0  # seconds before the next try
_LONGEST_RETRY_AFTER = 600.0  # seconds; a server that wants more is for another day

# How image files begin that every server reads; others are sent as PNG.
_FORMATS = (
    (re.compile(rb"\xff\xd8\xff"), "jpeg"),
    (re.compile(rb"\x89PNG\r\n\x1a\n"), "png"),
    (re.compile(rb"GIF8[79]a"), "gif"),
    (re.compile(rb"RIFF....WEBP", re.DOTALL), "webp"),
)


@dataclasses.dataclass(frozen=True)
class ServerOptions:
    """The server that answers; fields as the options of `dsvl2 eval` of these names, `url` as ``--server``."""

    url: str
    server_model: str | None = None
    api_key_file: Path | None = None
    concurrency: int = setting(16, least=1)
    timeout: float = setting(600.0, above=0)
    extra_body: str | None = None

    def __post_init__(self) -> None:
        problems = fields.check(self)
        fields.refuse((Problem((f"--{p.path[0].replace('_', '-')}",), p.text) for p in problems), UsageError)
        base_url(self.url)
        self.body_fields()

    def body_fields(self) -> dict[str, Any]:
        """``extra_body`` as an object. Raises UsageError when it is none, or sets what only this program can."""
        try:
            body = json.loads(self.extra_body or "{}")
        except ValueError as error:
            raise UsageError(f"--extra-body: found {self.extra_body!r}, which is not JSON ({error}).") from None
        if not isinstance(body, dict):
            raise UsageError(f"--extra-body: found {self.extra_body!r}, expected a JSON object of request fields.")
        if taken := [name for name in _OURS if name in body]:
            raise UsageError(f"--extra-body: {', '.join(taken)} cannot be set here.")
        return body


class Server:
    """A server as the source of answers (`dsvl2_jax.infer.eval.answers.Source`)."""

    def __init__(self, options: ServerOptions, max_new_tokens: int):
        """Finds out the model's name, for which the server is asked unless the options say it.

        Raises:
          UsageError: the key cannot be read, or httpx2 is not installed.
          RunError: the server cannot be reached, refuses the key, or does not say which models it has.
        """
        self._httpx = _import_httpx()
        self._options = options
        self._url = base_url(options.url)
        self._key = read_key(options.api_key_file)
        self._headers = {"Content-Type": "application/json"}
        if self._key:
            self._headers["Authorization"] = f"Bearer {self._key}"
        self._seen = False  # whether it has answered a request for its models
        self.model = options.server_model or self._first_model()
        self._body = {"model": self.model, "temperature": 0, "max_tokens": max_new_tokens} | options.body_fields()
        self._answered = 0  # questions that have a result
        self._failures = 0  # questions in a row that have none
        self.name = f"{_short_name(self.model)}@{urlsplit(self._url).netloc}"

    def identity(self) -> dict[str, Any]:
        identity: dict[str, Any] = {"url": self._url, "model": self.model}
        if extra := self._options.body_fields():
            identity["extra_body"] = extra
        return {"server": identity}

    def summary(self) -> dict[str, Any]:
        return {"server": self._url, "model": self.model}

    def start(self, *, needed: bool) -> None:
        """Makes sure that the server is there, if it is needed."""
        if needed and not self._seen:
            self._models()

    def answer(self, questions: Questions) -> None:
        """Asks the questions in their order, `concurrency` of them at once.

        Raises:
          DataError: an image cannot be read.
          RunError: the server is gone, or refuses everything. What was answered is kept.
        """
        asyncio.run(self._answer(questions))

    async def _answer(self, questions: Questions) -> None:
        waiting = iter(questions.samples)
        limits = self._httpx.Limits(max_connections=self._options.concurrency)
        timeout = self._httpx.Timeout(self._options.timeout, connect=_CONNECT, pool=None)

        async def work() -> None:
            for sample in waiting:  # the workers share them
                body = await asyncio.to_thread(self._request, sample, questions)
                questions.keep([await self._ask(client, sample, body)])

        async with self._httpx.AsyncClient(headers=self._headers, limits=limits, timeout=timeout) as client:
            workers = [asyncio.create_task(work()) for _ in range(self._options.concurrency)]
            try:
                await asyncio.gather(*workers)
            finally:  # after an error or Ctrl-C the others need not finish
                for worker in workers:
                    worker.cancel()
                await asyncio.gather(*workers, return_exceptions=True)

    def _request(self, sample: Sample, questions: Questions) -> bytes:
        """The body of a sample's request."""
        urls = [data_url(source, image) for source, image in questions.images(sample)]
        body = {"messages": messages(sample.conversation, urls)} | self._body
        return json.dumps({name: value for name, value in body.items() if value is not None}).encode()

    async def _ask(self, client: httpx2.AsyncClient, sample: Sample, body: bytes) -> Result:
        """The result of one question, after as many tries as it takes."""
        busy = own = 0
        answered_before = self._answered
        while True:
            try:
                result = self._result(sample, await self._post(client, body))
            except _FailedError as failed:
                if not failed.busy:
                    own += 1
                    if own >= _OWN_TRIES:
                        return self._given_up(sample, failed)
                else:
                    # As long as others are answered, this one waits for its turn.
                    busy = busy + 1 if self._answered == answered_before else 1
                    answered_before = self._answered
                    if busy >= _BUSY_TRIES:
                        raise RunError(f"{self._url}: {failed}; tried {busy} times. {_AGAIN}") from None
                await _sleep(_delay(busy + own, failed.retry_after))
            else:
                self._answered += 1
                self._failures = 0
                return result

    async def _post(self, client: httpx2.AsyncClient, body: bytes) -> httpx2.Response:
        """The response to a request. Raises _FailedError when there is none."""
        try:
            return await client.post(f"{self._url}/chat/completions", content=body)
        except (self._httpx.ConnectError, self._httpx.ConnectTimeout) as error:
            raise _FailedError(f"cannot be reached ({self._safe(first_line(error))})", busy=True) from None
        except self._httpx.TimeoutException:
            raise _FailedError(f"no answer within {self._options.timeout:g} seconds (--timeout)") from None
        except self._httpx.RequestError as error:  # it took the question and went: it may have died of it
            raise _FailedError(f"the connection broke ({self._safe(first_line(error))})") from None

    def _given_up(self, sample: Sample, failed: _FailedError) -> Result:
        """The result of a question that makes the server fail. Raises RunError when all questions do."""
        self._failures += 1
        if self._failures >= _FAILURES:
            raise RunError(f"{self._url}: has failed {self._failures} questions in a row; the last: {failed}. {_AGAIN}")
        return unanswered(sample, str(failed), again=True)

    def _result(self, sample: Sample, response: httpx2.Response) -> Result:
        """The result that a response brings. Raises _FailedError, or RunError when no request can succeed."""
        status = response.status_code
        if status == 200:
            text, details = self._reply(response)
            return answered(sample, text, parse_boxes(text, sample.sizes), details)
        self._check_access(response)
        reason = self._reason(response)
        if status in _BUSY or status in _TRY_AGAIN or status >= 500:
            raise _FailedError(reason, busy=status in _BUSY, retry_after=self._retry_after(response))
        return unanswered(sample, reason)

    def _reply(self, response: httpx2.Response) -> tuple[str, dict[str, Any]]:
        """(text, details) of an answer. Raises _FailedError when it is none."""
        try:
            reply = response.json()
            choice = reply["choices"][0]
            text = choice["message"].get("content") or ""
            if not isinstance(text, str):
                raise TypeError(f"content is {type(text).__name__}")
            usage = reply.get("usage") or {}
            known = {
                "finish_reason": (choice.get("finish_reason"), str),
                "prompt_tokens": (usage.get("prompt_tokens"), int),
                "image_tokens": ((usage.get("prompt_tokens_details") or {}).get("image_tokens"), int),
                "answer_tokens": (usage.get("completion_tokens"), int),
            }
        except (ValueError, KeyError, IndexError, TypeError, AttributeError):
            raise _FailedError(f"not a chat completion ({self._reason(response)})") from None
        return _encodable(text), {name: value for name, (value, kind) in known.items() if type(value) is kind}

    def _first_model(self) -> str:
        response = self._models()
        try:
            name = response.json()["data"][0]["id"]
            if not isinstance(name, str):
                raise TypeError
        except (ValueError, KeyError, IndexError, TypeError):
            raise RunError(
                f"{self._url}/models: does not say which models there are ({self._reason(response)}). "
                "Name one with --server-model."
            ) from None
        return name

    def _models(self) -> httpx2.Response:
        """The answer of /models, whatever it is. Raises RunError when there is none, or the key is refused."""
        timeout = self._httpx.Timeout(60.0, connect=_CONNECT)
        try:
            response = self._httpx.get(f"{self._url}/models", headers=self._headers, timeout=timeout)
        except (self._httpx.RequestError, self._httpx.InvalidURL) as error:
            raise RunError(
                f"{self._url}: cannot be reached ({self._safe(first_line(error))}). Check that the server runs, and "
                "the address given with --server."
            ) from None
        if response.status_code in _NO_ACCESS:
            self._check_access(response)
        self._seen = True
        return response

    def _check_access(self, response: httpx2.Response) -> None:
        """Raises RunError when no request can succeed as things are."""
        if response.status_code in _NO_ACCESS:
            given = "the API key" if self._key else "to answer without an API key"
            raise RunError(
                f"{self._url}: refuses {given} ({self._reason(response)}). Put the right key into a file and give it "
                f"with --api-key-file, or set {KEY_VARIABLE}."
            )
        if response.status_code in _NOT_HERE:
            leads = response.headers.get("location")
            raise RunError(
                f"{response.url}: no such page or model ({self._reason(response)}"
                f"{self._safe(f'; it leads to {leads}') if leads else ''}). Check --server, which ends before "
                f"/chat/completions, and --server-model; the model asked for is {self.model!r}."
            )

    def _reason(self, response: httpx2.Response) -> str:
        """What a response says about itself, as in "HTTP 400: image too large"."""
        text = ""
        try:
            reply = response.json()
            error = reply.get("error", reply)
            text = error if isinstance(error, str) else error.get("message") or error.get("detail") or ""
        except (ValueError, AttributeError):
            text = response.text
        text = " ".join(str(text).split())[:_LONGEST_REASON]
        return self._safe(f"HTTP {response.status_code}: {text or response.reason_phrase or 'no reason given'}")

    def _retry_after(self, response: httpx2.Response) -> float | None:
        """Seconds that a server asks to wait. Raises RunError when they are too many."""
        wait = parse_retry_after(response.headers.get("retry-after"))
        if wait is not None and wait > _LONGEST_RETRY_AFTER:
            raise RunError(f"{self._url}: asks to wait for {wait:,.0f} seconds ({self._reason(response)}). {_AGAIN}")
        return wait

    def _safe(self, text: str) -> str:
        """A text from outside without the key: servers quote what they refuse."""
        return _encodable(text.replace(self._key, "***") if self._key else text)


_AGAIN = "What was answered is kept: start the same command again to go on."


class _FailedError(Exception):
    """The server could not answer for now: because it is busy or away, or because of this question."""

    def __init__(self, message: str, *, busy: bool = False, retry_after: float | None = None):
        super().__init__(message)
        self.busy, self.retry_after = busy, retry_after


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
        try:
            text = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "not text"
            raise UsageError(f"{where}: cannot be read ({reason}).") from None
    lines = [words for line in text.splitlines() if (words := line.split()) and not words[0].startswith("#")]
    if not lines and file is None:
        return ""
    if len(lines) != 1:
        raise UsageError(f"{where}: has {len(lines)} keys, expected one.")
    if len(lines[0]) > 2 or not re.fullmatch(r"[\x21-\x7e]+", lines[0][-1]):
        raise UsageError(f"{where}: expected KEY or NAME KEY, the key of ASCII characters.")
    return lines[0][-1]


def messages(conversation: tuple[Mapping[str, str], ...], urls: list[str]) -> list[dict[str, Any]]:
    """The conversation as a server takes it: each ``<image>`` of a user's turn becomes a part with the next address.

    A newline behind a tag goes with it: an image part stands for ``<image>`` and a newline.
    """
    left = iter(urls)
    turns = []
    for turn in conversation:
        content: Any = turn["content"]
        if turn["role"] == "user" and IMAGE_TOKEN in content:
            first, *others = content.split(IMAGE_TOKEN)
            content = [{"type": "text", "text": first}]
            for text in others:
                content.append({"type": "image_url", "image_url": {"url": next(left)}})
                content.append({"type": "text", "text": text.removeprefix("\n")})
            content = [part for part in content if part.get("text") != ""]
        turns.append({"role": turn["role"], "content": content})
    return turns


def data_url(source: ImageSource, image: Image.Image) -> str:
    """An image as a data: address, of the file's own bytes where its format is a usual one.

    Args:
      source: a path, or a file's bytes.
      image: the same in RGB, sent as PNG otherwise.
    """
    content = source if isinstance(source, bytes) else Path(source).read_bytes()
    kind = next((name for start, name in _FORMATS if start.match(content)), None)
    if kind is None:
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        kind, content = "png", buffer.getvalue()
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def parse_retry_after(value: str | None) -> float | None:
    """Seconds from now of a Retry-After header, which holds seconds or a date (RFC 9110); None without a right one."""
    if value is None:
        return None
    if re.fullmatch(r"\d{1,9}(\.\d*)?", value.strip()):
        return float(value)
    try:
        then = parsedate_to_datetime(value)
    except ValueError:
        return None
    then = then if then.tzinfo else then.replace(tzinfo=UTC)
    return max(0.0, (then - datetime.now(UTC)).total_seconds())


def _delay(tries: int, retry_after: float | None) -> float:
    """Seconds before the next try: twice as many each time, at random so that not all come back at once."""
    most = min(_LONGEST_WAIT, _FIRST_WAIT * 2 ** (tries - 1))
    return (retry_after or 0.0) + random.uniform(most / 2, most)


_sleep = asyncio.sleep


def _encodable(text: str) -> str:
    """The text without halves of characters, which JSON can hold and files cannot."""
    return text.encode(errors="replace").decode()


def _short_name(model: str) -> str:
    """The last part of a model's name or path, without characters that are unusual in file names."""
    return re.sub(r"[^\w.-]+", "-", model.rstrip("/").rpartition("/")[2]) or "model"


def _import_httpx() -> Any:
    try:
        import httpx2
    except ModuleNotFoundError:
        raise UsageError("--server needs httpx2, which is not installed: pip install -e '.[serve]'") from None
    return httpx2
