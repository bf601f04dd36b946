"""Several adapters in one batch of the bundled model: rows are what they are alone, and what is kept is kept apart."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
from engine_turns import result, run
from random_adapters import merged_params, random_adapter

import dsvl2_jax
from dsvl2_jax import SamplingParams, configs
from dsvl2_jax.checkpoint.apply_adapter import with_adapter
from dsvl2_jax.infer.adapters import BASE, side_by_side
from dsvl2_jax.infer.request import Request
from dsvl2_jax.infer.scheduler import Scheduler

IMAGES = Path(configs.__file__).parent / "images"
PICTURES = [IMAGES / name for name in ("shapes.png", "number.png")]
STORE = 1 << 28
SLOTS = 4
ENDLESS = SamplingParams(ignore_eos=True)


@pytest.fixture(scope="module")
def base(checkpoints):
    return dsvl2_jax.load(checkpoints / "mini-small")


@pytest.fixture(scope="module")
def adapted(base):
    """Of all parts, of attention alone with gains, of all experts, and of the encoder and the adaptor alone."""
    kinds = {
        "all": {"targets": "", "rank": 3},
        "attention": {"targets": r"self_attn", "rank": 8, "dora": True},
        "experts": {"targets": r"layers_\d+/mlp"},
        "sight": {"targets": r"^(vision|projector)", "rank": 2},
    }
    read = {name: random_adapter(base.config, seed=i, **kind) for i, (name, kind) in enumerate(kinds.items())}
    return {name: with_adapter(base.params, base.config, *one) for name, one in read.items()}


@pytest.fixture(scope="module")
def model(base, adapted):
    return beside(base, adapted)


def beside(base, adapted):
    params, adapters = side_by_side(base.params, adapted)
    return dsvl2_jax.Model(base.config, params, base.processor, base.mesh, adapters)


@pytest.fixture(scope="module")
def prompts(base):
    def about(pictures, question):
        return base.processor([{"role": "user", "content": "<image>\n" * len(pictures) + question, "images": pictures}])

    return [about([], "Count."), about(PICTURES[:1], "What? " * 60)]


def requests_of(prompts, adapters=(BASE, 0, 1, 2, 3)):
    draw = random.Random(5)
    kinds = SamplingParams(), SamplingParams(temperature=1.0, seed=3, repetition_penalty=1.2, ignore_eos=True)
    return [
        Request(prompt, draw.choice([5, 12]), draw.choice(kinds), top_logprobs=draw.choice([None, 3]), adapter=number)
        for prompt in prompts
        for number in adapters
    ]


@pytest.mark.parametrize("drafts", [0, 3])
def test_rows_with_different_adapters_equal_each_alone_bit_for_bit_and_on_hits(model, prompts, drafts):
    requests = requests_of(prompts)
    alone = [result(run(Scheduler(model, SLOTS, 1024, drafts=drafts), [request])[0]) for request in requests]
    assert len({str(one) for one in alone}) > 3 * len(prompts)
    engine = Scheduler(model, SLOTS, 1024, prefix_bytes=STORE, feature_bytes=STORE, drafts=drafts)
    draw = random.Random(0)
    for _ in range(3):
        order = draw.sample(range(len(requests)), len(requests))
        for i, ticket in zip(order, run(engine, [requests[i] for i in order]), strict=True):
            assert result(ticket) == alone[i], i
    assert engine.pages.hits and engine.features.hits


def test_logits_with_each_adapter_equal_those_of_the_merged_weights_and_without_one_the_base_s(
    base, adapted, model, prompts
):
    for name, one in adapted.items():
        merged = dsvl2_jax.Model(base.config, merged_params(one, base.config), base.processor)
        expected = np.asarray(merged.logits(prompts[1]))
        found = model.logits(prompts[1], adapter=name)
        np.testing.assert_allclose(found, expected, atol=2e-5 * np.abs(expected).max())
    expected = np.asarray(base.logits(prompts[1]))
    np.testing.assert_allclose(model.logits(prompts[1]), expected, atol=2e-5 * np.abs(expected).max())
