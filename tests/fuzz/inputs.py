"""Broken inputs made from good ones: of bytes, of JSON documents, and of texts.

`changed` makes one from a seed of random numbers, so that an input is known by its number alone; `broken` is
the same as a hypothesis strategy, for property tests.
"""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from hypothesis import strategies as st

NUMBERS = (0, 1, -1, 2, 3, 255, 256, 999, 1000, 1 << 15, 1 << 16, 1 << 20, 1 << 24, 1 << 31, 1 << 32, 1 << 63, 1 << 64)
TEXTS = (
    "",
    " ",
    "\0",
    "\x1b[31m\x1b]0;title\x07",
    "\u202eright to left",
    "\ud83d",
    "\udcff",
    "😀",
    "<image>",
    "<|ref|>",
    "<|det|>[[1,2,3,4]]<|/det|>",
    "../../../etc/passwd",
    "/dev/zero",
    "file:///etc/passwd",
    "data:image/png;base64,AAAA",
    "a" * 300,
    "a/" * 3000,
    "nan",
    "1e999",
    "[" * 30,
    "9" * 25,
    "null",
    "%s%n{0}{",
)
VALUES: tuple[Any, ...] = (
    *(NUMBERS + tuple(-n for n in NUMBERS)),
    *TEXTS,
    10**30,
    10**400,
    0.5,
    -0.0,
    1e-320,
    1e308,
    float("inf"),
    float("nan"),
    None,
    True,
    False,
    [],
    {},
    [[]],
    [{}],
    {"": {}},
    ["a", 1, None],
    [[1, 2, 3, 4]],
    [[0.5, "x", None, 1e400]],
    {"type": "text", "text": "x"},
    {"role": "user", "content": "x"},
)
# Pieces of JSON text that no value gives.
JSON_PIECES = (
    "[" * 100_000,
    '{"a":' * 2000,
    "9" * 5000,
    "NaN",
    "-Infinity",
    '"\\ud800"',
    "1e400",
    "\ufeff",
    "//",
    "'",
    ",,",
)


def changed(seed: Any, rng: random.Random, kind: str, dictionary: Sequence[str] = ()) -> bytes:
    """A broken form of ``seed``.

    Args:
      kind: "json" (``seed`` is a value), "lines" (a list of values, one a line), "text" (str) or "bytes".
      dictionary: words that mean something in a text of this kind.
    """
    if kind == "bytes":
        return _bytes(bytes(seed), rng)
    if kind == "text":
        return _text(seed, rng, dictionary)
    if kind == "lines":
        rows = [_value(row, rng) if rng.random() < 0.6 else row for row in rng.sample(seed, rng.randint(1, len(seed)))]
        content = b"\n".join(map(_json, rows)) + rng.choice((b"", b"\n", b"\r\n"))
    else:
        content = _json(_value(seed, rng))
    if rng.random() < 0.1:
        place = rng.randint(0, len(content))
        content = content[:place] + rng.choice(JSON_PIECES).encode() + content[place:]
    return _bytes(content, rng) if rng.random() < 0.1 else content


def broken(seeds: Callable[[], Sequence[Any]], kind: str, dictionary: Sequence[str] = ()) -> st.SearchStrategy[bytes]:
    """Broken forms of some seeds, as a strategy."""
    make = lambda seed, rng: changed(seed, rng, kind, dictionary)  # noqa: E731
    return st.builds(make, st.deferred(lambda: st.sampled_from(list(seeds()))), st.randoms(use_true_random=False))


def _json(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=True).encode()


def _bytes(content: bytes, rng: random.Random) -> bytes:
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 4, 16))):
        place = rng.randrange(len(data)) if data else 0
        kind = rng.randrange(8)
        if kind == 0 and data:
            data[place] ^= 1 << rng.randrange(8)
        elif kind == 1 and data:
            data[place] = rng.choice((0, 1, 0x1B, 0x7F, 0x80, 0xFF, rng.randrange(256)))
        elif kind == 2:
            del data[place:]
        elif kind == 3:
            del data[place : place + rng.choice((1, 2, 8, 100))]
        elif kind == 4:
            start = rng.randrange(len(data)) if data else 0
            data[place:place] = data[start : start + rng.choice((1, 4, 50, 512))]
        elif kind == 5:
            data[place:place] = rng.randbytes(rng.choice((1, 3, 20)))
        else:  # a number of the header
            width, order = rng.choice((2, 4, 8)), rng.choice(("little", "big"))
            data[place : place + width] = (rng.choice(NUMBERS) % (1 << 8 * width)).to_bytes(width, order)
    return bytes(data)


def _text(text: str, rng: random.Random, dictionary: Sequence[str]) -> bytes:
    for _ in range(rng.choice((1, 1, 2, 4))):
        place, end = sorted((rng.randint(0, len(text)), rng.randint(0, len(text))))
        kind = rng.randrange(5)
        piece = rng.choice(TEXTS + tuple(dictionary) if rng.random() < 0.7 else JSON_PIECES)
        if kind < 2:
            text = text[:place] + piece + text[place:]
        elif kind == 2:
            text = text[:place] + str(rng.choice(NUMBERS)) + text[min(end, place + 4) :]
        elif kind == 3:
            text = text[:place] + text[end:]
        else:
            text = text[:end] + text[place:]
    content = text.encode(errors="surrogatepass")
    return _bytes(content, rng) if rng.random() < 0.2 else content


def _value(value: Any, rng: random.Random) -> Any:
    value = copy.deepcopy(value)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        places = list(_places(value, rng))
        if not places:
            return copy.deepcopy(rng.choice(VALUES))
        owner, key = rng.choice(places)
        kind = rng.randrange(11)
        if kind == 10 and isinstance(owner[key], int | str):  # everywhere, where values have to agree
            value = _replaced(value, owner[key], copy.deepcopy(rng.choice(VALUES)))
        elif kind < 6:
            owner[key] = copy.deepcopy(rng.choice(VALUES))
        elif kind == 6:
            del owner[key]
        elif kind == 7:
            owner[key] = [owner[key]] if rng.random() < 0.5 else {"a": owner[key]}
        elif isinstance(owner, dict):  # also a key that a field of another place has
            owner[rng.choice((*TEXTS, *owner))] = copy.deepcopy(owner[key])
        else:
            owner.insert(key, copy.deepcopy(owner[rng.randrange(len(owner))]))
    return value


def _replaced(value: Any, old: Any, new: Any) -> Any:
    if isinstance(value, dict):
        return {key: _replaced(inner, old, new) for key, inner in value.items()}
    if isinstance(value, list):
        return [_replaced(inner, old, new) for inner in value]
    return new if type(value) is type(old) and value == old else value


def _places(value: Any, rng: random.Random) -> Iterator[tuple[Any, Any]]:
    """(owner, key) of the values inside a value; of long ones some."""
    if isinstance(value, dict | list):
        keys = list(value) if isinstance(value, dict) else list(range(len(value)))
        for key in keys if len(keys) < 40 else rng.sample(keys, 5):
            yield value, key
            yield from _places(value[key], rng)
