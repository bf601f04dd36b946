"""POST /tokenize and /detokenize: how many tokens a prompt has, pictures included, and which."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from dsvl2_jax.infer.serve.answers import unless_gone
from dsvl2_jax.infer.serve.bodies import described, read_body
from dsvl2_jax.infer.serve.chat import turns
from dsvl2_jax.infer.serve.errors import ApiError, SafeRoute
from dsvl2_jax.infer.serve.prompts import chat_prompt
from dsvl2_jax.infer.serve.schemas_chat import DetokenizeRequest, TokenizeRequest
from dsvl2_jax.infer.serve.state import Serving, serving_of

router = APIRouter(route_class=SafeRoute)


@router.post("/tokenize", tags=["tokens"], openapi_extra=described(TokenizeRequest))
async def tokenize(request: Request) -> Response:
    """The tokens of a prompt as /v1/completions reads it, or of a conversation as the chat does."""
    serving = serving_of(request)
    body = await read_body(request, serving, TokenizeRequest)
    serving.model_of(request, body.model)
    if (body.prompt is None) == (body.messages is None):
        both = "neither" if body.prompt is None else "both"
        raise ApiError(400, f"prompt and messages: found {both}, expected one of them.", param="prompt")
    tokenizer = serving.processor.tokenizer
    if body.messages is not None:
        if body.add_special_tokens is False:
            message = "add_special_tokens: found false, but a chat always has them; leave it out."
            raise ApiError(400, message, param="add_special_tokens", code="unsupported_value")
        prompt = await unless_gone(request, chat_prompt(serving, turns(body.messages), "messages", body.budget))
        tokens = prompt.inputs.input_ids.tolist()
    else:
        tokens = await serving.in_pool(tokenizer.encode, body.prompt)
        tokens = tokens if body.add_special_tokens is False else [tokenizer.bos_id, *tokens]
    answer = {"count": len(tokens), "max_model_len": _context(serving), "tokens": tokens}
    if body.return_token_strs:
        answer["token_strs"] = [tokenizer.token_bytes(token).decode("utf-8", "replace") for token in tokens]
    return JSONResponse(answer)


@router.post("/detokenize", tags=["tokens"], openapi_extra=described(DetokenizeRequest))
async def detokenize(request: Request) -> Response:
    """The text of tokens."""
    serving = serving_of(request)
    body = await read_body(request, serving, DetokenizeRequest)
    serving.model_of(request, body.model)
    tokenizer = serving.processor.tokenizer
    most = len(tokenizer) - 1
    for index, token in enumerate(body.tokens):
        if token > most:
            field = f"tokens[{index}]"
            raise ApiError(400, f"{field}: found {token}, expected a token, 0 to {most}.", param=field)
    return JSONResponse({"prompt": await serving.in_pool(tokenizer.decode, body.tokens)})


def _context(serving: Serving) -> int:
    return serving.engine.model.context
