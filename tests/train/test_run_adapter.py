"""A run that trains an adapter on a quantized model: it resumes to the bit, answers, and refuses another base."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import released_checkpoint
import toy_run

from dsvl2_jax.apps.cli.main import main
from dsvl2_jax.checkpoint.adapters import read_adapter
from dsvl2_jax.convert.to_orbax import convert
from dsvl2_jax.errors import CheckpointError, RunError, SettingsError
from dsvl2_jax.model.config import Config
from dsvl2_jax.model.quantization import Quantization
from dsvl2_jax.train.run import train

TIMING = ("time", "tokens_per_second", "step_seconds", "mfu")
TARGETS = ["^language/.*self_attn", "^language/.*mlp/experts/"]


@pytest.fixture
def given(tmp_path, checkpoints):
    """A quantized model, and the configuration of a run of four steps on data=4, expert=2."""
    base = tmp_path / "base"
    convert(checkpoints / "mini-base", base, quantization=Quantization("int8"))
    words = np.random.default_rng(0).choice(["red", "blue", "two", "three"], size=(24, 6))
    data = tmp_path / "text.jsonl"
    data.write_text("".join(json.dumps({"text": " ".join(line)}) + "\n" for line in words))
    tables = {
        "model": {"checkpoint": str(base)},
        "data": {"sequence_length": 64, "tiles_per_sequence": 0, "max_segments": 8, "packing_bins": 2},
        "data.train.toy": {"path": str(data)},
        "batch": {"sequences": 8},
        "adapter": {"kind": "dora", "rank": 2, "dropout": 0.1, "targets": TARGETS},
        "optimizer": {"learning_rate": 0.01},
        "compute": toy_run.COMPUTE | {"mesh": "data=4,expert=2"},
        "run": {"directory": str(tmp_path / "run"), "steps": 4, "checkpoint_every": 2},
    }
    lines = []
    for name, table in tables.items():
        lines += [f"[{name}]", *(f"{key} = {json.dumps(value)}" for key, value in table.items())]
    (tmp_path / "config.toml").write_text("\n".join(lines))
    return tmp_path


def steps(run):
    found = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in TIMING} for line in found if line["kind"] == "step"]


def test_a_run_resumes_to_the_bit_and_keeps_its_adapter_alone(given, checkpoints, capfd):
    config, run, base = given / "config.toml", given / "run", given / "base"
    assert main(["train", str(config)]) == 0
    assert f"dsvl2 generate {base} --adapter {run}" in capfd.readouterr().err
    whole, adapter = steps(run), (run / "checkpoints/4/adapter/adapter_model.safetensors").read_bytes()
    assert not (run / "checkpoints/4/params").exists()  # of the model, nothing is kept

    shutil.rmtree(run / "checkpoints/4")  # as if killed before
    train(config, verify=True)
    assert steps(run) == whole
    assert (run / "checkpoints/4/adapter/adapter_model.safetensors").read_bytes() == adapter

    arrays, described = read_adapter(run, Config.from_file(base))
    assert (described.kind, described.rank, described.base) == ("dora", 2, str(base))
    assert np.abs(arrays["language"]["layers_1"]["mlp"]["experts"]["down_proj"]["lora_b"]).max() > 0
    assert main(["generate", str(run), "--prompt", "red"]) == 1
    assert f"--adapter {run / 'checkpoints/4/adapter'}" in capfd.readouterr().err.replace("\n", " ")

    # Another model in its place, and another rank.
    with pytest.raises(RunError, match=r"adapter\.rank: 2 at the start of the run, now 3"):
        train(config, ["adapter.rank=3"])
    shutil.rmtree(base)
    changed = released_checkpoint.copy(checkpoints / "mini-base", given / "changed")
    tensors = released_checkpoint.tensors(changed)
    tensors["language.model.norm.weight"] = tensors["language.model.norm.weight"] + 1
    convert(released_checkpoint.put(changed, tensors), base, quantization=Quantization("int8"))
    with pytest.raises(CheckpointError, match="the adapter was trained on another checkpoint"):
        train(config, ["run.steps=6"])


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("adapter.rank=0", r"adapter\.rank: must be positive, not 0"),
        ("adapter.targets=['experts/nothing']", "'experts/nothing' matches no parameter of this model"),
        ("adapter.targets=['router']", "matches nothing that can have an adapter, only"),
        ("adapter.targets=['layers_1/self_attn']", "only some of the layers of language/layers_1_to_2"),
        ("adapter.targets=['(']", "is not a regular expression"),
        ("stage.parameters=[{match = '.'}]", "trains an adapter and leaves the model as it is: remove the rules"),
        ("stage.bias_update_speed=0.1", "the routers' biases too: set it to 0"),
        ("model.random_init=true", "it needs a model that has learnt something"),
    ],
)
def test_what_makes_no_sense_is_refused(given, override, expected):
    with pytest.raises(SettingsError, match=expected):
        train(given / "config.toml", [override])


def test_all_of_a_quantized_model_cannot_be_trained(given):
    with pytest.raises(SettingsError, match="its weights are quantized, and training changes plain ones"):
        rules = "[{match = 'attn_pool|correction_bias', train = false}, {match = '.'}]"
        train(given / "config.toml", ["adapter.kind=none", f"stage.parameters={rules}"])
