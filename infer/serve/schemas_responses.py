"""The body of /v1/responses."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from dsvl2_jax.infer.serve.schemas import Body, Sampling, TopLogprobs, Unobfuscated, by_type, one_of, only
from dsvl2_jax.infer.serve.schemas_chat import (
    Budgeted,
    Detail,
    Framed,
    NoCalls,
    NoEffort,
    NoModeration,
    NoVerbosity,
    Role,
    ToolChoice,
)

_STORED = "answers are not stored; send the whole conversation as input"
NoEarlier = only(None, but=_STORED)
NotLater = only(None, False, but="answers come at once")
NotLaterOptions = only(None, but="answers come at once")
NoFile = only(None, but="files are not stored; use image_url")
NoManagement = only(None, [], but="the context is not shortened")
NoTruncation = only(None, "disabled", but="the context is not shortened")
NoPrompts = only(None, but="prompts are not stored; write the prompt as input")
NoImages = only(None, but="the model draws no pictures")
NoPrograms = only(None, but="there are no such programs here")
NoCallCount = only(None, but="the model calls no tools")
NoSummary = only(None, but="the model does not reason before it answers")
NoAnnotations = only(None, [], but="the model is not shown annotations")


class InputText(Body):
    """Text of a message."""

    type: Literal["input_text", "output_text", "text"]
    text: str
    annotations: NoAnnotations = None
    logprobs: list[Any] | None = None
    prompt_cache_breakpoint: dict[str, Any] | None = None


class InputImage(Budgeted):
    """A picture of a message."""

    type: Literal["input_image"]
    image_url: str
    detail: Detail | None = None
    file_id: NoFile = None
    prompt_cache_breakpoint: dict[str, Any] | None = None


class InputVideo(Framed):
    """A video of a message."""

    type: Literal["input_video"]
    video_url: str
    file_id: NoFile = None
    prompt_cache_breakpoint: dict[str, Any] | None = None


def _part(value: Any) -> str | None:
    kind = value.get("type") if isinstance(value, dict) else None
    if kind in ("input_image", "input_video"):
        return "<image>" if kind == "input_image" else "<video>"
    return "<text>" if kind in ("input_text", "output_text", "text") else None


InputPart = one_of(
    {"<text>": InputText, "<image>": InputImage, "<video>": InputVideo},
    _part,
    'a part of the type "input_text", "input_image", "input_video" or "output_text"',
)
InputContent = one_of(
    {"<text>": str, "<parts>": Annotated[list[InputPart], Field(min_length=1)]},
    by_type("<text>", "<parts>"),
    "a string or a list of parts",
)


class InputMessage(Body):
    """One turn of a conversation; an output message of this server can be sent back as it came."""

    type: Literal["message"] | None = None
    role: Role
    content: InputContent
    id: str | None = None
    status: str | None = None
    phase: str | None = None
    boxes: list[dict[str, Any]] | None = None


class JsonFormat(Body):
    """Whether an answer is text or JSON."""

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None


class TextOptions(Body):
    """What the text of an answer is like."""

    format: JsonFormat | None = None
    verbosity: NoVerbosity = None


class Reasoning(Body):
    """OpenAI's reasoning models' options."""

    effort: NoEffort = None
    summary: NoSummary = None
    generate_summary: NoSummary = None


class ResponseStreamOptions(Body):
    """How an answer is streamed."""

    include_obfuscation: Unobfuscated = None


class ResponsesRequest(Sampling, Budgeted):
    """The body of POST /v1/responses."""

    input: one_of(  # type: ignore[valid-type]
        {"<text>": str, "<items>": Annotated[list[InputMessage], Field(min_length=1)]},
        by_type("<text>", "<items>"),
        "a string or a list of messages",
    )
    instructions: str | None = None
    max_output_tokens: int | None = Field(None, ge=1, le=2**31 - 1)
    text: TextOptions | None = None
    include: list[Literal["message.output_text.logprobs"]] | None = None
    top_logprobs: TopLogprobs | None = None
    stream_options: ResponseStreamOptions | None = None
    truncation: NoTruncation = None
    background: NotLater = None
    background_options: NotLaterOptions = None
    previous_response_id: NoEarlier = None
    conversation: NoEarlier = None
    context_management: NoManagement = None
    prompt: NoPrompts = None
    reasoning: Reasoning | None = None
    tools: NoCalls = None
    tool_choice: ToolChoice = None
    max_tool_calls: NoCallCount = None
    moderation: NoModeration = None
    image: NoImages = None
    access_programs: NoPrograms = None
