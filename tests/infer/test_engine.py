"""The engine: what compiles when, streaming, stops, seeds, limits and errors."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys

import golden
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dsvl2_jax
from dsvl2_jax import SamplingParams
from dsvl2_jax.errors import ConversationError, UsageError
from dsvl2_jax.infer.buckets import batch_bucket, cache_bucket, length_bucket, most_padding, tile_bucket
from dsvl2_jax.model.cache import init_cache
from dsvl2_jax.runtime.timing import Timing, compile_log


@pytest.fixture(scope="module")
def model(checkpoints):
    return dsvl2_jax.load(checkpoints / "mini-small")


@pytest.fixture(scope="module")
def ask(model):
    return lambda text: model.processor([{"role": "user", "content": text}])


def image_question(model, name, text="<image>\nDescribe this image."):
    return model.processor([{"role": "user", "content": text, "images": [golden.DATA / "images" / name]}])


def test_nothing_recompiles_inside_a_bucket(model):
    sampled = SamplingParams(temperature=0.7, seed=1, top_p=0.9, repetition_penalty=1.1)
    model.generate(image_question(model, "exact_384x384.png"), 9)
    before = compile_log().count
    for name, text, new_tokens, sampling in (
        ("gray_301x203.png", "<image>\nDescribe this image.", 9, SamplingParams()),
        ("tiny_20x20.png", "What is in this <image> of mine?", 20, sampled),
        ("rgba_257x123.png", "<image>", 17, SamplingParams(temperature=0.1, top_k=3)),
    ):
        model.generate(image_question(model, name, text), new_tokens, sampling)
    assert compile_log().count == before


def test_a_second_process_reuses_the_persistent_cache(tmp_path, checkpoints):
    program = (
        "import sys, jax, dsvl2_jax\n"
        "hits = []\n"
        "jax.monitoring.register_event_listener(lambda e, **_: hits.append(e) if 'cache_' in e else None)\n"
        "model = dsvl2_jax.load(sys.argv[1])\n"
        "model.generate(model.processor(prompt='Hello'), 4)\n"
        "print(sum(e.endswith('cache_hits') for e in hits), sum(e.endswith('cache_misses') for e in hits))\n"
    )
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(tmp_path), "XLA_FLAGS": ""}
    environment["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
    counts = []
    for _ in range(2):
        run = subprocess.run(
            [sys.executable, "-c", program, str(checkpoints / "mini-tiny")],
            env=environment, capture_output=True, text=True, check=True,
        )  # fmt: skip
        counts.append([int(n) for n in run.stdout.split()])
    (first_hits, first_misses), (second_hits, _) = counts
    assert first_hits == 0
    assert first_misses >= 3  # prefill, first token and the decode loop at least
    assert second_hits == first_misses


@pytest.mark.parametrize("sampling", [SamplingParams(), SamplingParams(temperature=1.5, top_k=0, seed=3)])
def test_streamed_text_is_the_answer(model, ask, sampling):
    pieces: dict[int, list[str]] = {0: [], 1: []}
    prompts = [ask("Hello there"), ask("用中文解释一下")]
    answers = model.generate(prompts, 40, sampling, on_text=lambda i, text: pieces[i].append(text))
    for i, answer in enumerate(answers):
        assert "".join(pieces[i]) == answer.text
        ids = [t for t in answer.token_ids if t != model.processor.tokenizer.eos_id]
        assert answer.text == model.processor.tokenizer.decode(ids)


def test_a_stop_string_ends_the_answer_and_is_not_shown(model, ask):
    whole = model.generate(ask("Hello there"), 40)
    stop = whole.text[10:13]
    shown = []
    answer = model.generate(
        ask("Hello there"), 40, SamplingParams(stop=(stop, "never seen")), on_text=lambda _, t: shown.append(t)
    )
    assert answer.text == whole.text[: whole.text.index(stop)]
    assert "".join(shown) == answer.text
    assert answer.finish_reason == "stop"
    assert answer.token_ids == whole.token_ids[: len(answer.token_ids)]


def test_the_same_seed_gives_the_same_tokens_and_another_seed_others(model, ask):
    def run(seed, **options):
        return model.generate(ask("Tell me"), 24, SamplingParams(temperature=1.0, seed=seed), **options).token_ids

    assert run(7) == run(7)
    assert run(7) != run(8)
    # Streaming looks at the device more often, and chunks the prompt: neither may change the draw.
    assert run(7, on_text=lambda *_: None) == run(7)


def test_settings_are_per_prompt(model, ask):
    prompt = ask("Tell me")
    greedy, warm = model.generate([prompt, prompt], 24, [SamplingParams(), SamplingParams(temperature=2.0, seed=1)])
    assert greedy.token_ids == model.generate(prompt, 24).token_ids
    assert warm.token_ids != greedy.token_ids


def test_top_k_one_is_greedy_at_any_temperature(model, ask):
    hot = model.generate(ask("Tell me"), 24, SamplingParams(temperature=5.0, top_k=1))
    assert hot.token_ids == model.generate(ask("Tell me"), 24).token_ids


def test_logprobs_are_those_of_the_models_distribution(model, ask):
    prompt = ask("Tell me")
    answer = model.generate(prompt, 6, logprobs=True)
    assert model.generate(prompt, 6).logprobs is None
    ids = np.concatenate([prompt.input_ids, answer.token_ids]).astype(np.int32)
    whole = type(prompt)(
        input_ids=ids, labels=ids, image_mask=np.zeros(len(ids), bool), image_index=np.full(len(ids), -1, np.int32),
        tiles=prompt.tiles, tile_grid=prompt.tile_grid, image_sizes=prompt.image_sizes, prompt="",
    )  # fmt: skip
    logprobs = jax.nn.log_softmax(model.logits(whole), axis=-1)
    start = len(prompt.input_ids) - 1
    expected = [float(logprobs[start + i, token]) for i, token in enumerate(answer.token_ids)]
    np.testing.assert_allclose(answer.logprobs, expected, atol=1e-4)


def test_an_answer_ends_at_the_context(model, ask):
    prompt = ask("Hello there")
    language = dataclasses.replace(model.config.language, max_position_embeddings=len(prompt.input_ids) + 4)
    short = dsvl2_jax.Model(dataclasses.replace(model.config, language=language), model.params, model.processor)
    answer = short.generate(prompt, 40)
    # Four more positions can be read; the token after the last of them can still be told.
    assert answer.token_ids == model.generate(prompt, 5).token_ids
    assert answer.finish_reason == "length"
    with pytest.raises(ConversationError, match=rf"context is {language.max_position_embeddings}"):
        short.generate(ask("Hello there, this is longer than that."), 4)


def test_phases_are_timed(model, ask):
    timing = Timing()
    model.generate(ask("Hello"), 4, timing=timing)
    assert set(timing) == {"encode", "prefill", "decode", "compile"}
    assert all(seconds >= 0 for seconds in timing.values())


def test_wrong_calls_say_what_to_give(model, ask):
    with pytest.raises(UsageError, match="max_new_tokens: found 0"):
        model.generate(ask("Hi"), 0)
    with pytest.raises(UsageError, match="chunk_size: found -1"):
        model.generate(ask("Hi"), 4, chunk_size=-1)
    with pytest.raises(UsageError, match="found 2 settings for 1 prompts"):
        model.generate(ask("Hi"), 4, [SamplingParams()] * 2)
    assert model.generate([], 4) == []
    for field, value in (("temperature", -1), ("top_p", 0), ("top_k", -1), ("repetition_penalty", 0), ("stop", "x")):
        with pytest.raises(UsageError, match=f"{field}: must be"):
            SamplingParams(**{field: value})


def test_any_chunk_size_gives_the_tokens_of_a_whole_prefill(model, ask):
    prompt = ask("Count: one two three four five six seven eight nine ten")
    length = len(prompt.input_ids)
    whole = model.generate(prompt, 8).token_ids
    for chunk_size in (7, length - 1, length):
        assert model.generate(prompt, 8, chunk_size=chunk_size).token_ids == whole


def test_buckets_hold_what_they_are_asked_to():
    for n in range(1, 5000, 7):
        assert length_bucket(n) >= n
        assert length_bucket(length_bucket(n)) == length_bucket(n)
    for n in range(1, 100):
        assert n <= tile_bucket(n) <= n + 8
        assert tile_bucket(n, 8) % 8 == 0
        assert all(tile_bucket(n, devices) - n < most_padding(devices) for devices in (1, 3, 5, 7, 8, 16, 100))
        assert n <= batch_bucket(n) < 2 * n
    assert tile_bucket(0, 8) == 0
    assert [cache_bucket(n, 512, 4096) for n in (1, 512, 513, 1025, 4096)] == [512, 512, 1024, 2048, 4096]
    assert cache_bucket(700, 512, 900) == 1024 and cache_bucket(1200, 512, 1300) == 1536


def test_the_latent_cache_keeps_576_numbers_a_token_and_layer(data):
    for size, width in (("tiny", 2560), ("small", 576), ("base", 576)):
        config = dsvl2_jax.Config.from_file(data / "reference" / f"released_config_{size}.json")
        cache = jax.eval_shape(lambda config=config: init_cache(config, 3, 100, jnp.bfloat16))
        assert len(cache) == config.language.num_hidden_layers
        assert (
            sum(leaf.size for leaf in jax.tree.leaves(cache[0])) == 3 * 100 * width == 300 * config.language.cache_width
        )


def test_no_tiles_give_no_features(model, ask):
    inputs = ask("Hello")
    assert inputs.tiles.shape[0] == 0
    assert model.encode_tiles(inputs.tiles).shape == (0, 729, 64)
    assert model.adapt_tiles(inputs.tiles).shape == (0, 196, 64)
    assert model.embed(inputs).shape == (len(inputs.input_ids), 64)


def test_pictures_of_more_tiles_than_the_checkpoint_has_are_answered_as_the_whole_prompt_is():
    micro = dsvl2_jax.load("configs/micro")
    pixels = np.random.default_rng(0).integers(0, 256, (700, 1500, 3), np.uint8)
    turn = {"role": "user", "content": "<image>\nWhat?", "images": [pixels]}
    for most in (18, 41):
        prompt = micro.processor([turn], max_tiles=most, min_tiles=most - 1)
        assert len(prompt.tiles) in (most, most + 1)
        first = micro.generate(prompt, 1)
        assert first.token_ids == [int(micro.logits(prompt)[-1].argmax())] and first.tiles == len(prompt.tiles)
