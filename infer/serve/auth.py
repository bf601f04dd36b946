"""API keys: where they come from, and the layer that lets nobody in without one."""

from __future__ import annotations

import base64
import binascii
import dataclasses
import hmac
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from dsvl2_jax.errors import UsageError
from dsvl2_jax.infer.serve.errors import ApiError
from dsvl2_jax.json_files import read_text

ENVIRONMENT = "DSVL2_API_KEY"
OPEN_PATHS = frozenset({"/health"})
PAGE_PATH = "/"


@dataclasses.dataclass(frozen=True)
class ApiKey:
    """A key, and the name under which its owner's requests wait in the queue and stand in the log."""

    name: str
    key: str = dataclasses.field(repr=False)


def read_keys(file: Path | None) -> tuple[ApiKey, ...]:
    """The keys of a file or, without one, of the environment's `ENVIRONMENT`; none when there is neither.

    Each line is a key, or the name of its owner and a key; empty lines and those that begin with # say nothing.

    Raises:
      UsageError: the file cannot be read, has no key, or has a line that is neither.
    """
    source = f"--api-key-file {file}" if file is not None else ENVIRONMENT
    if file is None:
        text = os.environ.get(ENVIRONMENT)
        if text is None:
            return ()
    else:
        text = read_text(file, UsageError, "Give --api-key-file a text file with one key a line.")
    keys = []
    for number, line in enumerate(text.splitlines(), 1):
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        if len(words) > 2:
            # The line itself is not repeated: it may be a key.
            raise UsageError(f"{source}: line {number} has {len(words)} words, expected KEY or NAME KEY.")
        if not words[-1].isascii():
            raise UsageError(f"{source}: the key in line {number} has characters that no HTTP header can have.")
        keys.append(ApiKey(words[0] if len(words) == 2 else f"key-{number}", words[-1]))
    if not keys:
        raise UsageError(f"{source}: has no key; without one nobody could use the server.")
    return tuple(keys)


class RequireKey:
    """ASGI layer: answers 401 to requests without a key, and tells the others' owner in ``scope["owner"]``.

    A key comes as ``Authorization: Bearer KEY``, as OpenAI's clients send it, or as the password of HTTP's basic
    authentication, for which a browser asks when it is led to the page.
    """

    def __init__(self, app: ASGIApp, keys: Sequence[ApiKey]):
        self.app = app
        self._keys = [(key.name, key.key.encode()) for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in OPEN_PATHS or not self._keys:
            await self.app(scope, receive, send)
            return
        given = _given(Headers(scope=scope).get("authorization", ""))
        owner = self._owner(given)
        if owner is None:
            await _refusal(scope, bool(given)).response()(scope, receive, send)
            return
        scope["owner"] = owner
        await self.app(scope, receive, send)

    def _owner(self, given: Iterable[bytes]) -> str | None:
        """The name of the key that was given. Every key is compared, each in a time that depends on lengths alone."""
        owner = None
        for one in given:
            for name, key in self._keys:
                if hmac.compare_digest(one, key):
                    owner = name
        return owner


def _given(authorization: str) -> tuple[bytes, ...]:
    scheme, _, value = authorization.strip().partition(" ")
    value = value.strip()
    if scheme.lower() == "bearer" and value:
        return (value.encode(),)
    if scheme.lower() == "basic":
        try:
            return (base64.b64decode(value, validate=True).partition(b":")[2],)
        except (binascii.Error, ValueError):
            return (b"",)
    return ()


def _refusal(scope: Scope, given: bool) -> ApiError:
    what = "The API key is wrong" if given else "An API key is missing"
    challenge = 'Basic realm="dsvl2", charset="UTF-8"' if scope["path"] == PAGE_PATH else "Bearer"
    return ApiError(
        401,
        f"{what}: send one that the operator has given out, as the header Authorization: Bearer KEY.",
        headers={"WWW-Authenticate": challenge},
    )
