"""Commands run nothing of a checkpoint, write where they are told, and open no port, as Python's audit events show."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import quick_compilation
from PIL import Image

from dsvl2_jax import configs

ROOT = Path(__file__).resolve().parents[2]
RELEASED = Path(configs.__file__).parent / "micro"
SHADOWING = ("jax.py", "numpy.py", "sitecustomize.py", "conftest.py", "modeling_deepseek_vl.py", "__init__.py")


class Payload:
    """Unpickled, it makes a file."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return open, (str(self.marker), "w")


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    """What convert, generate, eval and export did with a checkpoint that carries programs, by command.

    Its folder is the current one, as of somebody who looks at a download.
    """
    base = tmp_path_factory.mktemp("audited")
    ckpt, home, out = base / "ckpt", base / "home", base / "out"
    shutil.copytree(RELEASED, ckpt)
    home.mkdir()
    out.mkdir()
    marker = base / "marker"
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt", "tokenizer.pkl", "scheduler.pickle"):
        (ckpt / name).write_bytes(pickle.dumps(Payload(marker)))
    for name in SHADOWING:
        (ckpt / name).write_text(f"open({str(marker)!r}, 'w')\n")
    config = json.loads((ckpt / "config.json").read_text())
    loaded = {"AutoConfig": "modeling_deepseek_vl.Config", "AutoModelForCausalLM": "modeling_deepseek_vl.Model"}
    (ckpt / "config.json").write_text(json.dumps(config | {"auto_map": loaded, "trust_remote_code": True}))
    (ckpt / "SHA256SUMS").unlink()  # of the files as they were
    Image.new("RGB", (64, 64), "red").save(base / "red.png")
    question = {"question": "<image>\nWhat?", "images": ["red.png"], "answers": ["red"]}
    (base / "questions.jsonl").write_text(json.dumps(question) + "\n")
    asked = ["--image", str(base / "red.png"), "--prompt", "What?", "--max-new-tokens", "2"]
    commands = {
        "convert": ["convert", ".", str(out / "converted")],
        "generate": ["generate", ".", *asked],
        "again": ["generate", str(out / "converted"), *asked],
        "eval": ["eval", ".", str(base / "questions.jsonl"), "--metric", "exact", "--out", str(out / "eval")],
        "export": ["export", str(out / "converted"), str(out / "exported")],
        "doctor": ["doctor", "."],
    }
    before = files(base, out, home)
    environment = {"HOME": str(home), "TMPDIR": str(home), "PYTHONDONTWRITEBYTECODE": "1"}
    environment |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": quick_compilation.FLAGS}
    ignored = ("XDG_CACHE_HOME", "PYTHONPATH")
    child = subprocess.run(
        [sys.executable, str(ROOT / "tests/audited.py"), json.dumps(list(commands.values()))],
        cwd=ckpt,
        env={name: value for name, value in os.environ.items() if name not in ignored} | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert child.returncode == 0, child.stderr
    told = dict(zip(commands, map(json.loads, child.stdout.splitlines()), strict=True))
    assert [one["status"] for one in told.values()] == [0] * len(commands), child.stderr
    return told | {"base": base, "before": before, "after": files(base, out, home)}


def files(base: Path, *without: Path) -> set[str]:
    return {str(path) for path in base.rglob("*") if not any(path.is_relative_to(one) for one in without)}


PROGRAMS = {"jax", "jaxlib", "dsvl2_jax", "numpy"}
COMMANDS = ("convert", "generate", "again", "eval", "export", "doctor")


@pytest.mark.parametrize("command", COMMANDS)
def test_no_code_from_checkpoints_and_no_unpickling(seen, command):
    """But of the user's own compiled programs, which hold jax's objects, and arguments that are ours."""
    assert not (seen["base"] / "marker").exists()
    assert {name.partition(".")[0] for name in seen[command].get("unpickled", [])} <= PROGRAMS
    assert seen[command].get("started", []) == []


@pytest.mark.parametrize("command", COMMANDS)
def test_no_write_outside_of_the_destination_and_the_caches(seen, command):
    caches = [seen["base"] / "home", Path(os.environ["JAX_COMPILATION_CACHE_DIR"]), Path("/dev/null")]
    destination = {"convert": "converted", "eval": "eval", "export": "exported"}.get(command, "none")
    for path in map(Path, seen[command].get("written", [])):
        inside = any(path.is_relative_to(cache) for cache in caches)
        # A destination is written under a name of its own beside it, which it gives up when all of it is there.
        below = path.relative_to(seen["base"] / "out").parts if path.is_relative_to(seen["base"] / "out") else ("?",)
        assert inside or not below or below[0].lstrip(".").removesuffix(".dsvl2-partial") == destination, path
    assert seen["after"] == seen["before"]
    assert {path.name for path in (seen["base"] / "out").iterdir()} == {"converted", "eval", "exported"}


@pytest.mark.parametrize("command", COMMANDS)
def test_no_port_is_opened_and_nothing_goes_out(seen, command):
    assert seen[command].get("network", []) == []
    assert seen[command]["ports"] == []
