"""Boxes: the grammar, both round trips, hostile text, and drawing."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dsvl2_jax.errors import ConversationError
from dsvl2_jax.inputs.grounding import Box, count_malformed_boxes, draw_boxes, format_boxes, parse_boxes

SIZE = (999, 999)  # coordinates are pixels


def test_boxes_are_scaled_to_the_last_image():
    text = "It is <|ref|>a disk<|/ref|><|det|>[[0, 40, 512, 999],[1,2,3,4]]<|/det|> near the top."
    boxes = parse_boxes(text, [(10, 10), (301, 203)])
    assert boxes[0] == Box("a disk", 0, int(40 / 999 * 203), int(512 / 999 * 301), 203, image=1)
    assert boxes[1].label == "a disk"
    assert parse_boxes(text, np.array([[10, 10], [301, 203]], np.int32)) == boxes
    assert parse_boxes(text, []) == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<|det|>[[1,2,3,4]]<|/det|>", [Box("", 1, 2, 3, 4)]),
        (
            "<|ref|>a<|/ref|> and <|det|>[[1,2,3,4]]<|/det|><|det|>[[5,6,7,8]]<|/det|>",
            [Box("a", 1, 2, 3, 4), Box("", 5, 6, 7, 8)],
        ),
        ("<|ref|>a<|/ref|><|ref|>b<|/ref|><|det|>[[1,2,3,4]]<|/det|>", [Box("b", 1, 2, 3, 4)]),
        ("<|ref|>a<|det|>[[1,2,3,4]]<|/det|>", [Box("", 1, 2, 3, 4)]),
        ("<|ref|>用<|/ref|><|det|>[ [ 1 , 002,\n3,4 ] ]<|/det|>", [Box("用", 1, 2, 3, 4)]),
        ("<|det|>[1,2,3,4]<|/det|>", [Box("", 1, 2, 3, 4)]),
        ("<|det|>[[9,2,3,1]]<|/det|>", [Box("", 9, 2, 3, 1)]),
        (
            "<|det|>[[1,2,3],[1,2,3,4,5],[1,2,3,1000],[-1,2,3,4],[1.5,2,3,4],[x],[5,6,7,8]]<|/det|>",
            [Box("", 5, 6, 7, 8)],
        ),
        ("<|det|>[[1,2,3,4],[5,6,7", []),
        ("<|det|>[[1,2,3,4]]<|det|>[[5,6,7,8]]<|/det|>", [Box("", 5, 6, 7, 8)]),
        ("<|det|>__import__('os').exit()<|/det|>", []),
        ("<|det|><|/det|><|/ref|><|/det|>", []),
        ("[[1,2,3,4]]", []),
        ("", []),
    ],
)
def test_grammar_and_malformed_parts(text, expected):
    assert parse_boxes(text, [SIZE]) == expected


@pytest.mark.parametrize(
    ("text", "malformed"),
    [
        ("<|det|>[[1,2,3,4],[5,6,7,8]]<|/det|>", 0),
        ("<|det|>[1,2,3,4]<|/det|>", 0),
        ("<|det|>[]<|/det|> <|det|>[[]]<|/det|>", 0),
        ("<|det|>[[1,2,3]]<|/det|>", 1),
        ("<|det|>[[1,2,3],[1,2,3,4,5],[1,2,3,1000],[-1,2,3,4],[1.5,2,3,4],[x],[5,6,7,8]]<|/det|>", 6),
        ("<|det|>[[[1,2],[3,4]]]<|/det|>", 2),
        ("<|det|>[[[1,2,3,4]]]<|/det|>", 0),
        ("<|det|>[[1,2,3,4],[5,6,7", 2),
        ("<|det|>[[1,2,3,4]]<|det|>[[5,6,7,8]]<|/det|>", 1),
        ("<|det|>[[1,2,3,4],[5,6,7<|/det|>", 1),
        ("<|det|>1,2,3,4<|/det|><|det|>", 2),
        ("<|det|><|/det|>", 1),
        ("[[1,2,3]] <|/det|> <|ref|>a", 0),
        ("", 0),
    ],
)
def test_boxes_that_are_left_out_are_counted(text, malformed):
    assert count_malformed_boxes(text) == malformed


@given(st.lists(st.lists(st.integers(-5, 1200), max_size=6), max_size=6))
def test_every_list_is_a_box_or_counted(lists):
    written = sum(map(bool, lists))
    closed, cut = f"<|det|>{lists}<|/det|>", f"<|det|>{lists}"
    right = sum(len(one) == 4 and all(0 <= x <= 999 for x in one) for one in lists)
    assert (len(parse_boxes(closed, [SIZE])), count_malformed_boxes(closed)) == (right, written - right)
    assert (parse_boxes(cut, [SIZE]), count_malformed_boxes(cut)) == ([], written)


pieces = st.sampled_from(
    ["<|ref|>", "<|/ref|>", "<|det|>", "<|/det|>", "[[", "]]", "[1,2,3,4]", ",", "12", "99999", "<|"]
)


@settings(deadline=None)
@given(text=st.lists(pieces | st.text(max_size=6)).map("".join))
def test_parser_takes_any_text_and_stays_inside_the_image(text):
    for box in parse_boxes(text, [(640, 480)]):
        assert 0 <= box.x1 <= 640
        assert 0 <= box.x2 <= 640
        assert 0 <= box.y1 <= 480
        assert 0 <= box.y2 <= 480


labels = st.text(st.characters(exclude_characters="<>", exclude_categories=["Cs"]), max_size=20)


@settings(deadline=None)
@given(label=labels, width=st.integers(1, 998), height=st.integers(1, 998), data=st.data())
def test_pixels_survive_the_round_trip_under_999(label, width, height, data):
    corner = st.tuples(st.integers(0, width), st.integers(0, height))
    quads = data.draw(st.lists(st.tuples(corner, corner), max_size=3))
    boxes = [Box(label, *first, *second) for first, second in quads]
    assert parse_boxes(format_boxes(label, boxes, (width, height)), [(width, height)]) == boxes


@settings(deadline=None)
@given(width=st.integers(1000, 10_000), height=st.integers(1000, 10_000), quad=st.tuples(*[st.integers(0, 999)] * 4))
def test_coordinates_survive_the_round_trip_over_999(width, height, quad):
    text = f"<|ref|>a<|/ref|><|det|>{[list(quad)]}<|/det|>"
    assert format_boxes("a", parse_boxes(text, [(width, height)]), (width, height)) == text


def test_format_takes_plain_tuples_and_refuses_what_is_not_in_the_image():
    assert format_boxes("a", [(0, 0.4, 5, 10)], (10, 10)) == "<|ref|>a<|/ref|><|det|>[[0, 40, 500, 999]]<|/det|>"
    for box in ((0, 0, 11, 5), (-1, 0, 5, 5), (1, 2, 3), (0, 0, float("nan"), 1)):
        with pytest.raises(ConversationError, match="labelled 'a'"):
            format_boxes("a", [box], (10, 10))
    with pytest.raises(ConversationError, match="grounding tag"):
        format_boxes("a<|det|>", [], (10, 10))


def test_drawing_outlines_each_box_in_its_own_colour_and_leaves_the_original():
    image = Image.new("RGB", (400, 300), "gray")
    drawn = draw_boxes(image, [Box("", 50, 60, 150, 160), Box("", 200, 60, 390, 290)])
    first, second = drawn.getpixel((50, 100)), drawn.getpixel((200, 100))
    assert len({first, second, (128, 128, 128)}) == 3
    assert drawn.getpixel((100, 100)) == (128, 128, 128)  # inside stays visible
    assert image.getextrema() == ((128, 128),) * 3


def test_label_is_drawn_even_where_the_box_leaves_no_room():
    image = Image.new("RGB", (200, 100))
    for box in (Box("", 0, 0, 200, 100), Box("", 190, 95, 200, 100)):
        plain = np.asarray(draw_boxes(image, [box]))
        named = np.asarray(draw_boxes(image, [Box("cat", box.x1, box.y1, box.x2, box.y2)]))
        assert (plain != named).any(-1).sum() > 50


@settings(deadline=None, max_examples=30)
@given(
    label=st.text(), size=st.tuples(st.integers(1, 60), st.integers(1, 60)), quad=st.tuples(*[st.integers(-5, 70)] * 4)
)
def test_drawing_accepts_any_box_and_label(label, size, quad):
    drawn = draw_boxes(Image.new("L", size), [Box(label, *quad)])
    factor = drawn.width // size[0]
    assert drawn.size == (factor * size[0], factor * size[1])
    assert min(drawn.size) >= 300 or max(drawn.size) * 2 > 2000


def test_a_small_image_is_enlarged_so_that_names_cover_neither_boxes_nor_each_other():
    boxes = [Box("red star", 10, 30, 40, 60), Box("blue disk", 44, 28, 80, 64), Box("a green square", 12, 64, 30, 90)]
    plain = [dataclasses.replace(box, label="") for box in boxes]
    image = Image.new("RGB", (96, 96), "gray")
    drawn, unnamed = np.asarray(draw_boxes(image, boxes)), np.asarray(draw_boxes(image, plain))
    assert drawn.shape == (384, 384, 3)
    named = (drawn != unnamed).any(-1)
    for box in boxes:
        assert not named[4 * box.y1 : 4 * box.y2, 4 * box.x1 : 4 * box.x2].any()
    alone = [
        (np.asarray(draw_boxes(image, [box])) != np.asarray(draw_boxes(image, [bare]))).any(-1).sum()
        for box, bare in zip(boxes, plain, strict=True)
    ]
    assert named.sum() == sum(alone)  # nothing of a name is under another


def test_names_of_boxes_at_one_place_stand_apart():
    image = Image.new("RGB", (600, 600), "gray")

    def written(boxes: list[Box]) -> int:
        bare = [dataclasses.replace(box, label="") for box in boxes]
        return int((np.asarray(draw_boxes(image, boxes)) != np.asarray(draw_boxes(image, bare))).any(-1).sum())

    boxes = [Box(f"thing {number}", 100, 100, 200, 200) for number in range(10, 40)]
    assert written(boxes) > 0.97 * sum(written([box]) for box in boxes)  # some stand on the boxes' lines


def test_drawing_scales_with_the_image():
    small, large = Image.new("RGB", (300, 300)), Image.new("RGB", (3000, 3000))
    share = [
        np.asarray(draw_boxes(image, [Box("cat", *(image.width * f // 10 for f in (3, 3, 7, 7)))])).any(-1).mean()
        for image in (small, large)
    ]
    assert 0.4 < share[0] / share[1] < 2.5
