"""Decode slots on the device, and the programs that fill and advance them.

A prompt is prefilled chunk by chunk into a cache of one row, then put into a slot; all slots decode together. What a
program computes for a row depends on that row alone, bit for bit: shapes are the same in any company, a chunk's shape
follows from its place in the prompt, and attention does not see how long the cache is (`decode_attention`).

Tested in tests/infer/test_scheduler.py.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike, DTypeLike

from dsvl2_jax.infer.sampling import MAX_BIASES, MAX_TOP_LOGPROBS, SamplingArrays, adjust, choose, most_likely
from dsvl2_jax.model import deepseek_vl2 as model
from dsvl2_jax.model.attention import LayerCache, cache_axes
from dsvl2_jax.model.cache import init_cache
from dsvl2_jax.model.config import Config
from dsvl2_jax.model.decoder import Cache
from dsvl2_jax.model.deepseek_vl2 import Params
from dsvl2_jax.model.weights import for_rows
from dsvl2_jax.sharding import constrain, shard_map_kernel, split_over

GROUP = 8  # steps of a decode group
PAGE = 512  # tokens of a page, by which prompts' beginnings are kept


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SlotState:
    """Everything that decoding carries from group to group."""

    cache: Cache  # per layer, [slots, cache_length, ...]; see dsvl2_jax.model.attention
    tokens: jax.Array  # i32[B], the newest token of each row, not yet in the cache
    positions: jax.Array  # i32[B], the position in the cache that it will take
    limits: jax.Array  # i32[B], a token at this position is the row's last
    finished: jax.Array  # bool[B]
    seen: jax.Array  # bool[B, V], tokens of the prompt and the answer so far
    counts: jax.Array  # i32[B, V], how often the answer has each token so far
    sampling: SamplingArrays
    ids: jax.Array | None = None  # i32[B, cache_length], tokens by position, -1 where none is; None: no drafts are made


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Steps:
    """What a group gave each row: its first ``counts`` entries along the steps G."""

    counts: jax.Array  # i32[B]
    tokens: jax.Array  # i32[B, G]
    logprobs: jax.Array  # f32[B, G], under the model: before penalties, temperature and cuts
    top_ids: jax.Array  # i32[B, G, MAX_TOP_LOGPROBS], the most likely tokens; of size 0 in a plain group
    top_logprobs: jax.Array  # f32[B, G, MAX_TOP_LOGPROBS]
    finished: jax.Array  # bool[B]
    failed: jax.Array  # bool[B], the model's logits were no numbers
    drafted: jax.Array | None = None  # i32[B], tokens that were proposed; None: none ever are
    accepted: jax.Array | None = None  # i32[B], those of them that the answer has


def init_slots(config: Config, slots: int, cache_length: int, dtype: DTypeLike, *, drafts: bool = False) -> SlotState:
    """Empty slots, all of them finished; ``drafts``: for `dsvl2_jax.infer.speculation`."""
    vocab = config.language.vocab_size
    zeros = jnp.zeros(slots, jnp.int32)
    number, whole = jnp.zeros(slots, jnp.float32), jnp.zeros(slots, jnp.uint32)
    wide = functools.partial(jnp.zeros, (slots, MAX_BIASES))
    sampling = SamplingArrays(
        temperature=number,
        top_p=number,
        top_k=zeros,
        min_p=number,
        repetition_penalty=number + 1,
        presence_penalty=number,
        frequency_penalty=number,
        seed=whole,
        choice=whole,
        ignore_eos=jnp.zeros(slots, jnp.bool_),
        bias_ids=wide(jnp.int32),
        biases=wide(jnp.float32),
    )
    return _placed(
        SlotState(
            cache=init_cache(config, slots, cache_length, dtype),
            tokens=zeros,
            positions=zeros,
            limits=zeros,
            finished=jnp.ones(slots, jnp.bool_),
            seen=jnp.zeros((slots, vocab), jnp.bool_),
            counts=jnp.zeros((slots, vocab), jnp.int32),
            sampling=sampling,
            ids=jnp.full((slots, cache_length), -1, jnp.int32) if drafts else None,
        )
    )


def _placed(state: SlotState) -> SlotState:
    """The state split over a mesh as it always is, so that each program finds it where the last one left it."""

    def small(x: jax.Array) -> jax.Array:
        return constrain(x, *[None] * x.ndim)

    return dataclasses.replace(
        jax.tree.map(small, dataclasses.replace(state, cache=None, seen=None, counts=None)),
        cache=state.cache,
        seen=constrain(state.seen, "slots", "vocab"),
        counts=constrain(state.counts, "slots", "vocab"),
    )


def adapt_tiles(
    params: Params,
    config: Config,
    tiles: jax.Array,
    mean: ArrayLike,
    std: ArrayLike,
    adapters_n: jax.Array | None = None,
) -> jax.Array:
    """`dsvl2_jax.model.deepseek_vl2.adapt_tiles`; ``adapters_n``: i32[N], see `for_rows`."""
    return model.adapt_tiles(for_rows(params, adapters_n), config, tiles, mean, std)


def init_features(config: Config, tiles: int, dtype: DTypeLike) -> jax.Array:
    """Room for the adaptor's output of a prompt's tiles: [tiles, tokens per tile, D], D split over all devices."""
    table = jnp.zeros((tiles, config.tokens_per_tile, config.language.hidden_size), dtype)
    return constrain(table, None, None, "features")


def place_features(table: jax.Array, features: jax.Array, first_tile: jax.Array) -> jax.Array:
    """Puts a picture's adaptor output [n, t, D] among those of its prompt [N, t, D], from tile ``first_tile`` on."""
    features = constrain(features.astype(table.dtype), None, None, "features")
    return constrain(lax.dynamic_update_slice_in_dim(table, features, first_tile, axis=0), None, None, "features")


def prefill_chunk(
    params: Params,
    config: Config,
    ids_bt: jax.Array,
    image_index_bt: jax.Array,
    features: jax.Array,
    length: jax.Array,
    start: jax.Array,
    total: jax.Array,
    row: Cache,
    read_length: int | None,
    adapters_b: jax.Array | None = None,
) -> tuple[jax.Array, Cache]:
    """One chunk of one prompt into a cache of one row.

    Args:
      ids_bt, image_index_bt: i32[1, T].
      features: [N, tokens per tile, D], which ``image_index_bt`` names rows of.
      length: i32, real tokens of the chunk. start: i32, tokens before it. total: i32, of the prompt.
      row: [1, cache_length, ...].
      read_length: static; how much of the row the chunk attends to, at least start + T; None: it is the first chunk.
      adapters_b: i32[1], see `for_rows`.

    Returns:
      f32[1, V] logits after the chunk's last token, and the row.
    """
    params = for_rows(params, adapters_b)
    embeddings_btd = model.merge(params, config, ids_bt, image_index_bt, features)
    lengths_b = length[None]
    if read_length is None:
        return model.prefill(params, config, embeddings_btd, lengths_b, row, totals=total[None])
    read = jax.tree.map(lambda x: x[:, :read_length], row)
    logits_bv, read = model.prefill(params, config, embeddings_btd, lengths_b, read, start[None], total[None])
    return logits_bv, jax.tree.map(lambda x, part: x.at[:, :read_length].set(part), row, read)


def take_page(row: Cache, page: jax.Array) -> Cache:
    """Copies page number ``page`` out of a row: [1, PAGE, ...]."""
    return jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, page * PAGE, PAGE, axis=1), row)


def put_page(row: Cache, contents: Cache, page: jax.Array) -> Cache:
    """Puts contents of `take_page` into a row."""

    def put(x: jax.Array, part: jax.Array) -> jax.Array:
        return lax.dynamic_update_slice_in_dim(x, part, page * PAGE, axis=1)

    return jax.tree.map(put, row, contents)


def insert(
    state: SlotState,
    slot: jax.Array,
    row: Cache,
    logits_bv: jax.Array,
    seen_bv: jax.Array,
    allowed_bv: jax.Array,
    sampling: SamplingArrays,
    length: jax.Array,
    limit: jax.Array,
    eos: int,
    ids_bs: jax.Array | None = None,
) -> tuple[SlotState, Steps]:
    """Puts a prefilled prompt into a slot, and chooses its first token.

    Args:
      slot: i32. row: [1, cache_length, ...].
      logits_bv: f32[1, V] of the prompt's last chunk. seen_bv: bool[1, V], tokens of the prompt.
      allowed_bv: bool[1, V], tokens that may come first.
      sampling: of one row.
      length: i32, tokens of the prompt. limit: i32, the last position that a token of the answer may have.
      ids_bs: i32[1, cache_length], the prompt's tokens, -1 where there is none; None: no drafts are made.

    Returns:
      The state, and the one step of the one row: `Steps` with B = G = 1.
    """
    counts_bv = jnp.zeros(seen_bv.shape, jnp.int32)
    step = _next_tokens(logits_bv, seen_bv, counts_bv, allowed_bv, sampling, length[None], top=True)
    token_b = step.tokens[:, 0]
    finished_b = ((token_b == eos) & ~sampling.ignore_eos) | (length >= limit) | step.failed
    new = {
        "tokens": token_b,
        "positions": length[None],
        "limits": limit[None],
        "finished": finished_b,
        "seen": seen_bv.at[0, token_b].set(True),
        "counts": counts_bv.at[0, token_b].set(1),
    }
    if ids_bs is not None:
        new["ids"] = ids_bs.at[0, length].set(token_b[0], mode="drop")

    def put(array: jax.Array, values: jax.Array) -> jax.Array:
        return lax.dynamic_update_slice_in_dim(array, values.astype(array.dtype), slot, axis=0)

    state = dataclasses.replace(
        state,
        cache=[_put_row(layer, values, slot) for layer, values in zip(state.cache, row, strict=True)],
        sampling=jax.tree.map(put, state.sampling, sampling),
        **{name: put(getattr(state, name), values) for name, values in new.items()},
    )
    return _placed(state), dataclasses.replace(step, finished=finished_b)


def _put_row(layer: LayerCache, row: LayerCache, slot: jax.Array) -> LayerCache:
    """A layer's cache [B, S, ...] with a row [1, S, ...] in a slot, written by the device that has the slot.

    On a mesh, slots are a multiple of the devices: a slot is whole on one of them.
    """

    def local(names: tuple[str, ...], old: jax.Array, new: jax.Array, slot: jax.Array) -> tuple[jax.Array]:
        first = slot - (lax.axis_index(names) * old.shape[0] if names else 0)
        at = jnp.clip(first, 0, old.shape[0] - 1)
        kept = lax.dynamic_slice_in_dim(old, at, 1, axis=0)
        return (lax.dynamic_update_slice_in_dim(old, jnp.where(first == at, new, kept), at, axis=0),)

    def put(name: str, cache: jax.Array, new: jax.Array) -> jax.Array:
        axes = cache_axes(name, cache)
        names, _ = split_over(cache.shape, axes, 0)
        if not names:
            return constrain(lax.dynamic_update_slice_in_dim(cache, new, slot, axis=0), *axes)
        whole = (None,) * cache.ndim
        write = shard_map_kernel(functools.partial(local, names), (axes, whole, ()), (axes,), [cache])
        return write(cache, new, slot)[0]

    return {name: jax.tree.map(functools.partial(put, name), layer[name], row[name]) for name in layer}


def next_state(
    params: Params,
    config: Config,
    state: SlotState,
    active_b: jax.Array,
    allowed_bv: jax.Array | None,
    eos: int,
    top: bool,
    greedy: bool = False,
) -> tuple[SlotState, Steps]:
    """One decode step of the active rows; the others keep what they have.

    Args:
      active_b: bool[B]. allowed_bv: bool[B, V], tokens that may come; None: all.
      top: static, whether the most likely tokens are told too.
      greedy: static; see `decode_group`.
    """
    # A free row is as if it began: attention need not go over what is left in it.
    at_b = jnp.where(state.finished, 0, state.positions)
    logits_bv, cache = model.decode_step(params, config, state.tokens, at_b, state.cache, active_b)
    # What follows differs from program to program; the model's own part is to be compiled alike in all of them.
    logits_bv, cache = lax.optimization_barrier((logits_bv, cache))
    return take_tokens(dataclasses.replace(state, cache=cache), logits_bv, active_b, allowed_bv, eos, top, greedy)


def take_tokens(
    state: SlotState,
    logits_bv: jax.Array,
    active_b: jax.Array,
    allowed_bv: jax.Array | None,
    eos: int,
    top: bool,
    greedy: bool = False,
) -> tuple[SlotState, Steps]:
    """The active rows' next tokens, from f32[B, V] logits after their newest ones; see `next_state`."""
    positions_b = state.positions + active_b
    choice = state.seen, state.counts, allowed_bv, state.sampling, positions_b
    step = _next_tokens(logits_bv, *choice, top=top, greedy=greedy)
    tokens_b = jnp.where(active_b, step.tokens[:, 0], state.tokens)
    failed_b = step.failed & active_b
    ended_b = ((tokens_b == eos) & ~state.sampling.ignore_eos) | (positions_b >= state.limits) | failed_b
    rows = jnp.arange(tokens_b.shape[0])
    ids = None if state.ids is None else state.ids.at[rows, positions_b].set(tokens_b, mode="drop")
    state = dataclasses.replace(
        state,
        tokens=tokens_b,
        positions=positions_b,
        finished=state.finished | (active_b & ended_b),
        seen=state.seen.at[rows, tokens_b].set(True),
        counts=state.counts.at[rows, tokens_b].add(active_b),
        ids=ids,
    )
    return _placed(state), dataclasses.replace(step, failed=failed_b)


@jax.named_scope("sampling")
def _next_tokens(
    logits_bv: jax.Array,
    seen_bv: jax.Array,
    counts_bv: jax.Array,
    allowed_bv: jax.Array | None,
    sampling: SamplingArrays,
    step_b: jax.Array,
    *,
    top: bool,
    greedy: bool = False,
) -> Steps:
    """`Steps` with G = 1, of which ``counts`` and ``finished`` are yet to be told."""
    adjusted_bv = adjust(logits_bv, seen_bv, counts_bv, sampling, biased=not greedy)
    if allowed_bv is not None:
        adjusted_bv = jnp.where(allowed_bv, adjusted_bv, -jnp.inf)
    tokens_b = most_likely(adjusted_bv) if greedy else choose(adjusted_bv, sampling, step_b)
    total_b1 = jax.nn.logsumexp(logits_bv, axis=-1, keepdims=True)
    logprobs_b1 = jnp.take_along_axis(logits_bv, tokens_b[:, None], axis=-1) - total_b1
    top_values, top_ids = lax.top_k(logits_bv, min(MAX_TOP_LOGPROBS, logits_bv.shape[-1]) if top else 0)
    return Steps(
        counts=jnp.ones_like(tokens_b),
        tokens=tokens_b[:, None],
        logprobs=logprobs_b1,
        top_ids=top_ids[:, None],
        top_logprobs=(top_values - total_b1)[:, None],
        finished=jnp.zeros(tokens_b.shape, jnp.bool_),
        failed=~jnp.isfinite(total_b1[:, 0]),
    )


def decode_group(
    params: Params,
    config: Config,
    state: SlotState,
    budget_b: jax.Array,
    allowed_bv: jax.Array | None,
    eos: int,
    cache_length: int,
    top: bool,
    greedy: bool = False,
    adapters_b: jax.Array | None = None,
) -> tuple[SlotState, Steps]:
    """Up to `GROUP` steps, until no row has any to take.

    Args:
      budget_b: i32[B], the most steps that each row may take: 0 for a free slot, 1 where a grammar has to look at each
        token.
      allowed_bv: bool[B, V], tokens that may come; None: all.
      cache_length: static; the cache's first so many positions hold all that these steps read and write.
      top: static, whether the most likely tokens are told too.
      greedy: static; no row that takes a step draws its token, or has a bias, and the program does not look for one.
        On a GPU the host waits for the device wherever a program asks.
      adapters_b: i32[B], see `for_rows`.
    """
    params = for_rows(params, adapters_b)
    whole, state = state.cache, first_positions(state, cache_length)
    steps = no_steps(state, GROUP, top)

    def active(i: jax.Array, state: SlotState) -> jax.Array:
        return ~state.finished & (i < budget_b)

    def more(carry: Any) -> jax.Array:
        i, state, _ = carry
        return (i < GROUP) & jnp.any(active(i, state))

    def body(carry: Any) -> Any:
        i, state, steps = carry
        active_b = active(i, state)
        state, new = next_state(params, config, state, active_b, allowed_bv, eos, top, greedy)
        wide = {name: getattr(steps, name).at[:, i].set(getattr(new, name)[:, 0]) for name in OF_EACH_TOKEN}
        counts, failed = steps.counts + active_b, steps.failed | new.failed
        return i + 1, state, dataclasses.replace(steps, counts=counts, failed=failed, finished=state.finished, **wide)

    _, state, steps = lax.while_loop(more, body, (jnp.int32(0), state, steps))
    return with_whole_cache(state, whole), steps


OF_EACH_TOKEN = ("tokens", "logprobs", "top_ids", "top_logprobs")


def first_positions(state: SlotState, cache_length: int) -> SlotState:
    """The state with the first ``cache_length`` positions of its cache alone."""
    return dataclasses.replace(state, cache=jax.tree.map(lambda x: x[:, :cache_length], state.cache))


def with_whole_cache(state: SlotState, whole: Cache) -> SlotState:
    """The state of `first_positions`, its cache put back into the whole."""
    cache = jax.tree.map(lambda x, part: x.at[:, : part.shape[1]].set(part), whole, state.cache)
    return _placed(dataclasses.replace(state, cache=cache))


def no_steps(state: SlotState, tokens: int, top: bool) -> Steps:
    """What a group has given before its first step, with room for so many tokens a row."""
    slots, vocab = state.seen.shape
    wide = (slots, tokens, min(MAX_TOP_LOGPROBS, vocab) if top else 0)
    return Steps(
        counts=jnp.zeros(slots, jnp.int32),
        tokens=jnp.zeros((slots, tokens), jnp.int32),
        logprobs=jnp.zeros((slots, tokens), jnp.float32),
        top_ids=jnp.zeros(wide, jnp.int32),
        top_logprobs=jnp.zeros(wide, jnp.float32),
        finished=state.finished,
        failed=jnp.zeros(slots, jnp.bool_),
    )
