"""Turns: every form of one turn reads the same, and what cannot be honoured is named."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from dsvl2_jax.errors import ConversationError
from dsvl2_jax.inputs.turns import ROLES, Turn, parts_text, read_turn

PICTURE = Image.new("RGB", (2, 2))
TEXT = {"type": "text", "text": "What?"}


@given(st.sampled_from(sorted(ROLES)), st.data())
def test_roles_may_be_in_any_case(role, data):
    written = "".join(data.draw(st.sampled_from([letter.lower(), letter.upper()])) for letter in role)
    assert read_turn({"role": f" {written}", "content": "x"}, "turn 1").role == ROLES[role]
    assert read_turn({"from": written, "value": "x"}, "turn 1").role == ROLES[role]


texts = st.text(st.characters(exclude_characters="<"), max_size=8)


@given(st.lists(st.none() | texts, max_size=6))
def test_content_in_parts_is_the_string_with_tags_and_the_pictures_in_order(parts):
    pictures = iter(range(len(parts)))
    content = [
        {"type": "image", "image": f"{next(pictures)}.png"} if part is None else {"type": "text", "text": part}
        for part in parts
    ]
    turn = read_turn({"role": "user", "content": content}, "turn 1")
    assert turn.text == parts_text(parts)
    assert turn.images == tuple(f"{number}.png" for number in range(parts.count(None)))
    assert turn.text.count("<image>\n") == parts.count(None)
    as_string = read_turn({"role": "user", "content": turn.text, "images": list(turn.images)}, "turn 1")
    assert as_string == turn


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image", "image": PICTURE},
        {"type": "image", "url": PICTURE},
        {"type": "image", "path": PICTURE, "detail": "high"},
        {"type": "image_url", "image_url": PICTURE},
        {"type": "input_image", "image_url": PICTURE, "image": None},
        {"type": "image", "source": PICTURE, "cache_control": {"type": "ephemeral"}},
        {"image": PICTURE},
    ],
)
def test_a_picture_may_stand_under_any_of_its_keys(part):
    expected = Turn("user", "<image>\nWhat?", (PICTURE,))
    assert read_turn({"role": "user", "content": [part, TEXT]}, "turn 1") == expected
    assert read_turn({"role": "user", "content": (part, "What?")}, "turn 1") == expected


def test_arrays_are_pictures_too():
    pixels = np.zeros((2, 2, 3), np.uint8)
    assert read_turn({"role": "user", "content": [{"type": "image", "image": pixels}]}, "turn 1").images[0] is pixels
    assert read_turn({"role": "user", "content": "<image>", "images": pixels}, "turn 1").images[0] is pixels
    assert len(read_turn({"role": "user", "content": "<image>", "images": [pixels, pixels]}, "turn 1").images) == 2


def test_a_part_without_a_picture_stands_for_the_next_of_those_beside_it():
    turn = read_turn({"role": "user", "content": [{"type": "image"}, TEXT], "image": "a.png"}, "turn 1")
    assert turn == Turn("user", "<image>\nWhat?", ("a.png",))


def test_keys_that_are_not_used_are_named_and_harmless_ones_are_not():
    turn = {"role": "user", "content": [{**TEXT, "weight": 2}], "id": 3, "name": "Ann", "tool_calls": [], "speaker": 1}
    assert read_turn(turn, "turn 1").unused == ("speaker", "content[0].weight")


def test_an_answer_that_is_yet_to_come_may_be_null():
    assert read_turn({"role": "assistant", "content": None, "refusal": None}, "turn 2") == Turn("assistant", "")


@pytest.mark.parametrize(
    ("turn", "message"),
    [
        ({"role": "usr", "content": ""}, r"unknown role 'usr'; did you mean user\?"),
        ({"role": None, "content": ""}, "unknown role None"),
        ({"content": "x"}, "found content"),
        ({}, "found nothing"),
        ({"role": "user", "content": [{"type": "audio"}]}, r"content\[0\] is neither text nor an image"),
        ({"role": "user", "content": [{"type": ["text"], "text": "x"}]}, r"content\[0\] is neither text nor an image"),
        ({"role": "user", "content": [TEXT, {"type": "text"}]}, r"content\[1\]\.text is of type NoneType"),
        ({"role": "user", "content": [{"type": "image", "url": "a", "path": "b"}]}, "twice, under url and path"),
        ({"role": "user", "content": [{"type": "image", "url": "a"}], "images": ["b"]}, "given twice"),
        ({"role": "user", "content": {"text": "x"}}, "content is of type dict"),
        ({"role": "user", "content": [{"type": "text", "text": "<image_placeholder>"}]}, "the tag of another model"),
    ],
)
def test_what_is_no_turn_says_why(turn, message):
    with pytest.raises(ConversationError, match=f"turn 7.*{message}"):
        read_turn(turn, "turn 7")
