"""What is asked of the engine, and what it answers, piece by piece."""

from __future__ import annotations

import dataclasses
import hashlib
from typing import TYPE_CHECKING

import numpy as np

from dsvl2_jax.errors import DSVL2Error, UsageError
from dsvl2_jax.infer.adapters import BASE
from dsvl2_jax.infer.sampling import MAX_TOP_LOGPROBS, SamplingParams
from dsvl2_jax.inputs.processor import ModelInputs

if TYPE_CHECKING:
    from dsvl2_jax.infer.constraints import Grammar


class RefusedError(DSVL2Error):
    """A request that the engine does not take now, or not at all.

    Attributes:
      status: the HTTP status that says so: 429 (later), 413 (never: it is too large) or 503 (the engine stops).
      retry_after: seconds after which it may be worth trying again, or None.
    """

    def __init__(self, message: str, status: int, retry_after: float | None = None):
        super().__init__(message)
        self.status = status
        self.retry_after = retry_after


class FailedError(DSVL2Error):
    """A request that was taken and cannot be finished; the others go their way.

    Attributes:
      status: 400 (its grammar cannot be followed), 500 (the model computed what is no number) or 503 (the device
        failed; trying again may help).
    """

    def __init__(self, message: str, status: int):
        super().__init__(message)
        self.status = status


@dataclasses.dataclass(frozen=True, eq=False)
class Request:
    """One answer that is asked for. Building one hashes its pictures: servers build it in a worker thread.

    Attributes:
      inputs: of the processor, made with ``inference=True``.
      max_new_tokens: the most tokens of the answer; the context's end may come first.
      sampling: how tokens are chosen.
      choice: which of several answers to one question; folded into the random key.
      top_logprobs: None for no log-probabilities; 0 … 20: those of the chosen token and of so many most likely ones.
      grammar: what the answer must obey, or None.
      owner: whose it is; owners are served in turn.
      adapter: a number of `dsvl2_jax.infer.adapters.Adapters`, or `BASE`: the model as it is.
      image_digests: SHA-256 of each picture's tiles, by which its features are kept.

    Raises:
      UsageError: ``max_new_tokens`` or ``top_logprobs`` is out of range.
    """

    inputs: ModelInputs
    max_new_tokens: int
    sampling: SamplingParams = SamplingParams()  # noqa: RUF009 (frozen)
    choice: int = 0
    top_logprobs: int | None = None
    grammar: Grammar | None = None
    owner: str = ""
    adapter: int = BASE
    image_digests: tuple[bytes, ...] = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise UsageError(f"max_new_tokens: found {self.max_new_tokens}, expected a positive whole number.")
        if self.top_logprobs is not None and not 0 <= self.top_logprobs <= MAX_TOP_LOGPROBS:
            raise UsageError(f"top_logprobs: found {self.top_logprobs}, expected 0 to {MAX_TOP_LOGPROBS}.")
        object.__setattr__(self, "image_digests", tuple(map(_digest, image_tiles(self.inputs))))


def image_tiles(inputs: ModelInputs) -> list[np.ndarray]:
    """u8[N, S, S, 3] of each picture: its global view, then its local tiles."""
    counts = 1 + inputs.tile_grid.prod(axis=1)
    return np.split(inputs.tiles, np.cumsum(counts)[:-1]) if len(counts) else []


def _digest(tiles: np.ndarray) -> bytes:
    digest = hashlib.sha256(repr(tiles.shape).encode())
    digest.update(np.ascontiguousarray(tiles))
    return digest.digest()


@dataclasses.dataclass(frozen=True)
class Delta:
    """What became certain of an answer since the last one.

    Attributes:
      text: joined, the texts of an answer's deltas are the whole answer; never half a character, never the beginning
        of a stop string.
      token_ids: the new tokens, the ending eos included.
      logprobs: of the model for each of ``token_ids``; empty when not asked for.
      top_logprobs: for each of ``token_ids`` the most likely (token, log-probability); empty when not asked for.
      finish_reason: "stop" (eos, a stop string or the grammar's end) or "length" in the last delta, else None.
    """

    text: str
    token_ids: list[int]
    logprobs: list[float]
    top_logprobs: list[list[tuple[int, float]]]
    finish_reason: str | None
