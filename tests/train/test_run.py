"""`dsvl2 train`: runs that are killed, stopped, refused and gone on with, as real processes where that matters."""

from __future__ import annotations

import errno
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quick_compilation
import released_checkpoint
import toy_run

import dsvl2_jax
from dsvl2_jax.apps.cli.main import main
from dsvl2_jax.checkpoint import orbax_io, rules
from dsvl2_jax.checkpoint.load import load_params
from dsvl2_jax.checkpoint.locate import resolve
from dsvl2_jax.checkpoint.verify import verify
from dsvl2_jax.convert.to_safetensors import export
from dsvl2_jax.errors import CheckpointError, RunError, SettingsError
from dsvl2_jax.model.config import Config
from dsvl2_jax.train import run as run_module
from dsvl2_jax.train.objectives.language import LanguageTrainer
from dsvl2_jax.train.run import train

STEPS = 24
TIMING = ("time", "tokens_per_second", "step_seconds", "mfu")
PATIENCE = 240  # seconds until a process is taken to hang


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """A directory with ``model``, ``train.jsonl`` and ``held.jsonl``."""
    directory = tmp_path_factory.mktemp("toy")
    toy_run.make_model(directory / "model")
    toy_run.make_data(directory)
    toy_run.make_data(directory, "held.jsonl", samples=5, seed=1)
    return directory


def write_config(toy, run, tables):
    """The configuration of a run that validates on ``held.jsonl``, in a file beside the run's directory."""
    held = {"data.validation.held": {"path": str(toy / "held.jsonl")}}
    return toy_run.write_config(run.parent / "config.toml", toy / "model", toy / "train.jsonl", run, held | tables)


def lines(run, kind="step"):
    """The log's lines of a kind, without what the clock says."""
    found = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in TIMING} for line in found if line["kind"] == kind]


def stems(run):
    return sorted(path.name for path in (run / "checkpoints").iterdir())


# Real processes: one device each, and a compilation cache that they share.


class Process:
    """A ``dsvl2 train`` of its own."""

    def __init__(self, config, *overrides):
        environment = os.environ | {"XLA_FLAGS": quick_compilation.FLAGS}
        self.output = config.parent / f"output-{len(list(config.parent.iterdir()))}"
        with self.output.open("wb") as output:
            arguments = [sys.executable, "-m", "dsvl2_jax", "train", str(config), *overrides]
            self.popen = subprocess.Popen(arguments, env=environment, stdout=output, stderr=output)

    def wait_for(self, condition):
        """Until ``condition()``; fails if the process ends first."""
        end = time.monotonic() + PATIENCE
        while not condition():
            assert self.popen.poll() is None, self.output.read_text()
            assert time.monotonic() < end, self.output.read_text()
            time.sleep(0.002)

    def step(self):
        """The last step that it has shown; 0 before the first."""
        return max(map(int, re.findall(r"^step (\d+)/", self.output.read_text(), re.MULTILINE)), default=0)

    def finish(self, send=None):
        if send is not None:
            self.popen.send_signal(send)
        return self.popen.wait(PATIENCE)


def newest(run):
    return max((int(name) for name in stems(run) if name.isdecimal()), default=0)


def process_config(toy, run):
    cadence = {"steps": STEPS, "checkpoint_every": 3, "validate_every": 6, "keep_last": 2}
    return write_config(toy, run, {"run": {"directory": str(run)} | cadence})


@pytest.fixture(scope="module")
def uninterrupted(toy, tmp_path_factory):
    """The directory of a run that nothing happened to."""
    run = tmp_path_factory.mktemp("uninterrupted") / "run"
    process = Process(process_config(toy, run))
    assert process.finish() == 0, process.output.read_text()
    return run


def test_a_run_killed_twice_and_stopped_once_has_the_losses_of_one_left_alone(toy, tmp_path, uninterrupted):
    run = tmp_path / "run"
    config = process_config(toy, run)
    moment = random.Random()
    # At any moment, perhaps before there is anything to go on from.
    process, at = Process(config), moment.randint(4, 10)
    process.wait_for(lambda: process.step() >= at)
    time.sleep(moment.uniform(0, 0.1))
    assert process.finish(signal.SIGKILL) == -signal.SIGKILL
    first = newest(run)
    # During a save.
    process = Process(config)
    process.wait_for(lambda: process.step() > first + 3 and any("tmp" in name for name in stems(run)))
    assert process.finish(signal.SIGKILL) == -signal.SIGKILL
    left = stems(run)
    assert any("tmp" in name for name in left)
    second = newest(run)
    # By SIGTERM: what is computed is saved.
    process = Process(config)
    process.wait_for(lambda: process.step() > second + 1)
    assert process.finish(signal.SIGTERM) == 0, process.output.read_text()
    stop = lines(run, "stop")[-1]
    assert stop["reason"] == "SIGTERM"
    assert stop["step"] == lines(run)[-1]["step"] == newest(run)
    assert f"a checkpoint of step {stop['step']} is written" in process.output.read_text()
    process = Process(config)
    assert process.finish() == 0, process.output.read_text()
    assert [line["step"] for line in lines(run)] == list(range(1, STEPS + 1))
    assert lines(run) == lines(uninterrupted)  # bit by bit: JSON keeps every digit
    assert {line["step"]: line for line in lines(run, "validation")} == {
        line["step"]: line for line in lines(uninterrupted, "validation")
    }
    # The last two, and the best by validation loss.
    losses = {line["step"]: line["loss"] for line in lines(uninterrupted, "validation")}
    best = min(losses, key=losses.get)
    expected = {str(best), str(STEPS - 3), str(STEPS)}
    assert set(stems(run)) == set(stems(uninterrupted)) == expected
    for name in expected:
        same(load_params(run / "checkpoints" / name, config_of(run)), uninterrupted / "checkpoints" / name)
    state = [orbax_io.read_documents(path / "checkpoints" / str(STEPS)) for path in (run, uninterrupted)]
    assert state[0] == state[1]


def config_of(run):
    return Config.from_file(run / "model")


def same(params, directory):
    for found, expected in zip(
        jax.tree.leaves(params),
        jax.tree.leaves(load_params(directory, config_of(directory.parents[1]))),
        strict=True,
    ):
        assert np.asarray(found).tobytes() == np.asarray(expected).tobytes()


def test_every_checkpoint_has_digests_and_a_run_with_verify_does_not_resume_from_a_flipped_bit(
    toy, tmp_path, uninterrupted, monkeypatch, capfd
):
    for name in stems(uninterrupted):
        assert not any("params" in note for note in verify(uninterrupted / "checkpoints" / name))
    run = tmp_path / "run"
    shutil.copytree(uninterrupted, run)
    largest = max(resolve(run).rglob("*"), key=lambda file: file.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 4
    largest.write_bytes(content)
    monkeypatch.setattr(run_module, "training_mesh", lambda settings: None)  # one device
    assert main(["train", str(process_config(toy, run)), "--verify"]) == 1
    assert f"{largest.name}: changed" in capfd.readouterr().err


def test_the_router_bias_and_the_loss_move(uninterrupted):
    losses = [line["loss"] for line in lines(uninterrupted)]
    assert np.mean(losses[-3:]) < np.mean(losses[:3]) - 1
    params = load_params(resolve(uninterrupted), config_of(uninterrupted))
    for layer in (1, 2):
        bias = np.asarray(params["language"][f"layers_{layer}"]["mlp"]["router"]["correction_bias"])
        assert np.abs(bias).max() > 0
    assert all(math.isfinite(line["loss"]) for line in lines(uninterrupted, "validation"))


# In this process: eight devices, so the state is sharded when it is saved and restored.


@pytest.fixture
def sharded(toy, tmp_path):
    """sharded(**run): config and run directory of a run on data=4, expert=2."""

    def make(**run):
        tables = {
            "batch": {"sequences": 8, "microbatch_size": 1},
            "compute": toy_run.COMPUTE | {"mesh": "data=4,expert=2"},
            "run": {"directory": str(tmp_path / "run"), "steps": 4, "checkpoint_every": 2, "validate_every": 99} | run,
        }
        return write_config(toy, tmp_path / "run", tables), tmp_path / "run"

    return make


def test_a_run_survives_a_full_disk_answers_exports_and_refuses_what_is_not_its_own(toy, sharded, capfd, monkeypatch):
    config, run = sharded(steps=4, profile="2:2", tensorboard=True)
    # The disk fills up while the second checkpoint is written; the first one, of a sharded state, resumes exactly.
    place = orbax_io._Document._file

    def full(directory):
        if "/4." in str(directory):
            raise OSError(errno.ENOSPC, "No space left on device")
        return place(directory)

    with monkeypatch.context() as patch:
        patch.setattr(orbax_io._Document, "_file", staticmethod(full))
        assert main(["train", str(config)]) == 1
    error = capfd.readouterr().err
    assert "the disk is too full for this checkpoint" in error
    assert "step 2, is untouched" in error
    assert stems(run) == ["2"]
    assert "too full" in lines(run, "stop")[-1]["reason"]
    before = lines(run)
    assert main(["train", str(config)]) == 0
    assert f"{run}: done: 4 steps" in capfd.readouterr().err
    assert [line["step"] for line in before] == [1, 2, 3, 4]
    assert lines(run) == before
    assert stems(run) == ["2", "4"]
    assert list((run / "profile").rglob("*.xplane.pb"))
    assert list((run / "tensorboard").iterdir())
    assert main(["train", str(config)]) == 0  # nothing left to do
    assert "done: 4 steps" in capfd.readouterr().err
    assert lines(run) == before

    # It answers, is sound, and exports under the released names and shapes.
    assert main(["generate", str(run), "--prompt", "red", "--max-new-tokens", "4", "--json"]) == 0
    answer = json.loads(capfd.readouterr().out)
    assert 1 <= len(answer["token_ids"]) <= 4
    assert main(["doctor", str(run / "checkpoints" / "2")]) == 0
    assert "of a training run" in capfd.readouterr().out
    out = run.parent / "out"
    assert main(["export", str(run), str(out)]) == 0
    tensors = released_checkpoint.tensors(out)
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    assert found == rules.expected_shapes(config_of(run))
    trained, exported = dsvl2_jax.load(run), dsvl2_jax.load(out)
    inputs = trained.processor(
        [{"role": "user", "content": "<image>\nred", "images": [str(toy / "train-0.png")]}], inference=True
    )
    np.testing.assert_array_equal(trained.logits(inputs), exported.logits(inputs))
    export(run, run.parent / "half", dtype="bfloat16")
    for name, tensor in released_checkpoint.tensors(run.parent / "half").items():
        assert str(tensor.dtype) == ("torch.float32" if ".mlp.gate." in name else "torch.bfloat16"), name

    # Another configuration, other data and another model are told apart.
    with pytest.raises(RunError, match=r"optimizer\.learning_rate: 0\.003 at the start of the run, now 0\.1"):
        train(config, ["optimizer.learning_rate=0.1"])
    content = (toy / "train.jsonl").read_text()
    try:
        (toy / "train.jsonl").write_text(content + content.splitlines()[0] + "\n")
        with pytest.raises(RunError, match=r"train\.jsonl has changed"):
            train(config)
    finally:
        (toy / "train.jsonl").write_text(content)
    tokenizer = run / "model" / "tokenizer_config.json"
    tokenizer.write_text(tokenizer.read_text() + "\n")
    with pytest.raises(RunError, match=r"model: tokenizer_config\.json has changed"):
        train(config)
    assert stems(run) == ["2", "4"]


def test_a_loss_that_is_not_finite_names_the_step_and_its_samples_and_keeps_the_last_checkpoint(
    sharded, monkeypatch, capfd
):
    config, run = sharded()  # the program that the test before has compiled
    step, calls = LanguageTrainer.step, []

    def poisoned(self, state, batch):
        calls.append(1)
        if len(calls) == 4:
            state.trained["image_newline"] = state.trained["image_newline"] * jnp.nan
            state.trained["language/embed_tokens"] = state.trained["language/embed_tokens"] * jnp.nan
        return step(self, state, batch)

    monkeypatch.setattr(LanguageTrainer, "step", poisoned)
    assert main(["train", str(config)]) == 1
    error = capfd.readouterr().err
    assert "step 4: the loss is nan" in error
    assert "The last checkpoint, of step 2," in error
    named = [line.strip() for line in error.splitlines() if "train.jsonl:" in line]
    assert len(named) >= 4  # four rows of one sample or more
    assert stems(run) == ["2"]
    assert lines(run, "stop")[-1]["step"] == 4


# Refused before anything is computed.


def test_a_checkpoint_of_another_size_is_refused_naming_both(sharded):
    config, run = sharded()
    with pytest.raises(SettingsError, match=r"model\.size = base, but model\.checkpoint = .*model is of no released"):
        train(config, ["model.size=base"])
    assert not (run / "run.json").exists()


def test_what_does_not_fit_the_devices_is_refused(sharded):
    config, _ = sharded()
    with pytest.raises(SettingsError, match=r"compute\.mesh = 'data=3' makes 3 devices, but there are 8"):
        train(config, ["compute.mesh=data=3", "batch.sequences=3"])
    with pytest.raises(SettingsError, match=r"batch\.sequences = 12 does not divide .* × 8 data shards = 8"):
        train(config, ["compute.mesh=", "batch.sequences=12"])


def test_weights_are_needed_unless_they_are_random(sharded):
    config, _ = sharded()
    with pytest.raises(CheckpointError, match="not a checkpoint"):
        train(config, ["model.random_init=false"])
    with pytest.raises(CheckpointError, match="no such directory"):
        train(config, ["model.checkpoint=/nowhere"])


def test_a_missing_extra_is_named(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "optax", None)
    for name in [name for name in sys.modules if name.startswith("dsvl2_jax.train")]:
        monkeypatch.delitem(sys.modules, name)
    assert main(["train", "tiny-sft"]) == 2
    assert "training needs optax, which is not installed: pip install -e '.[train]'" in capsys.readouterr().err


def test_the_second_interrupt_stops_at_once(capfd):
    before = signal.getsignal(signal.SIGINT)  # ignored in a shell's background job
    with run_module._Signals() as signals:
        os.kill(os.getpid(), signal.SIGINT)
        assert signals.received == "SIGINT"
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert "SIGINT: finishing the step, then writing a checkpoint" in capfd.readouterr().err
    assert signal.getsignal(signal.SIGINT) is before
