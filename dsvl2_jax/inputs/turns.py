"""One turn of a conversation, in any of the forms that people write it in: the one reader of all of them.

Python, data files and `dsvl2 eval` read turns by `read_turn`; the server, whose requests have a schema of their own,
joins the parts of a message by `parts_text` too. Nothing here opens a picture. Tested in tests/inputs/test_turns.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from dsvl2_jax.errors import ConversationError
from dsvl2_jax.inputs.tokenizer import ASSISTANT_TOKEN, IMAGE_TOKEN, USER_TOKEN
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

_NAMES = (("role", "content"), ("from", "value"))
_IMAGES = ("images", "image")
# Keys that say nothing about what the model reads. Boxes are what the server adds to its answers, whose text has them.
_HARMLESS = frozenset({"id", "name", "uuid", "message_id", "created", "created_at", "timestamp", "date", "boxes"})

# Keys of a turn or of a whole record that say whether there is a loss on it, in the names of several training tools.
SWITCHES = ("loss", "weight", "train", "training", "loss_weight", "loss_scale")

_TEXT_PARTS = frozenset({"text", "input_text", "output_text"})
_IMAGE_PARTS = frozenset({"image", "image_url", "input_image"})
_REFERENCES = ("image_url", "image", "url", "path", "base64", "bytes", "data", "source")
_HARMLESS_OF_PARTS = _HARMLESS | frozenset({"type", "detail", "format", "media_type", "mime_type", "cache_control"})


class Turn(NamedTuple):
    """A turn in plain form.

    Attributes:
      role: "user", "assistant" or "system".
      text: with ``<image>`` where each picture belongs.
      images: the turn's own, as they were given: names, addresses, objects or pictures.
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
        given elsewhere. ``images`` or ``image`` beside the content are the turn's own. One of `SWITCHES` that is false
        or 0 takes the loss from the turn.
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
    unused = unused_keys(turn, {*names, *_IMAGES, *_HARMLESS, *SWITCHES})
    learnt = read_switch(turn, f"{label} ({role})")
    in_parts: list[Any] = []
    if isinstance(content, list | tuple):
        content, in_parts, unused_of_parts = _read_parts(content, f"{label} ({role})")
        unused += unused_of_parts
    if not isinstance(content, str):
        raise ConversationError(
            f"{label} ({role}): content is of type {_type(content)}, expected a string or a list of parts."
        )
    beside = _images_beside(turn, f"{label} ({role})")
    if beside and in_parts:
        raise ConversationError(
            f"{label} ({role}): its images are given twice, in parts of its content and beside it. Use one of the two."
        )
    if role == "user" and OLD_IMAGE_TOKEN in content:
        raise old_image_token(f"{label} ({role})")
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
                f"{label}: {where} is neither text nor an image: {str(part)[:60]}. Expected "
                '{"type": "text", "text": …} or {"type": "image", "image": …}.'
            )
        if kind == "text":
            if not isinstance(part.get("text"), str):
                found = _type(part.get("text"))
                raise ConversationError(f"{label}: {where}.text is of type {found}, expected a string.")
            texts.append(part["text"])
            known = {"text"}
        else:
            given = [key for key in _REFERENCES if not says_nothing(part.get(key))]
            if len(given) > 1:
                raise ConversationError(
                    f"{label}: {where} has its image twice, under {given[0]} and {given[1]}. Leave one of them out."
                )
            texts.append(None)
            images += [part[key] for key in given]
            known = set(_REFERENCES)
        unused += tuple(f"{where}.{key}" for key in unused_keys(part, {*known, *_HARMLESS_OF_PARTS}))
    return parts_text(texts), images, unused


def _images_beside(turn: Mapping[str, Any], label: str) -> list[Any]:
    """What ``images`` or ``image`` of a turn has: one image, or a list of them."""
    given = [turn[key] for key in _IMAGES if not says_nothing(turn.get(key))]
    if len(given) > 1:
        raise ConversationError(f'{label}: "images" and "image" are both given. Use one of the two.')
    if given and isinstance(given[0], list | tuple):
        return list(given[0])
    return given


def _kind(part: Any) -> str | None:
    """Whether a part is "text" or "image", None for neither; its type may be left out where a key tells it."""
    if not isinstance(part, Mapping):
        return None
    kind = part.get("type", next((key for key in ("text", "image", "image_url") if key in part), None))
    if not isinstance(kind, str):
        return None
    return "text" if kind in _TEXT_PARTS else "image" if kind in _IMAGE_PARTS else None


def unused_keys(values: Mapping[str, Any], known: Iterable[str]) -> tuple[str, ...]:
    """The keys that are not among the known ones and say something."""
    return tuple(str(key) for key, value in values.items() if key not in known and not says_nothing(value))


def says_nothing(value: Any) -> bool:
    """Whether a value is empty, as chat interfaces and tables fill the fields that they do not use."""
    return value is None or (isinstance(value, str | bytes | list | tuple | dict | np.ndarray) and len(value) == 0)


def _type(value: Any) -> str:
    return type(value).__name__
