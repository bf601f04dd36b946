"""Conversations about drawn pictures: each is of its mixture, and files do not depend on how they are written."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from picture_answers import asked, assert_right, described, read, seeds, the, work_out

from dsvl2_jax import configs
from dsvl2_jax.apps.cli.main import main
from dsvl2_jax.apps.micro import synthetic
from dsvl2_jax.apps.micro.pictures import COLOURS, Background, Bar, Chart, Picture, Shape, Writing
from dsvl2_jax.apps.micro.synthetic import DEMO, HELD_OUT, MIXTURES, TASKS, TRAINING
from dsvl2_jax.infer.eval import samples as eval_data
from dsvl2_jax.inputs import image_sources
from dsvl2_jax.inputs.grounding import parse_boxes
from dsvl2_jax.inputs.processor import Processor
from dsvl2_jax.inputs.records import parse_record
from dsvl2_jax.inputs.tokenizer import IMAGE_TOKEN
from dsvl2_jax.train.data.check import examine

MICRO = Path(configs.__file__).parent / "micro"


# ---- samples


@settings(max_examples=150)
@given(seeds, st.sampled_from(list(TASKS)))
def test_a_task_asks_its_own_question(seed, task):
    sample = synthetic.task_sample(np.random.default_rng(seed), task)
    (question,) = sample.questions
    assert question.task == task
    assert_right(question, sample.pictures)
    assert question.answer != "0"
    if task == "counting":
        assert question.answer in ("1", "2", "3", "4", "5")


def test_counting_asks_for_every_number_up_to_five():
    rngs = (np.random.default_rng(seed) for seed in range(150))
    answers = Counter(synthetic.task_sample(rng, "counting").questions[0].answer for rng in rngs)
    assert set(answers) == set("12345") and min(answers.values()) >= 5


@settings(max_examples=100)
@given(seeds, st.sampled_from(list(MIXTURES)), st.integers(1, 8))
def test_a_conversation_has_its_pictures_tags_and_different_tasks_first(seed, mixture, turns):
    sample = synthetic.sample(np.random.default_rng(seed), mixture, turns)
    conversation = sample.conversation()
    assert 1 <= len(sample.questions) <= turns
    assert [turn["role"] for turn in conversation] == ["user", "assistant"] * len(sample.questions)
    assert [turn["content"].count(IMAGE_TOKEN) for turn in conversation] == [len(sample.pictures)] + [0] * (
        len(conversation) - 1
    )
    assert conversation[0]["content"].startswith(f"{IMAGE_TOKEN}\n" * len(sample.pictures))
    for question in sample.questions:
        assert_right(question, sample.pictures)
    kinds = {question.task for question in asked(sample.pictures, 0)}
    assert len({question.task for question in sample.questions}) == min(len(kinds), len(sample.questions))


@settings(max_examples=50)
@given(seeds, st.integers(0, 2**31 - 1))
def test_training_evaluation_and_demo_never_share_a_picture(seed, index):
    streams = [
        {
            *synthetic.sample(synthetic.rng_of(stream, seed, index), "full").pictures,
            *synthetic.task_sample(synthetic.rng_of(stream, seed, index), "digits").pictures,
        }
        for stream in (TRAINING, HELD_OUT, DEMO)
    ]
    assert len(set.union(*streams)) == sum(map(len, streams))


def test_numbers_have_one_to_four_digits_equally_often():
    rng = np.random.default_rng(0)
    drawn = [synthetic.number(rng) for _ in range(2000)]
    lengths = Counter(map(len, drawn))
    assert set(lengths) == {1, 2, 3, 4} and min(lengths.values()) > 400
    assert "0" in drawn and all(str(int(text)) == text for text in drawn)


# ---- conversations without pictures


def told(statement: str) -> tuple[list[Picture], bool]:
    """The pictures that a statement in words describes, with boxes in thousandths when it has them."""
    group, grounded = [], False
    for line in statement.splitlines():
        caption = re.fullmatch(r"(?:Image|First image|Second image|Third image): (.+)\.", line)[1]
        shapes, ink, bars = [], None, []
        if boxes := parse_boxes(caption, [(999, 999)]):
            grounded = True
            for b in boxes:
                _, colour, kind = b.label.split()
                column, row = (int((low + high) / 2 / 333) for low, high in ((b.x1, b.x2), (b.y1, b.y2)))
                place = " ".join([("top", "", "bottom")[row], ("left", "", "right")[column]]).strip() or "centre"
                shapes.append(Shape(kind, colour, COLOURS[colour], (b.x1, b.y1, b.x2, b.y2), place))
        else:
            for what, *rest in read(caption):
                if what == "shape":
                    shapes.append(Shape(rest[1], rest[0], COLOURS[rest[0]], (0, 0, 0, 0), rest[2]))
                elif what == "bar":
                    bars.append(Bar(rest[1], rest[0], rest[2], (0, 0, 0, 0)))
                elif what != "chart":
                    ink = Writing(rest[0], rest[1], COLOURS[rest[1]], "", 0, (0, 0, 0, 0))
        plain = Background("plain", ((0, 0, 0), (0, 0, 0)), 8, 0)
        chart = Chart(tuple(bars), (0, 0, 0, 0), False) if bars else None
        group.append(Picture((999, 999), plain, tuple(shapes), ink, chart))
    return group, grounded


@settings(max_examples=300)
@given(seeds)
def test_a_text_states_what_it_asks_about(seed):
    conversation = synthetic.text_sample(np.random.default_rng(seed))
    assert not any(IMAGE_TOKEN in turn["content"] for turn in conversation)
    assert [turn["role"] for turn in conversation] == ["user", "assistant"] * (len(conversation) // 2)
    statement, _, first = conversation[0]["content"].rpartition("\n")
    group, grounded = told(statement)
    texts = [first, *(turn["content"] for turn in conversation[2::2])]
    for text, answer in zip(texts, (turn["content"] for turn in conversation[1::2]), strict=True):
        if "<|ref|>" in text:
            shape = the(re.search(r"<\|ref\|>the (.+)<\|/ref\|>", text)[1], group[0])
            (box,) = parse_boxes(answer, [(999, 999)])
            assert grounded and (box.x1, box.y1, box.x2, box.y2) == shape.box
        elif "<|grounding|>" in text:
            assert statement == f"Image: {answer}."
        elif "left or right" in text or "above or below" in text:
            if grounded:  # otherwise the places alone are told
                assert answer == work_out(text, group)
        elif not text.startswith("Describe the") and text != "What is in the image?":
            assert answer == work_out(text, group), (statement, text)
        elif not grounded:
            assert answer in statement


# ---- files


def files(directory: Path) -> dict[str, bytes]:
    return {str(f.relative_to(directory)): f.read_bytes() for f in sorted(directory.rglob("*")) if f.is_file()}


def records(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """A folder with one data set of each mixture, 66 samples of ``tasks`` and 12 of the others."""
    directory = tmp_path_factory.mktemp("data")
    for mixture in (*MIXTURES, *synthetic.FOCUS, "text", "captions", "regions"):
        synthetic.write(directory, mixture, 12, seed=3, mixture=mixture)
    synthetic.write(directory, "tasks", 66, seed=3, mixture="tasks")
    return directory


@pytest.mark.parametrize(("mixture", "count"), [("text", 150), ("full", 70)])
def test_files_do_not_depend_on_the_number_of_processes(tmp_path, mixture, count):
    for workers in (1, 2):
        synthetic.write(tmp_path / str(workers), "set", count, seed=5, mixture=mixture, turns=4, workers=workers)
    assert files(tmp_path / "1") == files(tmp_path / "2")


def test_a_complete_file_is_kept_and_an_interrupted_one_is_never_there(tmp_path, monkeypatch):
    whole = synthetic.write(tmp_path / "whole", "set", 4, seed=1)
    kept = files(tmp_path / "whole")
    assert synthetic.write(tmp_path / "whole", "set", 9, seed=2) == whole
    assert files(tmp_path / "whole") == kept
    assert len(records(whole)) == 4 and not list(whole.parent.glob("*.new"))

    with monkeypatch.context() as patch:
        line = synthetic._line

        def interrupted(record, folder):
            if record["images"][0].startswith("set-000002"):
                raise KeyboardInterrupt
            return line(record, folder)

        patch.setattr(synthetic, "_line", interrupted)
        with pytest.raises(KeyboardInterrupt):
            synthetic.write(tmp_path / "again", "set", 4, seed=1)
    assert not (tmp_path / "again" / "set.jsonl").exists()
    synthetic.write(tmp_path / "again", "set", 4, seed=1)
    assert files(tmp_path / "again") == kept


def test_streams_and_seeds_make_different_files(tmp_path):
    made = [
        synthetic.write(tmp_path / str(i), "set", 3, seed=seed, stream=stream, mixture="text").read_text()
        for i, (seed, stream) in enumerate([(0, TRAINING), (1, TRAINING), (0, HELD_OUT)])
    ]
    assert len(set(made)) == 3


@pytest.mark.parametrize("mixture", [*MIXTURES, *synthetic.FOCUS, "text", "captions"])
def test_training_reads_every_sample(data, mixture):
    path = data / f"{mixture}.jsonl"
    for record in records(path):
        parsed = parse_record(record)
        assert len(parsed.images) == len(record.get("images", [])) and bool(parsed.images) == (mixture != "text")
        assert (parsed.text is not None) == (mixture == "captions")
    summary = examine(str(path), processor=Processor.from_dir(MICRO), tiles_per_sequence=10)
    assert (summary.samples, summary.broken_samples, summary.problems) == (12, 0, [])
    assert summary.tiles.max() <= 10 and summary.too_long == 0


@pytest.mark.parametrize("name", synthetic.FOCUS)
def test_a_focus_asks_only_its_task(name):
    _, task, turns = synthetic.FOCUS[name]
    asked = []
    for index in range(20):
        made = synthetic.focused(synthetic.rng_of(TRAINING, 3, index), name)
        assert 0 < len(made.questions) <= turns and {q.task for q in made.questions} == {task}
        asked.append(made.questions)
    assert len(set(asked)) > 15


def named(picture: Picture) -> list[str]:
    """What a short caption has to say."""
    if picture.chart:
        return [str(bar.value) for bar in picture.chart.bars]
    printed = [picture.writing.text] if picture.writing else []
    return printed + [shape.kind for shape in picture.shapes]


def test_captions_say_what_is_in_their_one_picture(data):
    """In full or by kinds, printed texts and values alone."""
    full = 0
    for number, record in enumerate(records(data / "captions.jsonl")):
        picture = synthetic.sample(synthetic.rng_of(TRAINING, 3, number), "full", 1).pictures[0]
        assert len(record["images"]) == 1
        said = record["text"].removeprefix(f"{IMAGE_TOKEN}\n")
        if re.split(", | and ", said) != named(picture):
            assert Counter(read(said)) == described(picture)
            full += 1
    assert 0 < full < 12


def test_regions_are_what_their_picture_holds(data):
    """Shapes, signs and bars with their boxes, in order from left to right; edges in shares of the sides."""
    for number, record in enumerate(records(data / "regions.jsonl")):
        picture = synthetic.sample(synthetic.rng_of(TRAINING, 3, number), "full", 1).pictures[0]
        width, height = picture.size
        found = record["regions"]
        for region in found:
            left, top, right, bottom = region["box"]
            assert 0 <= left < right <= width and 0 <= top < bottom <= height
            assert ("left" in region) == ("x1" in region)
            if "left" in region:
                shares = (left / width, top / height, right / width, bottom / height)
                for parts, names in ((20, ("left", "top", "right", "bottom")), (50, ("x1", "y1", "x2", "y2"))):
                    assert all(abs(int(region[n]) - parts * s) <= 0.5 for n, s in zip(names, shares, strict=True))
        shapes = [(r["colour"], r["kind"], r["place"], tuple(r["box"])) for r in found if "kind" in r]
        assert shapes == [(s.colour, s.kind, s.place, tuple(s.box)) for s in picture.shapes]
        signs = "".join(r.get("digit", r.get("letter", "")) for r in found)
        assert signs == (picture.writing.text if picture.writing else "")
        bars = [(r["bar"], r["colour"], int(r["value"])) for r in found if "bar" in r]
        assert bars == ([(b.letter, b.colour, b.value) for b in picture.chart.bars] if picture.chart else [])
        numbered = [r["order"] for r in found if "order" in r]
        assert numbered == [f"{i + 1} of {len(numbered)}" for i in range(len(numbered))]


def test_the_evaluation_asks_every_task_equally_often_and_is_read_whole(data):
    path = data / "tasks.jsonl"
    store = image_sources.open_images("", str(path))
    samples = eval_data.read_samples(path, store, metric=None, template=None, limit=None)
    assert Counter(sample.task for sample in samples) == dict.fromkeys(TASKS, 6)
    assert len({sample.id for sample in samples}) == len(samples)
    for number, (sample, record) in enumerate(zip(samples, records(path), strict=True)):
        made = synthetic.task_sample(synthetic.rng_of(HELD_OUT, 3, number), sample.task)
        (question,) = made.questions
        assert sample.sizes == tuple(picture.size for picture in made.pictures)
        assert record["metric"] == sample.metric == question.metric
        assert sample.question == question.text
        assert eval_data.score(sample, question.answer, [list(box) for box in question.boxes]).value == 1


def test_the_command_writes_the_held_out_stream(tmp_path, capsys):
    path = tmp_path / "mine.jsonl"
    options = ["--name", "mine", "--count", "2", "--seed", "4", "--held-out", "--mixture", "simple"]
    assert main(["micro", "draw", str(tmp_path), *options]) == 0
    assert capsys.readouterr().out == f"{path}\n"
    expected = synthetic.write(tmp_path / "b", "mine", 2, seed=4, stream=HELD_OUT, mixture="simple")
    assert path.read_bytes() == expected.read_bytes()


def test_an_unknown_mixture_is_refused_with_all_that_there_are(tmp_path, capsys):
    assert main(["micro", "draw", str(tmp_path / "new"), "--mixture", "text digits"]) == 2
    message = capsys.readouterr().err
    assert "mixture 'text digits': expected one of 'digit', " in message and "'text digit'" in message
    assert not (tmp_path / "new").exists()


def test_a_seed_always_means_the_same_pictures_and_questions():
    """The data of every stage are known by their seeds alone. Edges of letters are left out: they depend on Pillow."""
    digest = hashlib.sha256()
    for name in [*MIXTURES, *synthetic.FOCUS]:
        for index in range(12):
            rng = synthetic.rng_of(TRAINING, 5, index)
            boxes = synthetic.BOXES.get(name, 1.0)
            made = synthetic.focused(rng, name) if name in synthetic.FOCUS else synthetic.sample(rng, name, 6, boxes)
            said = re.sub(r"\[\[.*?\]\]", "", json.dumps(made.conversation()))
            shapes = [[(s.kind, s.colour, s.box) for s in picture.shapes] for picture in made.pictures]
            digest.update(f"{said} {shapes}".encode())
    assert digest.hexdigest()[:16] == "ed27b1c975d3a9bd"
