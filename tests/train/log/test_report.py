"""The log of a run, and what is shown of it."""

import io
import json
import math
from pathlib import Path

import jax
import numpy as np
import pytest
from rich.console import Console

from dsvl2_jax.errors import RunError
from dsvl2_jax.train.data.pipeline import DataStats
from dsvl2_jax.train.flops import StepFlops
from dsvl2_jax.train.log import report as report_module
from dsvl2_jax.train.log import run_log
from dsvl2_jax.train.log.report import Report
from dsvl2_jax.train.objectives.contrastive import ContrastiveMetrics
from dsvl2_jax.train.objectives.language import LanguageMetrics
from dsvl2_jax.train.settings.schema import OptimizerSettings, ParameterRule, RunSettings, Settings, StageSettings

NAN = np.float32(np.nan)


def metrics(**changes) -> LanguageMetrics:
    values = {
        "loss": np.float32(2.3),
        "text_loss": np.float32(2.0),
        "image_loss": np.float32(2.5),
        "supervised_tokens": np.int32(60),
        "image_supervised_tokens": np.int32(40),
        "tokens": np.int32(100),
        "balance_losses": np.array([0.25, 0.5], np.float32),
        "load": np.array([[10, 30, 20, 20], [20, 20, 20, 20]], np.float32),
        "gradient_norm": np.float32(0.7),
    }
    return LanguageMetrics(**(values | changes))


def stats(step: int) -> DataStats:
    """Four samples, 100 tokens and three tiles a step."""
    return DataStats(4 * step, {"image missing": 2}, 0, 100 * step, 25 * step, 3 * step, step)


def make_settings(**run) -> Settings:
    rules = (ParameterRule("^vision/", lr_multiplier=0.1), ParameterRule("."))
    optimizer = OptimizerSettings(learning_rate=1e-3, schedule="step")
    return Settings(stage=StageSettings(rules), optimizer=optimizer, run=RunSettings(steps=8, **run))


def make_report(directory: Path, *, terminal: bool = False, flops: StepFlops | None = None, **run):
    console = Console(file=io.StringIO(), force_terminal=terminal, width=100)
    return Report(directory, make_settings(**run), devices=2, flops=flops, console=console), console.file


def lines(directory: Path) -> list[dict]:
    return [json.loads(text) for text in (directory / "log.jsonl").read_text().splitlines()]


def test_a_step_is_logged_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(report_module, "peak_flops", lambda device: 1000.0)
    report, _ = make_report(tmp_path, flops=StepFlops(per_token=2.0, per_pair=1.0, per_tile=10.0))
    with report:
        report.event("start", 0)
        report.step(1, metrics(), stats(1), 0.5)
        report.step(5, metrics(text_loss=NAN), stats(2), 0.25)
    start, first, fifth = lines(tmp_path)
    assert (start["kind"], start["step"]) == ("start", 0)
    assert (first["kind"], first["step"], first["tokens"], first["supervised_tokens"]) == ("step", 1, 100, 60)
    assert first["loss"] == float(np.float32(2.3)) and first["balance_loss"] == 0.75  # exact, to compare runs
    assert first["load_max_over_mean"] == [1.5, 1.0]
    assert (first["tiles"], first["samples"], fifth["tiles"], fifth["samples"]) == (3, 4, 3, 4)
    assert (first["skipped"], first["padding_share"], first["tile_padding_share"]) == (2, 0.2, 0.25)
    assert (first["tokens_per_second"], fifth["tokens_per_second"]) == (200.0, 400.0)
    # 100 tokens in 4 samples see 26 / 2 keys on average: 200 + 1300 + 30 FLOPs, on 2 devices of 1000 a second.
    assert first["mfu"] == pytest.approx(1530 / (0.5 * 2 * 1000))
    assert first["text_loss"] == 2.0 and fifth["text_loss"] is None
    assert (first["learning_rate"], fifth["learning_rate"]) == pytest.approx((1e-3, 1e-3 / math.sqrt(10)))


def test_no_mfu_without_a_known_peak(tmp_path):
    report, _ = make_report(tmp_path, flops=StepFlops(1.0, 1.0, 1.0))
    with report:
        report.event("start", 0)
        report.step(1, metrics(), stats(1), 0.5)
    assert lines(tmp_path)[-1]["mfu"] is None


def test_a_layer_without_tokens_and_a_loss_that_is_not_finite(tmp_path):
    report, text = make_report(tmp_path)
    with report:
        report.event("start", 0)
        report.step(1, metrics(loss=NAN, load=np.zeros((1, 4), np.float32)), stats(1), 0.5)
        report.step(2, metrics(load=np.zeros((0, 4), np.float32)), stats(2), 0.5)
    first, second = lines(tmp_path)[1:]
    assert first["load_max_over_mean"] == [None] and first["loss"] is None and "loss nan" in text.getvalue()
    assert second["load_max_over_mean"] == []  # a model without experts


def test_contrastive_training_reports_its_accuracy_and_no_experts(tmp_path):
    values = {"loss": 4.5, "accuracy": 0.25, "scale": 10.0, "bias": -9.5, "gradient_norm": 0.5}
    found = ContrastiveMetrics(
        images=np.int32(8), tokens=np.int32(100), **{name: np.float32(value) for name, value in values.items()}
    )
    for terminal in (False, True):
        report, text = make_report(tmp_path, terminal=terminal)
        with report:
            report.event("start", 0)
            report.step(1, found, stats(1), 0.5)
            report.validation(1, **ContrastiveMetrics.average([found]))
        shown = text.getvalue()
        assert "loss 4.5000 (accuracy 0.2500)" in shown if not terminal else "scale 10, bias -9.5" in shown
        assert "load" not in shown
    step, validation = lines(tmp_path)[-2:]
    assert {name: step[name] for name in values} == values and step["images"] == 8
    assert not {"load_max_over_mean", "balance_loss", "text_loss", "supervised_tokens"} & step.keys()
    assert (validation["loss"], validation["accuracy"], validation["images"]) == (4.5, 0.25, 8)


def test_after_a_resume_no_step_appears_twice(tmp_path):
    report, _ = make_report(tmp_path)
    with report:
        report.event("start", 0)
        for step in (1, 2, 3):
            report.step(step, metrics(), stats(step), 0.5)
        report.event("checkpoint", 2, seconds=0.1)  # complete only now
        report.step(4, metrics(), stats(4), 0.5)
        report.validation(4, loss=1.0, text_loss=math.nan, image_loss=1.0, tokens=7)
    log = tmp_path / "log.jsonl"
    log.write_text(log.read_text() + '{"kind": "step", "st')  # killed while writing
    report, _ = make_report(tmp_path)
    with report:
        report.event("resume", 2)
        report.step(3, metrics(loss=np.float32(9.0)), stats(3), 0.5)
    kinds = [(line["kind"], line["step"]) for line in lines(tmp_path)]
    assert kinds == [("start", 0), ("step", 1), ("step", 2), ("checkpoint", 2), ("resume", 2), ("step", 3)]
    assert (lines(tmp_path)[-1]["loss"], lines(tmp_path)[-1]["tiles"]) == (9.0, 3)
    assert list(tmp_path.iterdir()) == [log]


def test_a_resume_without_a_log_does_not_guess(tmp_path):
    report, text = make_report(tmp_path)
    with report:
        report.event("resume", 2)
        report.step(3, metrics(), stats(3), 0.5)
        report.step(4, metrics(), stats(4), 0.5)
    third, fourth = lines(tmp_path)[1:]
    assert (third["tiles"], fourth["tiles"]) == (None, 3) and "tiles –" in text.getvalue()


def test_plain_lines_outside_a_terminal(tmp_path):
    report, text = make_report(tmp_path, log_every=2)
    with report:
        report.event("start", 0)
        for step in range(1, 6):
            report.step(step, metrics(), stats(step), 0.5)
        report.validation(5, loss=1.5, text_loss=math.nan, image_loss=1.5, tokens=7)
        report.step(8, metrics(), stats(6), 0.5)
    shown = text.getvalue().splitlines()
    assert [line.split(":")[0] for line in shown] == ["step 2/8", "step 4/8", "step 5", "step 8/8"]
    assert len(lines(tmp_path)) == 8  # every step all the same
    for part in (
        "loss 2.3000 (text 2.0000, vision-language 2.5000)",
        "200 tokens/s, 0.50 s/step",
        "gradient norm 0.7",
        "learning rate 0.001 (×0.1: 0.0001)",
        "max/mean load 1.50 (MoE layer 1), 1.25 on average",
        "tiles 3",
        "padding 20.0%",
        "skipped 2",
    ):
        assert part in shown[0]
    assert "left 0:00:0" in shown[1]
    assert shown[2] == "step 5: validation loss 1.5000 (vision-language 1.5000)"


def test_live_view_in_a_terminal(tmp_path):
    report, text = make_report(tmp_path, terminal=True)
    with report:
        report.event("start", 0)
        report.validation(0, loss=1.5, text_loss=math.nan, image_loss=1.5, tokens=7)
        report.step(1, metrics(), stats(1), 0.5)
    shown = text.getvalue()
    for part in (
        "1/8",
        "2.3000 (text 2.0000, vision-language 2.5000)",
        "1.5000 (vision-language 1.5000) at step 0",
        "1.50 (MoE layer 1), 1.25 on average, balance loss 0.75",
        "100 tokens, 3 tiles in 4 samples",
        "20.0% of tokens, 25.0% of tile places",
        "2 image missing",
    ):
        assert part in shown
    assert len(lines(tmp_path)) == 3


def test_tensorboard_on_request(tmp_path):
    report, _ = make_report(tmp_path, tensorboard=True)
    with report:
        report.event("start", 0)
        report.step(1, metrics(text_loss=NAN), stats(1), 0.5)
        report.validation(1, loss=1.5, text_loss=math.nan, image_loss=1.5, tokens=7)
    written = b"".join(file.read_bytes() for file in (tmp_path / "tensorboard").iterdir())
    for tag in (b"train/loss", b"validation/image_loss", b"learning_rate/rate_0.1", b"load_max_over_mean/moe_2"):
        assert tag in written
    assert b"text_loss" not in written


def test_no_tensorboard_otherwise(tmp_path):
    report, _ = make_report(tmp_path)
    with report:
        report.event("start", 0)
    assert not (tmp_path / "tensorboard").exists()


def test_only_the_first_process_reports(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    report, text = make_report(tmp_path, tensorboard=True)
    with report:
        report.event("start", 0)
        report.step(1, metrics(), stats(1), 0.5)
        report.validation(1, loss=1.5, text_loss=1.0, image_loss=1.5, tokens=7)
    assert not list(tmp_path.iterdir()) and not text.getvalue()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_stops_the_run_once(tmp_path):
    report, _ = make_report(tmp_path)
    with report:
        report.event("start", 0)
        report._log.close()
        (tmp_path / "log.jsonl").unlink()
        (tmp_path / "log.jsonl").symlink_to("/dev/full")
        with pytest.raises(RunError, match=r"log\.jsonl: cannot be written: No space left"):
            report.step(1, metrics(), stats(1), 0.5)
        report.event("stop", 1, reason="disk full")


def test_an_edited_log_is_named(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"kind": "start", "step": 0}\n[1]\n{"kind": "start", "step": 0}\n')
    with pytest.raises(RunError, match=r"log\.jsonl:2: not a line of a training log"):
        list(run_log.read(path))
    with pytest.raises(RunError, match="cannot be read"):
        list(run_log.read(tmp_path))
