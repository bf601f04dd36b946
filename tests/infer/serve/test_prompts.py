"""How messages become one conversation: roles joined, pictures where they stand, what is not the user's refused."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsvl2_jax.infer.serve import responses
from dsvl2_jax.infer.serve.chat import turns
from dsvl2_jax.infer.serve.errors import ApiError
from dsvl2_jax.infer.serve.prompts import Picture, Text, Turn, join, render
from dsvl2_jax.infer.serve.schemas_chat import Message
from dsvl2_jax.infer.serve.schemas_responses import ResponsesRequest

IMAGE = {"type": "image_url", "image_url": {"url": "data:,x"}}


def rendered(*messages):
    """(role, text) of the conversation that messages become."""
    parsed = [Message.model_validate(message) for message in messages]
    return [(turn.role, render(turn)) for turn in join(turns(parsed))]


def text(words):
    return {"type": "text", "text": words}


def test_a_picture_is_its_tag_and_a_newline_where_it_stands():
    assert rendered({"role": "user", "content": [IMAGE, text("What?")]}) == [("user", "<image>\nWhat?")]
    assert rendered({"role": "user", "content": [text("A: "), IMAGE, text("B: "), IMAGE, text("Which?")]}) == [
        ("user", "A: <image>\nB: <image>\nWhich?")
    ]
    assert rendered({"role": "user", "content": [text("What?"), IMAGE]}) == [("user", "What?<image>\n")]


def test_texts_of_a_message_are_lines():
    assert rendered({"role": "user", "content": [text("one"), text("two")]}) == [("user", "one\ntwo")]


def test_messages_of_one_role_are_joined():
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "developer", "content": "Be kind."},
        {"role": "user", "content": [IMAGE]},
        {"role": "user", "content": "What is this?"},
        {"role": "user", "content": "Say it in a word."},
        {"role": "assistant", "content": "red"},
        {"role": "assistant", "content": None},
        {"role": "user", "content": "Thanks"},
    ]
    assert rendered(*messages) == [
        ("system", "Be brief.\n\nBe kind."),
        ("user", "<image>\nWhat is this?\n\nSay it in a word."),
        ("assistant", "red"),
        ("user", "Thanks"),
    ]


@pytest.mark.parametrize("role", ["system", "developer", "assistant"])
def test_only_users_show_pictures(role):
    with pytest.raises(ApiError, match="pictures in user messages alone") as caught:
        rendered({"role": role, "content": [text("x"), IMAGE]})
    assert caught.value.status == 400 and caught.value.param == "messages[0].content[1].image_url.url"


@pytest.mark.parametrize("role", ["system", "user", "assistant"])
def test_the_tag_in_a_text_is_refused(role):
    with pytest.raises(ApiError, match="stands for a picture") as caught:
        rendered({"role": "user", "content": "x"}, {"role": role, "content": "an <image> tag"})
    assert caught.value.param == "messages[1].content"


def test_a_response_is_asked_for_by_a_plain_text_or_messages():
    plain = ResponsesRequest.model_validate({"instructions": "Be brief.", "input": "Hello"})
    parts = [{"type": "input_text", "text": "Hello"}]
    listed = {"instructions": "Be brief.", "input": [{"role": "User", "content": parts}]}
    for body in (plain, ResponsesRequest.model_validate(listed)):
        asked = [(turn.role, render(turn)) for turn in join(responses.turns(body))]
        assert asked == [("system", "Be brief."), ("user", "Hello")]


def test_roles_may_be_in_any_case():
    messages = [{"role": "System", "content": "Be brief."}, {"role": "USER", "content": "Hello"}]
    assert rendered(*messages) == [("system", "Be brief."), ("user", "Hello")]


def test_the_tag_of_another_model_is_refused_where_it_would_stand_for_a_picture():
    with pytest.raises(ApiError, match="found <image_placeholder>, which stands for a picture"):
        rendered({"role": "user", "content": "<image_placeholder> What?"})
    answer = {"role": "assistant", "content": "It is <image_placeholder>."}
    assert rendered({"role": "user", "content": "x"}, answer)[1] == ("assistant", "It is <image_placeholder>.")


@pytest.mark.parametrize("role", ["system", "user"])
def test_content_is_missing(role):
    with pytest.raises(ApiError, match="is missing"):
        rendered({"role": role})


parts = st.lists(
    st.builds(Text, st.text().filter(lambda words: "<image" not in words), st.just("f"))
    | st.just(Picture("data:,x", "f", None)),
    max_size=4,
)
conversations = st.lists(
    st.builds(Turn, st.sampled_from(["user", "assistant", "system"]), st.tuples(parts).map(list)), max_size=6
)


@given(conversations)
def test_joining_keeps_every_text_and_picture_in_order(conversation):
    kept = [
        Turn(turn.role, [[part for part in turn.parts if turn.role == "user" or isinstance(part, Text)]])
        for turn in conversation
    ]
    joined = join(kept)
    assert all(before.role != after.role for before, after in itertools.pairwise(joined))
    before = [part for turn in kept for part in turn.parts]
    assert [part for turn in joined for part in turn.parts] == before
    pictures = sum(isinstance(part, Picture) for part in before)
    assert sum(render(turn).count("<image>\n") for turn in joined) == pictures
