"""``context`` and ``rope_scaling`` of a loaded model, and caches that do not fit."""

import json
import shutil

import numpy as np
import pytest

import dsvl2_jax
from dsvl2_jax.errors import ConfigError, ConversationError, DSVL2Error, UsageError
from dsvl2_jax.infer import memory
from dsvl2_jax.infer.loading import LoadOptions, load
from dsvl2_jax.infer.request import Request
from dsvl2_jax.infer.sampling import SamplingParams
from dsvl2_jax.infer.scheduler import page_keys
from dsvl2_jax.sharding import make_mesh

DYNAMIC = {"type": "dynamic", "factor": 4}


@pytest.fixture(scope="module")
def short(checkpoints, tmp_path_factory):
    """mini-tiny with a context of 64."""
    copy = tmp_path_factory.mktemp("short") / "ckpt"
    shutil.copytree(checkpoints / "mini-tiny", copy)
    config = json.loads((copy / "config.json").read_text())
    config["language_config"]["max_position_embeddings"] = 64
    (copy / "config.json").write_text(json.dumps(config))
    return copy


def question(model, words: int):
    return model.processor([{"role": "user", "content": "a b c d " * words}])


def test_a_longer_context_takes_longer_prompts_and_says_so(short, capsys):
    model = dsvl2_jax.load(short)
    prompt = question(model, 20)
    assert len(prompt.input_ids) > 64
    with pytest.raises(ConversationError, match=r"context is 64 .max_position_embeddings, or --context"):
        model.generate(prompt, 8)
    capsys.readouterr()
    longer = dsvl2_jax.load(short, context=1024)
    assert "a context of 1024 is beyond the 64 positions that the model was made for" in capsys.readouterr().err
    (answer,) = longer.generate([prompt], 8, SamplingParams(ignore_eos=True))
    assert len(answer.token_ids) == 8
    scaled = dsvl2_jax.load(short, context=256, rope_scaling=DYNAMIC)
    assert not capsys.readouterr().err  # 4 × 64
    assert scaled.config.language.rope_scaling.kind == "dynamic"


def test_a_shorter_context_holds_less(short):
    model = dsvl2_jax.load(short, context=40)
    with pytest.raises(ConversationError, match="context is 40"):
        model.generate(question(model, 20), 8)


def test_a_dynamic_answer_does_not_depend_on_chunks(short):
    model = dsvl2_jax.load(short, context=1024, rope_scaling=DYNAMIC)
    prompt = question(model, 150)
    assert 512 < len(prompt.input_ids) < 640
    whole, chunked = (
        model.generate(prompt, 3, SamplingParams(ignore_eos=True), slots=1, chunk_size=size, logprobs=True)
        for size in (None, 256)
    )
    assert whole.token_ids == chunked.token_ids
    np.testing.assert_allclose(whole.logprobs, chunked.logprobs, atol=1e-4)


def test_pages_of_prompts_whose_positions_go_by_their_length_are_for_that_length(short):
    model = dsvl2_jax.load(short, context=2048)
    requests = [Request(question(model, words), 1) for words in (300, 310)]
    one, other = (page_keys(request, 4) for request in requests)
    assert one == other  # they begin alike
    one, other = (page_keys(request, 4, of_length=True) for request in requests)
    assert not set(one) & set(other)


def test_a_context_that_does_not_fit_memory_is_refused_with_what_fits(short, monkeypatch):
    model = dsvl2_jax.load(short, context=1 << 20)
    monkeypatch.setattr(memory, "device_memory", lambda device: 50e6)
    with pytest.raises(
        DSVL2Error, match=r"answers? at a time with a context of 1048576 .* a context of .* or less"
    ) as error:
        model.generate(question(model, 1), 1 << 20)
    fitting = int(str(error.value).split("a context of ")[2].split()[0])
    held = sum(memory.cache_bytes(model.config.language, rows, fitting, {}, "float32") for rows in (8, 1))
    assert 40e6 < held < 50e6


def test_wrong_options_are_named(short):
    with pytest.raises(UsageError, match="a context of 0 positions"):
        dsvl2_jax.load(short, context=0)
    with pytest.raises(UsageError, match="--rope-scaling yarn: is no JSON object"):
        load(str(short), LoadOptions(rope_scaling="yarn"))
    with pytest.raises(ConfigError, match=r"found 'llama3'; supported are linear, dynamic, yarn"):
        dsvl2_jax.load(short, rope_scaling={"type": "llama3", "factor": 2})
    with pytest.raises(UsageError, match="a mesh with sequence is for training"):
        dsvl2_jax.load(short, mesh=make_mesh(sequence=8))
