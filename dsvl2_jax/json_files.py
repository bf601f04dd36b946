"""Reading a JSON file that must hold an object, with an error of the caller's kind where it does not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dsvl2_jax.errors import DSVL2Error


def read_json_object(path: Path, error: type[DSVL2Error], advice: str = "Download the file again.") -> dict[str, Any]:
    """The object in a JSON file.

    Args:
      error: what is raised; its message names the file and what was found, and ends in ``advice``.

    Raises:
      error: there is no such file, it is not UTF-8 text in JSON, or it holds something else than an object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise error(f"{path}: not found, and it is needed. {advice}") from None
    except (OSError, ValueError) as problem:
        raise error(f"{path}: cannot be read as JSON ({problem}). {advice}") from None
    if not isinstance(content, dict):
        raise error(f"{path}: found a JSON {type(content).__name__}, expected an object with named fields. {advice}")
    return content
