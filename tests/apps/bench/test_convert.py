"""`dsvl2 bench convert`, on a checkpoint of a small configuration."""

from __future__ import annotations

import json

import pytest

from dsvl2_jax.apps.bench import convert as bench
from dsvl2_jax.convert.doctor import doctor
from dsvl2_jax.errors import CheckpointError, UsageError


def test_both_sides_are_measured_and_the_result_is_kept(data, tmp_path, monkeypatch, capsys):
    content = json.loads((data / "checkpoints" / "mini-small" / "config.json").read_text())
    monkeypatch.setattr(bench, "released_config", lambda size: content)
    found = bench.bench_convert(size="small", directory=tmp_path, keep=tmp_path / "kept", repeats=1)
    assert found.size == "small" and found.bytes > 0 and found.peak_bytes > 50e6
    assert found.ratio == found.cp_seconds / found.convert_seconds > 0
    printed = capsys.readouterr().out
    assert "CPU cores" in printed.splitlines()[0] and "× the speed of cp" in printed
    assert [file.name for file in tmp_path.iterdir()] == ["kept"]
    assert doctor(str(tmp_path / "kept"), as_json=True) == 0


def test_what_cannot_be_measured_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(UsageError, match="--repeats: found 0, expected at least 1"):
        bench.bench_convert(directory=tmp_path, repeats=0)
    (tmp_path / "kept").mkdir()
    with pytest.raises(CheckpointError, match="kept"):
        bench.bench_convert(directory=tmp_path, keep=tmp_path / "kept")
    assert [file.name for file in tmp_path.iterdir()] == ["kept"]
