"""Sharded runs on eight virtual devices equal the single-device ones."""

from __future__ import annotations

from pathlib import Path

import golden
import jax
import numpy as np
import pytest

import dsvl2_jax
from dsvl2_jax import configs
from dsvl2_jax.errors import UsageError
from dsvl2_jax.infer.loading import LoadOptions, load
from dsvl2_jax.sharding import make_mesh

CONFIGS = Path(configs.__file__).parent
MICRO = CONFIGS / "micro"
CASES = ("img_gray", "text")
ENDLESS = dsvl2_jax.SamplingParams(ignore_eos=True)
EXHAUSTIVE = pytest.mark.exhaustive
MESHES = ({"data": 2, "tensor": 2, "expert": 2}, {"tensor": 2, "expert": 4}, {"data": 8}, {"tensor": 8}, {"expert": 8})


def mesh_id(sizes: dict[str, int]) -> str:
    return ",".join(f"{axis}={size}" for axis, size in sizes.items())


# Each model on the meshes that split most of it, and each mesh with one model at least; the rest is exhaustive. The
# bundled model, which is built as base is, has the first mesh.
USUAL = {"mini-tiny": MESHES[:4:3], "mini-small": MESHES[2::2], "mini-base": MESHES[1:2]}


@pytest.fixture(scope="module")
def single(request, checkpoints):
    """(checkpoint, logits, tokens) of one device; the tokens are the official ones up to rounding."""
    directory = checkpoints / request.param
    model = dsvl2_jax.load(directory)
    prompts = [model.processor(golden.conversations()[case]) for case in CASES]
    logits = [np.asarray(row) for row in model.logits(prompts)]
    return request.param, directory, logits


@pytest.fixture(scope="module")
def bundled():
    """(prompts, logits, greedy tokens) of the micro model on one device."""
    model = dsvl2_jax.load(MICRO)
    image = CONFIGS / "images" / "shapes.png"
    questions = ("<image>\nWhat colour is the circle?", "<image>\nHow many shapes are there?")
    prompts = [model.processor([{"role": "user", "content": q, "images": [image]}]) for q in questions]
    logits = [np.asarray(row) for row in model.logits(prompts)]
    return prompts, logits, [answer.token_ids for answer in model.generate(prompts, max_new_tokens=16)]


@pytest.mark.parametrize(
    ("single", "sizes"),
    [
        pytest.param(name, sizes, id=f"{name}-{mesh_id(sizes)}", marks=[] if sizes in USUAL[name] else EXHAUSTIVE)
        for name in golden.MODELS
        for sizes in MESHES
    ],
    indirect=["single"],
)
def test_logits_and_greedy_tokens_on_a_mesh_equal_those_of_one_device(single, sizes):
    name, directory, expected = single
    model = dsvl2_jax.load(directory, mesh=make_mesh(**sizes))
    prompts = [model.processor(golden.conversations()[case]) for case in CASES]
    for found, true in zip(model.logits(prompts), expected, strict=True):
        np.testing.assert_allclose(np.asarray(found), true, rtol=0, atol=2e-5 * np.abs(true).max())
    for case, answer in zip(CASES, model.generate(prompts, max_new_tokens=48), strict=True):
        official = golden.until_eos(golden.arrays(f"{name}.f32")[f"{case}/greedy_ids"])
        golden.assert_same_tokens(answer.token_ids, official, golden.sure_steps(f"{name}.f32", case, "greedy"))


@pytest.mark.parametrize("sizes", [MESHES[0], *(pytest.param(s, marks=EXHAUSTIVE) for s in MESHES[1:4])], ids=mesh_id)
def test_the_bundled_model_answers_alike_on_a_mesh(bundled, sizes):
    prompts, expected, answers = bundled
    model = dsvl2_jax.load(MICRO, mesh=make_mesh(**sizes))
    for found, true in zip(model.logits(prompts), expected, strict=True):
        np.testing.assert_allclose(np.asarray(found), true, rtol=0, atol=2e-5 * np.abs(true).max())
    assert [answer.token_ids for answer in model.generate(prompts, max_new_tokens=16)] == answers


@EXHAUSTIVE
@pytest.mark.parametrize("sizes", MESHES[:3], ids=mesh_id)
def test_drafts_change_no_answer_on_a_mesh(bundled, sizes):
    prompts, _, _ = bundled
    expected = dsvl2_jax.load(MICRO).generate(prompts, 40, ENDLESS)
    drafted = dsvl2_jax.load(MICRO, mesh=make_mesh(**sizes)).generate(prompts, 40, ENDLESS, speculate=3)
    assert [answer.token_ids for answer in drafted] == [answer.token_ids for answer in expected]
    assert sum(answer.accepted_tokens for answer in drafted) > 3


def test_parameters_are_split_over_the_mesh_when_loaded(checkpoints):
    model = dsvl2_jax.load(checkpoints / "mini-small", mesh=make_mesh(data=2, tensor=2, expert=2))
    experts = model.params["language"]["layers_1"]["mlp"]["experts"]["gate_proj"]
    assert {shard.data.shape for shard in experts.addressable_shards} == {(4, 64, 16)}
    head = model.params["language"]["lm_head"]["kernel"]
    assert {shard.data.shape for shard in head.addressable_shards} == {(64, 256)}


def test_a_mesh_that_is_not_the_devices_is_refused():
    with pytest.raises(UsageError, match="needs 3 devices, but there are 8"):
        load(None, LoadOptions(mesh="tensor=3"))
    assert len(jax.devices()) == 8
