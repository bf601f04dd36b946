"""A side of a comparison in a process of its own, which works when it is told to.

Questions and answers are JSON objects, one a line. Tested by what uses it: tests/apps/bench/test_model.py, and
`dsvl2 bench train` by hand.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from typing import Any, TextIO

from dsvl2_jax.errors import DSVL2Error


class Side(contextlib.AbstractContextManager):
    """The process. As a context manager, it ends with the block.

    Args:
      module: is run with ``job`` as its only argument, in JSON; see `questions`.
      name: of the side, for messages.
      environment: variables besides our own.
    """

    def __init__(self, module: str, job: Mapping[str, Any], name: str, environment: Mapping[str, str]):
        self.name = name
        self._errors: TextIO = tempfile.TemporaryFile("w+")  # noqa: SIM115  (a pipe would fill: nobody reads it)
        self._process = subprocess.Popen(
            [sys.executable, "-m", module, json.dumps(job)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env=os.environ | environment,
        )

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()
        self._errors.close()

    def ask(self, question: Any) -> dict[str, Any]:
        """The answer to a question.

        Raises:
          DSVL2Error: the process has ended; the message has the last line of what it wrote.
        """
        with contextlib.suppress(BrokenPipeError):  # its end is told below
            self._process.stdin.write(json.dumps(question) + "\n")
            self._process.stdin.flush()
        return self.answer()

    def answer(self) -> dict[str, Any]:
        """The next line that it says, asked or not; raises as `ask` does."""
        line = self._process.stdout.readline()
        if line:
            return json.loads(line)
        self._process.wait()
        self._errors.seek(0)
        lines = self._errors.read().strip().splitlines()
        reason = lines[-1] if lines else f"ended with status {self._process.returncode}"
        raise DSVL2Error(f"{self.name}: {reason}")


class Answers:
    """Inside the process: where answers go. Whatever else is printed goes to standard error."""

    def __init__(self) -> None:
        self._answers = os.fdopen(os.dup(1), "w", buffering=1)
        os.dup2(2, 1)

    def give(self, answer: Mapping[str, Any]) -> None:
        print(json.dumps(answer), file=self._answers)

    @staticmethod
    def questions() -> Iterator[Any]:
        """One after the other, until the other side has no more."""
        for line in sys.stdin:
            yield json.loads(line)
