"""Pieces that the messages of several modules are made of."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

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
