"""How many programs an engine has and compiles, and how often it fetches: counts that no machine changes."""

from __future__ import annotations

import jax
import pytest

import dsvl2_jax
from dsvl2_jax.infer.executor import Executor
from dsvl2_jax.runtime.timing import compile_log

PROGRAMS = {
    "init_slots": 1, "init_features": 1, "init_cache": 1, "adapt_tiles": 1, "place_features": 1,
    "prefill_chunk": 4,  # lengths of a chunk, in a cache of one page
    "take_page": 1, "put_page": 1, "insert": 1,
    "decode_group": 3,  # plain, with log-probabilities, and with a grammar's mask
}  # fmt: skip


@pytest.fixture(scope="module")
def model():
    return dsvl2_jax.load()


def test_an_engine_starts_with_so_many_programs(model, monkeypatch):
    programs, run = set(), model.run

    def counted(function, static, **arrays):
        shapes = jax.tree.map(lambda x: (x.shape, x.dtype), arrays)
        programs.add((function.__name__, str(sorted(static.items(), key=str)), str(shapes)))
        return run(function, static, **arrays)

    monkeypatch.setattr(model, "run", counted)
    Executor(model, slots=2, cache_length=512).warm_up([1], lambda _: None)
    names = [name for name, *_ in programs]
    assert {name: names.count(name) for name in names} == PROGRAMS


def test_a_second_equal_request_compiles_nothing(model):
    prompt = model.processor(prompt="How many shapes are there?")
    first = model.generate(prompt, 12)
    before = compile_log().count
    assert model.generate(prompt, 12).token_ids == first.token_ids
    assert compile_log().count == before


def test_a_group_of_steps_is_fetched_once(model, monkeypatch):
    calls = dict.fromkeys(("decode", "insert", "fetch"), 0)

    def counting(owner, name):
        original = getattr(owner, name)

        def call(*args, **options):
            calls[name] += 1
            return original(*args, **options)

        monkeypatch.setattr(owner, name, call)

    for owner, name in ((Executor, "decode"), (Executor, "insert"), (model, "fetch")):
        counting(owner, name)
    answer = model.generate(model.processor(prompt="Count the shapes."), 25)
    assert calls["insert"] == 1 and 0 < calls["decode"] <= len(answer.token_ids)
    assert calls["fetch"] <= calls["decode"] + calls["insert"]
