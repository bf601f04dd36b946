"""Several adapters in one batch of the bundled model: rows are what they are alone, and what is kept is kept apart."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path

import jax
import numpy as np
import pytest
from engine_turns import result, run
from random_adapters import merged_params, random_adapter

import dsvl2_jax
from dsvl2_jax import SamplingParams, configs
from dsvl2_jax.checkpoint.adapters import write_adapter
from dsvl2_jax.checkpoint.apply_adapter import with_adapter
from dsvl2_jax.errors import UsageError
from dsvl2_jax.infer.adapters import BASE, side_by_side
from dsvl2_jax.infer.executor import CHUNKS
from dsvl2_jax.infer.request import Request
from dsvl2_jax.infer.scheduler import Scheduler
from dsvl2_jax.infer.slots import PAGE
from dsvl2_jax.sharding import make_mesh

IMAGES = Path(configs.__file__).parent / "images"
STORE = 1 << 28
SLOTS = 4
KINDS = {
    "all": {"targets": "", "rank": 3},
    "attention": {"targets": "self_attn", "rank": 8, "dora": True},
    "experts": {"targets": r"layers_\d+/mlp"},
    "sight": {"targets": "^(vision|projector)", "rank": 2},
}


def shortened(model):
    """Of a model one layer of each kind: there is less to compile."""
    config = dataclasses.replace(
        model.config,
        language=dataclasses.replace(model.config.language, num_hidden_layers=2),
        vision=dataclasses.replace(model.config.vision, layers=1),
    )
    kept = dict(model.params)
    for part, prefix, count in (("language", "layers_", 2), ("vision", "blocks_", 1)):
        kept[part] = {
            name: value
            for name, value in model.params[part].items()
            if not name.startswith(prefix) or int(name.removeprefix(prefix)) < count
        }
    return dsvl2_jax.Model(config, kept, model.processor, model.mesh)


def with_adapters(base, adapted):
    params, adapters = side_by_side(base.params, adapted)
    return dsvl2_jax.Model(base.config, params, base.processor, base.mesh, adapters)


@pytest.fixture(scope="module")
def directory(checkpoints):
    return checkpoints / "mini-small"


@pytest.fixture(scope="module")
def base(directory):
    return shortened(dsvl2_jax.load(directory))


@pytest.fixture(scope="module")
def read(base):
    """Random adapters of `KINDS`: of all parts, of attention alone with gains, of all MLPs, and of what sees alone."""
    return {name: random_adapter(base.config, seed=i, **kind) for i, (name, kind) in enumerate(KINDS.items())}


@pytest.fixture(scope="module")
def adapted(base, read):
    return {name: with_adapter(base.params, base.config, *one) for name, one in read.items()}


@pytest.fixture(scope="module")
def model(base, adapted):
    return with_adapters(base, adapted)


@pytest.fixture(scope="module")
def prompts(base):
    """A text and a picture of one page and a short chunk each."""
    picture = {"content": "<image>\n" + "What? " * 28, "images": [IMAGES / "shapes.png"]}
    prompts = [base.processor([{"role": "user"} | turn]) for turn in ({"content": "What? " * 130}, picture)]
    assert all(PAGE < len(prompt.input_ids) <= PAGE + CHUNKS[0] for prompt in prompts)
    return prompts


def requests_of(prompts):
    drawn = SamplingParams(temperature=1.0, seed=3, repetition_penalty=1.2, presence_penalty=0.5, ignore_eos=True)
    return [
        Request(prompt, 5 + 2 * number, sampling, top_logprobs=3, adapter=number)
        for prompt, sampling in zip(prompts, (drawn, SamplingParams()), strict=True)
        for number in range(BASE, len(KINDS))
    ]


@pytest.mark.parametrize("drafts", [0, pytest.param(3, marks=pytest.mark.exhaustive)])
def test_rows_with_different_adapters_equal_each_alone_bit_for_bit_and_share_only_what_is_the_same(
    model, prompts, drafts
):
    requests = requests_of(prompts)
    alone = [result(run(Scheduler(model, SLOTS, 1024, drafts=drafts), [request])[0]) for request in requests]
    # To "sight" a text is what it is to the base.
    assert len({logprobs[0] for _, logprobs, *_ in alone}) == len(requests) - 1
    engine = Scheduler(model, SLOTS, 1024, prefix_bytes=STORE, feature_bytes=STORE, drafts=drafts)
    draw = random.Random(0)
    for turn in range(2):
        order = draw.sample(range(len(requests)), len(requests))
        for i, ticket in zip(order, run(engine, [requests[i] for i in order]), strict=True):
            assert result(ticket) == alone[i], i
            assert ticket.cached_tokens == PAGE or not turn
    # "all" and "sight" see with adapters of their own; the text's page is also the base's to "sight".
    assert (len(engine.features), len(engine.pages)) == (3, 4 + 5)
    engine.cancel(engine.submit(requests[1]))
    assert result(run(engine, [requests[2]])[0]) == alone[2]


def test_each_adapter_equals_the_merged_weights_and_none_the_base(base, adapted, model):
    prompt, tiles = base.processor([{"role": "user", "content": "Count to three."}]), np.zeros((2, 384, 384, 3), "u1")
    tiles[1] = np.arange(384)[:, None] % 256
    for name in (None, *adapted):
        params = base.params if name is None else merged_params(adapted[name], base.config)
        merged = dsvl2_jax.Model(base.config, params, base.processor)
        for function, inputs in (("logits", prompt), ("adapt_tiles", tiles)):
            found = np.asarray(getattr(model, function)(inputs, adapter=name))
            expected = np.asarray(getattr(merged, function)(inputs))
            np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5 * np.abs(expected).max(), err_msg=name or "")


def test_adapters_load_by_name_from_their_directories(directory, read, tmp_path):
    whole = dsvl2_jax.load(directory)
    kinds = {name: random_adapter(whole.config, seed=7, **KINDS[name]) for name in ("attention", "sight")}
    for name, one in kinds.items():
        write_adapter(tmp_path / name, whole.config, *one)
    found = dsvl2_jax.load(directory, adapter={name: tmp_path / name for name in kinds})
    adapted = {name: with_adapter(whole.params, whole.config, *one) for name, one in kinds.items()}
    expected = with_adapters(whole, adapted)
    assert found.adapters == expected.adapters and found.adapters.names == ("attention", "sight")
    jax.tree.map(np.testing.assert_array_equal, found.params, expected.params)
    assert dsvl2_jax.load(directory, adapter={}).adapters is None


def test_adapters_that_cannot_lie_side_by_side_are_named(base, read):
    arrays, settings = read["attention"]
    broken = jax.tree.map(np.copy, arrays)
    broken["language"]["layers_1"]["self_attn"]["kv_b_proj"]["lora_b"][0, 0, 0] = np.inf
    whole = {
        "language": {**arrays["language"], "lm_head": {"kernel": base.params["language"]["lm_head"]["kernel"] + 1}}
    }
    good = with_adapter(base.params, base.config, arrays, settings)
    for bad, message in (
        (broken, "adapter bad: has what is no number .* in language/layers_1/self_attn/kv_b_proj"),
        (whole, "adapter bad: brings a whole language/lm_head/kernel along"),
    ):
        with pytest.raises(UsageError, match=message):
            side_by_side(base.params, {"good": good, "bad": with_adapter(base.params, base.config, bad, settings)})


def test_an_adapter_that_there_is_not_is_refused(base, model, prompts):
    with pytest.raises(UsageError, match="adapter: found 'none', expected one of all, attention, experts, sight"):
        model.generate(prompts[0], 1, adapter="none")
    with pytest.raises(UsageError, match="adapter: found 2 settings for 1 prompts"):
        model.generate(prompts[:1], 1, adapter=["all", None])
    with pytest.raises(UsageError, match="has no adapters to choose from"):
        base.logits(prompts[0], adapter="all")
    with pytest.raises(ValueError, match="adapter 4, but the model has 4"):
        Scheduler(model, 1, 1024).submit(Request(prompts[0], 1, adapter=4))


def test_rows_of_a_mesh_choose_their_adapters_too(model, directory, read):
    mesh = make_mesh(data=2, tensor=2, expert=2)
    split = shortened(dsvl2_jax.load(directory, mesh=mesh))
    with split.on_mesh():
        adapted = {name: with_adapter(split.params, split.config, *one, mesh=mesh) for name, one in read.items()}
        split = with_adapters(split, adapted)
    prompt = model.processor([{"role": "user", "content": "Count to three."}])
    for name in ("all", "attention"):
        found, expected = (np.asarray(one.logits(prompt, adapter=name)) for one in (split, model))
        np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5 * np.abs(expected).max())
