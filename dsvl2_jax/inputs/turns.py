"""One turn of a conversation, in any of the forms that people write it in: the one reader of all of them.

Python, data files and `dsvl2 eval` read turns by `read_turn`; the server, whose requests have a schema of their own,
joins the parts of a message by `parts_text` too. Nothing here opens a picture. Tested in tests/inputs/test_turns.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from dsvl2_jax.errors import ConversationError
from dsvl2_jax.inputs.tile_budget import BUDGET_KEYS
from dsvl2_jax.inputs.tokenizer import ASSISTANT_TOKEN, IMAGE_TOKEN, USER_TOKEN
from dsvl2_jax.inputs.visuals import VIDEO_KEYS
from dsvl2_jax.messages import did_you_mean

# The names of roles, in small letters: of the chat interfaces, of the published data sets, and the template's own.
ROLES = {
    "user": "user",
    "human": "user",
    USER_TOKEN.lower(): "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    ASSISTANT_TOKEN.lower(): "assistant",
    "system": "system",
    "developer": "system",
}

# Of the model's predecessor, whose examples are still about. As text it would stand for no picture.
OLD_IMAGE_TOKEN = "<image_placeholder>"

VIDEO_TAG = "<video>"  # where a video belongs, beside `IMAGE_TOKEN`, which may stand for one too

_NAMES = (("role", "content"), ("from", "value"))
IMAGES = ("images", "image")
_VIDEOS = ("videos", "video")
# Keys that say nothing about what the model reads. Boxes are what the server adds to its answers, whose text has them.
_HARMLESS = frozenset({"id", "name", "uuid", "message_id", "created", "created_at", "timestamp", "date", "boxes"})

# Keys of a turn or of a whole record that say whether there is a loss on it, in the names of several training tools.
SWITCHES = ("loss", "weight", "train", "training", "loss_weight", "loss_scale")

_TEXT_PARTS = frozenset({"text", "input_text", "output_text"})
_IMAGE_PARTS = frozenset({"image", "image_url", "input_image"})
_VIDEO_PARTS = frozenset({"video", "video_url", "input_video"})
_KINDS = ("text", "image", "image_url", "video", "video_url")  # keys that tell what a part without a type is
_ELSEWHERE = ("url", "path", "base64", "bytes", "data", "source")
_REFERENCES = {"image": ("image_url", "image", *_ELSEWHERE), "video": ("video_url", "video", *_ELSEWHERE)}
_OPTIONS = {"image": BUDGET_KEYS, "video": (*VIDEO_KEYS, *BUDGET_KEYS)}
_HARMLESS_OF_PARTS = _HARMLESS | frozenset({"type", "detail", "format", "media_type", "mime_type", "cache_control"})


class Turn(NamedTuple):
    """A turn in plain form.

    Attributes:
      role: "user", "assistant" or "system".
      text: with ``<image>`` where each picture or video belongs.
      images: the turn's own, in the order of their tags, as they were given: names, addresses, objects or pictures. One
        with options, and every video, is an object that `dsvl2_jax.inputs.visuals.read_visual` takes.
      unused: keys that would say something, but not to this model, as "speaker" or "content[1].max_pixels".
      learnt: whether training may have a loss on it.
    """

    role: str
    text: str
    images: tuple[Any, ...] = ()
    unused: tuple[str, ...] = ()
    learnt: bool = True


def read_turn(turn: Any, label: str) -> Turn:
    """Reads one turn.

    Args:
      turn: an object ``{"role", "content"}`` or ``{"from", "value"}``. The role is one of `ROLES` in any case. The
        content is a string or a list of parts: strings, ``{"type": "text", "text"}`` and ``{"type": "image", …}`` or
        ``{"type": "image_url", …}``. A part of an image has it under one of its keys, or stands for the next of those
        given elsewhere; ``max_tiles`` and ``min_tiles`` may stand beside it. ``{"type": "video", …}`` is a video, with
        ``frames`` and ``frame_choice`` too. ``images`` or ``image`` and ``videos`` or ``video`` beside the content are
        the turn's own. One of `SWITCHES` that is false or 0 takes the loss from the turn.
      label: names the turn in errors, as in "turn 2".

    Raises:
      ConversationError: it is none of these; the message says what was found and expected.
    """
    if not isinstance(turn, Mapping):
        raise ConversationError(f'{label}: expected an object with "role" and "content"; found {_type(turn)}.')
    names = next((names for names in _NAMES if all(name in turn for name in names)), None)
    if names is None:
        found = ", ".join(sorted(map(str, turn))) or "nothing"
        raise ConversationError(f'{label}: expected "role" and "content", or "from" and "value"; found {found}.')
    role = read_role(turn[names[0]], label)
    content = turn[names[1]]
    if content is None and role == "assistant":
        content = ""  # as chat interfaces write an answer that is yet to come
    unused = unused_keys(turn, {*names, *IMAGES, *_VIDEOS, *_HARMLESS, *SWITCHES})
    learnt = read_switch(turn, f"{label} ({role})")
    in_parts: list[Any] = []
    if isinstance(content, list | tuple):
        content, in_parts, unused_of_parts = _read_parts(content, f"{label} ({role})")
        unused += unused_of_parts
    if not isinstance(content, str):
        raise ConversationError(
            f"{label} ({role}): content is of type {_type(content)}, expected a string or a list of parts."
        )
    beside, videos = listed(turn, IMAGES, f"{label} ({role}): "), listed_videos(turn, f"{label} ({role}): ")
    if (beside or videos) and in_parts:
        raise ConversationError(
            f"{label} ({role}): its images are given twice, in parts of its content and beside it. Use one of the two."
        )
    if role == "user" and OLD_IMAGE_TOKEN in content:
        raise old_image_token(f"{label} ({role})")
    [content], beside = place_videos([content], beside, videos, f"{label} ({role}): ")
    return Turn(role, content, tuple(in_parts or beside), unused, learnt)


def read_switch(values: Mapping[str, Any], label: str) -> bool:
    """Whether a turn or a record may have a loss, by those of `SWITCHES` that it has.

    Raises ConversationError for a value that is neither true, false, 0 nor 1, and for switches that disagree.
    """
    found = {key: values[key] for key in SWITCHES if values.get(key) is not None}
    for key, value in found.items():
        if not isinstance(value, bool | int | float) or value not in (0, 1):
            raise ConversationError(
                f'{label}: "{key}" is {str(value)[:40]}, expected true or false (or 1 or 0): there is a loss or there '
                "is none, without weights between. Remove it, or leave the sample out."
            )
    if len(set(map(bool, found.values()))) > 1:
        raise ConversationError(f"{label}: {' and '.join(found)} contradict each other. Leave one of them.")
    return all(found.values())


def read_role(role: Any, label: str) -> str:
    """The plain name of a role. Raises ConversationError for a name that is not among `ROLES`."""
    name = role.strip().lower() if isinstance(role, str) else None
    if name not in ROLES:
        near = did_you_mean(name, ROLES) if name else "."
        known = ", ".join(map(repr, ROLES))
        raise ConversationError(f"{label}: unknown role {role!r:.60}{near} The roles are {known}.")
    return ROLES[name]


def parts_text(parts: Iterable[str | None]) -> str:
    """The text of content given as parts, of which None stands for a picture.

    A picture becomes ``<image>`` and a line end, as the model was trained; two texts that follow each other have a line
    end between them.
    """
    text, after_text = "", False
    for part in parts:
        if part is None:
            text += f"{IMAGE_TOKEN}\n"
        else:
            text += f"\n{part}" if after_text else part
        after_text = part is not None
    return text


def old_image_token(where: str) -> ConversationError:
    """The error for text that has the placeholder of another model instead of ``<image>``."""
    return ConversationError(
        f"{where}: has {OLD_IMAGE_TOKEN}, the tag of another model. Write {IMAGE_TOKEN} where the image belongs."
    )


def _read_parts(parts: Iterable[Any], label: str) -> tuple[str, list[Any], tuple[str, ...]]:
    """(text, images, unused keys) of a list of parts."""
    texts: list[str | None] = []
    images: list[Any] = []
    unused: tuple[str, ...] = ()
    for place, part in enumerate(parts):
        where = f"content[{place}]"
        if isinstance(part, str):
            texts.append(part)
            continue
        kind = _kind(part)
        if kind is None:
            raise ConversationError(
                f"{label}: {where} is neither text nor an image nor a video: {str(part)[:60]}. Expected "
                '{"type": "text", "text": …}, {"type": "image", "image": …} or {"type": "video", "video": …}.'
            )
        if kind == "text":
            if not isinstance(part.get("text"), str):
                found = _type(part.get("text"))
                raise ConversationError(f"{label}: {where}.text is of type {found}, expected a string.")
            texts.append(part["text"])
            known = {"text"}
        else:
            given = [key for key in _REFERENCES[kind] if not says_nothing(part.get(key))]
            if len(given) > 1:
                raise ConversationError(
                    f"{label}: {where} has its {kind} twice, under {given[0]} and {given[1]}. Leave one of them out."
                )
            options = {key: part[key] for key in _OPTIONS[kind] if part.get(key) is not None}
            if not given and (options or kind == "video"):
                raise ConversationError(
                    f'{label}: {where} has no {kind} of its own. Give it in the part, as {{"type": "{kind}", '
                    f'"{kind}": …}}.'
                )
            texts.append(None)
            images += [{kind: part[key], **options} if options or kind == "video" else part[key] for key in given]
            known = {*_REFERENCES[kind], *_OPTIONS[kind]}
        unused += tuple(f"{where}.{key}" for key in unused_keys(part, {*known, *_HARMLESS_OF_PARTS}))
    return parts_text(texts), images, unused


def listed(values: Mapping[str, Any], keys: Sequence[str], label: str) -> list[Any]:
    """What stands under one of two keys: one thing, or a list. Raises ConversationError where both have some."""
    given = [values[key] for key in keys if key in values and not says_nothing(values[key])]
    if len(given) > 1 and not _same(*given):
        raise ConversationError(f'{label}"{keys[0]}" and "{keys[1]}" are both given. Use one of the two.')
    return [] if not given else list(given[0]) if isinstance(given[0], list | tuple) else [given[0]]


def _same(one: Any, other: Any) -> bool:
    """Whether two names, or lists of names, mean the same."""
    first, second = (value if isinstance(value, list) else [value] for value in (one, other))
    return all(isinstance(name, str) for name in (*first, *second)) and first == second


def listed_videos(values: Mapping[str, Any], label: str) -> list[dict[str, Any]]:
    """The videos of a turn or a record, each as `read_visual` takes it."""
    return [{"video": video} for video in listed(values, _VIDEOS, label)]


def place_videos(
    texts: Sequence[str], images: Sequence[Any], videos: Sequence[Any], label: str
) -> tuple[list[str], list[Any]]:
    """Texts whose tags are all ``<image>``, and what they stand for, in order: pictures and videos.

    With videos, ``<video>`` in a text stands for the next one. Without any ``<video>`` they come after the images, as
    ``<image>`` too.

    Raises ConversationError for another number of ``<video>`` than of videos, or of ``<image>`` than of images.
    """
    if not videos:
        return list(texts), list(images)
    tags = re.findall(f"{IMAGE_TOKEN}|{VIDEO_TAG}", "".join(texts))
    if VIDEO_TAG not in tags:
        return list(texts), [*images, *videos]
    for tag, given in ((IMAGE_TOKEN, images), (VIDEO_TAG, videos)):
        if tags.count(tag) != len(given):
            raise ConversationError(
                f"{label}{tags.count(tag)} {tag} tag(s) in the text, but {len(given)} given. Put one {tag} where each "
                "belongs."
            )
    left = {IMAGE_TOKEN: iter(images), VIDEO_TAG: iter(videos)}
    return [text.replace(VIDEO_TAG, IMAGE_TOKEN) for text in texts], [next(left[tag]) for tag in tags]


def _kind(part: Any) -> str | None:
    """Whether a part is "text", "image" or "video", None for none of them; without a type a key may tell it."""
    if not isinstance(part, Mapping):
        return None
    kind = part.get("type", next((key for key in _KINDS if key in part), None))
    names = {"text": _TEXT_PARTS, "image": _IMAGE_PARTS, "video": _VIDEO_PARTS}
    return next((plain for plain in names if isinstance(kind, str) and kind in names[plain]), None)


def unused_keys(values: Mapping[str, Any], known: Iterable[str]) -> tuple[str, ...]:
    """The keys that are not among the known ones and say something."""
    return tuple(str(key) for key, value in values.items() if key not in known and not says_nothing(value))


def says_nothing(value: Any) -> bool:
    """Whether a value is empty, as chat interfaces and tables fill the fields that they do not use."""
    return value is None or (isinstance(value, str | bytes | list | tuple | dict | np.ndarray) and len(value) == 0)


def _type(value: Any) -> str:
    return type(value).__name__
