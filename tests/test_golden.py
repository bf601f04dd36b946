"""The official implementation's outputs, reproduced end to end from its checkpoints."""

from __future__ import annotations

import golden
import numpy as np
import pytest

import dsvl2_jax
from dsvl2_jax import SamplingParams
from dsvl2_jax.infer.buckets import length_bucket

# Longer prompts of the bfloat16 runs, which are slow on a CPU.
LONGER = ("img_palette", "img_1x5", "img_3x1", "multi_turn", "two_img_small")


@pytest.fixture(scope="module", params=golden.MODELS)
def model(request, checkpoints):
    """A mini checkpoint in float32, with the golden cases prepared as ``.inputs``."""
    model = dsvl2_jax.load(checkpoints / request.param, dtype="float32")
    model.name = request.param
    model.golden = f"{request.param}.f32"
    model.inputs = {case: model.processor(golden.conversations()[case]) for case in golden.cases(model.golden)}
    return model


def in_batches(model, cases):
    """Batches of prompts of one compiled length, so that little is padded and little is compiled."""
    batches = {}
    for case in cases:
        batches.setdefault(length_bucket(len(model.inputs[case].input_ids)), []).append(case)
    return batches.values()


@pytest.fixture(scope="module")
def all_logits(model):
    """Case → f32[T, V], computed in two batches."""
    out = {}
    for cases in in_batches(model, model.inputs):
        rows = model.logits([model.inputs[case] for case in cases])
        out |= {case: np.asarray(row) for case, row in zip(cases, rows, strict=True)}
    return out


def test_logits_equal_the_official_ones(model, all_logits):
    worst = 0.0
    for case, logits in all_logits.items():
        rows, expected, stride = golden.logits_rows(model.golden, case)
        worst = max(worst, np.abs(logits[rows][:, ::stride] - expected).max() / np.abs(expected).max())
        np.testing.assert_allclose(
            logits[rows][:, ::stride], expected, rtol=0, atol=1e-4 * np.abs(expected).max(), err_msg=case
        )
        if f"{case}/logits.last2" in golden.arrays(model.golden):
            expected = golden.arrays(model.golden)[f"{case}/logits.last2"]
            np.testing.assert_allclose(logits[-2:], expected, rtol=0, atol=1e-4 * np.abs(expected).max())
    print(f"{model.name}: largest logit difference {worst:.1e} of the largest logit, {len(all_logits)} cases")


def test_greedy_tokens_of_a_batch_equal_the_official_single_runs(model):
    for cases in in_batches(model, model.inputs):
        answers = model.generate([model.inputs[case] for case in cases], max_new_tokens=48)
        for case, answer in zip(cases, answers, strict=True):
            expected = golden.until_eos(golden.arrays(model.golden)[f"{case}/greedy_ids"])
            assert len(answer.token_ids) == len(expected), case
            golden.assert_same_tokens(answer.token_ids, expected, golden.sure_steps(model.golden, case, "greedy"))
            if "greedy_text" in golden.notes(model.golden)[case]:
                assert answer.text == golden.notes(model.golden)[case]["greedy_text"]


def test_a_single_prompt_gives_what_it_gives_in_a_batch(model, all_logits):
    logits = np.asarray(model.logits(model.inputs["img_gray"]))
    batched = all_logits["img_gray"]
    np.testing.assert_allclose(logits, batched, rtol=0, atol=2e-5 * np.abs(batched).max())


def test_repetition_penalty_and_chunked_prefill_follow_the_official_code(model):
    arrays = golden.arrays(model.golden)
    for run, options in (
        ("greedy_rep1.1", {"sampling": SamplingParams(repetition_penalty=1.1)}),
        ("incremental512", {"chunk_size": 512}),
    ):
        assert any(f"{case}/{run}_ids" in arrays for case in model.inputs)
        # Every prompt of a batch runs, so that the shapes are those compiled for the other tests.
        for cases in in_batches(model, model.inputs):
            longest = max(len(model.inputs[case].input_ids) for case in cases)
            # Long prompts take minutes on a CPU; one architecture shows them.
            if not any(f"{case}/{run}_ids" in arrays for case in cases) or (
                longest > 1024 and model.name != "mini-small"
            ):
                continue
            answers = model.generate([model.inputs[case] for case in cases], max_new_tokens=48, **options)
            for case, answer in zip(cases, answers, strict=True):
                if f"{case}/{run}_ids" in arrays:
                    expected = golden.until_eos(arrays[f"{case}/{run}_ids"])
                    golden.assert_same_tokens(answer.token_ids, expected, golden.sure_steps(model.golden, case, run))


def test_left_padded_official_batches_give_the_same_tokens(model):
    notes = golden.notes(model.golden)
    # The third pairs 1,040 tokens with 29: a shape of its own to compile, so once.
    once = ("batch_img_text",) if model.name == "mini-small" else ()
    for batch in ("batch_img_img", "batch_text", *once):
        cases = notes[batch]["cases"]
        answers = model.generate([model.inputs[case] for case in cases], max_new_tokens=48)
        for row, answer in enumerate(answers):
            expected = golden.until_eos(golden.arrays(model.golden)[f"{batch}/greedy_ids"][row])
            golden.assert_same_tokens(answer.token_ids, expected, golden.sure_steps(model.golden, batch, "greedy", row))


def test_a_row_that_ends_early_stops_and_the_others_go_on(model, monkeypatch):
    notes = golden.notes(model.golden)["batch_text"]["greedy_stop"]
    eos = notes["eos_token_id"]
    monkeypatch.setattr(model.processor.tokenizer, "eos_id", eos)
    cases = golden.notes(model.golden)["batch_text"]["cases"]
    answers = model.generate([model.inputs[case] for case in cases], max_new_tokens=len(notes["ids"][0]))
    for answer, ids in zip(answers, notes["ids"], strict=True):
        expected = golden.until_eos(np.asarray(ids), eos)
        assert answer.token_ids == expected
        assert answer.finish_reason == ("stop" if expected[-1] == eos else "length")


def test_vision_adaptor_and_merged_embeddings_equal_the_official_ones(model):
    arrays = golden.arrays(model.golden)
    for case in ("img_1x1", "two_img_small"):
        inputs = model.inputs[case]
        first_and_last = inputs.tiles[[0, -1]]
        for call, name in ((model.encode_tiles, "vision"), (model.adapt_tiles, "projector")):
            found = np.asarray(call(first_and_last))[:, arrays[f"{case}/{name}.sub.idx"]]
            expected = arrays[f"{case}/{name}.sub"]
            np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4 * np.abs(expected).max(), err_msg=name)
        found = np.asarray(model.embed(inputs))[arrays[f"{case}/inputs_embeds.sub.idx"]]
        expected = arrays[f"{case}/inputs_embeds.sub"][0]
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4 * np.abs(expected).max())


def test_a_float32_checkpoint_is_not_rounded(checkpoints):
    model = dsvl2_jax.load(checkpoints / "mini-small-f32", dtype="float32")
    for case in ("text", "img_exact384"):
        logits = np.asarray(model.logits(model.processor(golden.conversations()[case])))
        rows, expected, stride = golden.logits_rows("mini-small-f32.f32", case)
        np.testing.assert_allclose(logits[rows][:, ::stride], expected, rtol=0, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize("name", golden.MODELS)
def test_bfloat16_is_as_near_to_float32_as_the_official_run(name, checkpoints):
    """Median over positions of the largest logit difference, and argmax agreement."""
    model = dsvl2_jax.load(checkpoints / name, dtype="bfloat16")
    model.inputs = {
        case: model.processor(golden.conversations()[case])
        for case in ("text", "text_zh_code", "img_exact384", "img_gray", "img_rgba", "img_tiny20", *LONGER)
    }
    exact, official = golden.arrays(f"{name}.f32"), golden.arrays(f"{name}.bf16")
    ours_off, theirs_off, ours_agree, theirs_agree = [], [], [], []
    for cases in in_batches(model, model.inputs):
        for case, logits in zip(cases, model.logits([model.inputs[case] for case in cases]), strict=True):
            logits = np.asarray(logits)
            rows, expected, stride = golden.logits_rows(f"{name}.f32", case)
            for found, theirs, true in (
                (logits[rows][:, ::stride], official[f"{case}/logits.sub"], expected),
                (logits[-2:], official[f"{case}/logits.last2"], exact[f"{case}/logits.last2"]),
            ):
                ours_off += np.abs(found - true).max(-1).tolist()
                theirs_off += np.abs(theirs - true).max(-1).tolist()
                ours_agree += (found.argmax(-1) == true.argmax(-1)).tolist()
                theirs_agree += (theirs.argmax(-1) == true.argmax(-1)).tolist()
    assert np.median(ours_off) <= 1.25 * np.median(theirs_off)
    assert np.mean(ours_agree) >= np.mean(theirs_agree) - 0.02
    print(
        f"{name}: median difference {np.median(ours_off):.4f}, official {np.median(theirs_off):.4f}; "
        f"argmax agreement {np.mean(ours_agree):.3f}, official {np.mean(theirs_agree):.3f}"
    )
