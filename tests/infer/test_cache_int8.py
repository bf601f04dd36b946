"""What a cache in int8 changes, measured on the golden prompts, and what it must not change."""

from __future__ import annotations

import functools

import golden
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from engine_turns import result, run

import dsvl2_jax
from dsvl2_jax.errors import UsageError
from dsvl2_jax.infer.request import Request
from dsvl2_jax.infer.scheduler import Scheduler
from dsvl2_jax.infer.slots import PAGE
from dsvl2_jax.kernels.quantized_cache import QuantizedEntries
from dsvl2_jax.model.cache import init_cache
from dsvl2_jax.model.deepseek_vl2 import decode_step, embed_tokens, prefill

STEPS = 48


@functools.partial(jax.jit, static_argnames=("config", "cache_dtype"))
def teacher_forced(params, config, prompt, answer, cache_dtype):
    """f32[STEPS + 1, V]: the logits before each token of an answer, and after its last."""
    # The prompt begins at position 0 of a cache that it reads, as later chunks do.
    cache, length = init_cache(config, 1, 128, cache_dtype), jnp.array([prompt.shape[1]])
    first, cache = prefill(params, config, embed_tokens(params, config, prompt), length, cache, jnp.zeros_like(length))

    def step(cache, given):
        token, at = given
        logits, cache = decode_step(params, config, token[None], at[None], cache)
        return cache, logits[0]

    _, logits = jax.lax.scan(step, cache, (answer, prompt.shape[1] + jnp.arange(len(answer))))
    return jnp.concatenate([first, logits])


@pytest.mark.parametrize("name", ["mini-tiny", "mini-base"])
def test_the_logits_of_a_golden_answer_move_little(name, checkpoints):
    """mini-tiny has multi-head attention, mini-base latents.

    Medians, since these models are random: at some steps two experts score nearly the same, and the token goes to the
    other one.
    """
    model = dsvl2_jax.load(checkpoints / name)
    prompt = jnp.asarray(model.processor(golden.conversations()["text"]).input_ids, jnp.int32)[None]
    answer = jnp.asarray(golden.arrays(f"{name}.f32")["text/greedy_ids"].reshape(-1)[:STEPS], jnp.int32)
    exact, moved = (
        np.asarray(teacher_forced(model.params, model.config, prompt, answer, dtype)) for dtype in ("float32", "int8")
    )
    difference = np.abs(moved - exact).max(-1) / np.abs(exact).max()
    log_p, log_q = (np.asarray(jax.nn.log_softmax(logits, axis=-1)) for logits in (exact, moved))
    divergence = (np.exp(log_p) * (log_p - log_q)).sum(-1)
    agreement = (exact.argmax(-1) == moved.argmax(-1)).mean()
    assert 0 < np.median(difference) < 0.02
    assert np.median(divergence) < 1e-3 and divergence.mean() < 0.02
    assert agreement >= 0.9


@pytest.fixture(scope="module")
def model(checkpoints):
    return dsvl2_jax.load(checkpoints / "mini-small", cache_dtype="int8")


def test_an_answer_is_the_same_in_any_company_on_cache_hits_and_with_drafts(model):
    def ask(text):
        return Request(model.processor([{"role": "user", "content": text}]), 12)

    long = "A prompt of more than a page. " * 50
    requests = [ask("Hello"), ask("Count: one two three"), ask(long)]
    assert requests[2].inputs.input_ids.size > PAGE
    alone = [result(run(Scheduler(model, 4, 2 * PAGE), [request])[0]) for request in requests]
    engine = Scheduler(model, 4, 2 * PAGE, prefix_bytes=1 << 24)
    for _ in range(2):
        assert [result(ticket) for ticket in run(engine, requests)] == alone
    assert engine.pages.hits
    drafted = run(Scheduler(model, 4, 2 * PAGE, drafts=2), requests[:2])
    assert [ticket.answer.tokens for ticket in drafted] == [tokens for tokens, *_ in alone[:2]]
    kept = jax.tree.leaves(engine.executor._state.cache, is_leaf=lambda x: isinstance(x, QuantizedEntries))
    assert all(isinstance(x, QuantizedEntries) for x in kept)
    (page,) = engine.executor._pages.values()
    assert engine.executor.page_bytes == sum(x.nbytes for x in jax.tree.leaves(page))


def test_a_dtype_that_is_none_of_them_is_refused(checkpoints):
    with pytest.raises(UsageError, match="cache dtype 'int4': expected one of float32, bfloat16, int8"):
        dsvl2_jax.load(checkpoints / "mini-small", cache_dtype="int4")
