"""A conversation, or a raw prompt, checked and rendered as the stretches of text that the processor tokenises.

The chat template is the released models': ``<|User|>: text`` and ``<|Assistant|>: answer`` in turn, each answer
ended by eos, after the text of an optional system turn.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from dsvl2_jax.errors import ConversationError, UsageError
from dsvl2_jax.inputs.tokenizer import ASSISTANT_TOKEN, IMAGE_TOKEN, USER_TOKEN
from dsvl2_jax.inputs.turns import OLD_IMAGE_TOKEN, Turn, old_image_token, read_turn


class Piece(NamedTuple):
    """A stretch of the rendered conversation."""

    text: str
    is_token: bool = False  # exactly one special token, put there by the template
    marks_images: bool = False  # each <image> in it stands for the next image
    supervised: bool = False  # trained on even when the prompt is masked
    masked: bool = False  # never trained on: its turn says so


def render_conversation(
    conversation: Sequence[Mapping[str, Any]],
    images: Sequence[Any] | None,
    eos_token: str,
    inference: bool,
) -> tuple[list[Piece], list[Any]]:
    """The pieces of a conversation and its images, as many as ``<image>`` tags; arguments as `Processor.__call__`'s.

    Raises ConversationError for turns that are not a conversation, UsageError for images given twice.
    """
    turns = _read_turns(conversation, inference)
    pieces: list[Piece] = []
    for turn in turns:
        if turn.role == "user":
            rendered = _render_user(turn.text)
        elif turn.role == "system":
            rendered = [Piece(turn.text.strip())]
        else:
            rendered = [
                Piece(turn.text.strip(), supervised=True),
                Piece(eos_token, is_token=True, supervised=True),
            ]
        pieces += rendered if turn.learnt else [piece._replace(masked=True) for piece in rendered]
    if inference:
        pieces.pop()  # the eos of the answer that is yet to be written
    return pieces, _collect_images(turns, images)


def render_prompt(
    prompt: str,
    images: Sequence[Any] | None,
    eos_token: str,
    inference: bool,
    apply_sft_format: bool,
    system_prompt: str,
) -> tuple[list[Piece], list[Any]]:
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
    sources = _image_list(images) or []
    tags = sum(piece.text.count(IMAGE_TOKEN) for piece in pieces if piece.marks_images)
    if len(sources) > tags and OLD_IMAGE_TOKEN in prompt:
        raise old_image_token("the prompt")
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


def _read_turns(conversation: Sequence[Mapping[str, Any]], inference: bool) -> list[Turn]:
    """The turns in plain form, an empty assistant turn added for inference if the last is the user's."""
    if not isinstance(conversation, Sequence) or isinstance(conversation, str | bytes) or not conversation:
        found = "an empty one" if isinstance(conversation, list | tuple) else type(conversation).__name__
        raise ConversationError(f'A conversation is a list of one or more {{"role", "content"}} turns; found {found}.')
    turns = [_read_turn(item, number) for number, item in enumerate(conversation, 1)]
    opening = int(turns[0].role == "system")
    for number, turn in enumerate(turns[opening:]):
        label, expected = _label(turn, number + opening), "assistant" if number % 2 else "user"
        if turn.role == "system":
            raise ConversationError(f"{label}: a system turn can only be the first. Move it there.")
        if turn.role != expected:
            raise ConversationError(
                f"{label}: expected a turn of the {expected} here. User and assistant alternate, the user "
                "first: join consecutive turns of one speaker, or add the missing one."
            )
    last = turns[-1]
    label = _label(last, len(turns) - 1)
    if last.role == "system":
        raise ConversationError(f"{label}: the conversation has nothing after it. Add a user turn.")
    if not inference:
        if last.role != "assistant" or not last.text.strip():
            raise ConversationError(
                f"{label} is the last: a training conversation ends in an assistant turn with text. Add the "
                "answer, or pass inference=True to have it written."
            )
    elif last.role == "user":
        turns.append(Turn("assistant", ""))
    elif last.text.strip():
        raise ConversationError(
            f"{label} is the last and has text: for inference a conversation ends in a user turn or an empty "
            "assistant turn. Remove the answer, or pass inference=False to train on it."
        )
    return turns


def _read_turn(item: Any, number: int) -> Turn:
    turn = read_turn(item, f"turn {number}")
    label = _label(turn, number - 1)
    if turn.unused:
        raise ConversationError(
            f"{label}: has {', '.join(turn.unused)}, which the model does not use. A turn has role, content and "
            "images; leave the rest out."
        )
    _check_text(turn.text, f"{label}: content")
    if turn.role == "assistant" and IMAGE_TOKEN in turn.text:
        raise ConversationError(
            f"{label}: has {turn.text.count(IMAGE_TOKEN)} {IMAGE_TOKEN}; images can only be in user turns. "
            "Move the tag and its image to the user turn before it."
        )
    return turn


def _label(turn: Turn, index: int) -> str:
    """As in "turn 2 (assistant)", for messages."""
    return f"turn {index + 1} ({turn.role})"


def _check_text(text: Any, what: str) -> None:
    if not isinstance(text, str):
        raise ConversationError(f"{what} is of type {type(text).__name__}, expected a string.")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ConversationError(f"{what} is not valid Unicode at character {error.start}: {error.reason}.") from error


def _image_list(images: Any) -> list[Any] | None:
    if images is None:
        return None
    if isinstance(images, str | bytes) or not isinstance(images, Sequence):
        raise ConversationError(f"images is of type {type(images).__name__}, expected a list of images.")
    return list(images)


def _collect_images(turns: Sequence[Turn], images: Sequence[Any] | None) -> list[Any]:
    """All images of the conversation in order, their number equal to that of the user turns' tags."""
    in_turns = [image for turn in turns for image in turn.images]
    listed = _image_list(images)
    if listed is not None and in_turns:
        raise UsageError("Images are given twice: in the turns and as images=. Use one of the two.")
    sources = in_turns if listed is None else listed
    tags = [turn.text.count(IMAGE_TOKEN) if turn.role == "user" else 0 for turn in turns]
    uneven = [
        f"{_label(turn, index)} has {n} and {len(turn.images)}"
        for index, (turn, n) in enumerate(zip(turns, tags, strict=True))
        if listed is None and n != len(turn.images)
    ]
    _check_image_count(sum(tags), len(sources), "the conversation", "; ".join(uneven))
    return sources


def _check_image_count(n_tags: int, n_images: int, what: str, detail: str = "") -> None:
    if n_tags != n_images:
        raise ConversationError(
            f"{what} has {n_tags} {IMAGE_TOKEN} tag(s) but {n_images} image(s){detail and f' ({detail})'}. "
            f"Put one {IMAGE_TOKEN} in the user's text where each image belongs."
        )
