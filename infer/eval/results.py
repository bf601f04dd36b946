"""The directory of an evaluation: what it is of, and a result per line that a killed run does not lose.

Tested in tests/infer/eval/test_evaluate.py.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from dsvl2_jax.checkpoint.staging import NEW_SUFFIX, locked, write_text
from dsvl2_jax.errors import RunError
from dsvl2_jax.json_files import parse_json, read_json_object
from dsvl2_jax.messages import changes

IDENTITY_NAME, RESULTS_NAME = "run.json", "results.jsonl"
VERSION = 1

DIGEST = 16  # hexadecimal digits, of SHA-256


class EvalRun:
    """An open directory. ``results`` are those so far, by line of the data file."""

    def __init__(self, path: Path, results: dict[int, dict[str, Any]]):
        self.path = path
        self.results = results
        self._file = (path / RESULTS_NAME).open("a", encoding="utf-8")

    def append(self, results: Iterable[dict[str, Any]]) -> None:
        """Keeps results, on disk when this returns; each has ``line``."""
        for result in results:
            self.results[result["line"]] = result
            self._file.write(json.dumps(result, ensure_ascii=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


@contextlib.contextmanager
def open_run(path: Path, identity: Mapping[str, Any]) -> Iterator[EvalRun]:
    """Starts an evaluation in a directory, or resumes the one that is there.

    Args:
      identity: what makes results comparable: nested objects of texts and numbers.

    Raises:
      RunError: the directory holds another evaluation, something else, or results that cannot be read.
      CheckpointError: another process is evaluating into it, or it cannot be made.
    """
    if path.exists() and not path.is_dir():
        raise RunError(f"{path}: is a file. Choose another --out.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"{path.parent}: cannot be made ({error.strerror}). Choose another --out.") from None
    with locked(path, f"{path}: another run is evaluating into it. Wait for it, or choose another --out."):
        _check_identity(path, {"version": VERSION, **identity})
        run = EvalRun(path, _read_results(path / RESULTS_NAME))
        try:
            yield run
        finally:
            run.close()


def _check_identity(path: Path, identity: dict[str, Any]) -> None:
    file = path / IDENTITY_NAME
    if not file.exists():
        if others := sorted(p.name for p in path.iterdir() if not p.name.endswith(NEW_SUFFIX)):
            raise RunError(f"{path}: holds no evaluation, but {', '.join(others[:3])}. Choose another --out.")
        write_text(file, json.dumps(identity, indent=1, ensure_ascii=False) + "\n")
        return
    before = read_json_object(file, RunError, f"Remove {path}, or choose another --out.")
    if other := list(changes(before, identity)):
        raise RunError(
            f"{path}: holds the results of another evaluation: {'; '.join(other)}. Choose another --out, or remove "
            "the directory to start over."
        )


def _read_results(file: Path) -> dict[int, dict[str, Any]]:
    """The results by line. A last line that was cut short is cut off."""
    if not file.exists():
        return {}
    content = file.read_bytes()
    complete = content[: content.rfind(b"\n") + 1]
    results = {}
    for number, line in enumerate(complete.splitlines(), 1):
        try:
            result = parse_json(line)
            results[result["line"]] = result
        except (ValueError, KeyError, TypeError) as error:
            raise RunError(
                f"{file}:{number}: not a result ({type(error).__name__}: {error}). Remove this line: its sample is "
                "then answered again."
            ) from None
    if len(complete) < len(content):
        with file.open("r+b") as torn:
            torn.truncate(len(complete))
    return results


def file_digest(file: Path) -> str:
    """16 hexadecimal digits of the SHA-256 of a file's contents. Raises OSError."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()[:DIGEST]
