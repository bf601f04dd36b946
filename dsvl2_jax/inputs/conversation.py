"""A conversation, or a raw prompt, checked and rendered as the stretches of text that the processor tokenises.

The chat template is the released models': ``<|User|>: text`` and ``<|Assistant|>: answer`` in turn, each answer
ended by eos, after the text of an optional system turn.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from PIL import Image

from dsvl2_jax.errors import ConversationError, UsageError
from dsvl2_jax.inputs.images import ImageSource
from dsvl2_jax.inputs.tokenizer import ASSISTANT_TOKEN, IMAGE_TOKEN, USER_TOKEN

_ROLES = {
    USER_TOKEN: "user",
    "user": "user",
    ASSISTANT_TOKEN: "assistant",
    "assistant": "assistant",
    "system": "system",
}


class Piece(NamedTuple):
    """A stretch of the rendered conversation."""

    text: str
    is_token: bool = False  # exactly one special token, put there by the template
    marks_images: bool = False  # each <image> in it stands for the next image
    supervised: bool = False  # trained on even when the prompt is masked


class _Turn(NamedTuple):
    role: str
    text: str
    label: str  # "turn 2 (assistant)", for messages


def render_conversation(
    conversation: Sequence[Mapping[str, Any]],
    images: Sequence[ImageSource] | None,
    eos_token: str,
    inference: bool,
) -> tuple[list[Piece], list[ImageSource]]:
    """The pieces of a conversation and its images, as many as ``<image>`` tags; arguments as `Processor.__call__`'s.

    Raises ConversationError for turns that are not a conversation, UsageError for images given twice.
    """
    turns = _check_turns(conversation, inference)
    pieces: list[Piece] = []
    for turn in turns:
        if turn.role == "user":
            pieces += _render_user(turn.text)
        elif turn.role == "system":
            pieces.append(Piece(turn.text.strip()))
        else:
            pieces.append(Piece(turn.text.strip(), supervised=True))
            pieces.append(Piece(eos_token, is_token=True, supervised=True))
    if inference:
        pieces.pop()  # the eos of the answer that is yet to be written
    return pieces, _collect_images(conversation, turns, images)


def render_prompt(
    prompt: str,
    images: Sequence[ImageSource] | None,
    eos_token: str,
    inference: bool,
    apply_sft_format: bool,
    system_prompt: str,
) -> tuple[list[Piece], list[ImageSource]]:
    """The pieces of a raw prompt and its images, as many as ``<image>`` tags; arguments as `Processor.__call__`'s.

    Raises ConversationError for what is no text, or another number of images than of tags.
    """
    _check_text(prompt, "the prompt")
    pieces = [Piece(prompt, marks_images=True)]
    if apply_sft_format:
        _check_text(system_prompt, "system_prompt")
        system = f"{system_prompt}\n\n".lstrip() if system_prompt else ""
        pieces = [Piece(system, marks_images=True), *_render_user(prompt)]
    if not inference:
        pieces.append(Piece(eos_token, is_token=True))
    sources = _image_list(images, "images") or []
    tags = sum(piece.text.count(IMAGE_TOKEN) for piece in pieces if piece.marks_images)
    _check_image_count(tags, len(sources), "the prompt")
    return pieces, sources


def prepend_image_tags(prompt: str, n_images: int) -> str:
    """`prompt`, with one ``<image>`` line per image in front if it has no ``<image>`` of its own."""
    return prompt if IMAGE_TOKEN in prompt else f"{IMAGE_TOKEN}\n" * n_images + prompt


def _render_user(text: str) -> list[Piece]:
    """A user turn and the opening of its answer."""
    return [
        Piece(USER_TOKEN, is_token=True),
        Piece(f": {text.strip()}\n\n", marks_images=True),
        Piece(ASSISTANT_TOKEN, is_token=True),
        Piece(":"),
    ]


def _check_turns(conversation: Sequence[Mapping[str, Any]], inference: bool) -> list[_Turn]:
    """The turns with plain role names, an empty assistant turn added for inference if the last is the user's."""
    if not isinstance(conversation, Sequence) or isinstance(conversation, str | bytes) or not conversation:
        found = "an empty one" if isinstance(conversation, list | tuple) else type(conversation).__name__
        raise ConversationError(f'A conversation is a list of one or more {{"role", "content"}} turns; found {found}.')
    turns = [_check_turn(item, number) for number, item in enumerate(conversation, 1)]
    dialogue = turns[1:] if turns[0].role == "system" else turns
    for number, turn in enumerate(dialogue):
        expected = "assistant" if number % 2 else "user"
        if turn.role == "system":
            raise ConversationError(f"{turn.label}: a system turn can only be the first. Move it there.")
        if turn.role != expected:
            raise ConversationError(
                f"{turn.label}: expected a turn of the {expected} here. User and assistant alternate, the user "
                "first: join consecutive turns of one speaker, or add the missing one."
            )
    if not dialogue:
        raise ConversationError(f"{turns[0].label}: the conversation has nothing after it. Add a user turn.")
    last = turns[-1]
    if not inference:
        if last.role != "assistant" or not last.text.strip():
            raise ConversationError(
                f"{last.label} is the last: a training conversation ends in an assistant turn with text. Add the "
                "answer, or pass inference=True to have it written."
            )
    elif last.role == "user":
        turns.append(_Turn("assistant", "", "the answer"))
    elif last.text.strip():
        raise ConversationError(
            f"{last.label} is the last and has text: for inference a conversation ends in a user turn or an empty "
            "assistant turn. Remove the answer, or pass inference=False to train on it."
        )
    return turns


def _check_turn(item: Any, number: int) -> _Turn:
    if not isinstance(item, Mapping) or "role" not in item or "content" not in item:
        found = sorted(map(str, item)) if isinstance(item, Mapping) else type(item).__name__
        raise ConversationError(f'turn {number}: expected an object with "role" and "content"; found {found}.')
    role = item["role"]
    if not isinstance(role, str) or role not in _ROLES:
        raise ConversationError(f"turn {number}: unknown role {role!r}. The roles are {', '.join(map(repr, _ROLES))}.")
    turn = _Turn(_ROLES[role], item["content"], f"turn {number} ({_ROLES[role]})")
    _check_text(turn.text, f"{turn.label}: content")
    if turn.role == "assistant" and IMAGE_TOKEN in turn.text:
        raise ConversationError(
            f"{turn.label}: has {turn.text.count(IMAGE_TOKEN)} {IMAGE_TOKEN}; images can only be in user turns. "
            "Move the tag and its image to the user turn before it."
        )
    return turn


def _check_text(text: Any, what: str) -> None:
    if not isinstance(text, str):
        raise ConversationError(f"{what} is of type {type(text).__name__}, expected a string.")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ConversationError(f"{what} is not valid Unicode at character {error.start}: {error.reason}.") from error


def _image_list(images: Any, what: str) -> list[ImageSource] | None:
    if images is None:
        return None
    if isinstance(images, str | bytes | Image.Image) or not isinstance(images, Sequence):
        raise ConversationError(f"{what} is of type {type(images).__name__}, expected a list of paths or PIL images.")
    return list(images)


def _collect_images(
    conversation: Sequence[Mapping[str, Any]], turns: Sequence[_Turn], images: Sequence[ImageSource] | None
) -> list[ImageSource]:
    """All images of the conversation in order, their number equal to that of the user turns' tags."""
    per_turn = [
        _image_list(item.get("images"), f"{turn.label}: images") or []
        for item, turn in zip(conversation, turns, strict=False)  # turns may have one more, the answer
    ]
    listed = _image_list(images, "images")
    if listed is not None and any(per_turn):
        raise UsageError('Images are given twice: in the turns\' "images" and as images=. Use one of the two.')
    sources = [image for turn_images in per_turn for image in turn_images] if listed is None else listed
    tags = [turn.text.count(IMAGE_TOKEN) if turn.role == "user" else 0 for turn in turns]
    counts = zip(turns, tags, map(len, per_turn), strict=False)
    uneven = [f"{turn.label} has {n} and {m}" for turn, n, m in counts if listed is None and n != m]
    _check_image_count(sum(tags), len(sources), "the conversation", "; ".join(uneven))
    return sources


def _check_image_count(n_tags: int, n_images: int, what: str, detail: str = "") -> None:
    if n_tags != n_images:
        raise ConversationError(
            f"{what} has {n_tags} {IMAGE_TOKEN} tag(s) but {n_images} image(s){detail and f' ({detail})'}. "
            f"Put one {IMAGE_TOKEN} in the user's text where each image belongs."
        )
