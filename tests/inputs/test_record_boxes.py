"""Boxes beside a record's text: three kinds of them give the model's own syntax, and what is inconsistent is told."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsvl2_jax import configs
from dsvl2_jax.errors import ConversationError, SampleError
from dsvl2_jax.infer.eval.samples import read_samples
from dsvl2_jax.inputs.grounding import format_boxes
from dsvl2_jax.inputs.image_sources import FolderImages
from dsvl2_jax.inputs.images import image_size
from dsvl2_jax.inputs.processor import Processor
from dsvl2_jax.inputs.record_boxes import (
    BOX_KINDS,
    PIXELS,
    SHARES,
    THOUSANDTHS,
    guess_kind,
    place_objects,
    read_objects,
)
from dsvl2_jax.inputs.records import learnt_boxes, parse_record, place, process, resolve

CONFIGS = Path(configs.__file__).parent
SIZE = image_size(CONFIGS / "images" / "shapes.png")
BOX = [183, 78, 217, 113]


def record(objects: object, answer: str = "<bbox>", question: str = "<image>Find <ref-object>") -> dict:
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": turns, "images": ["shapes.png"], "objects": objects}


def texts(given: dict, sizes: list = [SIZE], kind: str | None = None) -> tuple[list[str], str | None]:  # noqa: B006
    placed, kind = place(parse_record(given), sizes, kind)
    return [turn["content"] for turn in placed.conversation], kind


def shares(box: list[float], whole: float) -> list[float]:
    return [c / SIZE[n % 2] * whole for n, c in enumerate(box)]


@pytest.mark.parametrize(
    ("objects", "kind"),
    [
        ({"ref": ["circle"], "bbox": [BOX]}, PIXELS),
        ({"ref": ["circle"], "bbox": [BOX], "bbox_type": "real", "image_id": [0]}, PIXELS),
        ({"ref": ["circle"], "bbox": [shares(BOX, 1)]}, SHARES),
        ({"ref": ["circle"], "bbox": [shares(BOX, 1)], "bbox_type": "norm1"}, SHARES),
        ({"ref": ["circle"], "bbox": [shares(BOX, 1000)]}, THOUSANDTHS),
        ({"ref": ["circle"], "bbox": [[BOX]], "image_id": None}, PIXELS),
        ([{"label": "circle", "bbox_2d": BOX}], PIXELS),
        ([{"name": "circle", "bbox": shares(BOX, 1000)}], THOUSANDTHS),
    ],
)
def test_every_kind_and_form_gives_what_the_model_writes(objects, kind):
    written = format_boxes("circle", [BOX], SIZE)
    label, _, box = written.partition("<|det|>")
    assert texts(record(objects)) == ([f"<image>Find {label}", f"<|det|>{box}"], kind)


def test_the_tokens_are_those_of_the_written_syntax():
    processor, store = Processor.from_dir(CONFIGS / "micro"), FolderImages(str(CONFIGS / "images"))
    answer = "<ref-object><bbox> and <ref-object><bbox>, <bbox>"
    objects = {"ref": ["a", "b"], "bbox": [BOX, [0, 0, 10, 10], [1, 2, 3, 4]]}
    first, second = format_boxes("a", [BOX], SIZE), format_boxes("b", [[0, 0, 10, 10], [1, 2, 3, 4]], SIZE)
    written = record(None, f"{first} and {second}", "<image>Find all.")
    found, expected = (
        process(resolve(parse_record(one), processor, store), processor, True)
        for one in (record(objects, answer, "<image>Find all."), written)
    )
    assert found.input_ids.tolist() == expected.input_ids.tolist()


def test_a_source_says_what_boxes_are_that_do_not():
    fits = {"ref": ["circle"], "bbox": [[10, 20, 30, 40]]}
    assert texts(record(fits))[1] == PIXELS
    assert texts(record(fits), kind=THOUSANDTHS) == texts(record({**fits, "bbox_type": "norm1000"}))
    assert texts(record({**fits, "bbox_type": "real"}), kind=THOUSANDTHS)[1] == PIXELS


def test_each_box_is_scaled_by_its_own_image():
    given = record(
        {"ref": [], "bbox": [[10, 10, 20, 20]] * 2, "image_id": [1, 0]}, "<bbox> but <bbox>", "<image><image>"
    )
    given["images"] *= 2
    found, _ = texts(given, [(40, 20), (20, 40)])
    one, other = (format_boxes("", [[10, 10, 20, 20]], size)[len("<|ref|><|/ref|>") :] for size in [(20, 40), (40, 20)])
    assert found[1] == f"{one} but {other}"
    boxes = learnt_boxes(parse_record(given), [(40, 20), (20, 40)])
    assert [(box.image, box.x1, box.y1, box.x2, box.y2) for box in boxes] == [(1, 10, 10, 20, 20), (0, 10, 10, 20, 20)]


@pytest.mark.parametrize(
    ("objects", "message"),
    [
        ({"ref": ["circle"], "bbox": [BOX, BOX]}, '1 <bbox> and "objects" 2 "bbox"'),
        ({"ref": [], "bbox": [BOX]}, '1 <ref-object> and "objects" 0 "ref"'),
        (None, '1 <ref-object> and "objects" 0'),
        ({"ref": ["circle"], "bbox": [[1, 2, 3]]}, r"\[1, 2, 3\], expected four numbers"),
        ({"ref": ["circle"], "bbox": [[1, 2, 3, "4"]]}, "expected four numbers"),
        ({"ref": ["circle"], "bbox": [[1, 2, 3, float("nan")]]}, "expected four numbers"),
        ({"ref": ["circle"], "bbox": [[1, 2, 3, True]]}, "expected four numbers"),
        ({"ref": ["circle"], "bbox": [[50, 50, 20, 20]]}, "x, y, width, height"),
        ({"ref": ["circle"], "bbox": [[-5, 0, 20, 20]]}, "expected 0 ≤ x1"),
        ({"ref": ["circle"], "bbox": [[0, 0, 20, 1200]]}, r"\[0, 0, 20, 1200\] is not in its image"),
        ({"ref": ["circle"], "bbox": [[0, 0, 20, 900]], "bbox_type": "real"}, "is not in pixels of its image"),
        ({"ref": ["circle"], "bbox": [[0, 0, 20, 9]], "bbox_type": "norm1"}, "is not from 0 to 1"),
        ({"ref": ["circle"], "bbox": [BOX], "bbox_type": "xywh"}, "\"bbox_type\" is 'xywh'"),
        ({"ref": ["circle"], "bbox": [BOX], "image_id": [3]}, "belongs to image 3"),
        ({"ref": ["circle"], "bbox": [BOX], "image_id": [0, 0]}, '1 "bbox" and 2 "image_id"'),
        ({"ref": [1], "bbox": [BOX]}, 'a "ref" is 1'),
        ({"ref": "circle", "bbox": [BOX]}, '"ref" is of type str'),
        ({"bbox": [BOX], "categories": ["circle"]}, "has categories; expected ref, bbox"),
        ([{"label": "circle", "box_2d": BOX}], "number 1 has box_2d, label"),
        ("circle", "of type str"),
    ],
)
def test_objects_that_are_inconsistent_break_the_record(objects, message):
    with pytest.raises(SampleError, match=message) as error:
        texts(record(objects))
    assert error.value.reason == "record"


@pytest.mark.parametrize("wrong", ["1200", "-4", "0.5", "x", "<bbox>"])
def test_a_coordinate_that_the_model_cannot_write_breaks_the_record(wrong):
    for broken in (
        record(None, f"<|det|>[[10, 10, {wrong}, 50]]<|/det|>", "<image>a"),
        {"text": f"<|det|>[[{wrong}]]<|/det|>"},
    ):
        with pytest.raises(SampleError, match=r"<bbox>|whole numbers from 0 to 999"):
            parse_record(broken)
    parse_record(record(None, "<|det|>[[10, 010, 999, 0]]<|/det|> in 1200 <|det|>", "<image>a"))


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.lists(st.floats(0, 2000), min_size=4, max_size=4).map(
            lambda c: [*map(min, c[:2], c[2:]), *map(max, c[:2], c[2:])]
        ),
        min_size=1,
        max_size=4,
    ),
    st.tuples(st.integers(1, 3000), st.integers(1, 3000)),
    st.sampled_from([None, *BOX_KINDS]),
)
def test_boxes_become_coordinates_from_0_to_999_or_are_refused(boxes, size, kind):
    objects = read_objects({"bbox": boxes})
    try:
        (text,), found = place_objects(objects, ["<bbox>." * len(boxes)], [size], kind)
    except ConversationError:
        return
    assert found == (kind or guess_kind([(tuple(box), size) for box in boxes]))
    numbers = [[int(c) for c in part.split("]]")[0].split(", ")] for part in text.split("[[")[1:]]
    scale = {PIXELS: size, SHARES: (1, 1), THOUSANDTHS: (1000, 1000)}[found]
    for written, box in zip(numbers, boxes, strict=True):
        for place_, (c, was) in enumerate(zip(written, box, strict=True)):
            assert 0 <= c <= 999 and c >= min(was / scale[place_ % 2], 1) * 999 - 1e-6
            assert c <= was / scale[place_ % 2] * 999 + 2


def test_questions_of_an_evaluation_have_their_boxes_placed_too(tmp_path):
    """Two labels, in the question and in the answer, and one box: the reference of the metric iou."""
    given = record({"ref": ["circle", "circle"], "bbox": [BOX]}, "<ref-object><bbox>") | {"metric": "iou"}
    (tmp_path / "a.jsonl").write_text(json.dumps(given))
    store = FolderImages(str(CONFIGS / "images"))
    (sample,) = read_samples(tmp_path / "a.jsonl", store, metric=None, template=None, limit=None)
    assert sample.answers == (format_boxes("circle", [BOX], SIZE),) and sample.boxes == (tuple(map(float, BOX)),)
