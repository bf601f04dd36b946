"""`dsvl2 data check`: everything in a set is counted, every broken sample is told, and the exit status says so."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dsvl2_jax import configs
from dsvl2_jax.apps.cli.main import main
from dsvl2_jax.inputs.processor import Processor
from dsvl2_jax.train.data.check import Summary, examine

MICRO = Path(configs.__file__).parent / "micro"


def ask(answer: str, image: str | None = None) -> str:
    turns = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": answer}]
    return json.dumps({"messages": turns} | ({"image": image} if image else {}))


@pytest.fixture(scope="module")
def data_set(tmp_path_factory) -> Path:
    """Five good samples, two of them with an image, and three broken ones."""
    root = tmp_path_factory.mktemp("set")
    Image.new("RGB", (200, 100), "teal").save(root / "a.png")
    good = [ask("A."), ask("B.", "a.png"), ask("word " * 300), ask("D.", "a.png"), json.dumps({"text": "E."})]
    bad = ["{", ask("F.", "nope.png"), ask("G.", "gone.png")]
    (root / "all.jsonl").write_text("\n".join([*good, "", *bad]))
    (root / "good.jsonl").write_text("\n".join(good))
    return root


def test_every_sample_is_counted_as_the_processor_sees_it(data_set):
    processor = Processor.from_dir(MICRO)
    path = data_set / "all.jsonl"
    summary = examine(str(path), processor=processor, sequence_length=200, mask_prompt=True, most_problems=2)
    assert (summary.files, summary.samples, summary.broken_samples, summary.too_long) == (1, 8, 3, 1)
    assert summary.broken == {"image missing": 2, "record": 1}
    assert [problem.split(": ")[0] for problem in summary.problems] == [f"{path}:7", f"{path}:8"]
    turns = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "A."}]
    inputs = processor(turns, inference=False, mask_prompt=True)
    assert summary.tokens[0] == len(inputs.input_ids)
    assert summary.supervised[0] == (inputs.labels[1:] >= 0).sum() < len(inputs.input_ids) - 1
    assert summary.tiles.tolist() == [0, 3, 0, 3, 0]  # a global view and two local tiles


def test_json_has_the_counts_and_the_status_tells_of_broken_samples(data_set, capsys):
    assert main(["data", "check", str(data_set / "all.jsonl"), "--json"]) == 1
    counts = json.loads(capsys.readouterr().out)
    assert (counts["samples"], counts["broken_samples"], counts["with_images"], counts["text_only"]) == (8, 3, 2, 3)
    assert counts["tokens"]["max"] >= counts["tokens"]["p90"] >= counts["tokens"]["median"] >= counts["tokens"]["min"]
    assert counts["tiles"] == {"sum": 6, "min": 0, "median": 0, "p90": 3, "p99": 3, "max": 3}
    assert main(["data", "check", str(data_set / "good.jsonl"), "--json"]) == 0


def test_the_report_lists_problems_and_draws_histograms(data_set, capsys, tmp_path):
    picture = tmp_path / "lengths.png"
    command = ["data", "check", str(data_set / "all.jsonl"), "--histogram", str(picture), "--problems", "1"]
    assert main(command) == 1
    out = capsys.readouterr().out
    for text in ("samples", "tokens of a sample", "image tiles of a sample", "█", "broken: 3", "and 2 more"):
        assert text in out
    assert f"{data_set / 'all.jsonl'}:7: not valid JSON" in out
    with Image.open(picture) as image:
        assert image.format == "PNG" and np.asarray(image.convert("L")).std() > 5


def test_pictures_that_are_read_otherwise_than_seen_are_counted(capsys, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 8
    Image.new("RGB", (200, 100)).save(tmp_path / "turned.jpg", exif=exif)
    Image.new("RGBA", (100, 100)).save(tmp_path / "clear.png", exif=exif)
    Image.new("RGBA", (100, 100), "red").save(tmp_path / "opaque.png")
    lines = [ask("A.", name) for name in ("turned.jpg", "clear.png", "opaque.png")]
    (tmp_path / "all.jsonl").write_text("\n".join(lines))
    command = ["data", "check", str(tmp_path / "all.jsonl")]
    for option in ([], ["--as-seen"]):
        assert main([*command, "--json", *option]) == 0
        assert json.loads(capsys.readouterr().out)["pictures"] == {"turned": 2, "transparent": 1, "16-bit": 0}
    assert main(command) == 0
    out = capsys.readouterr().out
    assert out.count("2 pictures with an EXIF orientation") == 1 and "data.as_seen = true" in out
    assert main([*command, "--as-seen"]) == 0
    assert "data.as_seen" not in capsys.readouterr().out


def test_bad_calls_are_refused(data_set, capsys, tmp_path):
    assert main(["data", "check", str(tmp_path / "none.jsonl")]) == 1
    assert "no such file" in capsys.readouterr().err
    assert main(["data", "check", str(data_set / "good.jsonl"), "--histogram", "a.pdf"]) == 2
    assert main(["data", "check", str(data_set / "good.jsonl"), "--images", str(tmp_path / "nowhere")]) == 1
    assert "no such folder of images" in capsys.readouterr().err


def test_a_set_without_a_usable_sample_is_still_reported(tmp_path, capsys):
    (tmp_path / "bad.jsonl").write_text("{\n{\n")
    picture = tmp_path / "empty.png"
    assert main(["data", "check", str(tmp_path / "bad.jsonl"), "--histogram", str(picture)]) == 1
    assert "broken: 2" in capsys.readouterr().out
    assert picture.is_file()
    empty = np.zeros(0, np.int64)
    assert Summary(1, 2, {"record": 2}, [], empty, empty, empty, 9, 9).as_dict()["tokens"] == {"sum": 0}


def test_tokens_of_images_are_told_and_follow_the_budget_and_the_frames(capsys, tmp_path):
    Image.new("RGB", (500, 250), "teal").save(tmp_path / "a.png")
    (tmp_path / "clip").mkdir()
    for number in range(9):
        Image.new("RGB", (60, 30)).save(tmp_path / "clip" / f"{number}.png")
    video = {"video": "clip", "query": "<video>\nWhat?", "response": "A."}
    lines = [ask("A.", "a.png"), json.dumps(video), json.dumps(video | {"frames": 2})]
    (tmp_path / "all.jsonl").write_text("\n".join(lines))

    def counts(*options):
        assert main(["data", "check", str(tmp_path / "all.jsonl"), "--json", *options]) == 0
        return json.loads(capsys.readouterr().out)

    plain, one, many = counts(), counts("--max-tiles", "1"), counts("--max-tiles", "18", "--frames", "9")
    assert plain["tiles"]["sum"] == 9 + 8 * 2 + 2 * 2
    assert one["tiles"]["sum"] == 2 + 8 * 2 + 2 * 2
    assert many["tiles"]["sum"] == 9 + 9 * 2 + 2 * 2
    for found in (plain, one, many):
        side = Processor.from_dir(MICRO).config.tokens_per_side
        assert found["image_tokens"]["sum"] < found["tokens"]["sum"] and found["image_tokens"]["min"] > 2 * side**2
    assert one["image_tokens"]["sum"] < plain["image_tokens"]["sum"] < many["image_tokens"]["sum"]
    assert main(["data", "check", str(tmp_path / "all.jsonl")]) == 0
    assert "of images" in capsys.readouterr().out
    assert main(["data", "check", str(tmp_path / "all.jsonl"), "--max-tiles", "0"]) == 2
