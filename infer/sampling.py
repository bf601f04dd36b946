"""Token choice on the device, with the semantics of the official generation code
(the logits processors of `transformers` that it uses).

Order: repetition, frequency and presence penalty → bias → a grammar's mask → temperature → top-k → min-p → top-p →
draw. Temperature 0 is greedy (the first of equal maxima), after bias and mask.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dsvl2_jax import fields
from dsvl2_jax.errors import UsageError
from dsvl2_jax.fields import Problem, setting
from dsvl2_jax.sharding import constrain

MAX_BIASES = 300
MAX_TOP_LOGPROBS = 20


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """How tokens are chosen.

    Attributes:
      temperature: 0 is greedy; the authors recommend at most 0.7.
      top_p: keeps the smallest set of most likely tokens whose probabilities add up to it; 1 keeps all.
      top_k: keeps the k most likely tokens; 0 keeps all. 50 is what the official code applies when it samples.
      repetition_penalty: each token of the prompt or the answer so far has its logit divided (positive) or
        multiplied (negative) by it; 1 is off.
      seed: of the random draw. The same seed and prompt give the same tokens.
      stop: strings that end the answer; the answer does not include them.
      min_p: keeps the tokens whose probability is at least this part of the most likely one's; 0 keeps all.
      presence_penalty: subtracted from the logit of each token that the answer has so far.
      frequency_penalty: subtracted as often as the answer has the token so far.
      logit_bias: (token, what is added to its logit), at most 300.
      ignore_eos: the token that ends an answer does not end it.

    Raises:
      UsageError: values are of the wrong type or out of range; all of them are listed.
    """

    temperature: float = setting(0.0, least=0, expected="0 (greedy) or a positive number")
    top_p: float = setting(1.0, above=0, most=1)
    top_k: int = setting(50, least=0, expected="0 (all tokens) or a positive whole number")
    repetition_penalty: float = setting(1.0, above=0, expected="a positive number (1 is off)")
    seed: int = 0
    stop: tuple[str, ...] = setting((), expected="a sequence of strings")
    min_p: float = setting(0.0, least=0, most=1)
    presence_penalty: float = setting(0.0, least=-2, most=2)
    frequency_penalty: float = setting(0.0, least=-2, most=2)
    logit_bias: tuple[tuple[int, float], ...] = setting((), expected="pairs of a token and a number from -100 to 100")
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        problems = fields.check(self)
        if not problems and "" in self.stop:
            problems.append(Problem(("stop",), "must not have an empty string, which every answer ends with."))
        if not problems and len(self.logit_bias) > MAX_BIASES:
            problems.append(
                Problem(("logit_bias",), f"has {len(self.logit_bias)} tokens, expected at most {MAX_BIASES}.")
            )
        for token, bias in self.logit_bias if not problems else ():
            if token < 0 or not -100 <= bias <= 100:
                problems.append(Problem(("logit_bias", token), f"must be a token and -100 to 100, not {bias}."))
        fields.refuse(problems, UsageError)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SamplingArrays:
    """One row's `SamplingParams` per entry, as arrays, so that no setting is compiled in."""

    temperature: jax.Array  # f32[B]
    top_p: jax.Array  # f32[B]
    top_k: jax.Array  # i32[B]
    min_p: jax.Array  # f32[B]
    repetition_penalty: jax.Array  # f32[B]
    presence_penalty: jax.Array  # f32[B]
    frequency_penalty: jax.Array  # f32[B]
    seed: jax.Array  # u32[B]
    choice: jax.Array  # u32[B]; with the seed and a position it makes the random key
    ignore_eos: jax.Array  # bool[B]
    bias_ids: jax.Array  # i32[B, MAX_BIASES]; the largest number where there is none
    biases: jax.Array  # f32[B, MAX_BIASES]

    @classmethod
    def of(cls, params: Sequence[SamplingParams], choices: Sequence[int] | None = None) -> SamplingArrays:
        """numpy arrays, a row for each; ``choices``: which of several answers to one question, 0 if None."""

        def column(name: str, dtype: Any) -> np.ndarray:
            return np.asarray([getattr(p, name) for p in params], dtype)

        bias_ids = np.full((len(params), MAX_BIASES), np.iinfo(np.int32).max, np.int32)
        biases = np.zeros((len(params), MAX_BIASES), np.float32)
        for row, p in enumerate(params):
            for i, (token, bias) in enumerate(p.logit_bias):
                bias_ids[row, i], biases[row, i] = token, bias
        choices = [0] * len(params) if choices is None else choices
        names = ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
        return cls(
            **{name: column(name, np.float32) for name in names},
            top_k=column("top_k", np.int32),
            seed=np.asarray([p.seed & 0xFFFFFFFF for p in params], np.uint32),
            choice=np.asarray(choices, np.uint32),
            ignore_eos=column("ignore_eos", np.bool_),
            bias_ids=bias_ids,
            biases=biases,
        )


def penalise(logits_bv: jax.Array, seen_bv: jax.Array, penalty_b: jax.Array) -> jax.Array:
    """Applies the repetition penalty once to each distinct seen token.

    Args:
      logits_bv: f32[B, V].
      seen_bv: bool[B, V], tokens of the prompt and of the answer so far.
      penalty_b: f32[B].

    Returns:
      f32[B, V].
    """
    penalty = penalty_b[:, None]
    penalised_bv = jnp.where(logits_bv > 0, logits_bv / penalty, logits_bv * penalty)
    return jnp.where(seen_bv, penalised_bv, logits_bv)


def adjust(
    logits_bv: jax.Array, seen_bv: jax.Array, counts_bv: jax.Array, sampling: SamplingArrays, *, biased: bool = True
) -> jax.Array:
    """f32[B, V] logits after penalties and bias; where a row has none of them, its logits as they were, bit for bit.

    Args:
      logits_bv: f32[B, V].
      seen_bv: bool[B, V], tokens of the prompt and of the answer so far.
      counts_bv: i32[B, V], how often the answer has each token so far.
      biased: static; False: no row has a bias.
    """
    logits_bv = penalise(logits_bv, seen_bv, sampling.repetition_penalty)
    logits_bv -= counts_bv * sampling.frequency_penalty[:, None]
    logits_bv -= (counts_bv > 0) * sampling.presence_penalty[:, None]
    if not biased:
        return logits_bv
    rows = jnp.arange(logits_bv.shape[0])[:, None]
    return jax.lax.cond(
        jnp.any(sampling.biases != 0),
        lambda: logits_bv.at[rows, sampling.bias_ids].add(sampling.biases, mode="drop"),
        lambda: logits_bv,
    )


def most_likely(logits_bv: jax.Array) -> jax.Array:
    """i32[B], the first of each row's largest logits: f32[B, V]."""
    return jnp.argmax(logits_bv, axis=-1).astype(jnp.int32)


def choose(logits_bv: jax.Array, sampling: SamplingArrays, step_b: jax.Array) -> jax.Array:
    """The next token of every row.

    Args:
      logits_bv: f32[B, V] of `adjust`, perhaps masked with −∞.
      step_b: i32[B], folded into the row's key: the token's position, so that nothing else changes the draw.

    Returns:
      i32[B].
    """
    greedy_b = most_likely(logits_bv)
    return jax.lax.cond(
        jnp.any(sampling.temperature > 0),
        lambda: jnp.where(sampling.temperature > 0, _draw(logits_bv, sampling, step_b), greedy_b),
        lambda: greedy_b,
    )


def _draw(logits_bv: jax.Array, sampling: SamplingArrays, step_b: jax.Array) -> jax.Array:
    """i32[B] tokens drawn after temperature, top-k, min-p and top-p."""
    vocab = logits_bv.shape[-1]
    logits_bv = constrain(logits_bv, "slots", None)  # sorting needs whole rows
    scaled = logits_bv / jnp.maximum(sampling.temperature, 1e-6)[:, None]
    descending, tokens = jax.lax.top_k(scaled, vocab)  # a stable sort: equal logits keep their order
    top_k = jnp.where(sampling.top_k == 0, vocab, jnp.minimum(sampling.top_k, vocab))
    kth_largest = jnp.take_along_axis(descending, top_k[:, None] - 1, axis=-1)
    kept = jnp.where(descending >= kth_largest, descending, -jnp.inf)
    # min_p in logits: a probability of p times the largest.
    kept = jnp.where(kept >= descending[:, :1] + jnp.log(sampling.min_p)[:, None], kept, -jnp.inf)
    probabilities = jax.nn.softmax(kept, axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    # The most likely token always stays; 1 must keep all, whatever the sum rounds to.
    inside = (before < sampling.top_p[:, None]) | (sampling.top_p[:, None] >= 1)
    kept = jnp.where(inside, kept, -jnp.inf)

    def key(seed: jax.Array, choice: jax.Array, step: jax.Array) -> jax.Array:
        return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), choice), step)

    keys = jax.vmap(key)(sampling.seed, sampling.choice, step_b)
    rank = jax.vmap(jax.random.categorical)(keys, kept)
    return jnp.take_along_axis(tokens, rank[:, None], axis=-1)[:, 0].astype(jnp.int32)
