"""The table of what is disturbed: a command, what it writes, and what its result is.

A further command is one more line of `OPERATIONS`. ``{inputs}`` in its words is the folder that `make_inputs` fills,
and ``{work}`` the one that it writes into, which holds nothing else.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import toy_run

Run = Callable[[Sequence[str]], None]  # a command that must succeed

# What says when a result was made, or how fast.
TIMING = {
    "time", "seconds", "tokens_per_second", "step_seconds", "mfu", "samples_per_second", "answered_now",
    "init_timestamp_nsecs", "commit_timestamp_nsecs",
}  # fmt: skip
RESUMED = ("start", "resume", "stop", "checkpoint")  # lines of a training log that a disturbed run has otherwise
STEPS = 10


@dataclasses.dataclass(frozen=True)
class Operation:
    """``command`` writes ``target`` below the folder {work}.

    Attributes:
      result: of the folder → what must be the same after any disturbance, anything that JSON can hold.
      given: names of inputs that are copied into {work} first, for a command that writes beside what it reads.
      again: the command is run again even when ``target`` is there: it resumes, or writes over.
      phases: (pattern of a path in {work}, name): of what a kill leaves, the first that is there names its moment.
    """

    name: str
    command: str
    target: str
    result: Callable[[Path], Any]
    again: bool = True
    given: tuple[str, ...] = ()
    share: int = 1  # of the kills; 0: it writes nothing
    stdin: str = os.devnull  # a name of the inputs
    phases: tuple[tuple[str, str], ...] = ()

    def words(self, inputs: Path, work: Path) -> list[str]:
        return [word.format(inputs=inputs, work=work) for word in self.command.split()]

    def phase(self, work: Path) -> str:
        """Where a killed process was."""
        for pattern, name in self.phases:
            if next(work.glob(pattern), None) is not None:
                return name
        return "before it wrote"


def tree(work: Path) -> dict[str, str]:
    """Path → digest of every file."""
    files = sorted(file for file in work.rglob("*") if file.is_file())
    return {str(file.relative_to(work)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def converted(work: Path) -> dict[str, Any]:
    """Every parameter and file of a converted directory; Orbax's own files differ from run to run."""
    from dsvl2_jax.checkpoint.locate import open_model, resolve

    directory = resolve(work / "out")
    config, _ = open_model(directory)
    files = {name: digest for name, digest in tree(work).items() if "/params/" not in name}
    manifest = json.loads((directory / "dsvl2_checkpoint.json").read_text())
    files["out/dsvl2_checkpoint.json"] = sorted(manifest["parameters"])
    return {"files": files, "parameters": _parameters(directory, config), "names": _names(work)}


def trained(work: Path) -> dict[str, Any]:
    """Losses to the bit, parameters and optimizer state of the newest checkpoint, and the names of all files."""
    from dsvl2_jax.checkpoint.locate import open_model, resolve

    checkpoint = resolve(work / "run")
    config, _ = open_model(checkpoint)
    lines = [json.loads(line) for line in (work / "run" / "log.jsonl").read_text().splitlines()]
    return {
        "log": [_without_timing(line) for line in lines if line["kind"] not in RESUMED],
        "checkpoint": checkpoint.name,
        "parameters": _parameters(checkpoint, config),
        "names": _names(work),
    }


def evaluated(work: Path) -> dict[str, Any]:
    """Answers and scores."""
    lines = (work / "eval" / "results.jsonl").read_text().splitlines()
    results = sorted((_without_timing(json.loads(line)) for line in lines), key=lambda result: result["line"])
    summary = _without_timing(json.loads((work / "eval" / "summary.json").read_text()))
    return {"results": results, "summary": summary, "names": _names(work)}


def _parameters(directory: Path, config: Any) -> dict[str, str]:
    import numpy as np
    from flax.traverse_util import flatten_dict

    from dsvl2_jax.checkpoint.load import load_params

    digests = {}
    for path, array in flatten_dict(load_params(directory, config)).items():
        content = np.asarray(array)
        digests["/".join(map(str, path))] = f"{content.dtype} {hashlib.sha256(content.tobytes()).hexdigest()}"
    return digests


def _names(work: Path) -> list[str]:
    """Names of all files, without those that Orbax draws."""
    return sorted({re.sub(r"[0-9a-f]{32}\w*", "*", str(file.relative_to(work))) for file in work.rglob("*")})


def _without_timing(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_timing(inner) for key, inner in value.items() if key not in TIMING}
    return value


def make_inputs(inputs: Path, operations: Sequence[Operation], run: Run) -> None:
    """What the operations read: the bundled model, a toy to train, questions, a benchmark's table."""
    needed = {name for operation in operations for name in re.findall(r"{inputs}/(\w+)", operation.command)}
    (inputs / "talk.txt").write_text("Hello <｜end▁of▁sentence｜>\n/nonsense\nAnd now?\n")
    rows = [f"{index}\tWhat is in picture {index}?\tanswer {index}\t{_PIXEL}" for index in range(12)]
    (inputs / "TextVQA_VAL.tsv").write_text("\n".join(["index\tquestion\tanswer\timage", *rows]) + "\n")
    if needed & {"released", "converted", "adapter"}:
        shutil.copytree(toy_run.MICRO, inputs / "released", ignore=shutil.ignore_patterns("train*", "*.py"))
    if "converted" in needed:
        run(["convert", str(inputs / "released"), str(inputs / "converted")])
    if "adapter" in needed:
        from adapter_files import random_adapter

        from dsvl2_jax.checkpoint.adapters import AdapterSettings
        from dsvl2_jax.model.config import Config

        random_adapter(inputs / "adapter", Config.from_file(inputs / "released"), AdapterSettings("dora", 2, 4.0))
    if "questions" in needed:
        run(["micro", "questions", str(inputs / "questions"), "--samples", "3"])
        (file,) = (inputs / "questions").glob("*.jsonl")
        file.rename(inputs / "questions" / "questions.jsonl")
    if needed & {"train", "run", "held"}:
        toy_run.make_model(inputs / "model")
        data = toy_run.make_data(inputs)
        held = {"data.validation.held": {"path": str(toy_run.make_data(inputs, "held.jsonl", samples=4, seed=1))}}
        cadence = {"steps": STEPS, "checkpoint_every": 2, "validate_every": 4, "keep_last": 2}
        # The command itself says where the run is.
        toy_run.write_config(inputs / "train.toml", inputs / "model", data, Path("run"), held | {"run": cadence})
    if "run" in needed:
        run(["train", str(inputs / "train.toml"), f"run.directory={inputs / 'run'}", "run.steps=4"])


# A PNG of one pixel, as the tables of VLMEvalKit hold pictures.
_PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="

_STAGED = ((".out.dsvl2-partial/dsvl2_checkpoint.json", "complete, not renamed"),)
_SAVE = "run/checkpoints/*.orbax-checkpoint-tmp*"

OPERATIONS = (
    Operation(
        "convert", "convert {inputs}/released {work}/out", "out", converted, again=False, share=4,
        phases=(("out", "done"), *_STAGED, (".out.dsvl2-partial/params*", "writing parameters"),
                (".out.dsvl2-partial", "copying files")),
    ),
    Operation(
        "export", "export {inputs}/converted {work}/out", "out", tree, again=False, share=4,
        phases=(("out", "done"), (".out.dsvl2-partial/*.index.json", "complete, not renamed"),
                (".out.dsvl2-partial/*.safetensors", "writing tensors"), (".out.dsvl2-partial", "copying files")),
    ),
    Operation(
        "merge", "merge {inputs}/released {inputs}/adapter {work}/out --layout orbax", "out", converted, again=False,
        share=2,
        phases=(("out", "done"), *_STAGED, (".out.dsvl2-partial/params*", "writing parameters"),
                (".out.dsvl2-partial", "copying files")),
    ),
    Operation(
        "train", "train {inputs}/train.toml run.directory={work}/run", "run", trained, share=6,
        phases=(("run/checkpoints/*.removing", "in pruning"), (_SAVE, "in a save"),
                ("run/checkpoints/[0-9]*", "in a step"), ("run/log.jsonl", "in the first steps"),
                ("run", "beginning the run")),
    ),
    Operation(
        "eval", "eval {inputs}/released {inputs}/questions/questions.jsonl --max-new-tokens 6 --batch-size 2 --limit 6 "
        "--out {work}/eval", "eval", evaluated,
        phases=(("eval/report.html*", "writing the report"), ("eval/summary.json*", "writing the summary"),
                ("eval/thumbnails/*", "answering"), ("eval/results.jsonl", "loading the model"),
                ("eval", "beginning")),
    ),
    Operation(
        "micro draw", "micro draw {work} --count 60 --name drawn", "drawn.jsonl", tree, share=2,
        phases=(("drawn.jsonl", "done"), ("drawn.jsonl.new", "drawing"), ("drawn", "beginning")),
    ),
    Operation(
        "micro questions", "micro questions {work} --samples 3", "questions-6-3.jsonl", tree,
        phases=(("questions*.jsonl", "done"), ("*.new", "drawing"), ("questions*", "beginning")),
    ),
    Operation(
        "data import", "data import {work}/TextVQA_VAL.tsv", "TextVQA_VAL.jsonl", tree,
        given=("TextVQA_VAL.tsv",), share=2,
        phases=(("TextVQA_VAL.jsonl", "done"), (".TextVQA_VAL*/records", "writing"), (".TextVQA_VAL*", "beginning")),
    ),
    Operation(
        "demo", "demo {inputs}/released --out {work}/demo", "demo", tree,
        phases=(("demo/boxes.png*", "drawing boxes"), ("demo/*.png*", "answering"), ("demo", "loading the model")),
    ),
    Operation("doctor", "doctor {inputs}/converted", "", tree, share=0),
    Operation("data check, as text", "data check {inputs}/held.jsonl --ckpt {inputs}/released", "", tree, share=0),
    Operation(
        "generate", "generate {inputs}/released --prompt <｜end▁of▁sentence｜>？ --max-new-tokens 4", "", tree, share=0
    ),
    Operation("chat", "chat {inputs}/released --max-new-tokens 4", "", tree, share=0, stdin="talk.txt"),
    Operation("plan", "plan micro --topology h100-1 --no-cache", "", tree, share=0),
    Operation("plot", "plot {inputs}/run --out {work}/plot.png", "plot.png", tree, phases=(("plot*", "writing"),)),
    Operation(
        "data check", "data check {inputs}/train.jsonl --ckpt {inputs}/released --histogram {work}/lengths.png",
        "lengths.png", tree, phases=(("lengths*", "writing"),),
    ),
)  # fmt: skip
