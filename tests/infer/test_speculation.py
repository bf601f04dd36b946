"""Drafts from the text itself: what they are, and that they change no answer.

An answer that is in the prompt already: docs/python.md, whose blocks run as a test.
"""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from engine_turns import result, run
from hypothesis import given, settings
from hypothesis import strategies as st

import dsvl2_jax
from dsvl2_jax import SamplingParams, configs
from dsvl2_jax.errors import UsageError
from dsvl2_jax.infer.request import Request
from dsvl2_jax.infer.scheduler import Scheduler
from dsvl2_jax.infer.slots import PAGE
from dsvl2_jax.infer.speculation import LONGEST_MATCH, SHORTEST_MATCH, propose

IMAGES = Path(configs.__file__).parent / "images"
SLOTS, DRAFTS, MIXES = 4, 4, 3
ENDLESS = SamplingParams(ignore_eos=True)


@pytest.fixture(scope="module")
def model():
    """The bundled model's first two layers, which repeat themselves soon; few layers compile sooner."""
    whole = dsvl2_jax.load(None)
    language = {name: part for name, part in whole.params["language"].items() if name not in ("layers_2", "layers_3")}
    config = dataclasses.replace(whole.config, language=dataclasses.replace(whole.config.language, num_hidden_layers=2))
    return dsvl2_jax.Model(config, {**whole.params, "language": language}, whole.processor)


def draft(ids: list[int], count: int) -> list[int]:
    """What may follow ``ids``, token by token as a person would look it up."""
    matches = []
    for end in range(len(ids) - 1):
        most = max(LONGEST_MATCH, count)
        pairs = zip(reversed(ids[: end + 1]), reversed(ids), strict=False)
        length = next((n for n, (a, b) in enumerate(pairs) if a != b or a < 0), end + 1)
        matches.append((min(length, most), end))
    length, end = max(matches, default=(0, 0))
    if length < SHORTEST_MATCH:
        return []
    repeated = ids[end + 1 :]
    drafted = [repeated[i % len(repeated)] for i in range(min(length, count))]
    return drafted[: drafted.index(-1)] if -1 in drafted else drafted


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.integers(-1, 3), min_size=1, max_size=31), min_size=4, max_size=4), st.sampled_from([4, 9]))
def test_a_draft_goes_on_after_the_longest_match_of_the_newest_tokens(texts, count):
    ids = np.full((4, 32), -1, np.int32)
    for row, text in zip(ids, texts, strict=True):
        row[: len(text)] = text
    positions = np.array([len(text) - 1 for text in texts], np.int32)
    found, counts = jax.jit(propose, static_argnums=2)(ids, positions, count)
    expected = [draft(text, count) for text in texts]
    assert [row[:n].tolist() for row, n in zip(np.asarray(found), counts, strict=True)] == expected


def prompt(model, question: str, picture: str | None = None, answer: str | None = None):
    """A question, about a picture or not; with an answer, the same question once more after it."""
    images = [] if picture is None else [IMAGES / picture]
    turn = {"role": "user", "content": "<image>\n" * len(images) + question, "images": images}
    again = [{"role": "assistant", "content": answer}, {"role": "user", "content": question}]
    return model.processor([turn, *(again if answer else ())])


@pytest.fixture(scope="module")
def requests(model):
    """Answers that repeat their prompt or themselves, and such as do not; greedy, and drawn in all ways."""
    choose, out = random.Random(3), []
    prompts = [
        prompt(model, "Describe the image.", "chart.png", "a bar chart: blue A is 5, orange B is 1 and black C is 8"),
        prompt(model, "one two three four " * 12),
        prompt(model, "Describe."),
        prompt(model, "What colour is the circle?", "shapes.png"),
    ]
    for number in range(10):
        kept = {
            "repetition_penalty": choose.choice([1.0, 1.1]),
            "presence_penalty": choose.choice([0.0, 0.3]),
            "frequency_penalty": choose.choice([0.0, 0.1]),
            "logit_bias": choose.choice([(), ((20, 3.0), (21, -50.0))]),
            "ignore_eos": choose.random() < 0.7,
            "stop": choose.choice([(), (" is", "cross cross")]),
        }
        if number % 2:
            kept |= {"temperature": choose.choice([0.3, 1.0]), "top_p": choose.choice([1.0, 0.9])}
            kept |= {"top_k": choose.choice([0, 20]), "min_p": choose.choice([0.0, 0.02]), "seed": number}
        sampling = SamplingParams() if number < len(prompts) else SamplingParams(**kept)
        length = choose.choice([2, 12, 30])
        out.append(Request(prompts[number % 4], length, sampling, choice=number % 3))
    return out


def test_answers_are_those_without_drafts_and_the_same_in_any_company_bit_for_bit(model, requests):
    plain, engine = Scheduler(model, SLOTS, PAGE), Scheduler(model, SLOTS, PAGE, drafts=DRAFTS)
    expected = run(plain, requests)
    alone = [run(engine, [request])[0] for request in requests]
    for request, ticket, drafted in zip(requests, expected, alone, strict=True):
        assert drafted.answer.tokens == ticket.answer.tokens, request.sampling
        assert result(drafted)[2:] == result(ticket)[2:]
        np.testing.assert_allclose(drafted.answer.logprobs, ticket.answer.logprobs, atol=1e-4)
        assert 0 <= drafted.accepted <= drafted.drafted
    assert (plain.drafted, plain.accepted) == (0, 0)
    assert engine.accepted == sum(ticket.accepted for ticket in alone) > 10
    choose = random.Random(0)
    for mix in range(MIXES):
        chosen = choose.choices(range(len(requests)), k=choose.randint(2, 5))
        pace = choose.choice([1.0, 0.3])
        tickets = run(engine, [requests[i] for i in chosen], lambda pace=pace: choose.random() < pace)
        for i, ticket in zip(chosen, tickets, strict=True):
            assert result(ticket) == result(alone[i]), (mix, chosen, i)


def test_the_last_position_of_the_cache_is_reached_with_drafts_as_without(model):
    """Drafts of the last steps would go beyond the cache; the answers end on it and up to 3 positions before."""
    asked = prompt(model, "one two three four " * 36)
    room = PAGE - len(asked.input_ids) + 1
    requests = [Request(asked, room - short, ENDLESS) for short in range(SLOTS)]
    plain = [result(ticket)[0] for ticket in run(Scheduler(model, SLOTS, PAGE), requests)]
    engine = Scheduler(model, SLOTS, PAGE, drafts=DRAFTS)
    assert [result(ticket)[0] for ticket in run(engine, requests)] == plain
    assert [len(tokens) for tokens in plain] == [room - short for short in range(SLOTS)]
    assert engine.accepted > room


def test_a_wrong_draft_whose_numbers_are_none_ends_nothing(model):
    """The prompt has a token whose embedding is no number behind a picture's mark, and would have it drafted."""
    marked = 77
    params = {**model.params, "language": dict(model.params["language"])}
    params["language"]["embed_tokens"] = params["language"]["embed_tokens"].at[marked].set(jnp.nan)
    sick = dsvl2_jax.Model(model.config, params, model.processor)
    asked, never = (
        prompt(sick, "one two three four " * 20),
        SamplingParams(ignore_eos=True, logit_bias=((marked, -100),)),
    )
    expected = result(run(Scheduler(sick, SLOTS, PAGE), [Request(asked, 60, never)])[0])[0]
    engine = Scheduler(sick, SLOTS, PAGE, drafts=DRAFTS)
    insert = engine.executor.insert

    def marking(slot, ids, *rest):
        """Tells the slot another prompt than was prefilled: one where the marked token follows the answer's own."""
        ids = ids.copy()
        ids[-30:] = np.resize([*expected[8:12], marked, marked], 30)
        return insert(slot, ids, *rest)

    engine.executor.insert = marking
    ticket = run(engine, [Request(asked, 60, never)])[0]
    assert result(ticket)[0] == expected
    assert ticket.drafted > ticket.accepted


def test_an_answer_under_a_grammar_takes_one_token_at_a_time_beside_drafted_ones(model):
    from dsvl2_jax.infer.constraints import GrammarCompiler

    grammar = GrammarCompiler(model.processor.tokenizer, model.config.language.vocab_size).regex("(one two ){9}")
    asked = prompt(model, "one two three four " * 12)
    free, bound = Request(asked, 60, ENDLESS), Request(asked, 100, top_logprobs=5, grammar=grammar)
    engine = Scheduler(model, SLOTS, PAGE, drafts=DRAFTS)
    alone = run(engine, [free])[0]
    first, beside, second = run(engine, [bound, free, bound])
    assert result(beside) == result(alone) and beside.accepted == alone.accepted > 0
    assert result(first) == result(second) and first.answer.text == "one two " * 9
    assert first.drafted == second.drafted == 0


def test_a_number_of_drafts_that_cannot_be_is_refused(model):
    for count in (-1, 17):
        with pytest.raises(UsageError, match=f"speculate: found {count}, expected 0"):
            model.generate(prompt(model, "Hi"), 2, speculate=count)
