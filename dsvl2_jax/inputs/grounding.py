"""Boxes in the model's text: reading, writing and drawing them.

The model writes ``<|ref|>label<|/ref|><|det|>[[x1, y1, x2, y2], …]<|/det|>`` with whole coordinates from 0 to
999, relative to the last image of the conversation.
"""

import colorsys
import dataclasses
import math
import re
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from dsvl2_jax.errors import ConversationError
from dsvl2_jax.inputs.tokenizer import DET_END_TOKEN, DET_TOKEN, REF_END_TOKEN, REF_TOKEN

MAX_COORDINATE = 999

_TAG = re.compile("(" + "|".join(map(re.escape, (REF_TOKEN, REF_END_TOKEN, DET_TOKEN, DET_END_TOKEN))) + ")")
_COORDINATE = r"\s*0*([0-9]{1,3})\s*"  # no value over 999 matches
_QUAD = re.compile(r"\[" + ",".join([_COORDINATE] * 4) + r"\]")

_ENTRY = re.compile(r"[^\s\[\],]+")
_LIST = re.compile(r"\[[^\[\]]*\]?")  # without lists in it; an outer one's beginning matches as an empty list

_GOLDEN_RATIO = 0.618034  # hues this far apart stay distinct however many there are
_LONGEST_LABEL = 60
# Pixels of the shorter side up to which an image is enlarged to be drawn on, and of the longer one that stay the most.
_LEAST_DRAWN, _MOST_DRAWN = 300, 2000


@dataclasses.dataclass(frozen=True)
class Box:
    """A labelled rectangle in pixels of image number `image` (from 0); (x1, y1) top left, (x2, y2) bottom right."""

    label: str
    x1: int
    y1: int
    x2: int
    y2: int
    image: int = 0


def parse_boxes(text: str, image_sizes: Sequence[Sequence[int]]) -> list[Box]:
    """The boxes in generated `text`, on the last of the images whose (width, height) are given, in pixels.

    A coordinate c becomes int(c / 999 · size), as officially. Every text is accepted, since models make mistakes:
    what is not four whole numbers from 0 to 999 in brackets, inside a closed ``<|det|>``, is skipped. A label
    belongs to the next ``<|det|>`` only; one without a label gets "". Corners are kept in the order written,
    even if x1 > x2: swapping them would be a guess.
    """
    if len(image_sizes) == 0:
        return []
    width, height = (int(side) for side in image_sizes[-1])
    boxes = []
    for label, content, closed in _detections(text):
        for x1, y1, x2, y2 in _QUAD.findall(content) if closed else []:
            corners = (_pixel(x1, width), _pixel(y1, height), _pixel(x2, width), _pixel(y2, height))
            boxes.append(Box(label, *corners, image=len(image_sizes) - 1))
    return boxes


def count_malformed_boxes(text: str) -> int:
    """How many boxes of generated `text` `parse_boxes` leaves out.

    Each list of something else than four whole numbers from 0 to 999 counts, lists in it on their own; in a
    ``<|det|>`` that is not closed every list does. One that has no list at all counts once. Empty lists say that there
    is no box, and do not count.
    """
    count = 0
    for _, content, closed in _detections(text):
        lists = _LIST.findall(content)
        count += sum(bool(inner.strip("[], \t\r\n")) and not (closed and _QUAD.fullmatch(inner)) for inner in lists)
        count += not lists
    return count


def _detections(text: str) -> Iterator[tuple[str, str, bool]]:
    """(label, content, whether it is closed) of each ``<|det|>``."""
    label = ""
    parts = _TAG.split(text)  # text, tag, text, tag, …, text
    for tag, content, closing in zip(parts[1::2], parts[2::2], [*parts[3::2], ""], strict=False):
        if tag == REF_TOKEN:
            label = content if closing == REF_END_TOKEN else ""
        elif tag == DET_TOKEN:
            yield label, content, closing == DET_END_TOKEN
            label = ""


def format_boxes(label: str, boxes: Iterable[Box | Sequence[float]], size: Sequence[int]) -> str:
    """The text for `boxes` (each a `Box` or x1, y1, x2, y2 in pixels) on an image of `size` (width, height).

    The inverse of `parse_boxes`: pixels survive the round trip on sides under 999 pixels, coordinates on longer
    ones (at 999 the official formula's rounding lets two coordinates share a pixel).

    Raises ConversationError if a box is not inside the image or the label contains a grounding tag.
    """
    if _TAG.search(label):
        raise ConversationError(f"label {label!r} contains a grounding tag. Remove it from the label.")
    quads = []
    for box in boxes:
        corners = (box.x1, box.y1, box.x2, box.y2) if isinstance(box, Box) else tuple(box)
        limits = (*size, *size)
        if len(corners) != 4 or not all(0 <= c <= limit for c, limit in zip(corners, limits, strict=True)):
            raise ConversationError(
                f"box {corners} labelled {label!r}: expected x1, y1, x2, y2 inside the image of {size[0]}×{size[1]}."
            )
        quads.append(coordinates(corners, size))
    return f"{REF_TOKEN}{label}{REF_END_TOKEN}{DET_TOKEN}{quads}{DET_END_TOKEN}"


def coordinates(corners: Sequence[float], size: Sequence[int]) -> list[int]:
    """The model's coordinates, 0 to 999, of corners x, y, … in pixels of an image of `size` (width, height)."""
    return [_coordinate(c, size[place % 2]) for place, c in enumerate(corners)]


def bad_coordinates(text: str) -> list[str]:
    """What stands in closed ``<|det|>`` lists of `text` and is no whole number from 0 to 999."""
    found = [entry for _, content, closed in _detections(text) if closed for entry in _ENTRY.findall(content)]
    return [entry for entry in found if not (entry.isascii() and entry.isdigit() and len(entry.lstrip("0")) <= 3)]


def draw_boxes(image: Image.Image, boxes: Sequence[Box]) -> Image.Image:
    """A copy of `image` in RGB with every box outlined in its own colour and named; sizes follow the image's.

    A small image is enlarged, by a whole factor, so that there is room for names. They stand beside their boxes where
    they cover neither another name nor a box, as far as there is such a place.
    """
    factor = max(1, min(-(-_LEAST_DRAWN // min(image.size)), _MOST_DRAWN // max(image.size)))
    image = image.convert("RGB")  # a copy always: convert copies even if the mode is the same
    if factor > 1:
        image = image.resize((factor * image.width, factor * image.height), Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(image)
    line = max(1, round(min(image.size) / 200))
    font = ImageFont.load_default(size=max(10, round(min(image.size) / 30)))
    colours, edges = [], []
    for number, box in enumerate(boxes):
        colours.append(tuple(round(255 * c) for c in colorsys.hsv_to_rgb(number * _GOLDEN_RATIO % 1, 0.9, 0.95)))
        left, right = sorted(min(max(factor * x, 0), image.width - 1) for x in (box.x1, box.x2))
        top, bottom = sorted(min(max(factor * y, 0), image.height - 1) for y in (box.y1, box.y2))
        edges.append((left, top, right, bottom))
        draw.rectangle(edges[-1], outline=colours[-1], width=line)
    places: list[tuple[int, int, int, int]] = []  # of names
    for box, colour, edge in zip(boxes, colours, edges, strict=True):
        label = " ".join(box.label.split())[:_LONGEST_LABEL]
        while len(label) > 1 and draw.textlength(label, font=font) + 2 * line > image.width:
            label = label[:-2] + "…"
        if not label:
            continue
        # Measured at the origin, then moved.
        x0, y0, x1, y1 = draw.textbbox((0, 0), label, font=font)
        size = math.ceil(x1 - x0) + 2 * line, math.ceil(y1 - y0) + 2 * line
        x, y = _place_name(size, edge, edges, places, image.size)
        places.append((x, y, x + size[0], y + size[1]))
        draw.rectangle(places[-1], fill=colour)
        luminance = 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2]
        draw.text((x + line - x0, y + line - y0), label, font=font, fill="black" if luminance > 128 else "white")
    return image


def _place_name(
    size: tuple[int, int],
    box: tuple[int, int, int, int],
    boxes: Sequence[tuple[int, int, int, int]],
    names: Sequence[tuple[int, int, int, int]],
    image_size: tuple[int, int],
) -> tuple[int, int]:
    """Where a box's name stands, (left, top).

    Of the places around the box, and last those inside it, the one that covers least of other names, and then of boxes;
    where all cover a name, the nearest place of the image that covers none.
    """
    width, height = size
    left, top, right, bottom = box
    most_x, most_y = max(0, image_size[0] - width), max(0, image_size[1] - height)
    above, below, before, behind = top - height - 1, bottom + 1, left - width - 1, right + 1
    x_inside, y_inside = right - width, bottom - height  # along the right and the lower edge
    around = [(left, above), (left, below), (x_inside, above), (x_inside, below)]
    beside = [(behind, top), (before, top), (behind, y_inside), (before, y_inside)]
    inside = [(left, top), (left, y_inside), (x_inside, top), (x_inside, y_inside)]
    corners = np.clip(np.array([*around, *beside, *inside]), 0, (most_x, most_y))
    over_names, over_boxes = _covered(corners, size, names), _covered(corners, size, boxes)
    best = min(range(len(corners)), key=lambda place: (over_names[place], over_boxes[place]))
    if over_names[best]:
        grid = np.stack(
            np.meshgrid(np.arange(0, most_x + 1, width // 2 + 1), np.arange(0, most_y + 1, height // 2 + 1))
        )
        anywhere = grid.reshape(2, -1).T
        anywhere = anywhere[_covered(anywhere, size, names) == 0]
        if len(anywhere):
            nearest = int(np.abs(anywhere - np.array([left, top])).sum(axis=1).argmin())
            return int(anywhere[nearest, 0]), int(anywhere[nearest, 1])
    return int(corners[best, 0]), int(corners[best, 1])


def _covered(corners: np.ndarray, size: tuple[int, int], others: Sequence[tuple[int, int, int, int]]) -> np.ndarray:
    """How many pixels of other rectangles ones of `size` at corners i64[n, 2] cover: i64[n]."""
    low = corners[:, None]
    other = np.array(others, np.int64).reshape(1, -1, 4)
    shared = np.minimum(low + np.array(size), other[..., 2:]) - np.maximum(low, other[..., :2]) + 1
    return np.maximum(shared, 0).prod(axis=-1).sum(axis=-1)


def _pixel(coordinate: str | int, size: int) -> int:
    return int(int(coordinate) / MAX_COORDINATE * size)


def _coordinate(pixel: float, size: int) -> int:
    """The least coordinate that does not fall short of `pixel`."""
    coordinate = min(math.ceil(pixel * MAX_COORDINATE / size), MAX_COORDINATE)
    # Division rounds, so the official formula can land a pixel short of where exact arithmetic does.
    return coordinate + (coordinate < MAX_COORDINATE and _pixel(coordinate, size) < int(pixel))
