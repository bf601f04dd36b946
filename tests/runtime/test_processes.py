"""Several real processes on this machine, which talk by gloo: answers and losses of one, and failures."""

from __future__ import annotations

import base64
import concurrent.futures
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import quick_compilation
import toy_run

from dsvl2_jax import configs
from dsvl2_jax.apps.cli.main import main
from dsvl2_jax.train import run as run_module

IMAGES = Path(configs.__file__).parent / "images"
PATIENCE = 600  # seconds until processes are taken to hang
END = 60  # seconds in which the others end after one was killed


class Group:
    """One ``dsvl2`` command as several processes of ``devices`` each; process I's output is in ``I.out``, ``I.err``."""

    def __init__(self, directory, count, *arguments, devices=1, own=(), missing=()):
        """``own``: arguments of process 1 alone. ``missing``: processes that are not started."""
        with socket.socket() as free:
            free.bind(("localhost", 0))
            self.coordinator = f"localhost:{free.getsockname()[1]}"
        flags = f"{quick_compilation.FLAGS} --xla_force_host_platform_device_count={devices}"
        self.directory = directory / f"group-{len(list(directory.iterdir()))}"
        self.processes = {}
        for i in set(range(count)) - set(missing):
            place = self.directory / str(i)
            place.mkdir(parents=True)  # relative names lead process 0 alone to the pictures
            if i == 0:
                (place / "images").symlink_to(IMAGES)
            together = [f"--processes={count}", f"--process={i}", f"--coordinator={self.coordinator}"]
            command = [sys.executable, "-m", "dsvl2_jax", *map(str, arguments), *(own if i == 1 else ()), *together]
            with (place / "out").open("wb") as out, (place / "err").open("wb") as err:
                environment = os.environ | {"XLA_FLAGS": flags}
                self.processes[i] = subprocess.Popen(command, cwd=place, env=environment, stdout=out, stderr=err)

    def out(self, i):
        return (self.directory / str(i) / "out").read_text()

    def err(self, i):
        return (self.directory / str(i) / "err").read_text()

    def errors(self, i):
        return [line for line in self.err(i).splitlines() if line.startswith("dsvl2: ")]

    def finish(self, timeout=PATIENCE):
        """The exit statuses."""
        end = time.monotonic() + timeout
        try:
            return [process.wait(max(0.1, end - time.monotonic())) for process in self.processes.values()]
        except subprocess.TimeoutExpired:
            pytest.fail(f"processes still run after {timeout} seconds:\n{self.err(min(self.processes))}")
        finally:
            for process in self.processes.values():
                process.kill()

    def kill(self, i, condition):
        """Kills process ``i`` when ``condition()``; the exit statuses of the others, which must end by themselves."""
        end = time.monotonic() + PATIENCE
        while not condition():
            if time.monotonic() > end or any(process.poll() is not None for process in self.processes.values()):
                for process in self.processes.values():
                    process.kill()
                pytest.fail(f"too late to kill process {i}:\n{self.err(0)}")
            time.sleep(0.002)
        self.processes.pop(i).kill()
        return self.finish(END)


def assert_said_once(group, statuses, message):
    assert group.finish() == statuses, group.err(0)
    (error,) = group.errors(0)
    assert message in error
    assert group.errors(1) == []


def largest_file(directory, pattern="*"):
    files = [file for file in directory.rglob(pattern) if file.is_file()]
    return max(files, key=lambda file: file.stat().st_size)


PROMPT = ("--image", "images/shapes.png", "--prompt", "What colour is the circle?", "--max-new-tokens", "8", "--json")


@pytest.mark.parametrize(
    ("count", "devices", "mesh"),
    [(2, 2, "tensor=2,expert=2"), pytest.param(4, 1, "data=2,tensor=2", marks=pytest.mark.exhaustive)],
)
def test_generate_gives_the_tokens_of_one_process_and_process_0_alone_reads_and_prints(count, devices, mesh, tmp_path):
    import dsvl2_jax

    model = dsvl2_jax.load()
    conversation = [{"role": "user", "content": f"<image>\n{PROMPT[3]}", "images": [IMAGES / "shapes.png"]}]
    expected = model.generate(model.processor(conversation), max_new_tokens=8)
    group = Group(tmp_path, count, "generate", *PROMPT, "--mesh", mesh, devices=devices)
    assert group.finish() == [0] * count, group.err(0)
    answer = json.loads(group.out(0))
    assert (answer["text"], answer["token_ids"]) == (expected.text, expected.token_ids)
    assert [group.out(i) for i in range(1, count)] == [""] * (count - 1)


def test_an_evaluation_gives_the_answers_of_one_process(tmp_path):
    lines = [{"question": f"<image>\nIs this {what}?", "images": ["shapes.png"], "answers": ["yes"]} for what in "abc"]
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    command = ("eval", tmp_path / "questions.jsonl", "--metric", "exact", "--images", IMAGES, "--batch-size", 2)
    command += ("--max-new-tokens", 4, "--json", "--out")
    assert main([*map(str, command), str(tmp_path / "one")]) == 0
    two = Group(tmp_path, 2, *command, tmp_path / "two", "--mesh", "tensor=2")
    assert two.finish() == [0, 0], two.err(0)
    results = [(tmp_path / name / "results.jsonl").read_text() for name in ("one", "two")]
    assert results[0] == results[1]
    assert json.loads(two.out(0))["samples"] == 3 and two.out(1) == ""


def test_a_server_of_two_processes_answers_as_one_does(tmp_path):
    import dsvl2_jax

    checkpoint = tmp_path / "short"  # a context for which fewer programs are compiled
    shutil.copytree(IMAGES.parent / "micro", checkpoint, ignore=shutil.ignore_patterns("SHA256SUMS", "train"))
    config = json.loads((checkpoint / "config.json").read_text())
    config["language_config"]["max_position_embeddings"] = 1024
    (checkpoint / "config.json").write_text(json.dumps(config))
    model = dsvl2_jax.load(checkpoint)
    url = "data:image/png;base64," + base64.b64encode((IMAGES / "shapes.png").read_bytes()).decode()
    conversation = [{"role": "user", "content": f"<image>\n{PROMPT[3]}", "images": [IMAGES / "shapes.png"]}]
    expected = model.generate(model.processor(conversation), max_new_tokens=8, slots=2)
    options = ("--port", 0, "--slots", 2, "--max-tiles", 4, "--mesh", "tensor=2")
    group = Group(tmp_path, 2, "serve", checkpoint, *options)

    def ask(**fields):
        content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": PROMPT[3]}]
        body = {"messages": [{"role": "user", "content": content}], "max_tokens": 8} | fields
        call = urllib.request.Request(
            group.out(0).strip() + "/v1/chat/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(call, timeout=PATIENCE) as response:
            return json.load(response)["choices"][0]["message"]["content"]

    end = time.monotonic() + PATIENCE
    while not group.out(0).strip() and time.monotonic() < end and group.processes[0].poll() is None:
        time.sleep(0.2)
    assert group.out(0).startswith("http://127.0.0.1:"), group.err(0)
    with concurrent.futures.ThreadPoolExecutor() as pool:
        answers = list(pool.map(lambda _: ask(temperature=0), range(3)))
    assert answers == [expected.text] * 3
    time.sleep(1)  # the others wait, and are woken again
    assert ask(temperature=0, choice=["green", "blue"]) == "blue"
    group.processes[0].send_signal(signal.SIGTERM)
    assert group.finish() == [0, 0], group.err(0)
    assert group.out(1) == ""


STEPS, EVERY = 6, 3


def losses(run):
    found = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in found if line["kind"] == "step"}


def test_training_has_the_losses_of_one_process_on_any_mesh_and_goes_on_after_kills(tmp_path, monkeypatch, capsys):
    toy_run.make_model(tmp_path / "model")
    data, run = toy_run.make_data(tmp_path), tmp_path / "run"
    cadence = {"directory": str(run), "steps": STEPS, "checkpoint_every": EVERY, "validate_every": 99, "log_every": 1}
    tables = {"batch": {"sequences": 4, "microbatch_size": 1}, "run": cadence, "data": {"streams": 2}}
    config = toy_run.write_config(tmp_path / "config.toml", tmp_path / "model", data, run, tables)

    def saved():
        return sorted(path.name for path in (run / "checkpoints").glob("*"))

    with monkeypatch.context() as patch:
        patch.setattr(run_module, "training_mesh", lambda settings: None)  # one device
        run_module.train(config, [f"run.directory={tmp_path / 'alone'}"])
    expected = losses(tmp_path / "alone")

    # Killed in a save: what was cut off does not count.
    two = Group(tmp_path, 2, "train", config, "compute.mesh=data=2")
    (status,) = two.kill(1, lambda: any("tmp" in name for name in saved()))
    assert status == 1, two.err(0)
    assert len(two.errors(0)) == 1 and re.search(r"process 1 of 2 has ended|complete checkpoint", two.errors(0)[0])
    np.testing.assert_allclose(losses(run)[EVERY], expected[EVERY], rtol=1e-5)

    # Killed in a step, process 0 this time.
    two = Group(tmp_path, 2, "train", config, "compute.mesh=data=2")
    (status,) = two.kill(0, lambda: f"step {EVERY + 1}/" in two.err(0) and str(EVERY) in saved())
    assert status in (1, -signal.SIGABRT), two.err(1)
    assert "process 0" in two.err(1) or "another task died" in two.err(1)

    # Four processes, of which two and two share a data shard, go on.
    mesh = ("compute.mesh=data=2,tensor=2", "batch.microbatch_size=2")
    four = Group(tmp_path, 4, "train", config, *mesh)
    assert four.finish() == [0] * 4, four.err(0)
    assert list(losses(run)) == list(range(1, STEPS + 1))
    np.testing.assert_allclose(list(losses(run).values()), list(expected.values()), rtol=1e-5)
    assert saved() == [str(EVERY), str(STEPS)]

    # Each process has kept the sizes of its share of the files: the one that is gone is named, and the way out.
    newest = run / "checkpoints" / str(STEPS)
    gone = largest_file(newest / "params")
    gone.unlink()
    assert main(["generate", str(run), "--prompt", "red"]) == 1
    said = capsys.readouterr().err
    assert f"{newest}: the checkpoint is damaged; copy it again, or remove {newest}: the run " in said
    assert f"{gone.relative_to(newest)}: missing" in said


def test_a_checkpoint_that_lacks_a_file_is_said_once_and_ends_all_processes_alike(checkpoints, tmp_path):
    from dsvl2_jax.convert.to_orbax import convert

    released = Path(shutil.copytree(checkpoints / "mini-base", tmp_path / "released"))
    convert(released, tmp_path / "converted")
    data = largest_file(tmp_path / "converted" / "params")
    shard = largest_file(released, "*.safetensors")
    for file in (data, shard):
        file.unlink()
    command = ("--prompt", "red", "--mesh", "tensor=2")
    groups = [Group(tmp_path, 2, "generate", tmp_path / name, *command) for name in ("converted", "released")]
    name = data.relative_to(tmp_path / "converted")
    assert_said_once(groups[0], [1, 1], "converted checkpoint is damaged; copy or convert it again")
    assert f"{name}: missing, expected " in groups[0].err(0)
    assert_said_once(groups[1], [1, 1], "released: the shards are not those of model.safetensors.index.json")
    assert f"{shard}: this shard is missing. Download it" in groups[1].err(0)


def test_what_is_wrong_is_said_once_and_ends_all_processes_alike(tmp_path):
    prompt = ("generate", "--prompt", "red", "--mesh")
    cases = [
        (Group(tmp_path, 2, *prompt, "tensor=3"), [2, 2], "mesh data=1, tensor=3, expert=1 needs 3 devices"),
        (Group(tmp_path, 2, *prompt, "tensor=2", own=["--seed=1"]), [2, 2], "the command must be the same in all"),
        (Group(tmp_path, 2, *prompt[:3]), [2, 2], "several processes need --mesh"),
        (Group(tmp_path, 2, "generate", "nowhere", *prompt[1:], "tensor=2"), [1, 1], "nowhere: no such directory"),
        (Group(tmp_path, 2, *prompt, "tensor=2", "--image", "no.png"), [1, 1], "no.png"),
    ]
    for group, statuses, message in cases:
        assert_said_once(group, statuses, message)
    for there in (0, 1):
        alone = Group(tmp_path, 2, *prompt, "tensor=2", "--connect-timeout", "3", missing=[1 - there])
        assert alone.finish() == [1]
        assert f"not all processes have met at {alone.coordinator} within 3 seconds" in alone.err(there)
