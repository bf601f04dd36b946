"""The models that a request can name: the base, and its adapters.

Names come from the operator alone: what a request names is looked up here, and never opened.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import re
from collections.abc import Mapping, Sequence

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


def parse_adapters(values: Sequence[str], name: str, aliases: Sequence[str]) -> dict[str, str]:
    """NAME=DIR of the command line → name → directory, in their order.

    Args:
      values: as they were given.
      name, aliases: of the base, and patterns of its other names.

    Raises:
      UsageError: a value has no such form, or a name is taken.
    """
    directories: dict[str, str] = {}
    for value in values:
        key, _, directory = value.partition("=")
        if not _NAME.fullmatch(key) or not directory:
            raise UsageError(
                f"{ADAPTER}: found {value!r}, expected NAME=DIR, the name of letters, digits and any of . _ : / -, at "
                "most 100 of them, and a letter or a digit first."
            )
        pattern = next((p for p in aliases if fnmatch.fnmatchcase(key, p)), None)
        taken = "is the base's name" if key == name else f"also means the base, by {pattern!r}" if pattern else ""
        if key in directories:
            taken = f"is {directories[key]}'s already"
        if taken:
            raise UsageError(f"{ADAPTER} {value}: {key} {taken}; give the adapter another name.")
        directories[key] = directory
    return directories


def served_models(name: str, root: str, adapters: Mapping[str, str]) -> dict[str, ServedModel]:
    """By name, the base first.

    Args:
      name, root: of the base.
      adapters: name → what it was loaded from, numbered in their order.
    """
    base = ServedModel(name, root)
    others = [ServedModel(key, root, number, name) for number, (key, root) in enumerate(adapters.items())]
    return {model.name: model for model in (base, *others)}
