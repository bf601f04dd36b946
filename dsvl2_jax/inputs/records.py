"""One record of a data file, in any of the forms that people have, to the arguments of the processor."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from dsvl2_jax.errors import ConversationError, ImageError, SampleError, UsageError
from dsvl2_jax.inputs.conversation import prepend_image_tags
from dsvl2_jax.inputs.grounding import MAX_COORDINATE, Box, bad_coordinates, parse_boxes
from dsvl2_jax.inputs.image_sources import ImageStore
from dsvl2_jax.inputs.images import image_size
from dsvl2_jax.inputs.processor import ModelInputs, Processor
from dsvl2_jax.inputs.record_boxes import Objects, boxes_of, check_places, place_objects, read_objects
from dsvl2_jax.inputs.record_forms import read_form, refuse, type_name, unused_keys
from dsvl2_jax.inputs.tile_budget import NO_BUDGET, TileBudget, read_budget
from dsvl2_jax.inputs.tokenizer import DET_TOKEN, IMAGE_TOKEN
from dsvl2_jax.inputs.turns import IMAGES, listed, listed_videos, place_videos, read_switch, read_turn
from dsvl2_jax.inputs.visuals import VIDEO_KEYS, Picture, Video, read_visual, resolve_visual

# The reasons that samples are counted under when their text fails them.
BAD_RECORD, BAD_CONVERSATION, UNREADABLE_IMAGE = "record", "conversation", "image unreadable"
NO_LOSS = "no loss"  # not broken: the record says itself that nothing of it is learnt

_PLACE = re.compile(r"\[\d+\]")


@dataclasses.dataclass(frozen=True)
class Record:
    """A conversation, or a text to learn as it is; one of the two. Images and videos are references, in order.

    Attributes:
      conversation: turns {"role", "content", "loss"}, tags in place; ``loss`` is false where there must be none.
      objects: labels and boxes whose places are in the texts; `place` puts them there.
      learnt: false: the record says that there is no loss on any of it.
      budget: of images that have none of their own.
      unused: keys that say something which is not used, as "speaker" or "messages[].speaker".
    """

    images: tuple[Any, ...]
    conversation: tuple[Mapping[str, Any], ...] | None = None
    text: str | None = None
    objects: Objects | None = None
    learnt: bool = True
    unused: tuple[str, ...] = ()
    budget: TileBudget = NO_BUDGET


def parse_record(record: Any, own_images: Sequence[Any] = ()) -> Record:
    """Reads one record.

    Args:
      record: an object with turns (``messages``, ``conversations`` or ``conversation``, a list of which each is
        ``{"role", "content"}`` or ``{"from", "value"}``; content may be a list of text and image parts), with a
        question and its answer (``instruction``, ``input`` and ``output``; ``query`` and ``response``; …), or with
        ``text``; and with ``images`` or ``image`` and ``videos`` or ``video``, unless its turns have their own.
        ``system``, ``history``, ``objects``, a switch of the loss, ``max_tiles`` and ``min_tiles`` of its images and
        ``frames`` and ``frame_choice`` of its videos may stand beside.
      own_images: images that came with the record (tar shards); they stand for those that it names.

    Raises SampleError, saying what was found and expected.
    """
    if not isinstance(record, Mapping):
        raise SampleError(BAD_RECORD, f"expected a JSON object, found {type_name(record)}.")
    try:
        form = read_form(record)
        unused = unused_keys(record, form)
        objects = read_objects(record.get("objects"))
        learnt, budget = read_switch(record, "the record"), read_budget(record)
        images, videos = list(own_images) or image_references(record), listed_videos(record, "")
        if form.text is not None:
            [text], beside = place_videos([form.text], images, videos, "")
            if not text.strip() and not beside:
                raise SampleError(BAD_RECORD, '"text" is empty.')
            parsed = Record(tuple(beside), text=prepend_image_tags(text, len(beside)))
        else:
            parsed = _parse_turns(form.turns, form.key, images, videos, bool(own_images))
        options = tuple(map(record.get, VIDEO_KEYS))
        visuals = tuple(_with_options(reference, *options) for reference in parsed.images)
        if not any(isinstance(visual, Video) for visual in visuals):
            unused += tuple(key for key, value in zip(VIDEO_KEYS, options, strict=True) if value is not None)
    except (ConversationError, UsageError) as error:
        raise SampleError(BAD_RECORD, str(error)) from None
    unused = tuple(dict.fromkeys([*unused, *parsed.unused]))
    parsed = dataclasses.replace(parsed, images=visuals, objects=objects, learnt=learnt, unused=unused, budget=budget)
    _check_boxes(parsed)
    return parsed


def place(record: Record, sizes: Sequence[Sequence[int]], kind: str | None = None) -> tuple[Record, str | None]:
    """The record with its objects in its texts, and the kind that their boxes were taken for, if there are any.

    Args:
      sizes: (width, height) of its images.
      kind: of `BOX_KINDS`, for records that do not say it.

    Raises SampleError when the boxes cannot be of this kind, or of any.
    """
    if record.objects is None:
        return record, None
    try:
        texts, kind = place_objects(record.objects, _texts(record), sizes, kind)
    except ConversationError as error:
        raise SampleError(BAD_RECORD, str(error)) from None
    if record.text is not None:
        return dataclasses.replace(record, text=texts[0], objects=None), kind
    turns = [{**turn, "content": text} for turn, text in zip(record.conversation, texts, strict=True)]
    return dataclasses.replace(record, conversation=tuple(turns), objects=None), kind


def resolve(record: Record, processor: Processor, store: ImageStore, kind: str | None = None) -> Resolved:
    """Finds a record's images, and places its objects in its texts by the images' sizes; arguments as `place`'s.

    Raises SampleError with the reason; OSError when a file cannot be read.
    """
    try:
        images = [resolve_visual(reference, store) for reference in record.images]
    except UsageError as error:
        raise SampleError(BAD_RECORD, str(error)) from None
    if record.objects is None:
        return Resolved(record, images, None)
    if any(isinstance(image, Video) for image in images):
        raise SampleError(
            BAD_RECORD,
            '"objects" are of pictures, and the frames of a video are chosen later. Give the frames as images.',
        )
    try:
        sizes = [image_size(image.source, processor.as_seen) for image in images]
    except ImageError as error:
        raise unreadable_image(error, record.images) from error
    placed, kind = place(record, sizes, kind)
    return Resolved(placed, images, kind)


class Resolved(NamedTuple):
    """A record whose texts are whole, its images and videos (paths or files' bytes), and the kind of its boxes, if it
    has any."""

    record: Record
    images: list[Picture | Video]
    kind: str | None


def learnt_boxes(record: Record, sizes: Sequence[Sequence[int]], kind: str | None = None) -> list[Box]:
    """All boxes of a record in pixels of their images, as training sees them; arguments as `place`'s."""
    written = [box for text in _texts(record) for box in parse_boxes(text, sizes)]
    _, kind = place(record, sizes, kind)
    return written + (boxes_of(record.objects, sizes, kind) if kind is not None else [])


def process(resolved: Resolved, processor: Processor, mask_prompt: bool) -> ModelInputs:
    """Tokenises a record for training and cuts its images into tiles.

    Raises SampleError with the reason; OSError when a file cannot be read.
    """
    record = resolved.record
    if not record.learnt:
        raise SampleError(NO_LOSS, "says that there is no loss on any of it.")
    try:
        budget = record.budget._asdict()
        if record.text is not None:
            return processor(prompt=record.text, images=resolved.images, inference=False, **budget)
        inputs = processor(record.conversation, resolved.images, inference=False, mask_prompt=mask_prompt, **budget)
    except ImageError as error:
        raise unreadable_image(error, record.images) from error
    except (ConversationError, UsageError) as error:
        raise SampleError(BAD_CONVERSATION, str(error)) from error
    if not (inputs.labels[1:] >= 0).any():
        raise SampleError(NO_LOSS, "says that there is no loss on any of its answers.")
    return inputs


def unreadable_image(error: ImageError, images: Sequence[Any]) -> SampleError:
    """The error of a sample one of whose images cannot be read; it names all of them, by their references."""
    return SampleError(UNREADABLE_IMAGE, f"{error} (image: {', '.join(map(_short, images))})")


def _with_options(reference: Any, frames: int | None, choice: str | None) -> Any:
    """The reference; of a video with the options of its record where it has none itself."""
    visual = read_visual(reference)
    if isinstance(visual, Picture):
        return reference
    return visual._replace(frames=visual.frames or frames, frame_choice=visual.frame_choice or choice).checked()


def _parse_turns(turns: Sequence[Any], key: str, images: list[Any], videos: list[Any], ignore_own: bool) -> Record:
    """A record of turns. Its images and videos stand in the turns, or are these; with ``ignore_own`` only these."""
    parsed, in_turns, left = [], [], []
    for number, turn in enumerate(turns, 1):
        role, content, own, unused, learnt = read_turn(turn, f"{key}: turn {number}")
        refuse(unused, f"{key}: turn {number} ({role}): ")
        left += [f"{key}[].{_PLACE.sub('[]', name)}" for name in unused]
        if ignore_own and any(isinstance(read_visual(visual), Video) for visual in own):
            raise SampleError(
                BAD_RECORD,
                f"{key}: turn {number} ({role}) has a video, and the shard has pictures of the record, which would "
                "stand for it. Name the video beside the turns, or leave the pictures out.",
            )
        if own and not ignore_own:
            # Tags of one turn count for its own images only; the processor checks the sum.
            content = prepend_image_tags(content, len(own)) if role == "user" else content
            if content.count(IMAGE_TOKEN) != len(own):
                raise SampleError(
                    BAD_CONVERSATION,
                    f"{key}: turn {number} ({role}) has {content.count(IMAGE_TOKEN)} {IMAGE_TOKEN} tag(s) and "
                    f"{len(own)} image(s). Put one tag where each image belongs.",
                )
            in_turns += own
        parsed.append({"role": role, "content": content} | ({} if learnt else {"loss": False}))
    if in_turns and (images or videos):
        raise SampleError(BAD_RECORD, "images are given twice: in the turns and beside them. Use one of the two.")
    users = [turn for turn in parsed if turn["role"] == "user"]
    texts, beside = place_videos([turn["content"] for turn in users], images, videos, "")
    for turn, text in zip(users, texts, strict=True):
        turn["content"] = text
    visuals = in_turns or beside
    if visuals and users and not any(IMAGE_TOKEN in turn["content"] for turn in parsed):
        users[0]["content"] = prepend_image_tags(users[0]["content"], len(visuals))
    return Record(tuple(visuals), conversation=tuple(parsed), unused=tuple(left))


def _check_boxes(record: Record) -> None:
    """Raises SampleError where the places of objects, or boxes in the model's own syntax, cannot be learnt as meant."""
    texts = _texts(record)
    if record.objects is not None or record.images:
        try:
            check_places(record.objects, texts)
        except ConversationError as error:
            raise SampleError(BAD_RECORD, str(error)) from None
    wrong = [entry for text in texts for entry in bad_coordinates(text)]
    if wrong:
        raise SampleError(
            BAD_RECORD,
            f"a box in {DET_TOKEN} has {wrong[0][:20]!r}, expected whole numbers from 0 to {MAX_COORDINATE}, which "
            'are thousandths of the image. Scale the box, or give it in pixels under "objects".',
        )


def _texts(record: Record) -> list[str]:
    return [record.text] if record.text is not None else [turn["content"] for turn in record.conversation]


def image_references(record: Mapping[str, Any]) -> list[Any]:
    """``images`` or ``image``: one reference or a list of them."""
    try:
        return listed(record, IMAGES, "")
    except ConversationError as error:
        raise SampleError(BAD_RECORD, str(error)) from None


def _short(reference: Any) -> str:
    text = str(reference.source if isinstance(reference, Picture | Video) else reference)
    return repr(text if len(text) <= 80 else text[:40] + "…")
