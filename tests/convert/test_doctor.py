"""The doctor's findings, on healthy and on broken checkpoints of both layouts."""

import json

import ml_dtypes
import numpy as np
import pytest
import released_checkpoint
from hypothesis import given
from hypothesis import strategies as st

from dsvl2_jax.convert.doctor import count_non_finite, count_parameters, doctor, examine
from dsvl2_jax.convert.to_orbax import convert
from dsvl2_jax.errors import CheckpointError
from dsvl2_jax.model import released
from dsvl2_jax.model.config import Config

torch = pytest.importorskip("torch")


@pytest.fixture
def mini(checkpoints, tmp_path):
    return released_checkpoint.copy(checkpoints / "mini-base", tmp_path / "mini")


@pytest.mark.parametrize("size", released.SIZES)
def test_component_counts_are_the_official_models(size, data):
    counts = count_parameters(Config.from_file(data / "reference" / f"released_config_{size}.json"))
    reference = json.loads((data / "reference" / f"released_param_counts_{size}.json").read_text())
    assert counts == {name.replace(": ignore_head", ""): count for name, count in reference.items()}


def test_both_layouts_of_a_healthy_checkpoint_are_usable(mini, tmp_path, capsys):
    convert(mini, tmp_path / "converted")
    capsys.readouterr()
    reports = []
    for directory, layout in ((mini, "released"), (tmp_path / "converted", "orbax")):
        assert doctor(directory, as_json=True) == 0
        report = json.loads(capsys.readouterr().out)
        assert report["ok"] is True
        assert report["layout"] == layout
        assert report["variant"] == "other"
        assert report["parameters"]["TOTAL"] == 686004
        assert report["dtypes"] == {"bfloat16": 2 * 686004}
        assert report["bfloat16_bytes"] == 2 * 686004 + 2 * report["parameters"]["language.router"]
        assert report["special_tokens"]["<image>"] == 976
        reports.append({key: report[key] for key in ("parameters", "special_tokens", "non_finite", "problems")})
    assert reports[0] == reports[1]
    assert doctor(mini) == 0
    assert "usable" in capsys.readouterr().out


def test_numbers_that_are_not_finite_are_counted_in_both_layouts(mini, tmp_path, capsys):
    tensors = released_checkpoint.tensors(mini)
    name = "language.model.layers.1.mlp.experts.3.up_proj.weight"
    tensors[name][0, :2] = torch.nan
    tensors[name][1, 0] = -torch.inf
    tensors["view_seperator"] = tensors["view_seperator"].float()
    tensors["view_seperator"][5] = torch.inf
    released_checkpoint.put(mini, tensors)
    convert(mini, tmp_path / "converted")
    assert examine(mini).non_finite == {"view_seperator": {"nan": 0, "inf": 1}, name: {"nan": 2, "inf": 1}}
    report = examine(tmp_path / "converted")
    assert report.non_finite["language/layers_1/mlp/experts/up_proj"] == {"nan": 2, "inf": 1}
    assert doctor(mini) == 1
    assert "2 NaN, 1 infinite" in capsys.readouterr().out


@given(st.lists(st.floats(width=16), min_size=1), st.sampled_from([np.float32, np.float16, ml_dtypes.bfloat16]))
def test_counting_by_bits_is_what_numpy_counts(values, dtype):
    array = np.array(values, np.float32).astype(dtype)
    as_float = array.astype(np.float32)
    assert count_non_finite(array) == (np.isnan(as_float).sum(), np.isinf(as_float).sum())


def test_every_problem_is_in_one_report(mini):
    tensors = released_checkpoint.tensors(mini)
    del tensors["image_newline"]
    tensors["extra"] = torch.zeros(2, dtype=torch.int64)
    released_checkpoint.put(mini, tensors)
    released_checkpoint.edit_json(mini / "processor_config.json", lambda c: c.pop("patch_size"))
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        released_checkpoint.edit_json(mini / name, lambda c: c.pop("eos_token", None))
    report = examine(mini)
    assert not report.ok
    text = "\n".join(report.problems)
    for part in ("patch_size", "eos_token", "1 missing tensors", "image_newline", "1 unknown tensors", "extra [2]"):
        assert part in text


def test_broken_files_are_problems_and_no_exception(mini, tmp_path):
    convert(mini, tmp_path / "converted")
    next(mini.glob("*.safetensors")).unlink()
    assert "missing" in "\n".join(examine(mini).problems)
    largest = max((tmp_path / "converted" / "params").rglob("*"), key=lambda f: f.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:-1])
    assert "damaged" in "\n".join(examine(tmp_path / "converted").problems)
    (mini / "config.json").write_text("{")
    assert "config.json" in "\n".join(examine(mini).problems)


def test_nothing_to_examine_is_an_error(tmp_path):
    with pytest.raises(CheckpointError, match="no such directory"):
        doctor(tmp_path / "absent")
    with pytest.raises(CheckpointError, match="not a checkpoint"):
        doctor(tmp_path)
