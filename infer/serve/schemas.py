"""Request bodies: what all endpoints share. Every field has a type and a range, and nothing that is sent is ignored.

There are three kinds of fields: those that do something; those that do nothing here and harm nobody (`Harmless`); and
those that would change the answer if this server could do what they ask. The last may only be null or have the value
that asks for nothing (`only`); any other is refused by name, since a client would otherwise take the answer for what it
asked for.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Discriminator, Field, Tag, WithJsonSchema
from pydantic_core import PydanticCustomError

from dsvl2_jax.infer.sampling import MAX_BIASES, MAX_TOP_LOGPROBS, SamplingParams
from dsvl2_jax.infer.serve.errors import UNSUPPORTED

MAX_CHOICES = 8
MAX_STOPS = 4
_SEED = 2**63

# What pydantic puts into the path of a problem to say which variant of a type was meant.
TAGS = frozenset(
    {
        "<text>",
        "<texts>",
        "<tokens>",
        "<token lists>",
        "<parts>",
        "<items>",
        "<image>",
        "<video>",
        "<object>",
        "<schema>",
        "<input>",
    }
    | {"<output>", "<message>"}
)


class Body(BaseModel):
    """A JSON object that may have no other fields than these, each of its own type: "1" is no number."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)


def only(*allowed: Any, but: str) -> Any:
    """The type of a field that may only ask for nothing.

    Args:
      allowed: the JSON values that do.
      but: why no other value can be, for people.
    """

    def check(value: Any) -> Any:
        if not any(type(value) is type(one) and value == one for one in allowed):
            wanted = " or ".join(dict.fromkeys(map(json.dumps, allowed)))
            raise PydanticCustomError(UNSUPPORTED, "but {but}; expected {wanted}.", {"but": but, "wanted": wanted})
        return value

    schema = {"enum": list(allowed), "description": f"No other value, because {but}."}
    return Annotated[Any, AfterValidator(check), WithJsonSchema(schema)]


def one_of(variants: Mapping[str, Any], pick: Callable[[Any], str | None], expected: str) -> Any:
    """A union of types of which the value itself says which one it is to be, so that a problem is told once.

    Args:
      variants: the types by their names, which are among `TAGS`.
      pick: the name for a value, or None.
      expected: words for all of them.
    """
    (first, *others) = [Annotated[kind, Tag(tag)] for tag, kind in variants.items()]
    union = first
    for other in others:
        union = union | other
    chosen = Discriminator(pick, custom_error_type="variant", custom_error_message=f"Input should be {expected}")
    return Annotated[union, chosen]


def by_type(texts: str, lists: str) -> Callable[[Any], str | None]:
    """A ``pick`` of `one_of` between a string and a list."""
    return lambda value: texts if isinstance(value, str) else lists if isinstance(value, list) else None


class Harmless(Body):
    """Fields that OpenAI's clients send for OpenAI's own accounts, stores and caches."""

    user: str | None = None
    metadata: dict[str, str] | None = None
    store: bool | None = None
    service_tier: str | None = None
    parallel_tool_calls: bool | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    prompt_cache_options: dict[str, Any] | None = None


Unobfuscated = only(None, False, but="nothing is added to hide the lengths of tokens")
MinTokens = only(None, 0, but="an answer ends where the model ends it")
StopTokens = only(None, [], but="only the model's own token ends an answer; use stop")
SpecialTokens = only(None, False, but="special tokens stay in the text, where boxes need them")
LengthPenalty = only(None, 1, 1.0, but="there is no beam search")
BeamSearch = only(None, False, but="there is no beam search")


class StreamOptions(Body):
    """How an answer is streamed."""

    include_usage: bool | None = Field(None, description="Count the tokens in a last chunk.")
    include_obfuscation: Unobfuscated = None


class JsonSchema(Body):
    """The schema that an answer is to follow."""

    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = Field(None, description="Answers always follow the schema.")


class ResponseFormat(Body):
    """Whether an answer is text or JSON."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class Sampling(Harmless):
    """How tokens are chosen, and how an answer is given: the same at every endpoint that answers."""

    model: str | None = Field(
        None, description="As GET /v1/models names it: the base or an adapter; without it, the base."
    )
    stream: bool | None = None
    temperature: float | None = Field(None, ge=0, le=2, description="0, as without it, is greedy.")
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1, le=2**31 - 1, description="0 or -1: all tokens; without it 50.")
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, gt=0, le=100)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = Field(None, max_length=MAX_BIASES)
    seed: int | None = Field(None, ge=-_SEED, lt=_SEED, description="Without it, another one for every request.")
    ignore_eos: bool | None = None
    regex: str | None = Field(None, min_length=1, description="The answer matches this regular expression.")
    choice: list[str] | None = Field(None, min_length=1, description="The answer is one of these.")
    grounding: bool | None = Field(None, description="Boxes in the answer are well-formed.")
    return_token_ids: bool | None = Field(None, description="The answer also has the ids of its tokens.")
    min_tokens: MinTokens = None
    stop_token_ids: StopTokens = None
    skip_special_tokens: SpecialTokens = None
    length_penalty: LengthPenalty = None
    use_beam_search: BeamSearch = None

    def sampling(self, stop: tuple[str, ...], default_seed: int) -> SamplingParams:
        """The engine's settings; those that are not given are `dsvl2 generate`'s.

        Raises:
          UsageError: a token of ``logit_bias`` is no number.
        """
        names = ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
        given = {name: getattr(self, name) for name in (*names, "ignore_eos") if getattr(self, name) is not None}
        if self.top_k is not None:
            given["top_k"] = max(0, self.top_k)
        bias = tuple((int(token), float(value)) for token, value in (self.logit_bias or {}).items())
        seed = default_seed if self.seed is None else self.seed
        return SamplingParams(**given, seed=seed, stop=stop, logit_bias=bias)


_StopText = Annotated[str, Field(min_length=1)]
Stop = one_of(
    {"<text>": _StopText, "<texts>": Annotated[list[_StopText], Field(max_length=MAX_STOPS)]},
    by_type("<text>", "<texts>"),
    f"a string or a list of at most {MAX_STOPS} strings",
)


class Streamed(Sampling):
    """What /v1/chat/completions and /v1/completions share."""

    n: int | None = Field(None, ge=1, le=MAX_CHOICES)
    stop: Stop | None = None
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


TopLogprobs = Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)]
