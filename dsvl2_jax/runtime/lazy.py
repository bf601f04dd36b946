"""Modules that are imported when they are first used, so that commands which do without them start without them."""

from __future__ import annotations

import importlib
from typing import Any


class LazyModule:
    """Stands for a module in ``module.name``, and imports it then.

    It keeps every use as it would be after an import at the top of a file, where a large module is needed by few of the
    file's functions, or by those alone that a second start does not call.
    """

    def __init__(self, name: str):
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        return getattr(importlib.import_module(self._name), attribute)
