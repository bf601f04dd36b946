"""Pieces that the messages of several modules are made of."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

MAX_LISTED = 10  # items of a kind that a message spells out


def first_line(error: BaseException) -> str:
    """The first line of an error's text, or the error's type where it has no text."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


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
