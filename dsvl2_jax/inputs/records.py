"""One record of a data file, in any of the forms that people have, to the arguments of the processor."""

from __future__ import annotations

import dataclasses
import functools
import math
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dsvl2_jax.errors import ConversationError, ImageError, SampleError
from dsvl2_jax.inputs.image_sources import ImageStore, resolve
from dsvl2_jax.inputs.images import load_image
from dsvl2_jax.inputs.processor import ModelInputs, Processor, prepend_image_tags
from dsvl2_jax.inputs.tokenizer import IMAGE_TOKEN, Tokenizer
from dsvl2_jax.model.config import TEXT_POSITION

# The reasons that samples are counted under when their text fails them.
BAD_RECORD, BAD_CONVERSATION, UNREADABLE_IMAGE = "record", "conversation", "image unreadable"
# The reasons for which a record that is whole is left out of the encoder's training.
NO_IMAGE, NO_ATTRIBUTE = "no image", "no such attribute"

_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


@dataclasses.dataclass(frozen=True)
class Record:
    """A conversation, or a text to learn as it is; one of the two. Images are references, in order."""

    images: tuple[Any, ...]
    conversation: tuple[Mapping[str, str], ...] | None = None  # {"role", "content"}, tags in place
    text: str | None = None


def parse_record(record: Any, own_images: Sequence[Any] = ()) -> Record:
    """Reads one record.

    Args:
      record: an object with ``messages`` or ``conversations`` (a list of turns, each ``{"role", "content"}`` or
        ``{"from", "value"}``; content may be a list of text and image parts), or with ``text``; and with ``images``
        or ``image``, unless its turns have their own.
      own_images: images that came with the record (tar shards); they stand for those that it names.

    Raises SampleError, saying what was found and expected.
    """
    if not isinstance(record, Mapping):
        raise SampleError(BAD_RECORD, f"expected a JSON object, found {_kind(record)}.")
    listed = list(own_images) or image_references(record)
    for key in ("messages", "conversations"):
        if record.get(key) is not None:
            return _parse_turns(record[key], key, listed, bool(own_images))
    text = record.get("text")
    if not isinstance(text, str):
        raise SampleError(
            BAD_RECORD,
            'expected "messages", "conversations" or "text"; found '
            + (f'"text" of type {_kind(text)}.' if text is not None else f"{', '.join(sorted(map(str, record)))}."),
        )
    if not text.strip() and not listed:
        raise SampleError(BAD_RECORD, '"text" is empty.')
    return Record(tuple(listed), text=prepend_image_tags(text, len(listed)))


def process(record: Record, processor: Processor, store: ImageStore, mask_prompt: bool) -> ModelInputs:
    """Tokenises a record for training and cuts its images into tiles.

    Raises SampleError with the reason; OSError when a file cannot be read.
    """
    images = [resolve(reference, store) for reference in record.images]
    try:
        if record.text is not None:
            return processor(prompt=record.text, images=images, inference=False)
        return processor(record.conversation, images, inference=False, mask_prompt=mask_prompt)
    except ImageError as error:
        raise _unreadable(error, record.images) from error
    except ConversationError as error:
        raise SampleError(BAD_CONVERSATION, str(error)) from error


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
        tile = processor.global_view(resolve(record.images[0], store))
    except ImageError as error:
        raise _unreadable(error, record.images[:1]) from error
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
        raise SampleError(BAD_RECORD, f"expected a JSON object, found {_kind(record)}.")
    images = list(own_images) or image_references(record)
    if not images:
        raise SampleError(NO_IMAGE, "has no image, which training on regions needs.")
    given = record.get("regions")
    if not isinstance(given, list) or not given:
        raise SampleError(BAD_RECORD, f'"regions" is {_kind(given)}, expected a list of one or more regions.')
    found = []
    for number, region in enumerate(given, 1):
        where = f"region {number}"
        if not isinstance(region, Mapping):
            raise SampleError(BAD_RECORD, f"{where} is {_kind(region)}, expected an object.")
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
            resolve(regions.image, store), processor.apply_exif_orientation, rescale_16bit=processor.rescale_16bit
        )
        tile = processor.global_view(image)
    except ImageError as error:
        raise _unreadable(error, [regions.image]) from error
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


def _unreadable(error: ImageError, images: Sequence[Any]) -> SampleError:
    return SampleError(UNREADABLE_IMAGE, f"{error} (image: {', '.join(map(_short, images))})")


def _parse_turns(turns: Any, key: str, listed: list[Any], own: bool) -> Record:
    if not isinstance(turns, Sequence) or isinstance(turns, str) or not turns:
        raise SampleError(BAD_RECORD, f'"{key}" is {_kind(turns)}, expected a list of one or more turns.')
    parsed, in_turns = [], []
    for number, turn in enumerate(turns, 1):
        role, content, images = _parse_turn(turn, f"{key}: turn {number}")
        if images and not own:
            # Tags of one turn count for its own images only; the processor checks the sum.
            content = prepend_image_tags(content, len(images)) if role == "user" else content
            if content.count(IMAGE_TOKEN) != len(images):
                raise SampleError(
                    BAD_CONVERSATION,
                    f"{key}: turn {number} ({role}) has {content.count(IMAGE_TOKEN)} {IMAGE_TOKEN} tag(s) and "
                    f"{len(images)} image(s). Put one tag where each image belongs.",
                )
            in_turns += images
        parsed.append({"role": role, "content": content})
    if in_turns and listed:
        raise SampleError(BAD_RECORD, "images are given twice: in the turns and beside them. Use one of the two.")
    images = in_turns or listed
    if images and not any(IMAGE_TOKEN in turn["content"] for turn in parsed):
        first = next((turn for turn in parsed if turn["role"] == "user"), None)
        if first is not None:
            first["content"] = prepend_image_tags(first["content"], len(images))
    return Record(tuple(images), conversation=tuple(parsed))


def _parse_turn(turn: Any, where: str) -> tuple[str, str, list[Any]]:
    """(role, text, the turn's own images)."""
    if not isinstance(turn, Mapping):
        raise SampleError(BAD_RECORD, f"{where} is {_kind(turn)}, expected an object.")
    for role_key, text_key in (("role", "content"), ("from", "value")):
        if role_key in turn and text_key in turn:
            role, content = turn[role_key], turn[text_key]
            break
    else:
        found = ", ".join(sorted(map(str, turn)))
        raise SampleError(BAD_RECORD, f'{where}: expected "role" and "content", or "from" and "value"; found {found}.')
    if not isinstance(role, str) or role not in _ROLES:
        raise SampleError(BAD_RECORD, f"{where}: unknown role {role!r}. Known are {', '.join(_ROLES)}.")
    images = image_references(turn)
    if isinstance(content, list):
        content, part_images = _join_parts(content, where)
        images = images or part_images
    if not isinstance(content, str):
        raise SampleError(BAD_RECORD, f"{where}: the text is {_kind(content)}, expected a string or a list of parts.")
    return _ROLES[role], content, images


def _join_parts(parts: list[Any], where: str) -> tuple[str, list[Any]]:
    """A content list's text, with a tag line for each image part, and the images that the parts carry."""
    text, images = "", []
    for part in parts:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "text" and isinstance(part.get("text"), str):
            text += part["text"]
        elif kind in ("image", "image_url"):
            reference = part.get("image_url") or part.get("image") or part.get("url") or part.get("path")
            text += f"{IMAGE_TOKEN}\n"
            images += [reference] if reference else []  # without one it stands for the next of the listed images
        else:
            raise SampleError(
                BAD_RECORD, f'{where}: a part of "content" is neither text nor an image: {str(part)[:60]}'
            )
    return text, images


def image_references(record: Mapping[str, Any]) -> list[Any]:
    """``images`` or ``image``: one reference or a list of them."""
    value = record.get("images") or record.get("image")
    if not value:
        return []
    return list(value) if isinstance(value, list | tuple) else [value]


def _kind(value: Any) -> str:
    return {dict: "an object", list: "a list", str: "a string", type(None): "nothing"}.get(
        type(value), type(value).__name__
    )


def _short(reference: Any) -> str:
    text = str(reference)
    return repr(text if len(text) <= 80 else text[:40] + "…")
