"""Samples of the encoder's own training: an image in one tile, with a caption or with named regions.

Tested in tests/train/objectives/test_contrastive.py and tests/train/objectives/test_regions.py.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from dsvl2_jax.errors import DataError, ImageError, SampleError
from dsvl2_jax.inputs.image_sources import ImageStore
from dsvl2_jax.inputs.processor import ModelInputs, Processor
from dsvl2_jax.inputs.record_forms import type_name
from dsvl2_jax.inputs.records import (
    BAD_CONVERSATION,
    BAD_RECORD,
    NO_LOSS,
    Resolved,
    image_references,
    unreadable_image,
)
from dsvl2_jax.inputs.tokenizer import IMAGE_TOKEN, Tokenizer
from dsvl2_jax.inputs.visuals import Picture, Video, resolve_visual
from dsvl2_jax.model.config import TEXT_POSITION

# The reasons for which a record that is whole is left out of the encoder's training.
NO_IMAGE, NO_ATTRIBUTE = "no image", "no such attribute"


def picture_of(visual: Picture | Video) -> Picture:
    """The picture itself. Raises SampleError for a video."""
    if isinstance(visual, Video):
        raise SampleError(NO_IMAGE, "has a video, and contrastive training reads images alone. Give a frame of it.")
    return visual


def process_pair(resolved: Resolved, processor: Processor, text_length: int) -> tuple[ModelInputs, bool]:
    """The record's first image, in its global view alone, and the caption that goes with it.

    The caption is the first assistant turn that has a loss; of a text to learn as it is, all of it but the image tags.
    Its tokens end in eos, and there is nothing else among ``input_ids``.

    Returns:
      The pair, and whether the caption was cut to ``text_length`` tokens.

    Raises SampleError with the reason; OSError when a file cannot be read.
    """
    record = resolved.record
    if not record.images:
        raise SampleError(NO_IMAGE, "has no image, which contrastive training needs.")
    if not record.learnt:
        raise SampleError(NO_LOSS, "says that there is no loss on any of it.")
    if record.text is not None:
        caption = record.text.replace(IMAGE_TOKEN, " ")
    else:
        answers = [turn for turn in record.conversation if turn["role"] == "assistant"]
        if answers and not any(turn.get("loss", True) for turn in answers):
            raise SampleError(NO_LOSS, "says that there is no loss on any of its answers.")
        caption = next((turn["content"] for turn in answers if turn.get("loss", True)), "")
    tokenizer = processor.tokenizer
    ids = tokenizer.encode(caption.strip(), special=not processor.strict_special_tokens)
    if not ids:
        what = "its text" if record.text is not None else "its first assistant turn"
        raise SampleError(BAD_CONVERSATION, f"has no caption: {what} is empty or missing.")
    truncated = len(ids) >= text_length
    tokens = np.array([*ids[: text_length - 1], tokenizer.eos_id], np.int32)
    try:
        image, traits = processor.read_image(picture_of(resolved.images[0]).source)
    except ImageError as error:
        raise unreadable_image(error, record.images[:1]) from error
    return _one_tile(tokens, processor.global_view(image), traits, caption), truncated


@dataclasses.dataclass(frozen=True)
class Pairs:
    """What the encoder's objectives read of a sample: its first image in one tile, and a caption or regions."""

    tokens: int  # at most, of the caption or of all phrases
    phrases: int = 0  # at most, of the regions; 0: a caption
    attributes: tuple[str, ...] = ()  # of the regions, that are read; none: all

    def attribute_id(self, name: str) -> int:
        """A number from 0 to 2³¹ − 1, the same in every process and run: the place among ``attributes``; a checksum of
        the name where all are read. `AttributeIds` sees to it that no two names have the same checksum."""
        return self.attributes.index(name) if self.attributes else zlib.crc32(name.encode()) & 0x7FFFFFFF


class AttributeIds:
    """The attributes that a process has met, by their ids."""

    def __init__(self) -> None:
        self._names: dict[int, str] = {}

    def add(self, names: Mapping[int, str]) -> None:
        """Raises DataError when two attributes have the same id, so that they could not be told apart."""
        for number, name in names.items():
            if self._names.setdefault(number, name) != name:
                raise DataError(
                    f"the attributes {self._names[number]!r} and {name!r} have the same checksum. Rename one of them, "
                    "or list those to learn in contrastive.attributes."
                )


@dataclasses.dataclass(frozen=True)
class Regions:
    """An image, and boxes of it in its pixels, (x1, y1, x2, y2), each with its phrases, by attribute."""

    image: Any
    boxes: tuple[tuple[tuple[float, float, float, float], Mapping[str, str]], ...]


def parse_regions(record: Any, own_images: Sequence[Any] = ()) -> Regions:
    """Reads one record with named regions.

    Args:
      record: an object with ``image`` or ``images``, of which the first counts, and ``regions``: a list of objects,
        each with its ``box`` [x1, y1, x2, y2] in the image's pixels, and attributes, which are texts.
      own_images: as in `parse_record`.

    Raises SampleError, saying what was found and expected.
    """
    if not isinstance(record, Mapping):
        raise SampleError(BAD_RECORD, f"expected a JSON object, found {type_name(record)}.")
    images = list(own_images) or image_references(record)
    if not images:
        raise SampleError(NO_IMAGE, "has no image, which training on regions needs.")
    given = record.get("regions")
    if not isinstance(given, list | tuple) or not given:
        raise SampleError(BAD_RECORD, f'"regions" is {type_name(given)}, expected a list of one or more regions.')
    boxes = []
    for number, region in enumerate(given, 1):
        name = f"region {number}"
        if not isinstance(region, Mapping):
            raise SampleError(BAD_RECORD, f"{name} is {type_name(region)}, expected an object.")
        box = region.get("box")
        if not (
            isinstance(box, list | tuple)
            and len(box) == 4
            and all(isinstance(x, int | float | np.number) and -1e9 < x < 1e9 for x in box)
            and box[0] < box[2]
            and box[1] < box[3]
        ):
            raise SampleError(BAD_RECORD, f'{name}: "box" is {box}, expected [x1, y1, x2, y2] with x1 < x2, y1 < y2.')
        said = {key: value for key, value in region.items() if key != "box"}
        if wrong := [key for key, value in said.items() if not isinstance(value, str) or not value.strip()]:
            raise SampleError(BAD_RECORD, f"{name}: {wrong[0]!r} is {said[wrong[0]]!r}, expected a text.")
        boxes.append((tuple(map(float, box)), said))
    return Regions(images[0], tuple(boxes))


class RegionInputs(NamedTuple):
    """An image with P phrases; ``input_ids`` are the phrases' tokens one after the other."""

    inputs: ModelInputs
    phrases: np.ndarray  # i32[P, 6]: columns `PHRASE_COLUMNS`
    attributes: dict[int, str]  # by their ids
    truncated: bool  # phrases were left out, since there are more, or more tokens, than `Pairs` allows


# Of a phrase: the rectangle of patches that it is said of (right and bottom are exclusive), the attribute's id, and how
# many tokens it has.
PHRASE_COLUMNS = ("left", "top", "right", "bottom", "attribute", "tokens")


def process_regions(regions: Regions, processor: Processor, store: ImageStore, pairs: Pairs) -> RegionInputs:
    """The image in its global view, and the phrases of its regions.

    A phrase is its attribute's name and what is said ("kind star"). Its rectangle are the patches whose middle lies in
    the box, at least one along each side.

    Raises SampleError with the reason; OSError when a file cannot be read.
    """
    try:
        image, traits = processor.read_image(picture_of(resolve_visual(regions.image, store)).source)
    except ImageError as error:
        raise unreadable_image(error, [regions.image]) from error
    tile = processor.global_view(image)
    ids, phrases, attributes, truncated = [], [], {}, False
    for box, said in regions.boxes:
        rectangle = _patches(box, image.size, tile.shape[0], processor.config.patch_size)
        for name, value in said.items():
            if pairs.attributes and name not in pairs.attributes:
                continue
            tokens = _phrase(processor.tokenizer, f"{name} {value.strip()}")
            if len(phrases) == pairs.phrases or len(ids) + len(tokens) > pairs.tokens:
                truncated = True
                continue
            attribute = pairs.attribute_id(name)
            attributes[attribute] = name
            ids += tokens
            phrases.append((*rectangle, attribute, len(tokens)))
    if not phrases:
        raise SampleError(NO_ATTRIBUTE, "none of its regions has an attribute that is asked for and fits.")
    inputs = _one_tile(np.array(ids, np.int32), tile, traits)
    return RegionInputs(inputs, np.array(phrases, np.int32), attributes, truncated)


def _one_tile(ids: np.ndarray, tile: np.ndarray, traits: tuple[str, ...], prompt: str = "") -> ModelInputs:
    """Text of tokens i32[T], and an image of one tile u8[S, S, 3] that no position stands for."""
    return ModelInputs(
        input_ids=ids,
        labels=ids,
        image_mask=np.zeros(len(ids), bool),
        image_index=np.full(len(ids), TEXT_POSITION, np.int32),
        tiles=tile[None],
        tile_grid=np.zeros((1, 2), np.int32),
        image_sizes=np.array([tile.shape[:2]], np.int32),
        prompt=prompt,
        image_traits=traits,
    )


@functools.lru_cache(1 << 14)
def _phrase(tokenizer: Tokenizer, text: str) -> tuple[int, ...]:
    return tuple(tokenizer.encode(text, special=False))


def _patches(box: Sequence[float], size: tuple[int, int], tile: int, patch: int) -> tuple[int, int, int, int]:
    """The columns and rows of patches of a box of an image that is fitted into a tile, as `processor` does it."""
    scale, last = tile / max(size), tile // patch
    sides = []
    for low, high, side in zip(box[:2], box[2:], size, strict=True):
        shift = (tile - side * scale) / 2
        first, end = (math.ceil((edge * scale + shift) / patch - 0.5) for edge in (low, high))
        if end <= first:
            first = math.floor(((low + high) / 2 * scale + shift) / patch)
            end = first + 1
        first = min(max(first, 0), last - 1)
        sides.append((first, min(max(end, first + 1), last)))
    (left, right), (top, bottom) = sides
    return left, top, right, bottom
