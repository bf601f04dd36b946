"""The metrics on examples worked by hand, and what holds for any text or box."""

from __future__ import annotations

import doctest

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsvl2_jax.infer.eval import metrics

TEXTS = st.text(alphabet="abcAB é1.'", max_size=12)
BOXES = st.tuples(*[st.integers(0, 40)] * 4).map(lambda b: (b[0], b[1], b[0] + b[2] + 1, b[1] + b[3] + 1))


def test_examples_of_the_docstring():
    assert doctest.testmod(metrics).failed == 0


@pytest.mark.parametrize(
    ("answer", "references", "score"),
    [
        ("Red", ["red"], 1),
        ("  a  red\nstar. ", ["A red star"], 1),
        ("two", ["2", "two"], 1),
        ("red star", ["red"], 0),
        ("3.5", ["35"], 0),  # only a final full stop goes
        ("", ["red"], 0),
    ],
)
def test_exact(answer, references, score):
    assert metrics.exact(answer, references) == score


@pytest.mark.parametrize(
    ("answer", "references", "score"),
    [("The sign says  STOP here", ["stop"], 1), ("st op", ["stop"], 0), ("no", ["yes", "no"], 1), ("", ["x"], 0)],
)
def test_contains(answer, references, score):
    assert metrics.contains(answer, references) == score


@pytest.mark.parametrize(
    ("answer", "references", "score"),
    [
        ("hello", ["hello"], 1),
        ("HELLO ", ["hello"], 1),  # case and spaces count for nothing
        ("Helo", ["hello"], 0.8),  # one letter of five
        ("kitten", ["sitting"], 1 - 3 / 7),  # three edits of seven
        ("ab", ["ac"], 0),  # half of it is wrong: NL = 0.5 is cut off
        ("abc", ["abd"], 2 / 3),  # NL = 1/3 is not
        ("12 May 2020", ["May 12", "12 may 2021"], 1 - 1 / 11),  # the nearest reference
        ("entirely else", ["hello"], 0),
        ("", ["hello"], 0),
    ],
)
def test_anls(answer, references, score):
    assert metrics.anls(answer, references) == pytest.approx(score)


@pytest.mark.parametrize(
    ("answer", "references", "score"),
    [
        ("100", ["100"], 1),
        ("105", ["100"], 1),  # 5 % is within
        ("95", ["100"], 1),
        ("106", ["100"], 0),
        ("-104", ["-100"], 1),
        ("-100", ["100"], 0),
        ("0.31", ["0.3"], 1),
        ("5%", ["0.05"], 1),
        ("5", ["5%"], 0),  # 5 is not 0.05
        ("0", ["0"], 1),
        ("0.001", ["0"], 0),  # 5 % of nothing
        ("Blue", ["blue"], 1),  # texts must be equal but for case
        ("blues", ["blue"], 0),
        ("1,000", ["1000"], 0),
        ("nan", ["NaN"], 1),  # a text, no number
        ("2004", ["2010"], 1),  # years are numbers too: the definition's weakness
    ],
)
def test_relaxed(answer, references, score):
    assert metrics.relaxed(answer, references) == score


@pytest.mark.parametrize(
    ("answer", "agreeing", "score"),
    [
        ("stop", 10, 1.0),
        ("stop", 4, 1.0),
        # Three agree: leaving one of them out leaves two (2/3, three times), another three (1, seven times).
        ("stop", 3, (3 * 2 / 3 + 7) / 10),
        ("stop", 2, (2 * 1 / 3 + 8 * 2 / 3) / 10),
        ("stop", 1, 9 / 10 / 3),
        ("stop", 0, 0.0),
    ],
)
def test_vqa_averages_over_leaving_out_each_annotator(answer, agreeing, score):
    references = ["Stop."] * agreeing + [f"other {i}" for i in range(10 - agreeing)]
    assert metrics.vqa(answer, references) == pytest.approx(score)


@pytest.mark.parametrize(
    ("text", "form"),
    [
        ("The Two dogs.", "2 dogs"),
        ("none", "0"),
        ("1,000", "1000"),
        ("2.5 kg.", "2.5 kg"),
        ("dont", "don't"),
        ("shouldntve", "shouldntve"),  # only one apostrophe may be missing
        ("couldn'tve", "couldn't've"),
        ("John's", "john 's"),
        ("coca-cola", "coca cola"),
        ("coca - cola", "coca cola"),
        ("yes/no?", "yes no"),
        ("a\nb\tc", "b c"),
    ],
)
def test_vqa_normalise(text, form):
    assert metrics.vqa_normalise(text) == form


def test_vqa_needs_several_annotators():
    with pytest.raises(ValueError, match="several annotators, found 1"):
        metrics.vqa("x", ["x"])


CHOICES = ["a dog", "a cat", "two dogs", "it"]


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("B", "B"), ("b", "B"), ("(b)", "B"), ("B. a cat", "B"), ("C)", "C"), ("**B**", "B"), ("B\nsince it is", "B"),
        ("A cat", "B"), ("a dog.", "A"), ("Two dogs", "C"),
        ("The answer is B because of its ears.", "B"), ("the answer is a dog", "A"), ("The answer is A because", "A"),
        ("First I thought A. The answer is (C).", "C"), ("Option C", "C"), ("Answer: C", "C"),
        ("It must be (D), I think", "D"), ("I would say C here", "C"), ("I see two dogs there", "C"),
        ("E", None), ("", None), ("a dog and a cat", None), ("B or C, who knows (B) (C)", None), ("Nothing", None),
    ],
)  # fmt: skip
def test_chosen(answer, letter):
    assert metrics.chosen(answer, CHOICES) == letter


def test_choice_takes_letters_and_texts_as_reference():
    assert metrics.choice("B", CHOICES, "a cat") == 1
    assert metrics.choice("a cat", CHOICES, "b") == 1
    assert metrics.choice("A", CHOICES, "B") == 0
    with pytest.raises(ValueError, match=r"'E' is neither a letter up to D nor one of the choices"):
        metrics.choice("A", CHOICES, "E")


@pytest.mark.parametrize(
    ("box", "reference", "value"),
    [
        ((0, 0, 10, 10), (0, 0, 10, 10), 1),
        ((0, 0, 10, 10), (5, 0, 15, 10), 1 / 3),  # 50 of 150
        ((0, 0, 10, 10), (0, 0, 5, 5), 1 / 4),
        ((0, 0, 10, 10), (10, 0, 20, 10), 0),  # touching only
        ((10, 10, 0, 0), (0, 0, 10, 10), 0),  # corners in the wrong order
        ((3, 3, 3, 3), (0, 0, 10, 10), 0),
    ],
)
def test_iou(box, reference, value):
    assert metrics.iou(box, reference) == pytest.approx(value)


def test_boxes_iou_takes_as_many_boxes_as_references():
    here, there = (0, 0, 10, 10), (20, 20, 30, 30)
    assert metrics.boxes_iou([there, here], [here]) == 0  # the first box counts
    assert metrics.boxes_iou([], [here]) == 0
    assert metrics.boxes_iou([there, here], [here, there]) == 1
    assert metrics.boxes_iou([here], [here, there]) == 0.5
    assert metrics.boxes_iou([here, here], [here, there]) == 0.5  # one reference is found once


@pytest.mark.parametrize(
    ("answer", "wanted", "score"),
    [
        ("A red star and a blue circle.", ["a red star", "a blue circle"], 1),
        ("a blue circle, a red star", ["a red star", "a blue circle"], 1),
        ("A red star.", ["a red star", "a blue circle"], 1 / 2),
        ("a red star, a red star, a green square", ["a red star"], 1 / 3),
        ("a red star, a red star", ["a red star", "a red star"], 1),
        ("", ["a red star"], 0),
        ("", [], 1),
    ],
)
def test_facts(answer, wanted, score):
    assert metrics.facts(answer, wanted) == pytest.approx(score)


def distance_by_definition(first: str, second: str) -> int:
    if not first or not second:
        return len(first) + len(second)
    return min(
        distance_by_definition(first[1:], second) + 1,
        distance_by_definition(first, second[1:]) + 1,
        distance_by_definition(first[1:], second[1:]) + (first[0] != second[0]),
    )


@given(st.text("ab", max_size=5), st.text("ab", max_size=5))
def test_edit_distance_is_levenshteins(first, second):
    assert metrics.edit_distance(first, second) == distance_by_definition(first, second)


@given(TEXTS, TEXTS, TEXTS)
def test_edit_distance_is_a_metric(a, b, c):
    distance = metrics.edit_distance
    assert distance(a, a) == 0
    assert distance(a, b) == distance(b, a)
    assert abs(len(a) - len(b)) <= distance(a, b) <= max(len(a), len(b))
    assert distance(a, c) <= distance(a, b) + distance(b, c)


@given(TEXTS, st.lists(TEXTS, min_size=1, max_size=3))
def test_anls_is_one_for_a_reference_and_else_zero_or_over_a_half(answer, references):
    assert metrics.anls(references[0], references) == 1
    value = metrics.anls(answer, references)
    assert value == 0 or 0.5 < value <= 1
    assert value == max(metrics.anls(answer, [reference]) for reference in references)


@given(TEXTS, st.lists(TEXTS, min_size=2, max_size=10))
def test_text_scores_lie_between_0_and_1(answer, references):
    for score in (metrics.exact, metrics.contains, metrics.relaxed, metrics.vqa, metrics.facts):
        assert 0 <= score(answer, references) <= 1
    assert metrics.chosen(answer, references) in [None, *metrics.LETTERS[: len(references)]]


@given(BOXES, BOXES, st.integers(1, 5), st.integers(-9, 9))
def test_iou_is_symmetric_and_free_of_scale_and_place(a, b, scale, shift):
    value = metrics.iou(a, b)
    assert 0 <= value <= 1
    assert (value == 1) == (a == b)
    assert value == metrics.iou(b, a)
    moved = [[x * scale + shift for x in box] for box in (a, b)]
    assert metrics.iou(*moved) == pytest.approx(value)


@given(BOXES, BOXES)
def test_iou_counts_pixels(a, b):
    pixels = [{(x, y) for x in range(box[0], box[2]) for y in range(box[1], box[3])} for box in (a, b)]
    assert metrics.iou(a, b) == pytest.approx(len(pixels[0] & pixels[1]) / len(pixels[0] | pixels[1]))


@given(st.lists(BOXES, max_size=4), st.lists(BOXES, min_size=1, max_size=4))
def test_boxes_iou_stays_in_range(boxes, references):
    assert 0 <= metrics.boxes_iou(boxes, references) <= 1
    assert metrics.boxes_iou(references, references) == pytest.approx(1)
