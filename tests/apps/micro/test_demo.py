"""`dsvl2 demo`: how answers are judged, and what is refused. The demo of the bundled model is in test_micro.py."""

from __future__ import annotations

import pytest

from dsvl2_jax.apps.cli.main import main
from dsvl2_jax.apps.micro.demo import ASKED, LOCATED, _judge, demo
from dsvl2_jax.apps.micro.questions import Question
from dsvl2_jax.apps.micro.synthetic import TASKS
from dsvl2_jax.errors import UsageError
from dsvl2_jax.infer.loading import LoadOptions
from dsvl2_jax.inputs.grounding import Box

COUNT = Question("counting", "How many shapes are there?", "3")
CAPTION = Question(
    "caption", "What is in the image?", "a red star and a blue cross", "facts", facts=("a red star", "a blue cross")
)
PLACE = Question("grounding", "<|ref|>the star<|/ref|>", "", "iou", boxes=((10, 10, 30, 30),))


def test_what_is_asked_are_tasks_of_the_evaluation():
    assert {*ASKED, LOCATED} <= set(TASKS)


@pytest.mark.parametrize(("text", "right"), [("3", True), (" 3. ", True), ("three", False), ("33", False), ("", False)])
def test_a_short_answer_is_the_truth_or_wrong(text, right):
    assert _judge(COUNT, text, []) == (right, "truth: 3")


@pytest.mark.parametrize(
    ("text", "right", "share"),
    [
        ("A blue cross and a red star.", True, "100%"),
        ("a red star", False, "50%"),
        ("a red star and a red star", False, "50%"),
        ("a red star, a blue cross and a blue cross", False, "67%"),
    ],
)
def test_a_caption_says_all_there_is_and_no_more(text, right, share):
    assert _judge(CAPTION, text, []) == (right, f"{share} of what is to see: {CAPTION.answer}")


@pytest.mark.parametrize(
    ("boxes", "right", "overlap"),
    [
        ([(10, 10, 30, 30)], True, "1.00"),
        ([(10, 10, 30, 20)], True, "0.50"),
        ([(10, 10, 30, 19)], False, "0.45"),
        ([(50, 50, 60, 60), (10, 10, 30, 30)], False, "0.00"),  # the first one counts
        ([(30, 30, 10, 10)], False, "0.00"),
        ([], False, "0.00"),
    ],
)
def test_a_box_is_right_from_half_an_overlap_on(boxes, right, overlap):
    found = _judge(PLACE, "", [Box("the star", *box) for box in boxes])
    assert found == (right, f"overlap with the true box: IoU {overlap}")


def test_a_negative_seed_and_a_file_for_a_folder_are_refused_before_anything_is_loaded(tmp_path, capsys):
    with pytest.raises(UsageError, match="--seed -1: expected 0 or"):
        demo(None, seed=-1, out=tmp_path / "out", options=LoadOptions())
    assert not (tmp_path / "out").exists()
    (tmp_path / "file").touch()
    assert main(["demo", "--out", str(tmp_path / "file" / "out")]) == 2
    assert f"usage error: --out {tmp_path / 'file' / 'out'}: cannot be made" in capsys.readouterr().err


def test_missing_fonts_are_named(tmp_path, monkeypatch):
    from dsvl2_jax.apps.micro import pictures

    pictures._font.cache_clear()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"needs the fonts of matplotlib.*pip install matplotlib"):
        pictures._font("DejaVuSans", 20)
