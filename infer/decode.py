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

# The most tokens that one call of `decode_tokens` gives; how many it does give is a traced number.
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


new_cache = jax.jit(init_cache, static_argnames=("config", "slots", "cache_length", "dtype"))


@functools.partial(jax.jit, static_argnames="config", donate_argnames="cache")
def prefill_tokens(
    params: Params,
    config: Config,
    ids_bt: jax.Array,
    image_index_bt: jax.Array,
    features: jax.Array,
    lengths_b: jax.Array,
    cache: Cache,
    start_b: jax.Array | None,
) -> tuple[jax.Array, Cache]:
    """`model.prefill` from token ids: merges, then fills the cache. ``start_b`` None: the prompt is whole."""
    embeddings_btd = model.merge(params, config, ids_bt, image_index_bt, features)
    return model.prefill(params, config, embeddings_btd, lengths_b, cache, start_b)


@functools.partial(jax.jit, static_argnames="eos", donate_argnames="cache")
def first_token(
    logits_bv: jax.Array,
    ids_bt: jax.Array,
    lengths_b: jax.Array,
    max_new_b: jax.Array,
    cache: Cache,
    sampling: SamplingArrays,
    eos: int,
) -> DecodeState:
    """Chooses each row's first token from the prefill's logits.

    Args:
      logits_bv: f32[B, V].
      ids_bt: i32[B, T] prompts, right-padded.
      lengths_b: i32[B], 0 for a padding row.
      max_new_b: i32[B], tokens that each row may give (at least 1).
    """
    rows = jnp.arange(ids_bt.shape[0])
    real_bt = jnp.arange(ids_bt.shape[1]) < lengths_b[:, None]
    # Padding repeats the row's first token, which is in the prompt anyway.
    ids_bt = jnp.where(real_bt, ids_bt, ids_bt[:, :1])
    seen_bv = jnp.zeros(logits_bv.shape, jnp.bool_).at[rows[:, None], ids_bt].set(True)
    tokens_b, logprobs_b = _choose(logits_bv, seen_bv, sampling, lengths_b)
    return DecodeState(
        cache=cache,
        tokens=tokens_b,
        logprobs=logprobs_b,
        positions=lengths_b,
        limits=lengths_b + max_new_b - 1,
        seen=seen_bv.at[rows, tokens_b].set(True),
        finished=(tokens_b == eos) | (max_new_b <= 1) | (lengths_b == 0),
    )


def _choose(
    logits_bv: jax.Array, seen_bv: jax.Array, sampling: SamplingArrays, step_b: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """i32[B] the next tokens, and f32[B] their log-probabilities."""
    with jax.named_scope("sampling"):
        tokens_b = choose(logits_bv, seen_bv, sampling, step_b)
        chosen_b = jnp.take_along_axis(logits_bv, tokens_b[:, None], axis=-1)[:, 0]
        return tokens_b, chosen_b - jax.nn.logsumexp(logits_bv, axis=-1)


def next_state(params: Params, config: Config, state: DecodeState, sampling: SamplingArrays, eos: int) -> DecodeState:
    """One decode step; finished rows keep their token."""
    logits_bv, cache = model.decode_step(params, config, state.tokens, state.positions, state.cache)
    positions_b = state.positions + ~state.finished
    tokens_b, logprobs_b = _choose(logits_bv, state.seen, sampling, positions_b)
    tokens_b = jnp.where(state.finished, state.tokens, tokens_b)
    return DecodeState(
        cache=cache,
        tokens=tokens_b,
        logprobs=logprobs_b,
        positions=positions_b,
        limits=state.limits,
        seen=state.seen.at[jnp.arange(tokens_b.shape[0]), tokens_b].set(True),
        finished=state.finished | (tokens_b == eos) | (positions_b >= state.limits),
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
