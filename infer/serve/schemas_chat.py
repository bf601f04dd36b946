"""The bodies of /v1/chat/completions, /v1/completions, /tokenize and /detokenize."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from dsvl2_jax.infer.sampling import MAX_TOP_LOGPROBS
from dsvl2_jax.infer.serve.schemas import Body, Streamed, TopLogprobs, by_type, one_of, only
from dsvl2_jax.inputs.frame_choice import FRAMES, MAX_FRAMES
from dsvl2_jax.inputs.tile_budget import MAX_TILES, TileBudget

MAX_PROMPTS = 64  # of one request to /v1/completions

Detail = Literal["auto", "low", "high", "original"]
Tiles = Annotated[int, Field(ge=1, le=MAX_TILES)]
Role = Annotated[
    Literal["system", "developer", "user", "assistant"],
    BeforeValidator(lambda role: role.lower() if isinstance(role, str) else role),
]
_CALLS = "the model calls no tools"
NoCalls = only(None, [], but=_CALLS)
NoCall = only(None, but=_CALLS)
ToolChoice = only(None, "none", "auto", but=_CALLS)
NoAudio = only(None, but="the model neither hears nor speaks")
TextOnly = only(None, [], ["text"], but="the model answers in text alone")
NoName = only(None, but="the model does not see the names of speakers")
NoEffort = only(None, "none", but="the model does not reason before it answers")
NoVerbosity = only(None, "medium", but="the model's answers cannot be made longer or shorter by it")
NoModeration = only(None, but="nothing is moderated here")
NoSearch = only(None, but="the model does not search the web")
NoPrediction = only(None, but="answers cannot be predicted")
NoEcho = only(None, False, but="the prompt is not repeated")
NoSuffix = only(None, "", but="the model cannot write what stands before a suffix")
OneOfOne = only(None, 1, but="answers are not compared; use n")


class TextPart(Body):
    """Text of a message."""

    type: Literal["text"]
    text: str
    prompt_cache_breakpoint: dict[str, Any] | None = None


class Budgeted(Body):
    """Into how many tiles pictures are cut, beside the view of the whole."""

    max_tiles: Tiles | None = Field(None, description="At most; without it, as the checkpoint has it.")
    min_tiles: Tiles | None = Field(None, description="At least, however many pictures there are.")

    @property
    def budget(self) -> TileBudget:
        return TileBudget(self.max_tiles, self.min_tiles)


class ImageUrl(Budgeted):
    """Where a picture is: a data URL; https and file URLs where the operator allows them."""

    url: str
    detail: Detail | None = None


class Framed(Budgeted):
    """Which frames of a video are shown, as pictures."""

    frames: Annotated[int, Field(ge=1, le=MAX_FRAMES)] | None = Field(
        None, description=f"At most; without it {FRAMES}."
    )
    frame_choice: Literal["even", "scene"] | None = Field(
        None, description="At even distances, as without it, or one of each part between the greatest changes."
    )


class VideoUrl(Framed):
    """Where a video is: a data URL; https and file URLs where the operator allows them."""

    url: str


class ImagePart(Body):
    """A picture of a message, seen where it stands."""

    type: Literal["image_url"]
    image_url: one_of(  # type: ignore[valid-type]
        {"<text>": str, "<object>": ImageUrl},
        lambda value: "<text>" if isinstance(value, str) else "<object>" if isinstance(value, dict) else None,
        "an object with a url",
    )
    prompt_cache_breakpoint: dict[str, Any] | None = None


class VideoPart(Body):
    """A video of a message: frames of it are seen where it stands."""

    type: Literal["video_url"]
    video_url: one_of(  # type: ignore[valid-type]
        {"<text>": str, "<object>": VideoUrl},
        lambda value: "<text>" if isinstance(value, str) else "<object>" if isinstance(value, dict) else None,
        "an object with a url",
    )
    prompt_cache_breakpoint: dict[str, Any] | None = None


def _part(value: Any) -> str | None:
    kind = value.get("type") if isinstance(value, dict) else None
    tags = {"text": "<text>", "image_url": "<image>", "video_url": "<video>"}
    return tags.get(kind) if isinstance(kind, str) else None


Part = one_of(
    {"<text>": TextPart, "<image>": ImagePart, "<video>": VideoPart},
    _part,
    'a part of the type "text", "image_url" or "video_url"',
)
Content = one_of(
    {"<text>": str, "<parts>": Annotated[list[Part], Field(min_length=1)]},
    by_type("<text>", "<parts>"),
    "a string or a list of parts",
)


class Message(Body):
    """One turn of a conversation. An answer of this server, boxes included, can be sent back as it came."""

    role: Role
    content: Content | None = None
    name: NoName = None
    refusal: NoCall = None
    audio: NoAudio = None
    tool_calls: NoCalls = None
    function_call: NoCall = None
    annotations: NoCalls = None
    boxes: list[dict[str, Any]] | None = None


class ChatRequest(Streamed, Budgeted):
    """The body of POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1, le=2**31 - 1)
    max_completion_tokens: int | None = Field(None, ge=1, le=2**31 - 1)
    logprobs: bool | None = None
    top_logprobs: TopLogprobs | None = None
    tools: NoCalls = None
    tool_choice: ToolChoice = None
    functions: NoCalls = None
    function_call: ToolChoice = None
    modalities: TextOnly = None
    audio: NoAudio = None
    reasoning_effort: NoEffort = None
    verbosity: NoVerbosity = None
    prediction: NoPrediction = None
    moderation: NoModeration = None
    web_search_options: NoSearch = None


_TokenId = Annotated[int, Field(ge=0, lt=2**31)]
_Tokens = Annotated[list[_TokenId], Field(min_length=1)]


def _prompt(value: Any) -> str | None:
    if isinstance(value, str):
        return "<text>"
    if not isinstance(value, list):
        return None
    kinds = {str: "<texts>", int: "<tokens>", list: "<token lists>"}
    return kinds.get(type(value[0]), "<texts>") if value else "<texts>"


Prompt = one_of(
    {
        "<text>": str,
        "<texts>": Annotated[list[str], Field(min_length=1, max_length=MAX_PROMPTS)],
        "<tokens>": _Tokens,
        "<token lists>": Annotated[list[_Tokens], Field(max_length=MAX_PROMPTS)],
    },
    _prompt,
    "a string, a list of strings, a list of token ids or a list of such lists",
)


class CompletionRequest(Streamed):
    """The body of POST /v1/completions: text that the model goes on with, without the chat's roles."""

    prompt: Prompt
    max_tokens: int | None = Field(None, ge=1, le=2**31 - 1)
    logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)
    best_of: OneOfOne = None
    echo: NoEcho = None
    suffix: NoSuffix = None


class TokenizeRequest(Budgeted):
    """The body of POST /tokenize: a prompt as /v1/completions takes it, or the messages of a chat."""

    model: str | None = None
    prompt: str | None = None
    messages: list[Message] | None = Field(None, min_length=1)
    add_special_tokens: bool | None = Field(None, description="With a prompt: begin with bos, which is the default.")
    return_token_strs: bool | None = None


class DetokenizeRequest(Body):
    """The body of POST /detokenize."""

    model: str | None = None
    tokens: list[_TokenId]
