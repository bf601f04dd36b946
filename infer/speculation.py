"""Prompt-lookup speculation: drafts of the next tokens, copied from where the text had the newest ones before.

An answer that repeats its prompt (a transcription, a correction, code that is changed) or itself is drafted a few
tokens at a time; one pass over the weights gives the logits after each of them. Each position's token is then chosen as
it always is, from its own logits and by its own random key, and a draft counts where it is that very token. So the
answer, greedy or drawn, is the one that there would be without drafts; what differs is rounding, as a product of more
rows may be summed in another order.

On CPUs a row with a draft and one without are never computed in the same pass: which of the two programs a row's
numbers come from depends on that row alone, and so do they (see `dsvl2_jax.infer.slots`).

Tested in tests/infer/test_speculation.py.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from dsvl2_jax.errors import UsageError
from dsvl2_jax.infer.slots import (
    GROUP,
    OF_EACH_TOKEN,
    SlotState,
    Steps,
    first_positions,
    next_state,
    no_steps,
    take_tokens,
    with_whole_cache,
)
from dsvl2_jax.model import deepseek_vl2 as model
from dsvl2_jax.model.config import Config
from dsvl2_jax.model.deepseek_vl2 import Params
from dsvl2_jax.model.weights import for_rows

# Newest tokens that must have stood together before, for anything to be drafted. Shorter matches are wrong more often
# than a draft is worth: the tokens of a wrong draft visit experts of their own, whose weights are read for nothing.
SHORTEST_MATCH = 3
LONGEST_MATCH = 8  # that are compared at least: a longer match tells apart the places where a text repeats itself
MAX_DRAFTS = 16


def check_drafts(name: str, count: int) -> None:
    """Raises UsageError, which begins with ``name``, when a step cannot draft so many tokens."""
    if not 0 <= count <= MAX_DRAFTS:
        raise UsageError(f"{name}: found {count}, expected 0 (no drafts) to {MAX_DRAFTS} tokens.")


def propose(ids_bs: jax.Array, positions_b: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """What may follow each row's newest token: what followed the longest match of the newest tokens, the latest one.

    Args:
      ids_bs: i32[B, S], tokens by position, -1 where none is (pictures, and all beyond the newest token).
      positions_b: i32[B], of the newest token.
      count: static; the most tokens of a draft.

    Returns:
      i32[B, count] tokens, over and over where they reach the newest one; and i32[B] how many of them are drafted: as
      many as match, so that drafts grow as long as they are right and are short after a wrong one; 0 without a match.
    """
    length = ids_bs.shape[1]
    index_s = jnp.arange(length)
    matching_bs = index_s < positions_b[:, None]
    matched_bs = jnp.zeros(ids_bs.shape, jnp.int32)
    for back in range(max(LONGEST_MATCH, count)):
        newest_b1 = jnp.take_along_axis(ids_bs, jnp.maximum(positions_b - back, 0)[:, None], axis=1)
        earlier_bs = jnp.pad(ids_bs, ((0, 0), (back, 0)), constant_values=-1)[:, :length]
        matching_bs &= (earlier_bs == newest_b1) & (newest_b1 >= 0)
        matched_bs += matching_bs
    best_b = jnp.max(matched_bs * length + index_s, axis=1)
    at_b, matched_b = best_b % length, best_b // length
    period_b1 = jnp.maximum(positions_b - at_b, 1)[:, None]
    drafts_bn = jnp.take_along_axis(ids_bs, at_b[:, None] + 1 + jnp.arange(count) % period_b1, axis=1, mode="clip")
    known_b = jnp.cumprod(drafts_bn >= 0, axis=1).sum(axis=1)
    return drafts_bn, jnp.where(matched_b < SHORTEST_MATCH, 0, jnp.minimum(matched_b, known_b))


def speculative_group(
    params: Params,
    config: Config,
    state: SlotState,
    budget_b: jax.Array,
    may_draft_b: jax.Array,
    allowed_bv: jax.Array | None,
    eos: int,
    cache_length: int,
    top: bool,
    drafts: int,
    adapters_b: jax.Array | None = None,
) -> tuple[SlotState, Steps]:
    """`decode_group` whose steps may give a row more than one token.

    Args:
      may_draft_b: bool[B], False where a grammar has to look at each token.
      drafts: static; the most tokens of a draft. A step gives a row one more at most.

    Returns:
      The state, and steps with room for all tokens that a group can give.
    """
    params = for_rows(params, adapters_b)
    whole, state = state.cache, first_positions(state, cache_length)
    slots, window = state.tokens.shape[0], drafts + 1
    none_b = jnp.zeros(slots, jnp.int32)
    steps = dataclasses.replace(no_steps(state, GROUP * window, top), drafted=none_b, accepted=none_b)
    apart = lax.platform_dependent(cpu=lambda: jnp.bool_(True), default=lambda: jnp.bool_(False))

    def active(taken_b: jax.Array, state: SlotState) -> jax.Array:
        return ~state.finished & (taken_b < budget_b)

    def begin(taken_b: jax.Array, state: SlotState, steps: Steps) -> Any:
        active_b = active(taken_b, state)
        drafts_bn, count_b = propose(state.ids, state.positions, drafts)
        count_b = jnp.minimum(count_b, state.limits - state.positions - 1)  # each draft is followed by a token
        return active_b, drafts_bn, jnp.where(active_b & may_draft_b, count_b, 0), taken_b, state, steps

    def with_drafts(carry: Any) -> Any:
        active_b, drafts_bn, count_b, taken_b, state, steps = carry
        rows_b = active_b & ((count_b > 0) | ~apart)
        state, steps = _verify(params, config, state, steps, rows_b, drafts_bn, count_b, allowed_bv, eos, top)
        return begin(taken_b + rows_b, state, steps)

    def without(carry: Any) -> Any:
        active_b, _, _, taken_b, state, steps = carry
        state, new = next_state(params, config, state, active_b, allowed_bv, eos, top)
        return begin(taken_b + active_b, state, _record(steps, new, active_b))

    def is_drafted(carry: Any) -> jax.Array:
        return jnp.any(carry[2] > 0)

    def is_plain(carry: Any) -> jax.Array:
        return jnp.any(carry[0]) & ~is_drafted(carry)

    # Two loops in a third, and no lax.cond, whose branches would copy the cache.
    def body(carry: Any) -> Any:
        return lax.while_loop(is_plain, without, lax.while_loop(is_drafted, with_drafts, carry))

    *_, state, steps = lax.while_loop(lambda carry: jnp.any(carry[0]), body, begin(none_b, state, steps))
    return with_whole_cache(state, whole), dataclasses.replace(steps, finished=state.finished)


def _verify(
    params: Params,
    config: Config,
    state: SlotState,
    steps: Steps,
    rows_b: jax.Array,
    drafts_bn: jax.Array,
    count_b: jax.Array,
    allowed_bv: jax.Array | None,
    eos: int,
    top: bool,
) -> tuple[SlotState, Steps]:
    """One pass over the rows' newest tokens and their drafts, i32[B, N] of which ``count_b`` are real."""
    window = drafts_bn.shape[1] + 1
    tokens_bt = jnp.concatenate([state.tokens[:, None], jnp.maximum(drafts_bn, 0)], axis=1)
    valid_bt = rows_b[:, None] & (jnp.arange(window) <= count_b[:, None])
    at_b = jnp.where(state.finished, 0, state.positions)
    logits_btv, cache = model.decode_tokens(params, config, tokens_bt, at_b, state.cache, valid_bt)
    logits_btv, cache = lax.optimization_barrier((logits_btv, cache))
    state = dataclasses.replace(state, cache=cache)
    steps = dataclasses.replace(steps, drafted=steps.drafted + count_b)
    following_bt = jnp.pad(drafts_bn, ((0, 0), (0, 1)), constant_values=-1)

    def more(carry: Any) -> jax.Array:
        i, alive_b, _, _ = carry
        return (i < window) & jnp.any(alive_b)

    def body(carry: Any) -> Any:
        i, alive_b, state, steps = carry
        logits_bv = lax.dynamic_index_in_dim(logits_btv, i, axis=1, keepdims=False)
        state, new = take_tokens(state, logits_bv, alive_b, allowed_bv, eos, top)
        steps = _record(steps, new, alive_b)
        draft_b = lax.dynamic_index_in_dim(following_bt, i, axis=1, keepdims=False)
        right_b = alive_b & (i < count_b) & (draft_b == state.tokens)
        steps = dataclasses.replace(steps, accepted=steps.accepted + right_b)
        return i + 1, right_b & ~state.finished, state, steps

    cache, state = state.cache, dataclasses.replace(state, cache=None)
    _, _, state, steps = lax.while_loop(more, body, (jnp.int32(0), rows_b, state, steps))
    return dataclasses.replace(state, cache=cache), steps


def _record(steps: Steps, new: Steps, active_b: jax.Array) -> Steps:
    """Adds a token of each active row to what the group has given."""
    rows, room = jnp.arange(active_b.shape[0]), steps.tokens.shape[1]
    column_b = jnp.where(active_b, steps.counts, room)
    wide = {
        name: getattr(steps, name).at[rows, column_b].set(getattr(new, name)[:, 0], mode="drop")
        for name in OF_EACH_TOKEN
    }
    return dataclasses.replace(steps, counts=steps.counts + active_b, failed=steps.failed | new.failed, **wide)
