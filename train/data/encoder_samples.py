"""Samples of the encoder's own training: an image in one tile, with a caption or with named regions."""

from __future__ import annotations

import dataclasses
import functools
import math
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dsvl2_jax.errors import ImageError, SampleError
from dsvl2_jax.inputs.image_sources import ImageStore, resolve_image
from dsvl2_jax.inputs.images import load_image
from dsvl2_jax.inputs.processor import ModelInputs, Processor
from dsvl2_jax.inputs.records import BAD_CONVERSATION, BAD_RECORD, Record, image_references, type_name, unreadable_image
from dsvl2_jax.inputs.tokenizer import IMAGE_TOKEN, Tokenizer
from dsvl2_jax.model.config import TEXT_POSITION

# The reasons for which a record that is whole is left out of the encoder's training.
NO_IMAGE, NO_ATTRIBUTE = "no image", "no such attribute"


def process_pair(record: Record, processor: Processor, store: ImageStore, text_length: int) -> tuple[ModelInputs, bool]:
    """The record's first image, in its global view alone, and the caption that goes with it.

    The caption is the first assistant turn; of a text to learn as it is, all of it but the image tags. Its tokens end
    in eos, and there is nothing else among ``input_ids``.

    Returns:
      The pair, and whether the caption was cut to ``text_length`` tokens.

    Raises SampleError with the reason; OSError when a file cannot be read.
    """
    if not record.images:
        raise SampleError(NO_IMAGE, "has no image, which contrastive training needs.")
    if record.text is not None:
        caption = record.text.replace(IMAGE_TOKEN, " ")
    else:
        answers = (turn["content"] for turn in record.conversation if turn["role"] == "assistant")
        caption = next(answers, "")
    tokenizer = processor.tokenizer
    ids = tokenizer.encode(caption.strip(), special=not processor.strict_special_tokens)
    if not ids:
        what = "its text" if record.text is not None else "its first assistant turn"
        raise SampleError(BAD_CONVERSATION, f"has no caption: {what} is empty or missing.")
    truncated = len(ids) >= text_length
    tokens = np.array([*ids[: text_length - 1], tokenizer.eos_id], np.int32)
    try:
        tile = processor.global_view(resolve_image(record.images[0], store))
    except ImageError as error:
        raise unreadable_image(error, record.images[:1]) from error
    return (
        ModelInputs(
            input_ids=tokens,
            labels=tokens,
            image_mask=np.zeros(len(tokens), bool),
            image_index=np.full(len(tokens), TEXT_POSITION, np.int32),
            tiles=tile[None],
            tile_grid=np.zeros((1, 2), np.int32),
            image_sizes=np.array([tile.shape[:2]], np.int32),
            prompt=caption,
        ),
        truncated,
    )


@dataclasses.dataclass(frozen=True)
class Pairs:
    """What the encoder's objectives read of a sample: its first image in one tile, and a caption or regions."""

    tokens: int  # at most, of the caption or of all phrases
    phrases: int = 0  # at most, of the regions; 0: a caption
    attributes: frozenset[str] = frozenset()  # of the regions, that are read; none: all


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
    if not isinstance(given, list) or not given:
        raise SampleError(BAD_RECORD, f'"regions" is {type_name(given)}, expected a list of one or more regions.')
    found = []
    for number, region in enumerate(given, 1):
        where = f"region {number}"
        if not isinstance(region, Mapping):
            raise SampleError(BAD_RECORD, f"{where} is {type_name(region)}, expected an object.")
        box = region.get("box")
        if not (
            isinstance(box, list)
            and len(box) == 4
            and all(isinstance(x, int | float) and math.isfinite(x) for x in box)
            and box[0] < box[2]
            and box[1] < box[3]
        ):
            raise SampleError(BAD_RECORD, f'{where}: "box" is {box}, expected [x1, y1, x2, y2] with x1 < x2, y1 < y2.')
        said = {name: value for name, value in region.items() if name != "box"}
        if wrong := [name for name, value in said.items() if not isinstance(value, str) or not value.strip()]:
            raise SampleError(BAD_RECORD, f"{where}: {wrong[0]!r} is {said[wrong[0]]!r}, expected a text.")
        found.append((tuple(map(float, box)), said))
    return Regions(images[0], tuple(found))


# A phrase's code, i32: from the low bits on the columns and rows of its rectangle of patches (left, top, right, bottom;
# the latter two exclusive), its attribute's hash, and one bit that tells it from the phrase before.
_SIDE_BITS, _ATTRIBUTE_BITS = 5, 10


_ATTRIBUTE_SHIFT = 4 * _SIDE_BITS


def region_of_codes(codes: Any) -> tuple[Any, Any, Any, Any]:
    """(left, top, right, bottom) of the patches' rectangle; of arrays of any kind."""
    return tuple((codes >> _SIDE_BITS * i) & (2**_SIDE_BITS - 1) for i in range(4))


def attribute_of_codes(codes: Any) -> Any:
    """The attribute's number; of arrays of any kind."""
    return (codes >> _ATTRIBUTE_SHIFT) & (2**_ATTRIBUTE_BITS - 1)


def process_regions(
    regions: Regions, processor: Processor, store: ImageStore, pairs: Pairs
) -> tuple[ModelInputs, bool]:
    """The image in its global view, and the phrases of its regions one after the other.

    A phrase is its attribute's name and what is said ("kind star"). Its tokens' ``labels`` are its code, which says
    where the region is: the patches whose middle lies in the box, at least one along each side.

    Returns:
      The image with its phrases, and whether phrases were left out, since there are more, or more tokens, than
      ``pairs`` allows.

    Raises SampleError with the reason; OSError when a file cannot be read.
    """
    try:
        image = load_image(
            resolve_image(regions.image, store), processor.apply_exif_orientation, rescale_16bit=processor.rescale_16bit
        )
        tile = processor.global_view(image)
    except ImageError as error:
        raise unreadable_image(error, [regions.image]) from error
    ids, codes, count, truncated = [], [], 0, False
    for box, said in regions.boxes:
        where = _patches(box, image.size, tile.shape[0], processor.config.patch_size)
        for name, value in said.items():
            if pairs.attributes and name not in pairs.attributes:
                continue
            tokens = _phrase(processor.tokenizer, f"{name} {value.strip()}")
            if count == pairs.phrases or len(ids) + len(tokens) > pairs.tokens:
                truncated = True
                continue
            attribute = zlib.crc32(name.encode()) % 2**_ATTRIBUTE_BITS
            code = sum(side << _SIDE_BITS * i for i, side in enumerate(where)) | attribute << _ATTRIBUTE_SHIFT
            ids += tokens
            codes += [code | (count % 2) << (_ATTRIBUTE_SHIFT + _ATTRIBUTE_BITS)] * len(tokens)
            count += 1
    if not count:
        raise SampleError(NO_ATTRIBUTE, "none of its regions has an attribute that is asked for and fits.")
    return (
        ModelInputs(
            input_ids=np.array(ids, np.int32),
            labels=np.array(codes, np.int32),
            image_mask=np.zeros(len(ids), bool),
            image_index=np.full(len(ids), TEXT_POSITION, np.int32),
            tiles=tile[None],
            tile_grid=np.zeros((1, 2), np.int32),
            image_sizes=np.array([tile.shape[:2]], np.int32),
            prompt="",
        ),
        truncated,
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
