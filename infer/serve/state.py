"""What the endpoints of one server share."""

from __future__ import annotations

import asyncio
import dataclasses
import fnmatch
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from fastapi import Request

from dsvl2_jax import fields
from dsvl2_jax.errors import UsageError
from dsvl2_jax.fields import Problem, setting
from dsvl2_jax.infer.serve.auth import ApiKey
from dsvl2_jax.infer.serve.errors import ApiError, found
from dsvl2_jax.infer.serve.loop_lag import LoopLag
from dsvl2_jax.infer.serve.metrics import Metrics
from dsvl2_jax.infer.serve.models import ServedModel, served_models
from dsvl2_jax.inputs.processor import Processor

if TYPE_CHECKING:
    from dsvl2_jax.infer.constraints import GrammarCompiler
    from dsvl2_jax.infer.serve.async_engine import AsyncEngine
    from dsvl2_jax.infer.serve.media import Media

T = TypeVar("T")

# OpenAI's own models: a client that was written for them need not be told of another name.
OPENAI_NAMES = ("gpt-*", "chatgpt-*", "o[0-9]*")


@dataclasses.dataclass(frozen=True)
class ServeOptions:
    """What an operator decides about the HTTP side; see `dsvl2 serve --help`.

    Attributes:
      model_name: that /v1/models tells.
      root: what that model was loaded from, as /v1/models tells it; empty: its name.
      aliases: patterns of names that also mean this model.
      adapters: name and directory of each adapter of the engine's model, in the order of their numbers.
      keys: without any, everybody may ask.
      honour_detail: ``detail: low`` gives a picture a single tile, and ``high`` tiles among any number of pictures.
        Evaluation kits send it without meaning it.
      default_max_tokens: of an answer in a chat, when the request names no number.
      max_body: bytes of a request.
      cors_origins: web pages from elsewhere that may ask, as ``https://example.org``; ``*``: all.

    Raises:
      UsageError: a number is not positive, or an adapter's name means the base.
    """

    model_name: str = "dsvl2"
    root: str = ""
    aliases: tuple[str, ...] = OPENAI_NAMES
    adapters: tuple[tuple[str, str], ...] = ()
    keys: tuple[ApiKey, ...] = ()
    honour_detail: bool = False
    default_max_tokens: int = setting(512, least=1)
    max_body: int = setting(32 * 2**20, least=1)
    cors_origins: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        problems = fields.check(self)
        fields.refuse((Problem((f"--{p.path[0].replace('_', '-')}",), p.text) for p in problems), UsageError)
        self.models()

    def models(self) -> dict[str, ServedModel]:
        """What requests can name, by name, the base first."""
        root = self.root or self.model_name
        return served_models(self.model_name, root, self.aliases, self.adapters)


class Serving:
    """The engine, the options and the counters of one server."""

    def __init__(self, engine: AsyncEngine, options: ServeOptions, media: Media, grammars: GrammarCompiler | None):
        self.engine, self.options, self.media, self.grammars = engine, options, media, grammars
        self.processor: Processor = engine.model.processor
        self.lag = LoopLag()
        self.models = options.models()
        self.metrics = Metrics(list(self.models), engine.statistics, self.lag)
        self.created = int(time.time())

    async def in_pool(self, function: Callable[..., T], *arguments: Any) -> T:
        """What a function returns that is too slow for the event loop."""
        return await asyncio.get_running_loop().run_in_executor(self.engine.pool, function, *arguments)

    def model_of(self, request: Request, name: str | None) -> ServedModel:
        """The model that a request names; without a name the base. Raises ApiError when there is none of that name."""
        options = self.options
        if name is None or any(fnmatch.fnmatchcase(name, pattern) for pattern in options.aliases):
            name = options.model_name
        if name not in self.models:
            names = " or ".join(map(found, self.models))
            message = f"model: found {found(name)}, expected {names}, which is what this server has."
            raise ApiError(404, message, param="model", code="model_not_found")
        request.scope["model"] = name  # for the log
        return self.models[name]


def serving_of(request: Request) -> Serving:
    """The `Serving` of the server that a request has come to."""
    return request.app.state.serving
