"""Sizes as people write them."""

from __future__ import annotations

import re
from decimal import Decimal, InvalidOperation

from dsvl2_jax.errors import UsageError

# Unit in lower case → bytes.
_UNITS = {"": 1, "b": 1} | {
    prefix + suffix: base**power
    for power, prefix in enumerate("kmgt", start=1)
    for suffix, base in (("", 1000), ("b", 1000), ("ib", 1024))
}


def parse_bytes(text: int | str) -> int:
    """A number of bytes from "4GiB", "500 MB", "2e9" or a number; K, M, G, T are powers of 1000, Ki … of 1024.

    Raises:
      UsageError: it is not a positive size.
    """
    match = re.fullmatch(r"\s*([0-9.]+(?:e[0-9]{1,2})?)\s*([A-Za-z]*)\s*", str(text))
    try:
        size = int(Decimal(match[1]) * _UNITS[match[2].lower()]) if match else 0
    except (KeyError, InvalidOperation):
        size = 0
    if size <= 0:
        raise UsageError(f"{text!r} is not a size: expected a number with a unit, such as 4GiB, 500MB or 2000000000.")
    return size
