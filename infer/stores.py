"""Bounded stores: what was used least lately goes out first."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Hashable


@dataclasses.dataclass
class Store:
    """Keys of things kept elsewhere, with their sizes; the sum of the sizes never exceeds ``capacity``.

    Attributes:
      capacity: bytes.
      drop: called with each key that goes out.
      size: bytes of all that is in.
      hits, queries: how often `touch` found a key, and was asked.
    """

    capacity: int
    drop: Callable[[Hashable], None]
    size: int = 0
    hits: int = 0
    queries: int = 0
    _sizes: collections.OrderedDict[Hashable, int] = dataclasses.field(default_factory=collections.OrderedDict)

    def __contains__(self, key: Hashable) -> bool:
        return key in self._sizes

    def __len__(self) -> int:
        return len(self._sizes)

    def touch(self, key: Hashable) -> bool:
        """Whether the key is in; it is then the last to go out."""
        self.queries += 1
        if key not in self._sizes:
            return False
        self.hits += 1
        self._sizes.move_to_end(key)
        return True

    def make_room(self, key: Hashable, size: int) -> bool:
        """Takes in a key that is not in yet, and drops others until it fits; False: it is larger than the store."""
        if size > self.capacity:
            return False
        while self.size + size > self.capacity:
            old, old_size = self._sizes.popitem(last=False)
            self.size -= old_size
            self.drop(old)
        self._sizes[key] = size
        self.size += size
        return True

    def forget(self, key: Hashable) -> bool:
        """Takes a key out, without dropping it; False: it was not in."""
        size = self._sizes.pop(key, None)
        self.size -= size or 0
        return size is not None

    def clear(self) -> None:
        """Forgets every key, without dropping: what they stood for is gone already."""
        self._sizes.clear()
        self.size = 0
