"""How many local tiles a picture may be cut into, and the canvases that this leaves to choose from.

Tested in tests/inputs/test_tile_budget.py.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from dsvl2_jax.errors import UsageError

# Of one picture. 18 were ever evaluated; 100 have fewer than 500 canvases.
MAX_TILES = 100
MAX_CANVAS_PIXELS = 1 << 25  # of the largest canvas; 18 tiles have 2.7 million

BUDGET_KEYS = ("max_tiles", "min_tiles")  # of an image or a video in a conversation, of a record, of a request


class TileBudget(NamedTuple):
    """Bounds of the local tiles of one picture (the global view comes on top); None: as the checkpoint has it."""

    max_tiles: int | None = None
    min_tiles: int | None = None

    def given(self) -> dict[str, int]:
        """The bounds that are set, by their names."""
        return {name: value for name, value in self._asdict().items() if value is not None}

    def over(self, other: TileBudget) -> TileBudget:
        """This budget, and ``other`` where it says nothing at all."""
        return other if self == NO_BUDGET else self

    def checked(self, where: str = "") -> TileBudget:
        """The budget itself. Raises UsageError, beginning with ``where``, for numbers that cannot be."""
        for name, value in zip(BUDGET_KEYS, self, strict=True):
            if value is not None and (type(value) is not int or not 1 <= value <= MAX_TILES):
                raise UsageError(f"{where}{name} is {value!r:.40}, expected a whole number from 1 to {MAX_TILES}.")
        if None not in self and self.min_tiles > self.max_tiles:
            raise UsageError(
                f"{where}min_tiles is {self.min_tiles}, more than max_tiles, {self.max_tiles}. Exchange them, or leave "
                "one of them out."
            )
        return self


NO_BUDGET = TileBudget()


def read_budget(values: Mapping[str, Any], where: str = "") -> TileBudget:
    """The budget under `BUDGET_KEYS` of an object; raises what `TileBudget.checked` does."""
    return TileBudget(*map(values.get, BUDGET_KEYS)).checked(where)


def extended_candidate_resolutions(max_tiles: int, tile_size: int) -> tuple[tuple[int, int], ...]:
    """All (width, height) canvases of 1 to `max_tiles` tiles, in the released order: by area, then by width.

    9 tiles of 384 give the released 23; 18 are what InfoVQA was evaluated with.
    """
    grids = [(cols, rows) for cols in range(1, max_tiles + 1) for rows in range(1, max_tiles // cols + 1)]
    grids.sort(key=lambda grid: (grid[0] * grid[1], grid[0]))
    return tuple((cols * tile_size, rows * tile_size) for cols, rows in grids)


def tiles_of(canvas: Sequence[int], tile_size: int) -> int:
    """How many tiles a (width, height) canvas has."""
    return canvas[0] // tile_size * (canvas[1] // tile_size)


@functools.lru_cache(maxsize=256)
def budgeted_candidates(
    candidates: tuple[tuple[int, int], ...], tile_size: int, budget: TileBudget
) -> tuple[tuple[int, int], ...]:
    """The (width, height) canvases that a budget leaves of a checkpoint's, and adds to them.

    Up to the checkpoint's largest number of tiles its own candidates hold, in their order, and no others; above it, up
    to ``max_tiles``, all canvases do, by area and then by width. Those outside of the budget are left out. One tile is
    always possible.

    Raises UsageError where nothing is left.
    """
    largest = max(tiles_of(canvas, tile_size) for canvas in candidates)
    least, most = budget.min_tiles or 1, budget.max_tiles or largest
    if most > largest and most * tile_size**2 > MAX_CANVAS_PIXELS:
        raise UsageError(
            f"max_tiles is {most}, but {most} tiles of {tile_size}×{tile_size} pixels are more than the "
            f"{MAX_CANVAS_PIXELS:,} that are read. Give at most {MAX_CANVAS_PIXELS // tile_size**2}."
        )
    further = extended_candidate_resolutions(most, tile_size) if most > largest else ()
    canvases = (*candidates, *(canvas for canvas in further if tiles_of(canvas, tile_size) > largest))
    left = tuple(canvas for canvas in canvases if least <= tiles_of(canvas, tile_size) <= most)
    if left:
        return left
    if least == 1:
        return ((tile_size, tile_size),)
    if budget.max_tiles is None:
        raise UsageError(
            f"min_tiles is {least}, but the checkpoint's candidate_resolutions have {largest} tiles at most. Give "
            "max_tiles too, which adds larger ones."
        )
    raise UsageError(
        f"the checkpoint's candidate_resolutions have none of {least} to {most} tiles. Give a wider range; above "
        f"{largest} tiles every number is possible."
    )
