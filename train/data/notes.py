"""What the samples of a set have that training does not use or had to guess, counted and said once.

Tested in tests/train/data/test_notes.py.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator
from typing import Any

from dsvl2_jax.inputs.record_boxes import PIXELS, THOUSANDTHS
from dsvl2_jax.messages import MAX_LISTED

# Keys of a sample on its way from a worker; `Notes.take` removes them.
UNUSED, BOXES, GUESSED = "unused_keys", "box_kind", "box_kind_guessed"


@dataclasses.dataclass
class UnusedKey:
    """A key that is not used, in one file or in a function's records."""

    file: str
    key: str
    first: str  # sample, as "file:line" or "data.train.drawn[7]"
    samples: int = 0

    def __str__(self) -> str:
        _, place, made = split_name(self.first)
        first = f"the first is number {place}" if made else f"the first in line {place}"
        return f"{self.file}: {self.key!r} is not used (samples: {self.samples:,}, {first})"


def split_name(name: str) -> tuple[str, str, bool]:
    """A sample's file and line (or key, in a shard), or its source and number, and whether it is of a function."""
    made = ":" not in name  # as the name of every sample of a file has
    file, _, place = name.removesuffix("]").rpartition("[") if made else name.rpartition(":")
    return file, place, made


class Notes:
    """Counts over samples in the order in which they are read."""

    def __init__(self) -> None:
        self._unused: dict[tuple[str, str], UnusedKey] = {}
        self._files: set[str] = set()
        self._guessed: Counter[str] = Counter()
        self.boxes: Counter[str] = Counter()  # kind of box → samples

    def take(self, sample: dict[str, Any]) -> Iterator[str]:
        """Counts a sample, removes its keys of this module, and gives what is to be said now, by its name."""
        keys, kind, guessed = sample.pop(UNUSED, ()), sample.pop(BOXES, ""), sample.pop(GUESSED, False)
        file, _, made = split_name(sample["name"])
        for key in keys:
            self._unused.setdefault((file, key), UnusedKey(file, key, sample["name"])).samples += 1
        if keys and file not in self._files:
            self._files.add(file)
            if len(self._files) <= MAX_LISTED:
                said, where = ", ".join(map(repr, keys)), "function" if made else "file"
                yield f"{said} not used, here and in later samples of the {where} (see docs/data.md)"
        if kind:
            self.boxes[kind] += 1
            if guessed:
                self._guessed[kind] += 1
                if self._guessed[kind] == 1 and self._mixed():
                    yield self._mixed()

    @property
    def unused(self) -> list[UnusedKey]:
        """By file and key, in the order in which they were met."""
        return list(self._unused.values())

    def totals(self) -> list[str]:
        """One sentence for each key of a file, and one about boxes of two kinds."""
        said = [str(key) for key in self.unused[:MAX_LISTED]]
        if len(self.unused) > MAX_LISTED:
            said.append(f"and {len(self.unused) - MAX_LISTED:,} more keys that are not used")
        return said + ([self._mixed()] if self._mixed() else [])

    def _mixed(self) -> str:
        pixels, thousandths = self._guessed[PIXELS], self._guessed[THOUSANDTHS]
        if not (pixels and thousandths):
            return ""
        return (
            f"boxes that do not say what they are were taken for pixels (samples: {pixels:,}), and for thousandths "
            f"where they go beyond their images (samples: {thousandths:,}). If all are thousandths, set the source's "
            f'boxes = "{THOUSANDTHS}" (--boxes {THOUSANDTHS} in `dsvl2 data check`)'
        )
