"""``log.jsonl`` of a run: one JSON object per line, ``kind`` telling what it is about.

Tested in tests/train/log/test_report.py.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from dsvl2_jax.errors import RunError
from dsvl2_jax.json_files import parse_json

LOG_NAME = "log.jsonl"

Line = dict[str, Any]


class RunLog:
    """The log of a running run. Every line is flushed, so that a killed run loses none."""

    def __init__(self, directory: Path):
        self.path = directory / LOG_NAME
        self._file: TextIO | None = None
        self._failed = False

    def cut(self, step: int) -> Line | None:
        """Drops what was logged beyond ``step``, and a last line that was not completed.

        Returns:
          The last line of kind ``step`` that is left, or None.
        """
        self.close()
        kept = [line for line in read(self.path) if line["step"] <= step] if self.path.exists() else []
        fresh = self.path.with_name(f"{LOG_NAME}.new")
        try:
            with fresh.open("w", encoding="utf-8") as file:
                file.writelines(_text(line) for line in kept)
            os.replace(fresh, self.path)
        except OSError as error:
            raise self._error(error) from error
        return next((line for line in reversed(kept) if line["kind"] == "step"), None)

    def write(self, line: Line) -> None:
        """Appends a line. Numbers that are not finite become null.

        Raises:
          RunError: it cannot be written. Only the first time, so that a run that stops for it can stop.
        """
        if self._failed:
            return
        try:
            if self._file is None:
                self._file = self.path.open("a", encoding="utf-8")
            self._file.write(_text(line))
            self._file.flush()
        except OSError as error:
            self._failed = True
            raise self._error(error) from error

    def close(self) -> None:
        """Ends writing; `write` starts again."""
        file, self._file = self._file, None
        if file is not None:
            try:
                file.close()
            except OSError as error:  # what `write` could not write is tried once more
                if not self._failed:
                    raise self._error(error) from error

    def _error(self, error: OSError) -> RunError:
        return RunError(f"{self.path}: cannot be written: {error.strerror or error}. Free space, or check permissions.")


def read(path: Path) -> Iterator[Line]:
    """The lines of a log. A last line that a killed process left incomplete is ignored.

    Raises:
      RunError: the file cannot be read, or a line before the last is no line of a log.
    """
    try:
        texts = path.read_bytes().splitlines()
    except (OSError, ValueError) as error:
        raise RunError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}.") from error
    for number, text in enumerate(texts, start=1):
        try:
            line = parse_json(text)
            complete = isinstance(line["step"], int) and isinstance(line["kind"], str)
        except (ValueError, KeyError, TypeError):
            complete = False
        if complete:
            yield line
        elif number < len(texts):
            shown = text[:80].decode(errors="replace")
            raise RunError(f"{path}:{number}: not a line of a training log: {shown!r}. Was the file edited?")


def _text(line: Line) -> str:
    return json.dumps(_storable(line), allow_nan=False) + "\n"


def _storable(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _storable(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_storable(inner) for inner in value]
    if isinstance(value, str):  # a file name that is not UTF-8 has surrogates, which are no JSON
        return value.encode(errors="backslashreplace").decode()
    return None if isinstance(value, float) and not math.isfinite(value) else value
