"""The engine beside an event loop, with the bundled model: what it answers, refuses, survives and leaves."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import threading
from pathlib import Path

import pytest

import dsvl2_jax
from dsvl2_jax import SamplingParams, configs
from dsvl2_jax.errors import ConversationError, UsageError
from dsvl2_jax.infer.request import FailedError, RefusedError, Request
from dsvl2_jax.infer.serve.async_engine import AsyncEngine, EngineOptions

IMAGES = Path(configs.__file__).parent / "images"
ENDLESS = SamplingParams(ignore_eos=True)


@pytest.fixture(scope="module")
def model():
    """The bundled model with a context of 1,024 tokens, for which fewer programs are compiled."""
    model = dsvl2_jax.load(None)
    language = dataclasses.replace(model.config.language, max_position_embeddings=1024)
    return dsvl2_jax.Model(dataclasses.replace(model.config, language=language), model.params, model.processor)


def about(model, name: str, question: str, tokens: int = 16, sampling: SamplingParams = SamplingParams(), **options):  # noqa: B008
    content = f"<image>\n{question}"
    inputs = model.processor([{"role": "user", "content": content, "images": [IMAGES / name]}])
    return Request(inputs, tokens, sampling, **options)


def words(model, tokens: int, sampling: SamplingParams = ENDLESS, **options):
    return Request(model.processor([{"role": "user", "content": "Tell me"}]), tokens, sampling, **options)


@contextlib.asynccontextmanager
async def running(model, **options):
    """A started engine, stopped in the end."""
    engine = AsyncEngine(model, EngineOptions(**({"slots": 2} | options)))
    said: list[str] = []
    assert engine.health == "starting"
    await engine.start(said.append)
    assert engine.health == "ok" and said
    try:
        yield engine
    finally:
        await engine.stop(0)


async def collect(answer):
    """(text, tokens, deltas) of an answer."""
    deltas = [delta async for delta in answer]
    return "".join(d.text for d in deltas), [t for d in deltas for t in d.token_ids], deltas


async def until(condition):
    while not condition():
        await asyncio.sleep(0.01)


def test_many_answers_at_once_are_those_that_each_gets_alone(model):
    async def main():
        questions = ("What colour is the circle?", "How many shapes are there?", "Describe the picture.")
        requests = [about(model, name, q) for name in ("shapes.png", "chart.png") for q in questions]
        requests += [words(model, 30, SamplingParams(temperature=1.2, seed=5), choice=i) for i in range(3)]
        alone = model.generate([r.inputs for r in requests[:6]], 16, slots=2)
        async with running(model) as engine:
            found = await asyncio.gather(*(collect(engine.submit(r)) for r in requests))
            assert [text for text, *_ in found[:6]] == [answer.text for answer in alone]
            assert [tokens for _, tokens, _ in found[:6]] == [answer.token_ids for answer in alone]
            assert len({text for text, *_ in found[6:]}) > 1  # choices of one question
            again = await asyncio.gather(*(collect(engine.submit(r)) for r in requests))
            assert [answer[:2] for answer in again] == [answer[:2] for answer in found]
            assert all(d.finish_reason is None for *_, deltas in found for d in deltas[:-1])
            assert all(deltas[-1].finish_reason for *_, deltas in found)
            assert engine.compiled_since_ready == 0
            statistics = engine.statistics()
            assert statistics["mm_cache_hits"] > 0 and statistics["tiles"] > 0
            assert statistics["num_requests_waiting"] == 0

    asyncio.run(main())


def test_an_answer_tells_its_times_and_what_was_cached(model):
    async def main():
        inputs = model.processor([{"role": "user", "content": "one two three " * 80}])
        async with running(model) as engine:
            first, second = (engine.submit(Request(inputs, 4)) for _ in range(2))
            assert first.prompt_tokens == len(inputs.input_ids) > 512 and first.image_tokens == 0
            assert (await collect(first))[:2] == (await collect(second))[:2]
            assert first.cached_tokens == 0 and second.cached_tokens == 512
            assert set(first.timing) == {"queue", "prefill", "first_token", "decode"}
            assert all(seconds >= 0 for seconds in first.timing.values())
            assert engine.statistics()["prefix_cache_hits"] == 512

    asyncio.run(main())


def test_drafts_are_made_and_counted_when_they_are_asked_for(model):
    engine = AsyncEngine(model, EngineOptions(slots=1, speculate=4))
    assert engine._scheduler.executor.drafts == 4
    engine._scheduler.drafted, engine._scheduler.accepted = 7, 5
    statistics = engine.statistics()
    assert [statistics[f"spec_decode_num_{what}_tokens"] for what in ("draft", "accepted")] == [7, 5]
    with pytest.raises(UsageError, match="--speculate: must be from 0 to 16, not 17"):
        EngineOptions(speculate=17)


def test_a_cancelled_answer_frees_its_slot(model):
    async def main():
        async with running(model, slots=1) as engine:
            endless, waiting = engine.submit(words(model, 4000)), engine.submit(words(model, 4000))
            await anext(endless)
            waiting.cancel()
            endless.cancel()
            endless.cancel()
            with pytest.raises(StopAsyncIteration):
                await anext(waiting)
            _, tokens, _ = await collect(engine.submit(words(model, 3)))
            assert len(tokens) == 3
            await until(lambda: engine.statistics()["num_requests_running"] == 0)
            assert engine.statistics()["num_requests_waiting"] == 0

    asyncio.run(main())


def test_what_is_too_much_is_refused(model):
    async def main():
        engine = AsyncEngine(model, EngineOptions(slots=1))
        with pytest.raises(RefusedError, match="starting") as refused:
            engine.submit(words(model, 3))
        assert refused.value.status == 503
        async with running(model, slots=1, max_queue=2, max_queued_tokens=1900, max_tiles=2) as engine:
            held = [engine.submit(words(model, 900)) for _ in range(1)]
            await anext(held[0])
            held += [engine.submit(words(model, 900)) for _ in range(2)]
            with pytest.raises(RefusedError, match="2 requests are waiting") as refused:
                engine.submit(words(model, 1))
            assert refused.value.status == 429 and refused.value.retry_after >= 1
            held.pop().cancel()
            with pytest.raises(RefusedError) as refused:
                engine.submit(words(model, 1500))  # too many tokens wait
            assert refused.value.status == 429
            with pytest.raises(RefusedError, match="tiles") as refused:
                engine.submit(about(model, "shapes.png", "What?"))
            assert refused.value.status == 413
            with pytest.raises(ConversationError, match="context"):
                inputs = model.processor([{"role": "user", "content": "one two three " * 300}])
                engine.submit(Request(inputs, 1))
            for answer in held:
                answer.cancel()

    asyncio.run(main())


def test_what_waits_too_long_for_a_slot_is_told_so(model):
    async def main():
        async with running(model, slots=1, max_wait=0.3) as engine:
            endless = engine.submit(words(model, 4000))
            await anext(endless)
            with pytest.raises(RefusedError, match="no slot became free") as refused:
                await collect(engine.submit(words(model, 3)))
            assert refused.value.status == 429
            assert (await anext(endless)).text is not None
            endless.cancel()

    asyncio.run(main())


def test_after_a_failure_of_the_device_the_queue_is_answered(model):
    async def main():
        async with running(model, slots=1) as engine:
            expected = (await collect(engine.submit(words(model, 20))))[:2]
            executor, decode, states = engine._scheduler.executor, engine._scheduler.executor.decode, []
            reset = executor.reset

            def broken(*arguments, **options):
                executor.decode = decode
                raise RuntimeError("the device is gone")

            def watched():
                states.append(engine.health)
                reset()

            first, second = engine.submit(words(model, 500)), engine.submit(words(model, 20))
            await anext(first)
            executor.decode, executor.reset = broken, watched
            with pytest.raises(FailedError, match="device failed") as failed:
                await collect(first)
            assert failed.value.status == 503
            assert (await collect(second))[:2] == expected
            assert states == ["recovering"] and engine.health == "ok"
            assert engine.statistics()["recoveries"] == 1

    asyncio.run(main())


def test_a_device_that_keeps_failing_is_given_up(model):
    async def main():
        async with running(model, slots=1) as engine:

            def broken(*arguments, **options):
                raise RuntimeError("the device is gone")

            engine._scheduler.executor.insert = broken
            answers = [engine.submit(words(model, 5)) for _ in range(4)]
            for answer in answers:
                with pytest.raises(FailedError):
                    await collect(answer)
            assert engine.health == "failed"
            with pytest.raises(RefusedError):
                engine.submit(words(model, 5))

    asyncio.run(main())


def test_a_device_that_hangs_is_noticed(model):
    async def main():
        engine = AsyncEngine(model, EngineOptions(slots=1, hang_timeout=0.2))
        await engine.start()
        fetch, gate = engine._scheduler.executor.fetch, threading.Event()

        def hanging(steps):
            gate.wait()
            return fetch(steps)

        engine._scheduler.executor.fetch = hanging
        answer = engine.submit(words(model, 5))
        await until(lambda: engine.health == "failed")
        gate.set()
        await engine.stop(0)
        with contextlib.suppress(FailedError):
            await collect(answer)

    asyncio.run(main())


def test_stopping_finishes_what_runs_and_cuts_off_what_takes_too_long(model):
    async def main():
        engine = AsyncEngine(model, EngineOptions(slots=1))
        await engine.start()
        short, long = engine.submit(words(model, 20)), engine.submit(words(model, 4000))
        stopping = asyncio.create_task(engine.stop(30))
        await asyncio.sleep(0)
        assert engine.health == "stopping"
        with pytest.raises(RefusedError) as refused:
            engine.submit(words(model, 3))
        assert refused.value.status == 503
        assert len((await collect(short))[1]) == 20
        long.cancel()
        await stopping

        engine = AsyncEngine(model, EngineOptions(slots=1))
        await engine.start()
        long = engine.submit(words(model, 4000))
        await anext(long)
        await engine.stop(0)
        with pytest.raises(FailedError, match="stopped") as failed:
            await collect(long)
        assert failed.value.status == 503

    asyncio.run(main())


def test_options_out_of_range_are_refused_together():
    with pytest.raises(UsageError, match=r"(?s)--slots.*--max-wait"):
        EngineOptions(slots=0, max_wait=0)
