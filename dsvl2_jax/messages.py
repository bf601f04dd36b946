"""Pieces that the messages of several modules are made of."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

MAX_LISTED = 10  # items of a kind that a message spells out


def first_line(error: BaseException) -> str:
    """The first line of an error's text, or the error's type where it has no text."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


# What a terminal obeys, or shows as something else: control characters but for tab and newline, changes of the writing
# direction, and surrogates, which no encoding has.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    """A text that a terminal shows and does not obey: control characters and the like as ``\\x1b`` or ``\\u202e``."""
    return _UNPRINTABLE.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def listed(items: Iterable[str], limit: int = MAX_LISTED, indent: str = "    ") -> str:
    """One item a line, at most ``limit`` of them and then how many more there are."""
    items = list(items)
    more = [f"and {len(items) - limit} more"] if len(items) > limit else []
    return "\n".join(indent + item for item in items[:limit] + more)


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name that ``name`` may have been meant for."""
    return next(iter(difflib.get_close_matches(name, known, 1)), None)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The end of a sentence about an unknown name: ``; did you mean NAME?``, or a full stop."""
    near = nearest(name, known)
    return "." if near is None else f"; did you mean {near}?"


def changes(old: Any, new: Any, prefix: str = "", *, values: bool = True) -> Iterator[str]:
    """A line for each value that two nested mappings do not share, by its dotted name.

    Args:
      prefix: of the names.
      values: say both values (as JSON), rather than that the value has changed.
    """
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for key in dict.fromkeys([*old, *new]):
            name = f"{prefix}{key}"
            if key not in old or key not in new:
                yield f"{name} is {'new' if key in new else 'gone'}"
            else:
                nested = isinstance(old[key], Mapping) and isinstance(new[key], Mapping)
                yield from changes(old[key], new[key], f"{name}." if nested else name, values=values)
    elif old != new:
        yield f"{prefix} was {json.dumps(old)}, is {json.dumps(new)}" if values else f"{prefix} has changed"
