"""The models that a request can name: the base, and its adapters.

Names come from the operator alone: what a request names is looked up here, and never opened.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import re
from collections.abc import Sequence

from dsvl2_jax.errors import UsageError
from dsvl2_jax.infer.adapters import BASE

ADAPTER = "--adapter"
_NAME = re.compile(
    r"[A-Za-z0-9][A-Za-z0-9._:/-]{0,99}"
)  # what paths, labels of metrics and lines of logs take as it is


@dataclasses.dataclass(frozen=True)
class ServedModel:
    """One of a server's models.

    Attributes:
      root: what it was loaded from, without the folders above.
      adapter: its number in `dsvl2_jax.infer.adapters.Adapters`; `BASE`: the base itself.
      parent: the base's name, of an adapter.
    """

    name: str
    root: str
    adapter: int = BASE
    parent: str | None = None


def parse_adapters(values: Sequence[str]) -> tuple[tuple[str, str], ...]:
    """NAME=DIR of the command line → (name, directory).

    Raises:
      UsageError: a value has no such form, or two have one name.
    """
    directories: dict[str, str] = {}
    for value in values:
        key, _, directory = value.partition("=")
        if not _NAME.fullmatch(key) or not directory:
            raise UsageError(
                f"{ADAPTER}: found {value!r}, expected NAME=DIR, the name of letters, digits and any of . _ : / -, at "
                "most 100 of them, and a letter or a digit first."
            )
        if key in directories:
            raise UsageError(f"{ADAPTER} {value}: {key} is {directories[key]}'s name already; give each its own.")
        directories[key] = directory
    return tuple(directories.items())


def served_models(
    name: str, root: str, aliases: Sequence[str], adapters: Sequence[tuple[str, str]]
) -> dict[str, ServedModel]:
    """By name, the base first.

    Args:
      name, root: of the base. aliases: patterns of its other names.
      adapters: (name, directory), numbered in their order.

    Raises:
      UsageError: an adapter's name means the base.
    """
    models = {name: ServedModel(name, root)}
    for number, (key, directory) in enumerate(adapters):
        means = "is the name of the base" if key == name else ""
        for pattern in aliases:
            if fnmatch.fnmatchcase(key, pattern):
                means = f"means the base too, by --model-alias {pattern!r}"
        if means:
            raise UsageError(f"{ADAPTER} {key}={directory}: {key} {means}; give the adapter another name.")
        models[key] = ServedModel(key, directory.rstrip("/").rpartition("/")[2], number, name)
    return models
