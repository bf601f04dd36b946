"""Reading JSON, TOML and text that a user gives: one guarded reader for every such file.

`json.loads` and `tomllib.loads` meet bad input with several kinds of exception and let some through. Here all of
it is a ValueError, or an error of the caller's kind that names the file. Tested in tests/test_json_files.py.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dsvl2_jax.errors import DSVL2Error

MAX_BYTES = 256 << 20  # of a file that is read whole; the largest that we know, a tokenizer.json, has 10 MB
MAX_DEPTH = 100  # levels of lists and objects in each other


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text.

    Raises ValueError: it is not UTF-8 (a byte order mark may lead), not JSON, deeper than MAX_DEPTH, has a number of
    thousands of digits, or a surrogate that is no half of a pair, which is not text and cannot be written again.
    """
    if isinstance(text, bytes):
        text = text.decode("utf-8-sig")
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError(f"more than {MAX_DEPTH} levels of lists and objects in each other") from None
    if text.count("[") + text.count("{") > MAX_DEPTH:
        _check_depth(value)
    if "\\ud" in text or "\\uD" in text:
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            surrogate = f"\\u{ord(error.object[error.start]):04x}"
            raise ValueError(f"a surrogate without its other half ({surrogate}), which is no character") from None
    return value


def parse_toml(text: str) -> dict[str, Any]:
    """The tables of a TOML text.

    Raises ValueError: it is not TOML, deeper than MAX_DEPTH, or has a number of thousands of digits.
    """
    try:
        value = tomllib.loads(text)
        _check_depth(value)
    except RecursionError:
        raise ValueError(f"more than {MAX_DEPTH} levels of arrays and tables in each other") from None
    return value


def _check_depth(value: Any) -> None:
    level, depth = [value], 0
    while containers := [item for item in level if isinstance(item, list | dict)]:
        depth += 1
        if depth > MAX_DEPTH:
            raise ValueError(f"more than {MAX_DEPTH} levels of lists and objects in each other")
        level = [child for item in containers for child in (item.values() if isinstance(item, dict) else item)]


def read_text(path: Path, error: type[DSVL2Error], advice: str = "Download the file again.") -> str:
    """The text of a UTF-8 file.

    Args:
      error: what is raised; its message names the file and what was found, and ends in ``advice``.

    Raises:
      error: there is no such file, it cannot be read, has more than MAX_BYTES, or is not UTF-8.
    """
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            raise error(f"{path}: has more than {MAX_BYTES:,} bytes, the most that such a file may have. {advice}")
        return content.decode("utf-8-sig")
    except FileNotFoundError:
        raise error(f"{path}: not found, and it is needed. {advice}") from None
    except UnicodeDecodeError as problem:
        raise error(f"{path}: not UTF-8 text ({problem.reason} at byte {problem.start}). {advice}") from None
    except (OSError, ValueError) as problem:  # ValueError: a name that no file can have
        raise error(f"{path}: cannot be read ({getattr(problem, 'strerror', None) or problem}). {advice}") from None


def read_json_object(path: Path, error: type[DSVL2Error], advice: str = "Download the file again.") -> dict[str, Any]:
    """The object in a JSON file; arguments as `read_text`'s.

    Raises:
      error: as `read_text` does, or `parse_json` refuses the text, or it holds something else than an object.
    """
    text = read_text(path, error, advice)
    try:
        content = parse_json(text)
    except ValueError as problem:
        raise error(f"{path}: cannot be read as JSON ({problem}). {advice}") from None
    if not isinstance(content, dict):
        raise error(f"{path}: found a JSON {type(content).__name__}, expected an object with named fields. {advice}")
    return content


def read_toml(path: Path, error: type[DSVL2Error], advice: str = "Correct the file.") -> dict[str, Any]:
    """The tables of a TOML file; arguments as `read_text`'s.

    Raises:
      error: as `read_text` does, or `parse_toml` refuses the text.
    """
    try:
        return parse_toml(read_text(path, error, advice))
    except ValueError as problem:
        raise error(f"{path}: not readable as TOML: {problem}. {advice}") from None


def read_lines(path: Path, error: type[DSVL2Error], advice: str) -> Iterator[tuple[int, str]]:
    """(number from 1, text) of the lines of a UTF-8 file, one at a time; arguments as `read_text`'s.

    A line ends at ``\\n``; the file may be of any size, a line has at most MAX_BYTES.

    Raises:
      error: as `read_text` does, and names the line where one is too long or not UTF-8.
    """
    number = 0
    try:
        with path.open("rb") as file:
            while line := file.readline(MAX_BYTES + 1):
                number += 1
                if len(line) > MAX_BYTES:
                    raise error(f"{path}:{number}: a line of more than {MAX_BYTES:,} bytes. {advice}")
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
    except FileNotFoundError:
        raise error(f"{path}: not found, and it is needed. {advice}") from None
    except UnicodeDecodeError as problem:
        raise error(f"{path}:{number}: not UTF-8 text ({problem.reason}). {advice}") from None
    except (OSError, ValueError) as problem:
        raise error(f"{path}: cannot be read ({getattr(problem, 'strerror', None) or problem}). {advice}") from None
