"""From the messages of a request to what the model reads: roles joined, pictures fetched, all tokenised.

What takes time (decoding, tiling, tokenising) runs in the engine's pool, never on the event loop.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np

from dsvl2_jax.errors import ConversationError, UsageError
from dsvl2_jax.infer.serve.errors import ApiError
from dsvl2_jax.infer.serve.media import Clip
from dsvl2_jax.infer.serve.state import Serving
from dsvl2_jax.inputs import visuals as visuals_of
from dsvl2_jax.inputs.processor import ModelInputs
from dsvl2_jax.inputs.tile_budget import NO_BUDGET, TileBudget
from dsvl2_jax.inputs.tokenizer import IMAGE_TOKEN
from dsvl2_jax.inputs.turns import OLD_IMAGE_TOKEN, parts_text
from dsvl2_jax.model.config import TEXT_POSITION

_BETWEEN_MESSAGES = "\n\n"  # as between the turns of the chat template


class Text(NamedTuple):
    """A stretch of a message, and the field that it is from."""

    text: str
    field: str


class Picture(NamedTuple):
    """A picture where it stands in a message, and the field that says where it is found."""

    reference: str
    field: str
    detail: str | None
    budget: TileBudget = NO_BUDGET


class Video(NamedTuple):
    """A video where it stands in a message, and the field that says where it is found."""

    reference: str
    field: str
    frames: int | None = None
    frame_choice: str | None = None
    budget: TileBudget = NO_BUDGET


class Turn(NamedTuple):
    """Messages of one role, "system", "user" or "assistant": of each its texts, pictures and videos in order."""

    role: str
    messages: list[list[Text | Picture | Video]]

    @property
    def parts(self) -> list[Text | Picture | Video]:
        """Of all messages."""
        return [part for message in self.messages for part in message]


@dataclasses.dataclass(frozen=True)
class Prompt:
    """What an answer is asked to.

    Attributes:
      inputs: of the processor.
      sizes: (width, height) of each picture and frame, in whose pixels boxes are told.
    """

    inputs: ModelInputs
    sizes: tuple[tuple[int, int], ...] = ()


async def chat_prompt(serving: Serving, turns: Sequence[Turn], field: str, budget: TileBudget = NO_BUDGET) -> Prompt:
    """The prompt of a conversation.

    Args:
      field: what the messages are called, for errors.
      budget: of pictures that have none of their own.

    Raises:
      ApiError: the conversation cannot be answered, or a picture not be had.
      RefusedError: it has more tiles than a request may have.
    """
    joined, processor = join(turns), serving.processor
    _check_budget(serving, budget, "")
    parts = [part for turn in joined for part in turn.parts if not isinstance(part, Text)]
    budgets = [_own_budget(serving, part) for part in parts]
    pictures = [(part.reference, part.field) for part in parts if isinstance(part, Picture)]
    clips = [
        Clip(part.reference, part.field, part.frames or processor.frames, part.frame_choice or processor.frame_choice)
        for part in parts
        if isinstance(part, Video)
    ]
    images = await serving.media.load(pictures, field)
    videos = await serving.media.load_videos(clips, field, images)
    left = {Picture: iter([[image] for image in images]), Video: iter(videos)}
    seen = [next(left[type(part)]) for part in parts]
    visuals = [
        visuals_of.Picture(shown[0], own)
        if isinstance(part, Picture)
        else visuals_of.Video(shown, len(shown), "even", own)
        for part, shown, own in zip(parts, seen, budgets, strict=True)
    ]
    sizes = tuple(image.size for shown in seen for image in shown)
    owns = [own for shown, own in zip(seen, budgets, strict=True) for _ in shown]
    conversation = [{"role": turn.role, "content": render(turn)} for turn in joined]
    try:
        meant = budget.over(processor.budget)
        grids = [processor.grid(size, len(sizes), own, meant) for size, own in zip(sizes, owns, strict=True)]
        # Before they are cut, so that no work is done in vain.
        serving.engine.check_tiles(sum(1 + cols * rows for cols, rows in grids))
        inputs = await serving.in_pool(partial(processor, conversation, visuals, **budget._asdict()))
    except (ConversationError, UsageError) as error:
        raise ApiError(400, f"{field}: {error}", param=field) from None
    return _prompt(serving, inputs, field, sizes)


def _own_budget(serving: Serving, part: Picture | Video) -> TileBudget:
    """The budget of a part, or what its detail means. Raises ApiError for one that cannot be."""
    _check_budget(serving, part.budget, part.field.removesuffix(".url"))
    if part.budget == NO_BUDGET and isinstance(part, Picture) and serving.options.honour_detail:
        most = serving.engine.max_image_tiles
        return {"low": TileBudget(1), "high": TileBudget(most)}.get(part.detail, NO_BUDGET)
    return part.budget


def _check_budget(serving: Serving, budget: TileBudget, field: str) -> None:
    most = serving.engine.max_image_tiles
    for name, value in budget.given().items():
        if value > most:
            where = f"{field}.{name}".removeprefix(".")
            message = f"{where}: found {value}, expected at most {most}, which this server cuts a picture into "
            raise ApiError(400, message + "(--max-image-tiles).", param=where)
    try:
        serving.processor.config.candidates(budget.checked())
    except UsageError as error:
        raise ApiError(400, f"{field or 'max_tiles'}: {error}", param=field or "max_tiles") from None


async def text_prompt(serving: Serving, text: str, field: str) -> Prompt:
    """The prompt of a plain text, which the model goes on with; raises ApiError when it cannot."""
    if IMAGE_TOKEN in text:
        raise _marks_image(field)
    return _prompt(serving, await serving.in_pool(lambda: serving.processor(prompt=text)), field)


def token_prompt(serving: Serving, tokens: Sequence[int], field: str) -> Prompt:
    """The prompt of token ids as they are, without bos unless it is among them; raises ApiError for unknown ones."""
    tokenizer = serving.processor.tokenizer
    for index, token in enumerate(tokens):
        if token >= len(tokenizer):
            expected = f"a token of the vocabulary, 0 to {len(tokenizer) - 1}"
            raise ApiError(400, f"{field}[{index}]: found {token}, expected {expected}.", param=f"{field}[{index}]")
        if token == tokenizer.image_id:
            raise _marks_image(f"{field}[{index}]")
    ids = np.asarray(tokens, np.int32)
    inputs = dataclasses.replace(
        serving.processor(prompt=""),
        input_ids=ids,
        labels=ids,
        image_mask=np.zeros(len(ids), np.bool_),
        image_index=np.full(len(ids), TEXT_POSITION, np.int32),
        prompt=tokenizer.decode(tokens),
    )
    return _prompt(serving, inputs, field)


def join(turns: Iterable[Turn]) -> list[Turn]:
    """The turns with those joined that follow each other and are of one role, checked for what only users may say.

    Raises:
      ApiError: a picture that is not the user's, or ``<image>`` in a text, which would be taken for a picture.
    """
    joined: list[Turn] = []
    for turn in turns:
        for part in turn.parts:
            if isinstance(part, Picture | Video) and turn.role != "user":
                kind = type(part).__name__.lower()
                message = f"{part.field}: found a {kind} in a message of the {turn.role}, expected {kind}s in user "
                raise ApiError(400, message + "messages alone. Move it to a user message.", param=part.field)
            if isinstance(part, Text) and IMAGE_TOKEN in part.text:
                raise _marks_image(part.field)
            if isinstance(part, Text) and turn.role == "user" and OLD_IMAGE_TOKEN in part.text:
                raise _marks_image(part.field, OLD_IMAGE_TOKEN)
        if joined and joined[-1].role == turn.role:
            joined[-1] = Turn(turn.role, joined[-1].messages + turn.messages)
        else:
            joined.append(turn)
    return joined


def render(turn: Turn) -> str:
    """A turn's text, with ``<image>`` where a picture stands."""
    text, after_text = "", False
    for message in filter(None, turn.messages):
        text += _BETWEEN_MESSAGES if after_text else ""
        text += parts_text(part.text if isinstance(part, Text) else None for part in message)
        after_text = isinstance(message[-1], Text)
    return text


def _prompt(serving: Serving, inputs: ModelInputs, field: str, sizes: tuple[tuple[int, int], ...] = ()) -> Prompt:
    try:
        serving.engine.model.check_context(inputs)
    except ConversationError as error:
        raise ApiError(400, f"{field}: {error}", param=field, code="context_length_exceeded") from None
    return Prompt(inputs, sizes)


def _marks_image(field: str, tag: str = IMAGE_TOKEN) -> ApiError:
    return ApiError(
        400,
        f"{field}: found {tag}, which stands for a picture. Send the picture itself as a part of a chat "
        "message, where it belongs, and leave the tag out of the text.",
        param=field,
    )
