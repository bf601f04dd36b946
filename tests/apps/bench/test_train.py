"""`dsvl2 bench train`: what it refuses and how it counts. Both sides of it run in processes of minutes, by hand.

That both sides compute the same is in tests/train/test_transformers.py.
"""

from __future__ import annotations

import importlib.util

import pytest

from dsvl2_jax.apps.bench.train import OURS, TORCH_EAGER, Measured, Setting, TrainBench
from dsvl2_jax.apps.cli.main import main


@pytest.mark.parametrize(
    ("option", "value", "least"), [("--rows", 0, 1), ("--length", 1, 2), ("--steps", 0, 1), ("--rounds", 0, 1)]
)
def test_numbers_that_are_too_small_are_refused(option, value, least, capsys):
    assert main(["bench", "train", option, str(value)]) == 2
    assert f"{option}: found {value}, expected at least {least}" in capsys.readouterr().err


def test_missing_pytorch_is_named(monkeypatch, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *a: None if name == "torch" else find(name, *a))
    assert main(["bench", "train"]) == 2
    assert "compares with PyTorch, and torch cannot be imported" in capsys.readouterr().err


def test_speed_is_of_the_median_step_and_memory_without_the_libraries():
    ours = Measured(OURS[0], 10, 1.0, base=0.5, seconds=[9.0, 2.0, 1.0], peak=3.0)
    result = TrainBench(rows=2, length=100, ours=ours, torch=ours, trials={})
    assert ours.step == 2.0 and ours.model_peak == 2.5 and result.speed(ours) == 100.0


def test_settings_say_how_a_side_runs():
    assert str(Setting("torch", "grouped_mm", compiled=True)) == "torch, compiled, experts grouped_mm"
    names = [str(setting) for setting in (*OURS, *TORCH_EAGER)]
    assert "torch, eager, experts eager, malloc keeps memory" in names and len(set(names)) == len(names)
