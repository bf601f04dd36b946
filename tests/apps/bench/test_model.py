"""`dsvl2 bench model`: figures and their relations on a toy, both sides on shared weights, and what is refused."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from dsvl2_jax.apps.bench import ceilings, model, model_jobs, model_kernels, model_plot
from dsvl2_jax.apps.bench.against import _write_check
from dsvl2_jax.apps.bench.model_options import ModelOptions
from dsvl2_jax.apps.bench.model_report import Report
from dsvl2_jax.apps.cli.main import main
from dsvl2_jax.apps.plan.command import config_of
from dsvl2_jax.apps.plan.least_work import prefill_work

LANGUAGE = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 16, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 4, "n_shared_experts": 2, "n_routed_experts": 8,
    "num_experts_per_tok": 3, "first_k_dense_replace": 1, "kv_lora_rank": 16, "q_lora_rank": None,
    "qk_nope_head_dim": 12, "qk_rope_head_dim": 8, "v_head_dim": 10, "max_position_embeddings": 512,
    "topk_method": "greedy", "n_group": 1, "topk_group": 1,
}  # fmt: skip
PLAIN = {
    "use_mla": False, "kv_lora_rank": None, "qk_nope_head_dim": 0, "qk_rope_head_dim": 0, "v_head_dim": 0,
}  # fmt: skip
SIGMOID = {"topk_method": "noaux_tc", "scoring_func": "sigmoid", "norm_topk_prob": True, "routed_scaling_factor": 2.0}


def toy(folder: Path, **language: object) -> str:
    """A config.json of very few and narrow layers."""
    described = {
        "language_config": LANGUAGE | language,
        "vision_config": {
            "image_size": 56, "patch_size": 14, "width": 32, "layers": 2, "heads": 2, "mlp_ratio": 2.0,
        },
        "projector_config": {"input_dim": 32, "n_embed": 32},
        "tile_tag": "2D",
    }  # fmt: skip
    file = folder / "toy.json"
    file.write_text(json.dumps(described))
    return str(file)


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> dict[str, list[dict]]:
    """A toy's jobs, by the command: job → its lines."""
    name = toy(tmp_path_factory.mktemp("toy"))
    arguments = [
        "--slots",
        "1,3",
        "--context",
        "40",
        "--tokens",
        "40",
        "--tiles",
        "2",
        "--jobs",
        "decode,prefill,encode",
    ]
    said = io.StringIO()
    patch = pytest.MonkeyPatch()
    patch.setattr(ceilings, "LEAST_SECONDS", 1e-3)
    patch.setattr(ceilings, "SMALL_PRODUCT", 256)
    with contextlib.redirect_stdout(said):
        status = main(["bench", "model", name, *arguments, "--profile", "decode", "--json"])
    patch.undo()
    assert status == 0
    found: dict[str, list[dict]] = {}
    for line in said.getvalue().splitlines():
        row = json.loads(line)
        found.setdefault("scopes" if "scopes" in row else row.get("job", "about"), []).append(row)
    return found


def test_every_job_has_its_figures_and_they_agree_with_each_other(rows):
    (about,), (reached,) = rows["about"], rows["ceilings"]
    assert about["layers"] == 2 and about["dtype"] == "float32" and about["platform"] == "cpu"
    assert reached["product_flops"] > 0 < reached["copy_bandwidth"] and reached["peak_flops"] is None
    assert [row["sizes"]["slots"] for row in rows["decode"]] == [1, 3]
    for job, unit in (("decode", "tokens"), ("prefill", "tokens"), ("encode", "tiles")):
        for row in rows[job]:
            made = {"decode": row["sizes"].get("slots"), "encode": 2}.get(job, 40)
            assert row[f"{unit}_per_second"] == pytest.approx(made / row["seconds"], rel=1e-4)
            assert min(row["series"]) <= row["seconds"] <= max(row["series"])
            assert row["roofline_share"] is None  # a CPU has no vendor's figures here
            least = max(row["least_flops"] / reached["product_flops"], row["least_bytes"] / reached["copy_bandwidth"])
            assert row["ceiling_share"] == pytest.approx(least / row["seconds"], rel=1e-3) and row["ceiling_share"] > 0
            assert row["bytes_ratio"] == pytest.approx(row["program_bytes"] / row["least_bytes"], rel=1e-4)
            assert row["bytes_ratio"] >= 1 and row["flops_ratio"] > 0.5
            assert row["launches"] > 0 <= row["sorts"] and row["compile_seconds"] > 0 < row["temporaries"]


def test_a_profile_gives_every_launch_to_a_scope(rows):
    for split, row in zip(rows["scopes"], rows["decode"], strict=True):
        assert split["sizes"] == row["sizes"]
        assert sum(scope["launches"] for scope in split["scopes"]) == row["launches"]
        assert sum(scope["bytes"] for scope in split["scopes"]) == pytest.approx(row["program_bytes"], rel=1e-4)
        assert sum(scope["share"] for scope in split["scopes"]) == pytest.approx(1, rel=1e-3)
        # The CPU compiler makes some products anew, without a name.
        assert {"layers/mlp/router", "logits/lm_head"} <= {scope["scope"] for scope in split["scopes"]}


def test_a_kernel_that_has_been_compared_is_measured(monkeypatch):
    monkeypatch.setattr(ceilings, "LEAST_SECONDS", 1e-3)
    (kernel,) = model_kernels.grouped(24, 16, 32, 4, jnp.dtype("float32"), backward=False)
    row = model_kernels.measured(kernel)
    assert row["error_of_float32"] < 1e-5 and row["flops_per_second"] == pytest.approx(24 * 1024 / row["seconds"])


def test_both_kinds_of_decode_attention_have_a_reference(tmp_path):
    config = config_of(toy(tmp_path, **PLAIN))
    assert model_kernels.decoding(config, 2, 40, jnp.dtype("float32")).error < 1e-5


def test_a_chunk_is_the_last_one_and_the_work_of_chunks_is_that_of_the_prompt(tmp_path):
    config = config_of(toy(tmp_path))
    assert model_jobs.chunk(config, 512, jnp.dtype("float32")).sizes == {"tokens": 512, "before": 0}
    first, last = prefill_work(config, 1, 40), prefill_work(config, 1, 60, before=40)
    head = 2.0 * config.language.hidden_size * config.language.vocab_size  # once more, for the first one's last token
    assert first.flops + last.flops == prefill_work(config, 1, 100).flops + head


@pytest.mark.parametrize(
    ("language", "jobs"), [({}, ("decode", "encode")), (PLAIN, ("prefill",)), (SIGMOID, ("train",))]
)
def test_pytorch_computes_the_same(tmp_path, language, jobs):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from dsvl2_jax.apps.bench.against import MOST_DIFFERENT, TOLERANCE
    from dsvl2_jax.apps.bench.torch_side import check

    name = toy(tmp_path, **language)
    _write_check(tmp_path, config_of(name), ModelOptions(jobs=jobs))
    distances = check({"model": name, "device": "cpu"}, tmp_path)
    assert {output.partition(" ")[0] for output in distances} >= set(jobs)
    for output, distance in distances.items():
        assert distance <= (MOST_DIFFERENT if output.endswith("tokens") else TOLERANCE / 10), output


def test_numbers_that_are_none_are_an_error():
    with pytest.raises(Exception, match="logits: 1 of 3 numbers are not finite"):
        model_jobs.Repeated(lambda: np.array([1.0, np.nan, 2.0]), lambda out: {"logits": out})


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (["--layers", "0"], "--layers: found 0, expected at least 1"),
        (["--slots", "0"], "--slots: found 0, expected at least 1"),
        (["--slots", "1 16"], "--slots: found '1 16', expected whole numbers with commas"),
        (["--jobs", "decde"], "--jobs: 'decde' is none of decode, prefill"),
        (["--context", "16"], "--context: found 16, expected at least 17"),
        (["--context", "5000"], "--context: found 5000, expected at most the model's context, 4096"),
        (["--profile", "train"], "--profile train: expected one of the programs that are measured"),
        (["--set", "compute.remat=none"], "--set is of the training step"),
        (["--budget", "0"], "--budget: found 0.0, expected a positive number"),
    ],
)
def test_what_cannot_be_is_refused_and_said(options, problem, capsys):
    assert main(["bench", "model", "micro", *options]) == 2
    assert problem in capsys.readouterr().err


def test_an_unknown_model_is_named(capsys):
    assert main(["bench", "model", "tinny"]) == 1
    assert "tinny: no such directory" in capsys.readouterr().err


def test_a_model_that_does_not_fit_says_what_would(monkeypatch, capsys):
    monkeypatch.setattr(model._Bench, "_memory", lambda self: 20e9)
    assert main(["bench", "model", "base", "--jobs", "decode"]) == 2
    assert "and the device has 19.0 GB to give; try --layers" in capsys.readouterr().err


def test_missing_pytorch_is_named_before_anything_is_made(monkeypatch, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *a: None if name == "torch" else find(name, *a))
    assert main(["bench", "model", "micro", "--against", "torch"]) == 2
    captured = capsys.readouterr()
    assert "compares with PyTorch, and torch cannot be imported" in captured.err and not captured.out


def test_what_there_is_no_time_for_is_said(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(ceilings, "SMALL_PRODUCT", 64)
    name = toy(tmp_path)
    assert main(["bench", "model", name, "--budget", "1e-9", "--jobs", "encode", "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["skipped"] == "no time was left"


def test_shares_are_drawn(tmp_path):
    row = {"job": "decode", "sizes": {"slots": 1}, "ceiling_share": 0.5, "roofline_share": None}
    model_plot.plot([row, row | {"job": "prefill", "speedup": 1.5}], "toy", tmp_path / "shares.png")
    with Image.open(tmp_path / "shares.png") as picture:
        assert picture.width > picture.height > 100


def test_a_line_for_people_has_the_units(capsys):
    report = Report(as_json=False)
    report.add({"job": "ceilings", "product_flops": 2e12, "copy_bandwidth": 3e9})
    shares = {"roofline_share": 0.61, "ceiling_share": 0.7}
    program = {"program_flops": 1.0, "flops_ratio": 1.02, "bytes_ratio": 1.55, "launches": 508, "sorts": 33}
    times = {"seconds": 3.43e-3, "tokens_per_second": 4659.0}
    report.add({"job": "decode", "sizes": {"slots": 16}} | times | shares | program)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "dense product 2 TFLOP/s, copy 3 GB/s"
    assert lines[-1].split() == ["decode", "slots", "16", "3.43", "ms", "4,659", "tokens/s", "61", "%", "70", "%",
                                 "1.02", "×", "1.55", "×", "508", "33"]  # fmt: skip
