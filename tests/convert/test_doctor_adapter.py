"""The doctor's findings on adapters."""

import json

import numpy as np
from adapter_files import random_adapter
from safetensors.numpy import load_file, save_file

from dsvl2_jax.checkpoint.adapters import CONFIG_NAME, MANIFEST_NAME, WEIGHTS_NAME, AdapterSettings
from dsvl2_jax.convert.doctor import doctor
from dsvl2_jax.model.config import Config


def test_a_healthy_adapter_is_described(checkpoints, tmp_path, capsys):
    settings = AdapterSettings("dora", 2, 8.0, base="mini", base_digest="12-34")
    config = Config.from_file(checkpoints / "mini-small")
    adapter = random_adapter(tmp_path / "adapter", config, settings, "layers_1/mlp")
    capsys.readouterr()
    assert doctor(adapter, as_json=True) == 0
    report = json.loads(capsys.readouterr().out)
    tensors = load_file(adapter / WEIGHTS_NAME)
    assert report["parameters"] == sum(x.size for x in tensors.values())
    assert report["dtypes"] == {"float32": sum(x.nbytes for x in tensors.values())}
    assert report["modules"] == {f"experts.{name}": 8 for name in ("down_proj", "gate_proj", "up_proj")} | {
        f"shared_experts.{name}": 1 for name in ("down_proj", "gate_proj", "up_proj")
    }
    assert (report["kind"], report["rank"], report["alpha"], report["base"]) == ("dora", 2, 8.0, "mini")
    assert doctor(adapter) == 0
    out = capsys.readouterr().out
    assert "DoRA" in out and "mini, digest 12-34" in out and "usable with its checkpoint" in out


def test_every_problem_of_an_adapter_is_told(checkpoints, tmp_path, capsys):
    config = Config.from_file(checkpoints / "mini-small")
    adapter = random_adapter(tmp_path / "adapter", config, AdapterSettings("lora", 2, 8.0), "o_proj")
    tensors = load_file(adapter / WEIGHTS_NAME)
    name = next(iter(tensors))
    save_file(tensors | {name: tensors[name] * np.nan}, adapter / WEIGHTS_NAME)
    (adapter / CONFIG_NAME).write_text('{"peft_type": "LORA", "r": 0}')
    capsys.readouterr()
    assert doctor(adapter, as_json=True) == 1
    problems = "\n".join(json.loads(capsys.readouterr().out)["problems"])
    for expected in (f"{WEIGHTS_NAME}: changed", "r: found 0", f"{name}: has numbers that are none"):
        assert expected in problems
    (adapter / MANIFEST_NAME).unlink()
    (adapter / WEIGHTS_NAME).unlink()
    assert doctor(adapter) == 1
    out = capsys.readouterr().out
    assert "neither adapter_model.safetensors" in out and "not usable" in out and "written elsewhere" in out
