"""Log-probabilities of tokens, as OpenAI's endpoints write them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dsvl2_jax.infer.request import Delta
from dsvl2_jax.inputs.tokenizer import Tokenizer


def content(tokenizer: Tokenizer, delta: Delta) -> list[dict[str, Any]]:
    """An object for each of a delta's tokens: token, bytes, logprob, top_logprobs. eos, no text, has none."""
    tops = delta.top_logprobs or [[]] * len(delta.logprobs)
    rows = zip(delta.token_ids[: len(delta.logprobs)], delta.logprobs, tops, strict=True)
    return [
        _entry(tokenizer, token, value) | {"top_logprobs": [_entry(tokenizer, *one) for one in top]}
        for token, value, top in rows
        if token != tokenizer.eos_id
    ]


def legacy(entries: Sequence[dict[str, Any]], offset: int) -> dict[str, Any]:
    """The same as /v1/completions has it.

    Args:
      entries: of `content`.
      offset: characters of the answer before them.
    """
    offsets = []
    for entry in entries:
        offsets.append(offset)
        offset += len(entry["token"])
    return {
        "tokens": [entry["token"] for entry in entries],
        "token_logprobs": [entry["logprob"] for entry in entries],
        "top_logprobs": [{one["token"]: one["logprob"] for one in entry["top_logprobs"]} for entry in entries],
        "text_offset": offsets,
    }


def _entry(tokenizer: Tokenizer, token: int, value: float) -> dict[str, Any]:
    data = tokenizer.token_bytes(token)
    # JSON has no infinity; OpenAI writes this for what is as good as impossible.
    return {"token": data.decode("utf-8", "replace"), "bytes": list(data), "logprob": max(float(value), -9999.0)}
