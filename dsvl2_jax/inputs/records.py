"""One record of a data file, in any of the forms that people have, to the arguments of the processor."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from dsvl2_jax.errors import ConversationError, ImageError, SampleError
from dsvl2_jax.inputs.conversation import prepend_image_tags
from dsvl2_jax.inputs.image_sources import ImageStore, resolve_image
from dsvl2_jax.inputs.processor import ModelInputs, Processor
from dsvl2_jax.inputs.tokenizer import IMAGE_TOKEN
from dsvl2_jax.inputs.turns import read_turn

# The reasons that samples are counted under when their text fails them.
BAD_RECORD, BAD_CONVERSATION, UNREADABLE_IMAGE = "record", "conversation", "image unreadable"


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
        raise SampleError(BAD_RECORD, f"expected a JSON object, found {type_name(record)}.")
    listed = list(own_images) or image_references(record)
    for key in ("messages", "conversations"):
        if record.get(key) is not None:
            return _parse_turns(record[key], key, listed, bool(own_images))
    text = record.get("text")
    if not isinstance(text, str):
        raise SampleError(
            BAD_RECORD,
            'expected "messages", "conversations" or "text"; found '
            + (f'"text" of type {type_name(text)}.' if text is not None else f"{', '.join(sorted(map(str, record)))}."),
        )
    if not text.strip() and not listed:
        raise SampleError(BAD_RECORD, '"text" is empty.')
    return Record(tuple(listed), text=prepend_image_tags(text, len(listed)))


def process(record: Record, processor: Processor, store: ImageStore, mask_prompt: bool) -> ModelInputs:
    """Tokenises a record for training and cuts its images into tiles.

    Raises SampleError with the reason; OSError when a file cannot be read.
    """
    images = [resolve_image(reference, store) for reference in record.images]
    try:
        if record.text is not None:
            return processor(prompt=record.text, images=images, inference=False)
        return processor(record.conversation, images, inference=False, mask_prompt=mask_prompt)
    except ImageError as error:
        raise unreadable_image(error, record.images) from error
    except ConversationError as error:
        raise SampleError(BAD_CONVERSATION, str(error)) from error


def unreadable_image(error: ImageError, images: Sequence[Any]) -> SampleError:
    """The error of a sample one of whose images cannot be read; it names all of them, by their references."""
    return SampleError(UNREADABLE_IMAGE, f"{error} (image: {', '.join(map(_short, images))})")


def _parse_turns(turns: Any, key: str, listed: list[Any], ignore_own: bool) -> Record:
    if not isinstance(turns, Sequence) or isinstance(turns, str) or not turns:
        raise SampleError(BAD_RECORD, f'"{key}" is {type_name(turns)}, expected a list of one or more turns.')
    parsed, in_turns = [], []
    for number, turn in enumerate(turns, 1):
        try:
            role, content, images, _ = read_turn(turn, f"{key}: turn {number}")
        except ConversationError as error:
            raise SampleError(BAD_RECORD, str(error)) from error
        if images and not ignore_own:
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


def image_references(record: Mapping[str, Any]) -> list[Any]:
    """``images`` or ``image``: one reference or a list of them."""
    value = record.get("images") or record.get("image")
    if not value:
        return []
    return list(value) if isinstance(value, list | tuple) else [value]


def type_name(value: Any) -> str:
    """What a JSON value is, for messages: "an object", "a list", …"""
    return {dict: "an object", list: "a list", str: "a string", type(None): "nothing"}.get(
        type(value), type(value).__name__
    )


def _short(reference: Any) -> str:
    text = str(reference)
    return repr(text if len(text) <= 80 else text[:40] + "…")
