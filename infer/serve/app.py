"""The HTTP application: its endpoints, its layers, and its OpenAPI document."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from importlib import metadata
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Request, Response
from fastapi.middleware.cors import CORSMiddleware
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from dsvl2_jax.infer.serve import bodies, chat, completions, probes, responses, tokens
from dsvl2_jax.infer.serve.access import Access
from dsvl2_jax.infer.serve.auth import RequireKey
from dsvl2_jax.infer.serve.errors import api_error
from dsvl2_jax.infer.serve.schemas_chat import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest
from dsvl2_jax.infer.serve.schemas_responses import ResponsesRequest
from dsvl2_jax.infer.serve.state import ServeOptions, Serving

if TYPE_CHECKING:
    from dsvl2_jax.infer.constraints import GrammarCompiler
    from dsvl2_jax.infer.serve.async_engine import AsyncEngine
    from dsvl2_jax.infer.serve.media import Media

BODIES = (ChatRequest, CompletionRequest, ResponsesRequest, TokenizeRequest, DetokenizeRequest)


class ErrorObject(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """Every answer whose status is 400 or above."""

    error: ErrorObject


_ERRORS = {
    400: "A field cannot be: which one, what was found, what was expected.",
    401: "The API key is missing or wrong.",
    403: "A picture is from where this server fetches none.",
    404: "There is no such model, or no such path.",
    408: "The body did not come in time.",
    413: "The body, a picture or the request is larger than the operator allows.",
    415: "The body is of another type than application/json.",
    429: "Too much is waiting; Retry-After says when to try again.",
    500: "The server failed on this request.",
    503: "The server is starting, stopping, or bringing its device back.",
}


def create_app(engine: AsyncEngine, options: ServeOptions, media: Media, grammars: GrammarCompiler | None) -> FastAPI:
    """The application around an engine, which somebody else starts and stops.

    Args:
      grammars: None: the tokenizer is none that answers can be constrained with, and requests for it are refused.
    """
    serving = Serving(engine, options, media, grammars)

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        watch = asyncio.create_task(serving.lag.watch())
        yield
        watch.cancel()

    app = FastAPI(
        title="DeepSeek-VL2",
        version=metadata.version("dsvl2-jax"),
        description="Answers about pictures, in the forms of OpenAI's API.",
        docs_url=None,  # these pages load scripts from elsewhere
        redoc_url=None,
        lifespan=lifespan,
        responses={status: {"model": ErrorBody, "description": text} for status, text in _ERRORS.items()},
    )
    app.state.serving = serving
    for module in (chat, completions, responses, tokens, probes):
        app.include_router(module.router)
    app.add_exception_handler(HTTPException, _http_error)
    # The last one added is the outermost.
    app.add_middleware(RequireKey, keys=options.keys)
    if options.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(options.cors_origins),
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["Retry-After", "X-Request-Id"],
        )
    app.add_middleware(Access, count=serving.metrics.request)
    app.openapi = lambda: _openapi(app)
    return app


async def _http_error(_: Request, error: Exception) -> Response:
    return api_error(error).response()


def _openapi(app: FastAPI) -> dict[str, Any]:
    if app.openapi_schema is None:
        document = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
        parts = document.setdefault("components", {})
        parts.setdefault("schemas", {}).update(bodies.schemas(BODIES))
        if app.state.serving.options.keys:
            parts["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
            document["security"] = [{"key": []}]
            document["paths"]["/health"]["get"]["security"] = []
        app.openapi_schema = document
    return app.openapi_schema
