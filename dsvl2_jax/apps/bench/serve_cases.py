"""The requests of the soak: good ones, whose answers are known beforehand, and bad ones, which must be refused.

Tested in tests/apps/bench/test_serve.py.
"""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from dsvl2_jax.apps.bench.serve_client import CHAT, COMPLETIONS
from dsvl2_jax.apps.bench.serve_requests import Body, Requests, ask, chat, png_url, url

# How often each kind comes. The first six are good requests; "cancelled" and "slow" are such, read in another way.
SHARES = {
    "short text": 0.26,
    "one picture": 0.28,
    "several pictures": 0.1,
    "two turns": 0.06,
    "long prompt": 0.05,
    "long answer": 0.05,
    "cancelled": 0.08,
    "slow": 0.03,
    "malformed": 0.06,
    "oversized": 0.03,
}
GOOD = tuple(SHARES)[:6]
_BODY_LIMIT = 32 << 20  # bytes, the default of dsvl2 serve --max-body
_MANY_PICTURES, _MANY_PIXELS = 17, 7100  # pictures, and pixels of a side, beyond the defaults


@dataclasses.dataclass(frozen=True)
class Bad:
    """A request that must be refused, with one of some statuses."""

    name: str
    body: bytes
    statuses: tuple[int, ...] = (400,)
    path: str = CHAT
    content_type: str = "application/json"


def good_requests(requests: Requests, count: int, context: int) -> dict[str, list[Body]]:
    """So many requests, by kind: greedy and sampled, some with log-probabilities.

    Args:
      context: the most tokens of a prompt and its answer.
    """
    weights = {kind: SHARES[kind] for kind in GOOD}
    total = sum(weights.values())
    return {
        kind: [_settings(requests, _good(requests, kind, context), kind, context) for _ in range(number)]
        for kind, number in ((kind, max(1, round(count * share / total))) for kind, share in weights.items())
    }


def _good(requests: Requests, kind: str, context: int) -> Body:
    random = requests.rng
    if kind == "one picture":
        return requests.about_picture()
    if kind == "several pictures":
        number = int(random.integers(2, 9))
        side = 1 if number > 2 else 0  # from three pictures on none is cut into tiles
        images = [png_url(requests.picture(side, side)) for _ in range(number)]
        return chat(ask(images, requests.question()))
    if kind == "two turns":
        said = {"role": "assistant", "content": requests.text(12)}
        return chat(ask([png_url(requests.picture())], requests.question()), said, ask([], requests.question()))
    if kind == "long prompt":
        return requests.about_text(int(random.uniform(0.3, 0.8) * context))
    return requests.about_text(int(random.integers(4, 48)))


def _settings(requests: Requests, body: Body, kind: str, context: int) -> Body:
    random = requests.rng
    if kind == "long answer":
        return body | {"max_tokens": min(256, context // 4), "ignore_eos": True}
    body = body | {"max_tokens": int(random.integers(8, 49))}
    if random.random() < 0.4:
        body |= {"temperature": round(float(random.uniform(0.2, 1.2)), 2), "seed": int(random.integers(2**31))}
    if random.random() < 0.3:
        body |= {"logprobs": True, "top_logprobs": 20}
    return body


def bad_requests(requests: Requests, context: int) -> dict[str, list[Bad]]:
    """Malformed and oversized requests."""
    good = requests.about_picture()
    (message,) = good["messages"]
    text = ask([], "What is this?")

    def with_picture(reference: str) -> bytes:
        return _bytes(chat(ask([reference], "What is this?")))

    truncated = png_url(requests.picture())[:-400]
    malformed = [
        Bad("no JSON", b'{"messages": ['),
        Bad("not UTF-8", b'{"messages": "\xff\xfe"}'),
        Bad("a list", b"[]"),
        Bad("nothing", b""),
        Bad("no content type", _bytes(good), (415,), content_type="text/plain"),
        Bad("no messages", _bytes(chat())),
        Bad("unknown field", _bytes(good | {"max_token": 4})),
        Bad("wrong type", _bytes(good | {"temperature": "hot"})),
        Bad("out of range", _bytes(good | {"temperature": 9.5})),
        Bad("infinite", b'{"messages": [{"role": "user", "content": "a"}], "temperature": 1e999}'),
        Bad("other model", _bytes(good | {"model": "another"}), (404,)),
        Bad("unknown role", _bytes(chat(text | {"role": "tool"}))),
        Bad("picture of the system", _bytes(chat(message | {"role": "system"}, text))),
        Bad("broken picture", with_picture(truncated)),
        Bad("no picture", with_picture(url(b"these are no pixels", "png"))),
        Bad("no base64", with_picture("data:image/png;base64,%%%%")),
        Bad("no such scheme", with_picture("gopher://example.org/picture.png"), (400, 403)),
        Bad("picture from elsewhere", with_picture("https://example.org/picture.png"), (403,)),
        Bad("image tag in text", _bytes(chat(ask([], "<image> what is this?")))),
        Bad("unknown token", _bytes({"prompt": [2**31 - 1]}), path=COMPLETIONS),
        Bad("no such path", _bytes(good), (404,), path="/v1/chat/completion"),
    ]
    wide = io.BytesIO()
    Image.new("1", (_MANY_PIXELS, _MANY_PIXELS)).save(wide, "PNG")
    small = png_url(requests.picture(1, 1))
    oversized = [
        Bad("longer than the context", _bytes(requests.about_text(3 * context))),
        Bad("too many pictures", _bytes(chat(ask([small] * _MANY_PICTURES, "What are these?"))), (413,)),
        Bad("too many pixels", with_picture(url(wide.getvalue(), "png")), (413,)),
        Bad("too many bytes", b'{"messages": "' + b"a" * _BODY_LIMIT + b'"}', (413,)),
    ]
    return {"malformed": malformed, "oversized": oversized}


def _bytes(body: Any) -> bytes:
    return json.dumps(body).encode()


def order(requests: Requests, count: int) -> Sequence[str]:
    """The kinds of so many requests in random order, each as often as its share says."""
    ends = np.cumsum(list(SHARES.values())) / sum(SHARES.values())
    kinds = np.searchsorted(ends, (np.arange(count) + 0.5) / count)
    return [list(SHARES)[kind] for kind in requests.rng.permutation(kinds)]
