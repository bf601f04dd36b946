"""`make train-micro` scaled down: its stages, from scratch, on one large shape a picture, until it tells colours."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dsvl2_jax.apps.micro import build, pictures, synthetic
from dsvl2_jax.train.settings.load import load

pytestmark = pytest.mark.exhaustive  # five stages, some minutes; tests/train has what each of them does

TEXTS = ["data.train.text.path=texts.jsonl", "data.validation.text.path=texts-held.jsonl"]
CAPTIONS = ["data.train.pairs.path=captions.jsonl", "data.validation.pairs.path=captions-held.jsonl"]


def pictures_of(stage: str) -> list[str]:
    """The preset's sources, each reading the same pictures; text stays text."""
    sources = [f"data.train.{name}.path" for name in load(f"micro-{stage}").data.train]
    files = [f"{path}={'texts' if '.text.' in path else 'pictures'}.jsonl" for path in sources]
    return [*files, "data.validation.vl.path=pictures-held.jsonl", "data.tiles_per_sequence=8"]


# Steps of each stage, and what differs from its preset.
STAGES = {
    "language": (100, TEXTS),
    "encoder": (150, [*CAPTIONS, "batch.sequences=64", "batch.microbatch_size=64"]),
    "align": (60, pictures_of("align")),
    "pretrain": (200, [*pictures_of("pretrain"), "optimizer.schedule=constant"]),
    "sft": (100, pictures_of("sft")),
}
QUESTION, SAMPLES, ASKED = "What colour is the shape?", 3000, 160


def write(folder: Path, name: str, count: int, stream: int) -> None:
    """Pictures of one large shape: conversations about its colour, the same in words, and colours as captions."""
    records: dict[str, list[dict]] = {"pictures": [], "texts": [], "captions": [], "questions": []}
    for index in range(count):
        rng = synthetic.rng_of(stream, 11, index)
        picture = pictures.scene(rng, 1, size=pictures.picture_size(rng, 1))
        file, (shape,) = f"{name or 'train'}-{index}.png", picture.shapes
        picture.draw().save(folder / file, compress_level=1)
        turns = [(QUESTION, shape.colour), ("Describe the image.", synthetic.caption(picture))]
        for form, first in (("pictures", "<image>\n"), ("texts", f"Image: {synthetic.caption(picture)}.\n")):
            messages = []
            for number, (question, answer) in enumerate(turns):
                messages.append({"role": "user", "content": first * (number == 0) + question})
                messages.append({"role": "assistant", "content": answer})
            records[form].append({"messages": messages} | ({"images": [file]} if form == "pictures" else {}))
        records["captions"].append({"images": [file], "text": f"<image>\n{shape.colour}"})
        records["questions"].append({"question": QUESTION, "answers": [shape.colour], "images": [file]})
    for form, some in records.items():
        (folder / f"{form}{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in some))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the data, of a run of every stage, and of ``scores.json``, what `dsvl2 eval` printed."""
    folder = tmp_path_factory.mktemp("micro")
    build.start(folder / "start")
    config = json.loads((folder / "start/config.json").read_text())
    config["vision_config"] |= {"width": 64, "layers": 2, "heads": 2}
    config["language_config"] |= {"hidden_size": 96, "num_hidden_layers": 2, "intermediate_size": 256}
    config["projector_config"] |= {"input_dim": 64, "n_embed": 96}
    (folder / "start/config.json").write_text(json.dumps(config))
    write(folder, "", SAMPLES, synthetic.TRAINING)
    write(folder, "-held", ASKED, synthetic.HELD_OUT)
    before, commands = "start", []
    for stage, (steps, changes) in STAGES.items():
        sizes = ["data.workers=0", f"run.steps={steps}", f"run.validate_every={steps}", "run.checkpoint_every=1000"]
        if stage != "encoder":
            sizes += ["data.sequence_length=256", "batch.sequences=8", "batch.microbatch_size=8"]
        commands.append(
            ["train", f"micro-{stage}", f"model.checkpoint={before}", f"run.directory={stage}", *sizes, *changes]
        )
        before = stage
    commands.append(["eval", "sft", "questions-held.jsonl", "--metric", "exact", "--max-new-tokens", "4", "--json"])
    # One process of its own for all: the suite's eight virtual devices are not what training should run on.
    script = (
        "import json, sys; from dsvl2_jax.apps.cli.main import main\n"
        "for command in json.loads(sys.argv[1]): assert main(command) in (0, None), command"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, json.dumps(commands)],
        cwd=folder,
        env={key: value for key, value in os.environ.items() if key != "XLA_FLAGS"} | {"JAX_NUM_CPU_DEVICES": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (folder / "scores.json").write_text(done.stdout[done.stdout.rindex('{"tasks"') :])
    return folder


@pytest.mark.parametrize("stage", STAGES)
def test_loss_falls(trained, stage):
    entries = [json.loads(line) for line in (trained / stage / "log.jsonl").read_text().splitlines()]
    losses = [entry["loss"] for entry in entries if entry["kind"] == "step"]
    assert len(losses) == STAGES[stage][0]
    tenth = len(losses) // 10
    # Fine-tuning reads the answers that pre-training has read: there is little left to learn, and nothing to lose.
    assert sum(losses[-tenth:]) < sum(losses[:tenth]) * (1.1 if stage == "sft" else 1)


def test_answers_are_twice_as_often_right_as_by_chance(trained):
    (task,) = json.loads((trained / "scores.json").read_text())["tasks"].values()
    assert task["samples"] == ASKED
    assert task["score"] > 2 / len(pictures.COLOURS)
