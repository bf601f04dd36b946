"""`make train-micro` in little: every stage from nothing, on pictures of one shape, until the model sees colours."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dsvl2_jax.train import micro, synthetic

# The stages of `micro.STAGES` in order: steps, and what differs from the preset.
STAGES = {
    "language": (150, ["data.train.text.path=text.jsonl", "data.validation.text.path=text-held.jsonl"]),
    "encoder": (80, ["data.train.pairs.path=captions.jsonl", "data.validation.pairs.path=captions-held.jsonl"]),
    "align": (40, []),
    "simple": (150, []),
    "pretrain": (80, ["data.train.text.path=text.jsonl"]),
    "sft": (80, []),
}
PICTURES = ["data.train.vl.path=pictures.jsonl", "data.validation.vl.path=pictures-held.jsonl"]
QUESTIONS = 200
CHANCE = 1 / 6  # of colours (8) and kinds (6), the better one


def run(*arguments: str, cwd: Path) -> str:
    """`dsvl2` as a user calls it: the suite's eight slow devices are not what training should run on."""
    clean = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
    done = subprocess.run(
        [sys.executable, "-m", "dsvl2_jax", *arguments],
        cwd=cwd,
        env=clean | {"JAX_NUM_CPU_DEVICES": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the data and of a run of every stage."""
    folder = tmp_path_factory.mktemp("micro")
    micro.start(folder / "start")
    config = json.loads((folder / "start/config.json").read_text())
    config["vision_config"] |= {"width": 64, "layers": 2, "heads": 2}
    config["language_config"] |= {"hidden_size": 96, "num_hidden_layers": 2, "intermediate_size": 256}
    config["projector_config"] |= {"input_dim": 64, "n_embed": 96}
    (folder / "start/config.json").write_text(json.dumps(config))
    for name, mixture, count in (
        ("text", "text single", 4000),
        ("captions", "captions single", 4000),
        ("pictures", "single", 4000),
    ):
        synthetic.write(folder, name, count, seed=1, mixture=mixture, turns=4)
        synthetic.write(folder, f"{name}-held", 64, seed=1, mixture=mixture, turns=4, stream=synthetic.HELD_OUT)
    before = "start"
    for stage, (steps, settings) in STAGES.items():
        sizes = [
            "data.workers=0",
            f"run.steps={steps}",
            f"run.validate_every={steps // 2}",
            "run.checkpoint_every=1000",
        ]
        if stage == "encoder":
            sizes += ["batch.sequences=64", "batch.micro_sequences=64"]
        else:
            sizes += ["data.sequence_length=256", "batch.sequences=8", "batch.micro_sequences=8"]
        if stage not in ("language", "encoder"):
            sizes += [*PICTURES, "data.tiles_per_sequence=8"]
        run(
            "train",
            f"micro-{stage}",
            f"model.checkpoint={before}",
            f"run.directory={stage}",
            *sizes,
            *settings,
            cwd=folder,
        )
        before = stage
    return folder


def test_the_stages_are_those_of_make_train_micro():
    assert tuple(STAGES) == micro.STAGES


@pytest.mark.parametrize("stage", STAGES)
def test_loss_falls(trained, stage):
    entries = [json.loads(line) for line in (trained / stage / "log.jsonl").read_text().splitlines()]
    losses = [entry["loss"] for entry in entries if entry["kind"] == "step"]
    tenth = len(losses) // 10
    assert sum(losses[-tenth:]) < sum(losses[:tenth])


def test_answers_are_better_than_chance(trained):
    lines = []
    for index in range(QUESTIONS):
        made = synthetic.sample(synthetic.rng_of(synthetic.HELD_OUT, 2, index), "single")
        (picture,) = made.pictures
        picture.draw().save(trained / f"question-{index}.png")
        found = next(
            q for q in synthetic.questions(picture, synthetic.rng_of(3, 2, index)) if q.task == "colour and shape"
        )
        record = {"question": found.text, "answers": [found.answer], "images": [f"question-{index}.png"]}
        lines.append(json.dumps(record))
    (trained / "questions.jsonl").write_text("\n".join(lines))
    out = run("eval", "sft", "questions.jsonl", "--metric", "exact", "--max-new-tokens", "8", "--json", cwd=trained)
    (task,) = json.loads(out)["tasks"].values()
    assert task["samples"] == QUESTIONS
    assert task["score"] > 2 * CHANCE
