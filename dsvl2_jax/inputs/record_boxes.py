"""Objects of a record: labels and boxes that stand beside its text, and their places in it.

A record says ``"objects": {"ref": ["a dog"], "bbox": [[12, 30, 200, 180]]}`` and has ``<ref-object>`` and ``<bbox>``
where they belong. Training reads the model's own syntax there. Boxes come in three kinds, which look alike:
`BOX_KINDS`. Tested in tests/inputs/test_record_boxes.py.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from dsvl2_jax.errors import ConversationError
from dsvl2_jax.inputs.grounding import Box, coordinates, parse_boxes
from dsvl2_jax.inputs.tokenizer import DET_END_TOKEN, DET_TOKEN, REF_END_TOKEN, REF_TOKEN
from dsvl2_jax.inputs.turns import says_nothing, unused_keys

LABEL_TAG, BOX_TAG = "<ref-object>", "<bbox>"

# What the numbers of a box are: pixels of its image, shares of its width and height, or thousandths of them.
PIXELS, SHARES, THOUSANDTHS = BOX_KINDS = ("pixels", "0-1", "0-1000")
AUTO = "auto"  # instead of a kind: what `guess_kind` says
_DECLARED = {"real": PIXELS, "norm1": SHARES, "norm1000": THOUSANDTHS, **{kind: kind for kind in BOX_KINDS}}

_KEYS = ("ref", "bbox", "bbox_type", "image_id")
# Of an object in a list of objects.
_LABELS, _BOXES = ("label", "ref", "name", "phrase", "category"), ("bbox", "bbox_2d", "box")

_TAGS = re.compile(f"{LABEL_TAG}|{BOX_TAG}(?:[\\s,]*{BOX_TAG})*")
_EXCESS = 1.0  # pixels by which rounding may lead a box out of its image

Quad = tuple[float, float, float, float]


@dataclasses.dataclass(frozen=True)
class Objects:
    """Labels and boxes in the order of their places in the text."""

    labels: tuple[str, ...]
    boxes: tuple[tuple[Quad, ...], ...]  # of each place, x1, y1, x2, y2
    images: tuple[int, ...]  # of each place, from 0
    kind: str | None  # of `BOX_KINDS`, if the record says it


def read_objects(value: Any) -> Objects | None:
    """The ``objects`` of a record; None where there are none.

    Args:
      value: an object with ``ref`` (texts), ``bbox`` (boxes [x1, y1, x2, y2], or lists of them), and perhaps
        ``bbox_type`` (real, norm1 or norm1000) and ``image_id`` (the image of each box, from 0; else the first); or a
        list of objects, each with one of ``label``, ``ref``, ``name``, ``phrase`` or ``category``, and one of ``bbox``,
        ``bbox_2d`` or ``box``.

    Raises ConversationError, saying what was found and expected.
    """
    if says_nothing(value):
        return None
    if isinstance(value, list | tuple):
        labels, boxes = _columns(value)
        value = {"ref": labels, "bbox": boxes}
    if not isinstance(value, Mapping):
        raise ConversationError(
            f'"objects" is of type {type(value).__name__}, expected an object with "ref" and "bbox", or a list.'
        )
    if unknown := unused_keys(value, _KEYS):
        raise ConversationError(f'"objects" has {", ".join(unknown)}; expected {", ".join(_KEYS)}.')
    labels, boxes = _list(value, "ref"), _list(value, "bbox")
    for label in labels:
        if not isinstance(label, str):
            raise ConversationError(f'"objects": a "ref" is {label!r:.60}, expected a text.')
    kind = value.get("bbox_type")
    if kind is not None and (not isinstance(kind, str) or kind not in _DECLARED):
        raise ConversationError(f'"objects": "bbox_type" is {kind!r:.60}, expected real, norm1 or norm1000.')
    numbers = _list(value, "image_id") or [0] * len(boxes)
    if len(numbers) != len(boxes):
        raise ConversationError(f'"objects" has {len(boxes)} "bbox" and {len(numbers)} "image_id". Give one for each.')
    for number in numbers:
        if not isinstance(number, int) or isinstance(number, bool) or number < 0:
            raise ConversationError(f'"objects": an "image_id" is {number!r:.60}, expected a number from 0.')
    if not labels and not boxes:
        return None
    return Objects(tuple(labels), tuple(map(_quads, boxes)), tuple(numbers), _DECLARED.get(kind))


def check_places(objects: Objects | None, texts: Sequence[str]) -> None:
    """Raises ConversationError unless the texts have one place for each label and box."""
    for tag, what, count in (
        (LABEL_TAG, '"ref"', len(objects.labels) if objects else 0),
        (BOX_TAG, '"bbox"', len(objects.boxes) if objects else 0),
    ):
        found = sum(text.count(tag) for text in texts)
        if found != count:
            raise ConversationError(
                f'the text has {found} {tag} and "objects" {count} {what}. Put one {tag} where each of them belongs.'
            )


def place_objects(
    objects: Objects, texts: Sequence[str], sizes: Sequence[Sequence[int]], kind: str | None = None
) -> tuple[list[str], str]:
    """Labels and boxes in the model's syntax at their places, and the kind that the boxes were taken for.

    Boxes that follow each other directly become one list, as the model writes them.

    Args:
      texts: with as many places as there are labels and boxes.
      sizes: (width, height) of the record's images.
      kind: of `BOX_KINDS`; counts where the record does not say it. None: `guess_kind` decides.

    Raises ConversationError: the boxes are not of that kind, or lie outside their images.
    """
    if missing := [number for number in objects.images if number >= len(sizes)]:
        raise ConversationError(
            f'"objects": a box belongs to image {missing[0]}, and there are {len(sizes)} image(s), numbered from 0.'
        )
    by_place = [tuple(sizes[number]) for number in objects.images]
    flat = [(quad, size) for quads, size in zip(objects.boxes, by_place, strict=True) for quad in quads]
    kind = objects.kind or kind or guess_kind(flat)
    labels = iter(objects.labels)
    places = iter(
        [coordinates(_pixels(quad, size, kind), size) for quad in quads]
        for quads, size in zip(objects.boxes, by_place, strict=True)
    )

    def written(match: re.Match[str]) -> str:
        if match[0] == LABEL_TAG:
            return f"{REF_TOKEN}{next(labels)}{REF_END_TOKEN}"
        quads = [quad for place in itertools.islice(places, match[0].count(BOX_TAG)) for quad in place]
        return f"{DET_TOKEN}{quads}{DET_END_TOKEN}"

    return [_TAGS.sub(written, text) for text in texts], kind


def boxes_of(objects: Objects, sizes: Sequence[Sequence[int]], kind: str) -> list[Box]:
    """The boxes as training sees them: in its coordinates, and those in pixels again. Arguments as `place_objects`'s.

    A box has a label where there are as many labels as places.
    """
    labels = objects.labels if len(objects.labels) == len(objects.boxes) else ("",) * len(objects.boxes)
    boxes = []
    for label, quads, image in zip(labels, objects.boxes, objects.images, strict=True):
        for quad in quads:
            text = f"{DET_TOKEN}{[coordinates(_pixels(quad, sizes[image], kind), sizes[image])]}{DET_END_TOKEN}"
            boxes += [dataclasses.replace(box, label=label, image=image) for box in parse_boxes(text, [sizes[image]])]
    return boxes


def guess_kind(boxes: Sequence[tuple[Quad, Sequence[int]]]) -> str:
    """The kind of a record's boxes, each given with its image's (width, height), by all of them together.

    Numbers that are all at most 1 are shares. Otherwise boxes that lie in their images are in pixels, and boxes that do
    not, with numbers up to 1000, in thousandths.

    Raises ConversationError: they are neither.
    """
    if all(c <= 1 for quad, _ in boxes for c in quad):
        return SHARES
    outside = next((found for found in boxes if not _lies_inside(*found)), None)
    if outside is None:
        return PIXELS
    if all(c <= 1000 for quad, _ in boxes for c in quad):
        return THOUSANDTHS
    quad, size = outside
    raise ConversationError(
        f'"objects": the box {_shown(quad)} is not in its image of {size[0]}×{size[1]} pixels, nor are all numbers '
        "below 1000. Expected x1, y1, x2, y2 in pixels, from 0 to 1 or from 0 to 1000."
    )


def _columns(objects: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    """The labels and boxes of a list of objects. Objects without a label, all of them, have none."""
    labels, boxes = [], []
    for number, one in enumerate(objects, 1):
        name = f'"objects": number {number}'
        if not isinstance(one, Mapping):
            raise ConversationError(f"{name} is of type {type(one).__name__}, expected an object with a box.")
        found = [[key for key in keys if not says_nothing(one.get(key))] for keys in (_LABELS, _BOXES)]
        unknown = unused_keys(one, (*_LABELS, *_BOXES))
        if len(found[0]) > 1 or len(found[1]) != 1 or unknown:
            keys = ", ".join(sorted(map(str, one)))
            raise ConversationError(f"{name} has {keys}; expected one of {', '.join(_BOXES)}, and a label.")
        labels += [one[key] for key in found[0]]
        boxes.append(one[found[1][0]])
    if labels and len(labels) != len(boxes):
        raise ConversationError(f'"objects": {len(boxes) - len(labels)} have no label. Give all of them one, or none.')
    return labels, boxes


def _list(value: Mapping[str, Any], key: str) -> list[Any]:
    items = value.get(key)
    if says_nothing(items):
        return []
    if not isinstance(items, list | tuple):
        raise ConversationError(f'"objects": "{key}" is of type {type(items).__name__}, expected a list.')
    return list(items)


def _quads(box: Any) -> tuple[Quad, ...]:
    """The boxes of one place: one, or a list of some."""
    nested = isinstance(box, list | tuple) and len(box) > 0 and all(isinstance(item, list | tuple) for item in box)
    return tuple(map(_quad, box if nested else [box]))


def _quad(box: Any) -> Quad:
    numbers = isinstance(box, list | tuple) and all(
        isinstance(c, int | float) and not isinstance(c, bool) and abs(c) < 1e9 and math.isfinite(c) for c in box
    )
    if not numbers or len(box) != 4:
        raise ConversationError(f'"objects": a "bbox" is {str(box)[:60]}, expected four numbers x1, y1, x2, y2.')
    if min(box) < 0 or box[0] > box[2] or box[1] > box[3]:
        raise ConversationError(
            f'"objects": the box {_shown(box)} is none: expected 0 ≤ x1 ≤ x2 and 0 ≤ y1 ≤ y2. '
            "(Boxes as x, y, width, height have to be rewritten.)"
        )
    return tuple(map(float, box))


def _lies_inside(quad: Quad, size: Sequence[int]) -> bool:
    return quad[2] <= size[0] + _EXCESS and quad[3] <= size[1] + _EXCESS


def _pixels(quad: Quad, size: Sequence[int], kind: str) -> list[float]:
    whole = {SHARES: 1, THOUSANDTHS: 1000}.get(kind)
    if max(quad) > whole if whole else not _lies_inside(quad, size):
        limits = f"from 0 to {whole}" if whole else f"in pixels of its image of {size[0]}×{size[1]}"
        raise ConversationError(f'"objects": the box {_shown(quad)} is not {limits}, as it is said to be.')
    sides = (*size, *size)
    if whole:
        return [c / whole * side for c, side in zip(quad, sides, strict=True)]
    return [min(c, side) for c, side in zip(quad, sides, strict=True)]


def _shown(quad: Sequence[float]) -> str:
    return f"[{', '.join(f'{c:g}' for c in quad)}]"
