"""Continuous batching with the bundled model: answers are the same in any company, and what a slot is used for ends."""

from __future__ import annotations

import random
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from engine_turns import result, run

import dsvl2_jax
from dsvl2_jax import SamplingParams, configs
from dsvl2_jax.errors import ConversationError, UsageError
from dsvl2_jax.infer.executor import CHUNKS
from dsvl2_jax.infer.request import FailedError, Request
from dsvl2_jax.infer.scheduler import FairQueue, Scheduler, page_keys
from dsvl2_jax.infer.slots import GROUP, PAGE
from dsvl2_jax.runtime.timing import compile_log

IMAGES = Path(configs.__file__).parent / "images"
PICTURES = [IMAGES / name for name in ("shapes.png", "number.png", "chart.png")]
CONTEXT = 2048
STORE = 1 << 28


@pytest.fixture(scope="module")
def model():
    return dsvl2_jax.load(None)


def words(model, count: int, text: str = "one two three"):
    """A prompt without pictures of about ``count`` tokens."""
    return model.processor([{"role": "user", "content": " ".join([text] * (count // 9))}])


def about(model, pictures: list, question: str):
    content = "<image>\n" * len(pictures) + question
    return model.processor([{"role": "user", "content": content, "images": pictures}])


def scheduler(model, slots: int = 8, **options) -> Scheduler:
    return Scheduler(model, slots, CONTEXT, **options)


@pytest.fixture(scope="module")
def requests(model):
    """Prompts of all kinds: short, of several chunks, with few and many pictures; greedy, and drawn in all ways."""
    draw = random.Random(7)
    prompts = [words(model, n) for n in (8, 40, 130, 300, 700, 1400)]
    prompts += [about(model, [picture], "What colour is the circle?") for picture in PICTURES]
    prompts += [about(model, PICTURES[:2], "Describe the pictures."), about(model, PICTURES * 2, "How many shapes?")]
    out = []
    for number, prompt in enumerate(prompts * 2):
        warm = SamplingParams(
            temperature=draw.choice([0.4, 1.0, 1.8]),
            top_p=draw.choice([1.0, 0.9]),
            top_k=draw.choice([0, 20]),
            min_p=draw.choice([0.0, 0.02]),
            seed=number,
            repetition_penalty=draw.choice([1.0, 1.2]),
            presence_penalty=draw.choice([0.0, 0.5]),
            frequency_penalty=draw.choice([0.0, 0.5]),
            logit_bias=draw.choice([(), ((20, 3.0), (21, -50.0))]),
            ignore_eos=draw.random() < 0.3,
        )
        sampling = SamplingParams() if number < len(prompts) else warm
        tops = draw.choice([None, None, 0, 5])
        out.append(Request(prompt, draw.choice([1, 9, 24, 40]), sampling, choice=number % 3, top_logprobs=tops))
    return out


@pytest.mark.parametrize("mixes", [50, pytest.param(200, marks=pytest.mark.exhaustive)])
def test_an_answer_is_the_same_in_any_company_and_on_cache_hits_bit_for_bit_and_nothing_compiles(
    model, requests, mixes
):
    engine, said = scheduler(model, prefix_bytes=STORE, feature_bytes=STORE), []
    engine.executor.warm_up(range(2, 11), said.append)  # of pictures with up to nine local tiles
    assert len(said) > len(CHUNKS)
    compiled = compile_log().count
    alone = [result(run(scheduler(model), [request])[0]) for request in requests]
    draw = random.Random(0)
    for mix in range(mixes):
        chosen = draw.choices(range(len(requests)), k=draw.randint(2, 5))
        pace = draw.choice([1.0, 0.5, 0.2])
        tickets = run(engine, [requests[i] for i in chosen], lambda pace=pace: draw.random() < pace)
        for i, ticket in zip(chosen, tickets, strict=True):
            assert result(ticket) == alone[i], (mix, chosen, i)
    assert engine.pages.hits > mixes / 4 and engine.features.hits > mixes / 2
    # Each picture is encoded once as tiles, and once as one of many pictures, of which none is cut into tiles.
    assert engine.features.queries - engine.features.hits <= 2 * len(PICTURES)
    assert compile_log().count == compiled


def test_groups_that_draw_no_token_have_a_program_of_their_own_on_gpus_with_the_same_answers(
    model, requests, monkeypatch
):
    chosen = SamplingParams(), SamplingParams(logit_bias=((20, 3.0),)), SamplingParams(temperature=1.0, seed=3)
    kinds = [Request(requests[0].inputs, 20, sampling) for sampling in chosen]
    alone = [result(run(scheduler(model), [request])[0]) for request in kinds]
    used, original = [], type(model).run

    def spy(self, function, static, **arrays):
        used.append(static.get("greedy"))
        return original(self, function, static, **arrays)

    monkeypatch.setattr(type(model), "run", spy)
    for mixed in ([0], [2], [0, 1]):
        engine = scheduler(model)
        engine.executor._asks_here = True  # as on a GPU
        used.clear()
        tickets = run(engine, [kinds[i] for i in mixed])
        assert [result(ticket) for ticket in tickets] == [alone[i] for i in mixed]
        assert (True in used) and (False in used) if mixed[0] != mixed[-1] else {*used} == {None, mixed[0] == 0}


def test_a_second_turn_about_a_picture_neither_encodes_nor_prefills_it_again(model):
    question = {"role": "user", "content": "<image>\n" * 6 + "Describe. " * 90, "images": PICTURES * 2}
    engine = scheduler(model, prefix_bytes=STORE, feature_bytes=STORE)
    first = run(engine, [Request(model.processor([question]), 8)])[0]
    tiles = engine.tiles
    turns = [question, {"role": "assistant", "content": first.answer.text}, {"role": "user", "content": "And now?"}]
    second = run(engine, [Request(model.processor(turns), 8)])[0]
    assert engine.tiles == tiles
    assert second.cached_tokens == first.length // PAGE * PAGE > 0
    assert result(second) == result(run(scheduler(model), [second.request])[0])


def test_small_stores_keep_within_their_bytes_and_change_no_answer(model, requests):
    alone = [result(run(scheduler(model), [request])[0]) for request in requests[:11]]
    engine = scheduler(model)
    engine.pages.capacity = engine.executor.page_bytes  # one page
    engine.features.capacity = engine.executor.feature_bytes(3)
    for _ in range(2):
        for ticket, expected in zip(run(engine, requests[:11]), alone, strict=True):
            assert result(ticket) == expected
            assert engine.pages.size <= engine.pages.capacity
            assert engine.features.size <= engine.features.capacity
    assert len(engine.executor._pages) == len(engine.pages) == 1
    assert len(engine.executor._features) == len(engine.features)


def test_a_long_prompt_lets_running_answers_take_a_group_after_each_chunk(model):
    engine = scheduler(model)
    talker = engine.submit(Request(words(model, 8), 200, SamplingParams(ignore_eos=True)))
    while not talker.answer.tokens:
        engine.turn()
    long = engine.submit(Request(words(model, 1400), 4))
    engine.turn()  # the first chunk; what it fetches was given before
    for _ in range(-(-long.length // PAGE) - 1):
        before = len(talker.answer.tokens)
        engine.turn()
        assert len(talker.answer.tokens) - before == GROUP
    engine.turn()
    assert long.answer.tokens


def test_a_first_token_does_not_wait_for_the_group_after_it(model):
    engine = scheduler(model)
    ticket = engine.submit(Request(words(model, 8), 20, SamplingParams(ignore_eos=True)))
    assert list(engine.advance()) == []
    first, group = ([delta for _, delta in events] for events in engine.advance())
    assert [len(delta.token_ids) for delta in first + group] == [1, GROUP // 2]
    assert ticket.answer.tokens == [token for delta in first + group for token in delta.token_ids]


def test_groups_are_short_while_somebody_could_begin(model):
    engine, endless = scheduler(model, slots=4), SamplingParams(ignore_eos=True)

    def group() -> int:
        before = talker.position()
        engine.turn()
        return talker.position() - before

    talker = engine.submit(Request(words(model, 8), 200, endless))
    engine.turn()
    assert group() == GROUP // 2  # slots are free
    for _ in range(4):
        engine.submit(Request(words(model, 8), 200, endless))
    assert [group() for _ in range(3)] == [GROUP // 8, GROUP // 4, GROUP]  # two, one, and none of them can begin
    assert len(engine.queue) == 1 and group() == GROUP


def test_a_cancelled_request_frees_its_slot_wherever_it_is(model):
    engine = scheduler(model, slots=1)
    endless = SamplingParams(ignore_eos=True)
    running, waiting, last = (engine.submit(Request(words(model, n), 500, endless)) for n in (8, 40, 8))
    while not running.answer.tokens:
        engine.turn()
    engine.cancel(waiting)
    engine.cancel(running)
    engine.cancel(running)
    count = len(running.answer.tokens)
    for _ in range(4):
        engine.turn()
    assert last.answer.tokens and not waiting.answer.tokens and len(running.answer.tokens) == count
    prefilled = engine.submit(Request(words(model, 1400), 4))
    engine.cancel(last)
    engine.turn()
    engine.cancel(prefilled)  # between its chunks
    after = engine.submit(Request(words(model, 8), 3))
    while not engine.idle:
        engine.turn()
    assert result(after) == result(run(scheduler(model, slots=1), [after.request])[0])


def test_owners_are_served_in_turn_and_the_oldest_first():
    class Asked:
        def __init__(self, owner):
            self.request = self
            self.owner = owner

    queue, waiting = FairQueue(), [Asked(owner) for owner in "aaabbca"]
    for ticket in waiting:
        queue.push(ticket)
    assert len(queue) == len(list(queue)) == 7
    assert queue.remove(waiting[6]) and not queue.remove(waiting[6])
    order = [queue.pop() for _ in range(6)]
    assert [ticket.owner for ticket in order] == list("abcaba")
    assert [ticket for ticket in order if ticket.owner == "a"] == waiting[:3]
    assert not queue


def test_numbers_that_are_none_end_their_request_alone(model, requests):
    poisoned = jax.tree.map(lambda x: x, model.params)
    marked = 77  # a token whose embedding is no number
    embeddings = model.params["language"]["embed_tokens"].at[marked].set(jnp.nan)
    poisoned["language"] = {**model.params["language"], "embed_tokens": embeddings}
    sick = dsvl2_jax.Model(model.config, poisoned, model.processor)
    never, always = (SamplingParams(logit_bias=((marked, bias),)) for bias in (-100.0, 100.0))
    prompts = words(sick, 8), words(sick, 700), about(sick, PICTURES[:1], "What?")
    assert not any(marked in prompt.input_ids for prompt in prompts)
    usual = [Request(prompt, 12, never) for prompt in prompts]
    bad = words(sick, 700)
    bad.input_ids[5] = marked
    engine = scheduler(sick, slots=2, prefix_bytes=STORE, feature_bytes=STORE)
    expected = [result(run(scheduler(sick, slots=2), [request])[0]) for request in usual]
    for _ in range(3):
        tickets = run(engine, [usual[0], Request(bad, 5), usual[1], Request(words(sick, 8), 30, always), usual[2]])
        assert [ticket.error is None for ticket in tickets] == [True, False, True, False, True]
        assert all(isinstance(tickets[i].error, FailedError) for i in (1, 3))
        assert [result(tickets[i]) for i in (0, 2, 4)] == expected
    assert not set(page_keys(Request(bad, 5), sick.config.tokens_per_tile)) & set(engine.executor._pages)


def test_after_a_failure_of_the_device_what_ran_has_failed_and_what_waits_is_answered(model, requests):
    engine = scheduler(model, slots=2, prefix_bytes=STORE, feature_bytes=STORE)
    tickets = [engine.submit(request) for request in requests[:5]]
    while not tickets[0].answer.tokens:
        engine.turn()
    ended = [ticket.done for ticket in tickets]
    failed = engine.reset(FailedError("the device failed", 503))
    assert failed and all(ticket.error.status == 503 and delta is None for ticket, delta in failed)
    while not engine.idle:
        engine.turn()
    for ticket, had_ended in zip(tickets, ended, strict=True):
        if ticket.error is None and not had_ended:
            assert result(ticket) == result(run(scheduler(model, slots=2), [ticket.request])[0])
    assert sum(ticket.error is None for ticket in tickets) >= 3


def test_pages_have_one_key_as_long_as_all_before_them_is_the_same(model):
    per_tile = model.config.tokens_per_tile
    prompt = about(model, PICTURES * 2, "one two three " * 120)
    request = Request(prompt, 4)
    keys = page_keys(request, per_tile)
    assert len(keys) == len(set(keys)) == len(prompt.input_ids) // PAGE >= 2
    assert page_keys(Request(about(model, PICTURES * 2, "one two three " * 120), 9), per_tile) == keys
    longer = page_keys(Request(about(model, PICTURES * 2, "one two three " * 250), 4), per_tile)
    assert longer[: len(keys)] == keys
    other = page_keys(Request(about(model, [*PICTURES, *PICTURES[::-1]], "one two three " * 120), 4), per_tile)
    assert not set(other) & set(keys)
    mirrored = Request(prompt, 4)
    object.__setattr__(mirrored, "image_digests", (*mirrored.image_digests[:-1], b"another picture"))
    assert page_keys(mirrored, per_tile) != keys


def test_requests_that_cannot_be_are_refused(model):
    with pytest.raises(UsageError, match="max_new_tokens: found 0"):
        Request(words(model, 8), 0)
    with pytest.raises(UsageError, match="top_logprobs: found 21"):
        Request(words(model, 8), 1, top_logprobs=21)
    with pytest.raises(ConversationError, match="context is 4096"):
        scheduler(model).submit(Request(words(model, 6000), 1))


def test_log_probabilities_of_the_most_likely_tokens_are_those_of_the_model(model):
    prompt = about(model, PICTURES[:1], "What colour is the circle?")
    engine = scheduler(model)
    ticket, deltas = engine.submit(Request(prompt, 4, top_logprobs=3)), []
    while not engine.idle:
        deltas += [delta for _, delta in engine.turn()]
    ids = np.concatenate([prompt.input_ids, ticket.answer.tokens[:-1]]).astype(np.int32)
    longer = np.full(len(ids) - len(prompt.input_ids), -1, np.int32)
    whole = type(prompt)(
        input_ids=ids, labels=ids, image_mask=np.concatenate([prompt.image_mask, longer > 0]),
        image_index=np.concatenate([prompt.image_index, longer]), tiles=prompt.tiles, tile_grid=prompt.tile_grid,
        image_sizes=prompt.image_sizes, prompt="",
    )  # fmt: skip
    expected = np.asarray(jax.nn.log_softmax(model.logits(whole)))[len(prompt.input_ids) - 1 :]
    tops = [top for delta in deltas for top in delta.top_logprobs]
    assert len(tops) == len(expected) == len(ticket.answer.tokens)
    for found, true in zip(tops, expected, strict=True):
        order = np.argsort(-true, kind="stable")[:3]
        assert [token for token, _ in found] == order.tolist()
        np.testing.assert_allclose([value for _, value in found], true[order], atol=1e-4)
