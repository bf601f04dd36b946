"""What is asked about the server rather than of the model: /v1/models, /health, /ready, /metrics, and the page at /."""

from __future__ import annotations

import base64
import functools
import hashlib
import re
from importlib import resources

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST

from dsvl2_jax.infer.serve.errors import ApiError, SafeRoute, found
from dsvl2_jax.infer.serve.state import Serving, serving_of

router = APIRouter(route_class=SafeRoute)

# The page is one file that speaks to this server alone; pictures that are pasted into it are blobs and data. Only the
# scripts that are in the file run, and none that a message might bring along.
_POLICY = (
    "default-src 'none'; script-src {scripts}; style-src 'unsafe-inline'; img-src 'self' data: blob:; "
    "connect-src 'self' data: blob:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_SCRIPT = re.compile(rb"<script[^>]*>(.*?)</script>", re.DOTALL)
_PAGE_HEADERS = {
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), microphone=(), geolocation=()",
    "Referrer-Policy": "no-referrer",
    "X-Frame-Options": "DENY",
    "Cache-Control": "no-cache",
}


@router.get("/v1/models", tags=["server"])
async def models(request: Request) -> Response:
    """The one model that this server has."""
    return JSONResponse({"object": "list", "data": [_model(serving_of(request))]})


@router.get("/v1/models/{name:path}", tags=["server"])
async def model(request: Request, name: str) -> Response:
    """The model of a name."""
    serving = serving_of(request)
    if name != serving.options.model_name:
        message = f"{found(name)} is no model here; GET /v1/models names the one there is."
        raise ApiError(404, message, param="model", code="model_not_found")
    return JSONResponse(_model(serving))


@router.get("/health", tags=["server"])
async def health(request: Request) -> Response:
    """Whether the process does its work; 503 while the device is brought back, and when it cannot be."""
    state = serving_of(request).engine.health
    return JSONResponse({"status": state}, 503 if state in ("recovering", "failed") else 200)


@router.get("/ready", tags=["server"])
async def ready(request: Request) -> Response:
    """Whether requests are answered now: not while programs are compiled, and not once the server is to stop."""
    state = serving_of(request).engine.health
    return JSONResponse({"status": state}, 200 if state == "ok" else 503)


@router.get("/metrics", tags=["server"])
async def metrics(request: Request) -> Response:
    """Counters and times, as Prometheus reads them."""
    return Response(serving_of(request).metrics.text(), headers={"Content-Type": CONTENT_TYPE_LATEST})


@router.get("/", include_in_schema=False)
async def page(request: Request) -> Response:
    """The page to chat on."""
    html, policy = _page()
    return Response(html, media_type="text/html", headers=_PAGE_HEADERS | {"Content-Security-Policy": policy})


@functools.cache
def _page() -> tuple[bytes, str]:
    """The page, and the policy that lets its own scripts run."""
    html = resources.files("dsvl2_jax.infer.serve.page").joinpath("index.html").read_bytes()
    digests = [base64.b64encode(hashlib.sha256(script).digest()).decode() for script in _SCRIPT.findall(html)]
    return html, _POLICY.format(scripts=" ".join(f"'sha256-{digest}'" for digest in digests) or "'none'")


def _model(serving: Serving) -> dict[str, object]:
    context = serving.engine.model.config.language.max_position_embeddings
    return {
        "id": serving.options.model_name,
        "object": "model",
        "created": serving.created,
        "owned_by": "dsvl2",
        "max_model_len": context,
    }
