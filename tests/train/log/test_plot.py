"""Drawing the logs of runs."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dsvl2_jax.apps.cli.main import main
from dsvl2_jax.errors import RunError, UsageError
from dsvl2_jax.train.log import plot as plot_module
from dsvl2_jax.train.log.plot import curves, draw, plot


def make_run(directory: Path, steps: int = 5, *, layers: int = 2, mfu: float | None = None, text: bool = True) -> Path:
    directory.mkdir(parents=True)
    lines = [{"kind": "start", "step": 0}]
    for step in range(1, steps + 1):
        line = {"kind": "step", "step": step, "loss": 1 / step, "image_loss": 1.1 / step, "mfu": mfu}
        line |= {"text_loss": 0.9 / step if text else None, "tokens_per_second": 1.0 if step == 1 else 1000.0 + step}
        lines.append(line | {"load_max_over_mean": [1.0 + 1 / step, 1.5][:layers]})
    lines.insert(3, {"kind": "validation", "step": 2, "loss": 0.6, "text_loss": None, "image_loss": 0.6})
    (directory / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return directory


def labels(axes) -> list[str]:
    return axes.get_legend_handles_labels()[1]


def test_a_log_becomes_curves(tmp_path):
    found = curves(make_run(tmp_path / "a", mfu=0.3), "a")
    np.testing.assert_array_equal(found.steps, [1, 2, 3, 4, 5])
    np.testing.assert_allclose(found.losses["loss"], 1 / found.steps)
    np.testing.assert_allclose(found.balance[1], [1.5, 1.5])
    assert np.isnan(found.tokens_per_second[0]) and found.tokens_per_second[1] == 1002  # the first step compiles
    assert (found.validation_steps.tolist(), found.validation_loss.tolist()) == ([2], [0.6])


def test_one_run_shows_its_kinds_of_loss(tmp_path):
    figure = draw([curves(make_run(tmp_path / "a", mfu=0.3), "a")])
    loss, balance, speed, mfu = figure.axes
    assert labels(loss) == ["training, text", "training, vision-language", "training", "validation"]
    assert labels(balance) == ["worst layer", "mean of layers"]
    np.testing.assert_allclose(balance.lines[0].get_ydata(), [2.0, 1.5, 1.5, 1.5, 1.5])
    np.testing.assert_allclose(speed.lines[0].get_ydata(), [1002, 1003, 1004, 1005])
    np.testing.assert_allclose(mfu.lines[0].get_ydata(), [0.3] * 4)


def test_several_runs_are_told_apart(tmp_path):
    runs = [curves(make_run(tmp_path / name, layers=layers, text=False), name) for name, layers in (("a", 2), ("b", 1))]
    figure = draw(runs)
    assert labels(figure.axes[0]) == ["a", "a, validation", "b", "b, validation"]
    assert labels(figure.axes[1]) == ["a, worst layer", "a, mean of layers", "b, MoE layer"]
    assert labels(figure.axes[2]) == ["a", "b"] and len(figure.axes) == 3
    assert len({line.get_color() for line in figure.axes[2].lines}) == 2


def test_contrastive_training_shows_its_accuracy_in_place_of_experts(tmp_path):
    (tmp_path / "encoder").mkdir()
    lines = [
        {"kind": "step", "step": i, "loss": 5.0 / i, "accuracy": 0.1 * i, "tokens_per_second": 9.0} for i in (1, 2, 3)
    ]
    lines.append({"kind": "validation", "step": 3, "loss": 2.0, "accuracy": 0.25})
    (tmp_path / "encoder" / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    encoder = curves(tmp_path / "encoder", "encoder")
    loss, accuracy, _ = draw([encoder]).axes
    assert loss.get_ylabel() == "nats per image" and labels(loss) == ["training", "validation"]
    np.testing.assert_allclose(accuracy.lines[0].get_ydata(), [0.1, 0.2, 0.3])
    np.testing.assert_allclose(accuracy.lines[1].get_ydata(), [0.25])
    # Beside a run of the language model each has its panel.
    loss, balance, accuracy, _ = draw([encoder, curves(make_run(tmp_path / "a"), "a")]).axes
    assert loss.get_ylabel() == "nats per supervised token\nor nats per image"
    assert labels(balance) == ["a, worst layer", "a, mean of layers"] and "a" not in labels(accuracy)


def test_long_runs_are_smoothed():
    values = np.tile([0.0, 2.0], 400)
    assert np.abs(plot_module._running_mean(values) - 1.0).max() < 0.1
    dips = np.where(np.arange(800) % 10, 5.0, 0.0)
    np.testing.assert_array_equal(plot_module._running_median(dips), 5.0)


def test_the_command_writes_a_png(tmp_path, capsys):
    runs = [str(make_run(tmp_path / name / "run", 80)) for name in ("a", "b")]
    assert main(["plot", *runs, "--out", str(tmp_path / "out.png")]) == 0
    with Image.open(tmp_path / "out.png") as image:
        assert image.format == "PNG" and image.width > 1000
    assert capsys.readouterr().out == f"{tmp_path / 'out.png'}\n"


def test_runs_of_one_name_are_shown_by_path(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(plot_module, "curves", lambda path, name: seen.append(name) or curves(path, name))
    plot([make_run(tmp_path / name / "run") for name in ("a", "b")], tmp_path / "out.png")
    assert seen == [str(tmp_path / name / "run") for name in ("a", "b")]


def test_what_cannot_be_drawn_is_named(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(RunError, match=r"empty: has no log\.jsonl"):
        plot([tmp_path / "empty"], tmp_path / "out.png")
    with pytest.raises(RunError, match="none: no such directory"):
        plot([tmp_path / "none"], tmp_path / "out.png")
    (tmp_path / "empty" / "log.jsonl").write_text('{"kind": "start", "step": 0}\n')
    with pytest.raises(RunError, match="no step is logged yet"):
        plot([tmp_path / "empty"], tmp_path / "out.png")
    run = make_run(tmp_path / "run")
    with pytest.raises(RunError, match="cannot be written"):
        plot([run], tmp_path / "nowhere" / "out.png")
    with pytest.raises(UsageError, match=r"ends in \.png"):
        plot([run], tmp_path / "out.pdf")
    with pytest.raises(UsageError, match="at least one run"):
        plot([], tmp_path / "out.png")
