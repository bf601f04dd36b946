"""Answers of an OpenAI-compatible server: one request to /chat/completions a question, many at once.

What a failure means is decided here: a question that the server refuses (HTTP 400 and the like) has no answer; a server
that is busy or away is waited for; one that does not know the key or the model ends the run.

Tested in tests/infer/eval/test_client.py.
"""

from __future__ import annotations

import asyncio
import json
import random
import re
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from dsvl2_jax.errors import RunError, UsageError
from dsvl2_jax.infer.eval.answers import Questions, Result, answered, unanswered
from dsvl2_jax.infer.eval.chat_request import KEY_VARIABLE, ServerOptions, base_url, data_url, messages, read_key
from dsvl2_jax.infer.eval.samples import Sample
from dsvl2_jax.inputs.grounding import parse_boxes
from dsvl2_jax.messages import first_line

if TYPE_CHECKING:
    import httpx2

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
        urls = [data_url(*image) for image in questions.images(sample)]
        asked = messages(sample.conversation, urls, sample.budgets)
        body = {"messages": asked} | sample.budget.given() | self._body
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


def parse_retry_after(value: str | None) -> float | None:
    """Seconds from now of a Retry-After header, which holds seconds or a date (RFC 9110); None without a right one."""
    if value is None:
        return None
    if re.fullmatch(r"\d{1,9}(\.\d*)?", value.strip()):
        return float(value)
    try:
        then = parsedate_to_datetime(value)
    except (ValueError, TypeError, OverflowError):
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
