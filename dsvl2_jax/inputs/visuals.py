"""What stands for a picture or a video in a conversation, a record, or a list of images: its source and its options.

Tested in tests/inputs/test_visuals.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from dsvl2_jax.inputs.frame_choice import EVEN, FRAMES, check_frames, natural_order
from dsvl2_jax.inputs.image_sources import ImageStore, open_reference, resolve_image
from dsvl2_jax.inputs.tile_budget import NO_BUDGET, TileBudget, read_budget

VIDEO_KEYS = ("frames", "frame_choice")  # of a video beside its source


class Picture(NamedTuple):
    """A picture: a reference, or what `read_image` takes; and the bounds of its tiles, if it has its own."""

    source: Any
    budget: TileBudget = NO_BUDGET


class Video(NamedTuple):
    """A video: a reference, a list of references to its frames, or what `read_frames` takes. None: as the processor."""

    source: Any
    frames: int | None = None
    frame_choice: str | None = None
    budget: TileBudget = NO_BUDGET

    def checked(self, where: str = "") -> Video:
        """The video itself. Raises UsageError, beginning with ``where``, for frames that cannot be."""
        frames, choice = self.frames, self.frame_choice
        check_frames(FRAMES if frames is None else frames, EVEN if choice is None else choice, where)
        return self


def read_visual(reference: Any) -> Picture | Video:
    """The picture or video that a reference stands for, its source as it was given.

    Args:
      reference: an object ``{"video": source}``, with ``frames`` and ``frame_choice``, is a video; ``{"image":
        source}`` or any other reference to an image is a picture. Either may have ``max_tiles`` and ``min_tiles``,
        beside the source or, where that is an object, in it.

    Raises UsageError for options that cannot be.
    """
    if isinstance(reference, Picture | Video):
        return reference
    if not isinstance(reference, Mapping):
        return Picture(reference)
    key = next((key for key in ("video", "image") if reference.get(key) is not None), None)
    source, options = reference, reference
    while key is not None and isinstance(source, Mapping) and source.get(key) is not None:
        source = source[key]
        options = {**source, **options} if isinstance(source, Mapping) else options
    what = f"the {key or 'image'}'s "
    budget = read_budget(options, what)
    if key != "video":
        return Picture(source, budget)
    return Video(source, *map(options.get, VIDEO_KEYS), budget).checked(what)


def resolve_visual(reference: Any, store: ImageStore) -> Picture | Video:
    """`read_visual`, its source a path, a file's bytes or a list of these; raises what `resolve_image` does too.

    A video may be named by the folder of its frames.
    """
    visual = read_visual(reference)
    source = visual.source
    if isinstance(visual, Picture):
        return visual._replace(source=resolve_image(source, store))
    name = (
        next((source[key] for key in ("path", "url") if source.get(key)), None)
        if isinstance(source, Mapping)
        else source
    )
    names = store.frames(name) if isinstance(name, str) and name else None
    if names is not None:
        source = sorted(names, key=natural_order)
    if isinstance(source, Sequence) and not isinstance(source, str | bytes):
        return visual._replace(source=[resolve_image(frame, store) for frame in source])
    return visual._replace(source=resolve_image(source, store))


def open_visual(reference: Any) -> Picture | Video:
    """`read_visual`, its source what `read_image` or `read_frames` takes; names are paths.

    Raises ImageError for a source that is neither, UsageError for options that cannot be.
    """
    visual = read_visual(reference)
    source = visual.source
    if isinstance(visual, Video) and isinstance(source, list | tuple):
        return visual._replace(source=[open_reference(frame) for frame in source])
    return visual._replace(source=open_reference(source))
