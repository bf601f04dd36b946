"""Jitted prefill and decode: sampling and the token loop stay on the device."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp

from dsvl2_jax.infer.sampling import SamplingArrays, choose
from dsvl2_jax.model import deepseek_vl2 as model
from dsvl2_jax.model.cache import init_cache
from dsvl2_jax.model.config import Config
from dsvl2_jax.model.decoder import Cache
from dsvl2_jax.model.deepseek_vl2 import Params

# Tokens that one call of `decode_tokens` can give; how many it does give is a traced number.
STEPS = 32


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeState:
    """Everything the token loop carries."""

    cache: Cache  # per layer; see dsvl2_jax.model.attention
    tokens: jax.Array  # i32[B], the newest token of each row, not yet in the cache
    logprobs: jax.Array  # f32[B], its log-probability under the model (before penalty, temperature and cuts)
    positions: jax.Array  # i32[B], the position in the cache that it will take
    limits: jax.Array  # i32[B], a token at this position is the row's last
    seen: jax.Array  # bool[B, V], tokens of the prompt and the answer so far
    finished: jax.Array  # bool[B]


@functools.partial(jax.jit, static_argnames=("config", "slots", "cache_length", "dtype"))
def new_cache(config: Config, slots: int, cache_length: int, dtype: str) -> Cache:
    return init_cache(config, slots, cache_length, dtype)


@functools.partial(jax.jit, static_argnames="config", donate_argnames="cache")
def prefill_tokens(
    params: Params,
    config: Config,
    ids: jax.Array,
    image_index: jax.Array,
    features: jax.Array,
    lengths: jax.Array,
    cache: Cache,
    start: jax.Array | None,
) -> tuple[jax.Array, Cache]:
    """`model.prefill` from token ids: merges, then fills the cache. ``start`` None: the prompt is whole."""
    embeddings = model.merge(params, config, ids, image_index, features)
    return model.prefill(params, config, embeddings, lengths, cache, start)


@functools.partial(jax.jit, static_argnames="eos", donate_argnames="cache")
def first_token(
    logits: jax.Array,
    ids: jax.Array,
    lengths: jax.Array,
    max_new: jax.Array,
    cache: Cache,
    sampling: SamplingArrays,
    eos: int,
) -> DecodeState:
    """Chooses each row's first token from the prefill's logits.

    Args:
      logits: f32[B, V]. ids: i32[B, T] prompts, right-padded. lengths: i32[B], 0 for a padding row.
      max_new: i32[B], tokens that each row may give (at least 1).
    """
    rows = jnp.arange(ids.shape[0])
    real = jnp.arange(ids.shape[1]) < lengths[:, None]
    # Padding repeats the row's first token, which is in the prompt anyway.
    ids = jnp.where(real, ids, ids[:, :1])
    seen = jnp.zeros(logits.shape, jnp.bool_).at[rows[:, None], ids].set(True)
    tokens, logprobs = _choose(logits, seen, sampling, lengths)
    return DecodeState(
        cache=cache,
        tokens=tokens,
        logprobs=logprobs,
        positions=lengths,
        limits=lengths + max_new - 1,
        seen=seen.at[rows, tokens].set(True),
        finished=(tokens == eos) | (max_new <= 1) | (lengths == 0),
    )


def _choose(logits: jax.Array, seen: jax.Array, sampling: SamplingArrays, step: jax.Array):
    tokens = choose(logits, seen, sampling, step)
    chosen = jnp.take_along_axis(logits, tokens[:, None], axis=-1)[:, 0]
    return tokens, chosen - jax.nn.logsumexp(logits, axis=-1)


def next_state(params: Params, config: Config, state: DecodeState, sampling: SamplingArrays, eos: int) -> DecodeState:
    """One decode step; finished rows keep their token."""
    logits, cache = model.decode_step(params, config, state.tokens, state.positions, state.cache)
    positions = state.positions + ~state.finished
    new, logprobs = _choose(logits, state.seen, sampling, positions)
    new = jnp.where(state.finished, state.tokens, new)
    return DecodeState(
        cache=cache,
        tokens=new,
        logprobs=logprobs,
        positions=positions,
        limits=state.limits,
        seen=state.seen.at[jnp.arange(new.shape[0]), new].set(True),
        finished=state.finished | (new == eos) | (positions >= state.limits),
    )


@functools.partial(jax.jit, static_argnames=("config", "eos"), donate_argnames="state")
def decode_tokens(
    params: Params, config: Config, state: DecodeState, sampling: SamplingArrays, steps: jax.Array, eos: int
) -> tuple[DecodeState, jax.Array, jax.Array, jax.Array]:
    """Runs up to ``steps`` (traced, at most `STEPS`) decode steps, stopping when every row is finished.

    Returns:
      The new state; i32[B, STEPS] tokens and f32[B, STEPS] log-probabilities (of no meaning once a row is
      finished); i32[B], how many each row got. The token that ends a row is counted.
    """
    tokens = jnp.zeros((state.tokens.shape[0], STEPS), jnp.int32)
    logprobs = jnp.zeros(tokens.shape, jnp.float32)

    def more(carry):
        i, state, *_ = carry
        return (i < steps) & ~jnp.all(state.finished)

    def body(carry):
        i, state, tokens, logprobs, counts = carry
        counts = counts + ~state.finished
        state = next_state(params, config, state, sampling, eos)
        return i + 1, state, tokens.at[:, i].set(state.tokens), logprobs.at[:, i].set(state.logprobs), counts

    start = (jnp.int32(0), state, tokens, logprobs, jnp.zeros_like(state.tokens))
    _, state, tokens, logprobs, counts = jax.lax.while_loop(more, body, start)
    return state, tokens, logprobs, counts
