"""What goes to people's eyes: text of files and models is shown there, and never obeyed.

An escape sequence in a file name, an error message or an answer could move the cursor, rename the window or hide what
stands before it. `escaped_output` makes whatever a command prints pass through `dsvl2_jax.messages.printable`: on
standard error always, on standard output where it is a terminal. Into a file or a pipe an answer goes exactly as it
is: there it is data. Tested in tests/runtime/test_terminal.py.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TextIO, TypeVar

from dsvl2_jax.messages import printable

Result = TypeVar("Result")


class _Escaped:
    """A text stream that writes printable text alone. One character decides alone, so pieces may be cut anywhere."""

    def __init__(self, stream: TextIO):
        self.rich_proxied_file = stream  # where a console of rich writes, whose own escape sequences must pass

    def write(self, text: str) -> int:
        self.rich_proxied_file.write(printable(text))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.rich_proxied_file, name)


def escaped(stream: TextIO, *, always: bool = False) -> TextIO:
    """The stream, with an `_Escaped` around it where it is a terminal, or ``always``."""
    if stream is None or isinstance(stream, _Escaped) or not (always or stream.isatty()):
        return stream
    return _Escaped(stream)  # type: ignore[return-value]


def unescaped(stream: TextIO) -> TextIO:
    """What is under `escaped`, for a library that draws on a terminal by itself."""
    return getattr(stream, "rich_proxied_file", stream)


@contextlib.contextmanager
def escaped_output() -> Iterator[None]:
    """Standard output and standard error as the module says, until the block ends."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = now = escaped(sys.stdout), escaped(sys.stderr, always=True)
    try:
        yield
    finally:
        if sys.stdout is now[0]:
            sys.stdout = before[0]
        if sys.stderr is now[1]:
            sys.stderr = before[1]


def with_escaped_output(command: Callable[..., Result]) -> Callable[..., Result]:
    """The command with what it prints escaped. Its options' help comes before, in the parser's own colours."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> Result:
        with escaped_output():
            return command(*args, **kwargs)

    return run
