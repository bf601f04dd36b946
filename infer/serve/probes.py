"""What is asked about the server rather than of the model: /v1/models, /health, /ready, /metrics, and the page at /."""

from __future__ import annotations

import functools
from importlib import resources
from typing import Literal

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import BaseModel

from dsvl2_jax.infer.serve.errors import ApiError, SafeRoute, found
from dsvl2_jax.infer.serve.models import ServedModel
from dsvl2_jax.infer.serve.page import load_page
from dsvl2_jax.infer.serve.state import Serving, serving_of

router = APIRouter(route_class=SafeRoute)


@router.get("/v1/models", tags=["server"])
async def models(request: Request) -> Response:
    """The models that this server has: the base, and its adapters."""
    serving = serving_of(request)
    return JSONResponse({"object": "list", "data": [_model(serving, one) for one in serving.models.values()]})


@router.get("/v1/models/{name:path}", tags=["server"])
async def model(request: Request, name: str) -> Response:
    """The model of a name."""
    serving = serving_of(request)
    if name not in serving.models:
        message = f"{found(name)} is no model here; GET /v1/models names those that are."
        raise ApiError(404, message, param="model", code="model_not_found")
    return JSONResponse(_model(serving, serving.models[name]))


class Health(BaseModel):
    """The engine's state."""

    status: Literal["starting", "ok", "recovering", "stopping", "failed"]


_STATES = {200: {"model": Health}, 503: {"model": Health, "description": "Not now."}}


@router.get("/health", tags=["server"], responses=_STATES)
async def health(request: Request) -> Response:
    """Whether the process does its work; 503 while the device is brought back, and when it cannot be."""
    state = serving_of(request).engine.health
    return JSONResponse({"status": state}, 503 if state in ("recovering", "failed") else 200)


@router.get("/ready", tags=["server"], responses=_STATES)
async def ready(request: Request) -> Response:
    """Whether requests are answered now: not while programs are compiled, and not once the server is to stop."""
    state = serving_of(request).engine.health
    return JSONResponse({"status": state}, 200 if state == "ok" else 503)


@router.get("/metrics", tags=["server"], response_class=PlainTextResponse)
async def metrics(request: Request) -> Response:
    """Counters and times, as Prometheus reads them."""
    return Response(serving_of(request).metrics.text(), headers={"Content-Type": CONTENT_TYPE_LATEST})


@router.get("/", include_in_schema=False)
async def page(request: Request) -> Response:
    """The page to chat on."""
    html, headers = _page()
    return Response(html, headers=headers)


_page = functools.cache(load_page)


@router.get("/examples/{name}", include_in_schema=False)
async def example(name: str) -> Response:
    """A picture of the page's examples."""
    if name not in _examples():
        raise ApiError(404, f"{found(name)} is no example's picture; there are {', '.join(_examples())}.")
    return Response(_examples()[name], media_type="image/png")


@functools.cache
def _examples() -> dict[str, bytes]:
    folder = resources.files("dsvl2_jax.configs").joinpath("images")
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir(), key=str) if file.name.endswith(".png")}


def _model(serving: Serving, served: ServedModel) -> dict[str, object]:
    context = serving.engine.model.context
    return {
        "id": served.name,
        "object": "model",
        "created": serving.created,
        "owned_by": "dsvl2",
        "root": served.root,
        "parent": served.parent,
        "max_model_len": context,
    }
