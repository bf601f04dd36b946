"""What a set has that training does not use or had to guess is told once, with counts: in a run's log and by check."""

import json
import logging
from pathlib import Path

import pytest
from PIL import Image

from dsvl2_jax import configs
from dsvl2_jax.apps.cli.main import main
from dsvl2_jax.inputs.processor import Processor
from dsvl2_jax.model.config import Config
from dsvl2_jax.train.data.notes import BOXES, GUESSED, UNUSED, Notes
from dsvl2_jax.train.data.pipeline import BatchShard, open_validation
from dsvl2_jax.train.settings.schema import DataSettings, Settings, SourceSettings

MICRO = Path(configs.__file__).parent / "micro"


def grounded(box: list[float], **more: object) -> dict:
    turns = [{"role": "user", "content": "<image>Find <ref-object>"}, {"role": "assistant", "content": "<bbox>"}]
    return {"messages": turns, "image": "a.png", "objects": {"ref": ["dog"], "bbox": [box]}} | more


@pytest.fixture(scope="module")
def data_set(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("set")
    Image.new("RGB", (200, 100), "teal").save(root / "a.png")
    records = [
        grounded([10, 10, 50, 50], mood="merry"),
        grounded([0.1, 0.1, 0.5, 0.5], id=3),
        grounded([10, 10, 500, 500], mood="sad", weight=1),
        {"text": "Nothing to learn.", "loss": False, "mood": "gone"},
        grounded([10, 10, 50, 50], rejected_response="B"),
        {"text": "Boxed: <|ref|>cat<|/ref|><|det|>[[0, 0, 500, 500]]<|/det|> <image>", "image": "a.png"},
    ]
    (root / "a.jsonl").write_text("".join(f"{json.dumps(record)}\n" for record in records))
    return root


def test_check_counts_boxes_and_unused_keys_and_draws_what_training_sees(data_set, tmp_path, capsys):
    arguments = ["data", "check", str(data_set / "a.jsonl"), "--draw", str(tmp_path / "drawn")]
    assert main([*arguments, "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert (found["samples"], found["broken_samples"], found["without_loss"]) == (6, 1, 1)
    assert found["boxes"] == {"pixels": 1, "0-1": 1, "0-1000": 1}
    file = str(data_set / "a.jsonl")
    assert found["unused_keys"] == [{"file": file, "key": "mood", "first": f"{file}:1", "samples": 2}]
    drawn = sorted(path.name for path in (tmp_path / "drawn").iterdir())
    assert drawn == [f"a.jsonl-{line}-0.png" for line in (1, 2, 3, 6)]
    # Enlarged by 3; of the first, the box's left edge is at 30.
    with Image.open(tmp_path / "drawn" / drawn[0]) as image:
        assert image.size == (600, 300) and image.getpixel((30, 100)) != image.getpixel((60, 100))
    assert main(["data", "check", file, "--boxes", "0-1000"]) == 1
    shown = " ".join(capsys.readouterr().out.split())
    assert "samples with boxes in 0-1000 3" in shown and "'mood' is not used (samples: 2, the first in line 1)" in shown
    assert "were taken for pixels" not in shown
    main(["data", "check", file])
    assert "for pixels (samples: 1), and for thousandths where" in " ".join(capsys.readouterr().out.split())


def test_a_run_warns_once_a_file_and_counts_at_its_end(data_set, caplog):
    source = {"set": SourceSettings(str(data_set / "a.jsonl"))}
    data = DataSettings(train=source, validation=source, sequence_length=512, packing=False, max_broken_share=0.5)
    with caplog.at_level(logging.WARNING):
        shard = BatchShard(rows=4)
        steps = list(open_validation(Settings(data=data), Processor.from_dir(MICRO), Config.from_file(MICRO), shard))
    assert steps[-1].stats.skipped == {"record": 1, "no loss": 1}
    said = [record.getMessage() for record in caplog.records if "not used" in record.getMessage()]
    assert (
        len(said) == 2 and "a.jsonl:1: 'mood' not used" in said[0] and "in all" in said[1] and "samples: 2" in said[1]
    )


def test_many_files_and_keys_are_told_in_few_lines():
    notes = Notes()
    said = []
    for number in range(50):
        said += notes.take({"name": f"{number}.jsonl:1", UNUSED: ("a", "b"), BOXES: "pixels", GUESSED: number > 5})
        said += notes.take({"name": f"{number}.jsonl:2", UNUSED: ("a",), BOXES: "0-1000", GUESSED: number == 20})
    assert len(said) == 11 and sum("taken for pixels" in line for line in said) == 1
    assert len(notes.totals()) == 12 and notes.boxes == {"pixels": 50, "0-1000": 50}
    assert (notes.unused[0].samples, notes.unused[0].first) == (2, "0.jsonl:1")
