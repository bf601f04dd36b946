"""What bodies may be: each field of each endpoint, refused by name when it is wrong, passed when it harms nobody."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsvl2_jax.infer.serve.bodies import parse
from dsvl2_jax.infer.serve.errors import ApiError
from dsvl2_jax.infer.serve.schemas_chat import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest
from dsvl2_jax.infer.serve.schemas_responses import ResponsesRequest

LEAST = {
    ChatRequest: {"messages": [{"role": "user", "content": "Hello"}]},
    CompletionRequest: {"prompt": "Hello"},
    ResponsesRequest: {"input": "Hello"},
    TokenizeRequest: {"prompt": "Hello"},
    DetokenizeRequest: {"tokens": [1]},
}
ANSWERING = (ChatRequest, CompletionRequest, ResponsesRequest)
HARMLESS = {
    "user": "me", "metadata": {"a": "b"}, "store": True, "service_tier": "auto", "parallel_tool_calls": True,
    "safety_identifier": "x", "prompt_cache_key": "k", "prompt_cache_retention": "24h",
    "prompt_cache_options": {"mode": "implicit"},
}  # fmt: skip


def refused(kind, **fields):
    with pytest.raises(ApiError) as caught:
        parse(json.dumps(LEAST[kind] | fields).encode(), kind)
    assert caught.value.status == 400
    return caught.value


@pytest.mark.parametrize("kind", LEAST)
def test_the_least_body_is_enough(kind):
    assert isinstance(parse(json.dumps(LEAST[kind]).encode(), kind), kind)


@pytest.mark.parametrize("kind", ANSWERING)
def test_harmless_fields_pass(kind):
    parse(json.dumps(LEAST[kind] | HARMLESS).encode(), kind)


@pytest.mark.parametrize("kind", LEAST)
def test_every_optional_field_may_be_null(kind):
    nulls = {field.alias or name: None for name, field in kind.model_fields.items() if not field.is_required()}
    parse(json.dumps(nulls | LEAST[kind]).encode(), kind)


@pytest.mark.parametrize("kind", LEAST)
def test_unknown_fields_are_named(kind):
    error = refused(kind, modle="micro")
    assert error.param == "modle" and error.code == "unknown_parameter" and "did you mean model?" in str(error)


WRONG = [
    ("temperature", "1", 'found "1", expected a number'),
    ("temperature", -0.1, "found -0.1, expected greater than or equal to 0"),
    ("temperature", 2.5, "found 2.5"),
    ("temperature", True, "found true"),
    ("top_p", 0, "greater than 0"),
    ("top_p", 1.1, "less than or equal to 1"),
    ("top_k", -2, "greater than or equal to -1"),
    ("top_k", 1.5, "a whole number"),
    ("min_p", 2, "less than or equal to 1"),
    ("repetition_penalty", 0, "greater than 0"),
    ("presence_penalty", 3, "less than or equal to 2"),
    ("frequency_penalty", -3, "greater than or equal to -2"),
    ("logit_bias", [1], "an object"),
    ("seed", 2**63, "less than"),
    ("seed", 1.5, "a whole number"),
    ("ignore_eos", 1, "true or false"),
    ("stream", "yes", "true or false"),
    ("regex", "", "at least 1 character"),
    ("choice", [], "at least 1"),
    ("choice", "a", "list"),
    ("grounding", "yes", "true or false"),
    ("model", 5, "string"),
    ("metadata", {"a": 1}, "string"),
    ("user", 5, "string"),
    ("min_tokens", 5, "expected null or 0"),
    ("use_beam_search", True, "expected null or false"),
    ("stop_token_ids", [1], "expected null or []"),
    ("skip_special_tokens", True, "expected null or false"),
]
OF_CHAT = [
    ("n", 0, "greater than or equal to 1"),
    ("n", 9, "less than or equal to 8"),
    ("stop", 5, "a string or a list"),
    ("stop", "", "at least 1 character"),
    ("stop", ["a"] * 5, "found 5 items, expected at most 4"),
    ("stop", ["a", ""], "at least 1 character"),
    ("max_tokens", 0, "greater than or equal to 1"),
    ("max_tokens", "5", "a whole number"),
    ("max_completion_tokens", -1, "greater than or equal to 1"),
    ("logprobs", 1, "true or false"),
    ("top_logprobs", 21, "less than or equal to 20"),
    ("response_format", "json", "an object"),
    ("response_format", {"type": "xml"}, "'text'"),
    ("stream_options", {"include_usage": 1}, "true or false"),
    ("tools", [{"type": "function"}], "calls no tools"),
    ("tool_choice", "required", "calls no tools"),
    ("functions", [{}], "calls no tools"),
    ("modalities", ["text", "audio"], "in text alone"),
    ("audio", {"voice": "x"}, "neither hears nor speaks"),
    ("reasoning_effort", "high", "does not reason"),
    ("verbosity", "high", "longer or shorter"),
    ("prediction", {"type": "content"}, "cannot be predicted"),
    ("web_search_options", {}, "does not search"),
    ("messages", [], "found no items, expected at least 1"),
    ("messages", "Hello", "list"),
    ("messages", None, "list"),
]
OF_COMPLETIONS = [
    ("prompt", [], "at least 1"),
    ("prompt", [[]], "at least 1"),
    ("prompt", 5, "a string, a list of strings"),
    ("prompt", ["a", 1], "string"),
    ("prompt", [1, -1], "greater than or equal to 0"),
    ("logprobs", True, "a whole number"),
    ("best_of", 2, "use n"),
    ("echo", True, "not repeated"),
    ("suffix", "x", "before a suffix"),
]
OF_RESPONSES = [
    ("input", [], "at least 1"),
    ("input", 5, "a string or a list of messages"),
    ("max_output_tokens", 0, "greater than or equal to 1"),
    ("previous_response_id", "resp_1", "not stored"),
    ("conversation", "c", "not stored"),
    ("background", True, "at once"),
    ("truncation", "auto", "not shortened"),
    ("include", ["file_search_call.results"], "message.output_text.logprobs"),
    ("tools", [{"type": "web_search"}], "calls no tools"),
]
CASES = (
    [(kind, *case) for kind in ANSWERING for case in WRONG]
    + [(ChatRequest, *case) for case in OF_CHAT]
    + [(CompletionRequest, *case) for case in OF_COMPLETIONS]
    + [(ResponsesRequest, *case) for case in OF_RESPONSES]
)


@pytest.mark.parametrize("kind, field, value, expected", CASES)
def test_a_wrong_value_is_told_with_field_what_was_found_and_expected(kind, field, value, expected):
    error = refused(kind, **{field: value})
    assert error.param.startswith(field) and expected in str(error), str(error)
    assert "found" in str(error) or "at least" in str(error)
    assert "<" not in error.param  # no names of ours


@pytest.mark.parametrize(
    "message, param, expected",
    [
        ({"role": "tool", "content": "x"}, "messages[0].role", "'user' or 'assistant'"),
        ({"content": "x"}, "messages[0].role", "is missing"),
        ({"role": "user", "content": 5}, "messages[0].content", "a string or a list of parts"),
        ({"role": "user", "content": []}, "messages[0].content", "at least 1"),
        ({"role": "user", "content": [{"type": "text"}]}, "messages[0].content[0].text", "is missing"),
        ({"role": "user", "content": [{"type": "input_audio"}]}, "messages[0].content[0]", 'or "video_url"'),
        ({"role": "user", "content": [{"type": ["text"]}]}, "messages[0].content[0]", 'or "video_url"'),
        ({"role": "user", "content": ["x"]}, "messages[0].content[0]", 'or "video_url"'),
        (
            {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x", "detail": "huge"}}]},
            "messages[0].content[0].image_url.detail",
            "'auto', 'low'",
        ),
        (
            {"role": "user", "content": [{"type": "image_url", "image_url": {}}]},
            "messages[0].content[0].image_url.url",
            "is missing",
        ),
        (
            {"role": "user", "content": [{"type": "image_url", "image_url": 5}]},
            "messages[0].content[0].image_url",
            "a url",
        ),
        ({"role": "user", "content": "x", "name": "Bob"}, "messages[0].name", "names of speakers"),
        ({"role": "assistant", "tool_calls": [{}]}, "messages[0].tool_calls", "calls no tools"),
        ({"role": "user", "content": "x", "weight": 1}, "messages[0].weight", "no field"),
        (5, "messages[0]", "found 5"),
    ],
)  # fmt: skip
def test_a_wrong_message_is_told_by_its_place(message, param, expected):
    error = refused(ChatRequest, messages=[message])
    assert error.param == param and expected in str(error), str(error)


def test_what_answers_bring_can_be_sent_back():
    """As openai's `message.model_dump()` does it."""
    message = {
        "role": "assistant", "content": "red", "refusal": None, "annotations": None, "audio": None,
        "function_call": None, "tool_calls": None,
    }  # fmt: skip
    messages = [{"role": "user", "content": "?"}, message, {"role": "user", "content": "!"}]
    parse(json.dumps({"messages": messages}).encode(), ChatRequest)


NO_OBJECTS = [b"", b"{", b"[]", b"5", b"null", b'"x"', b"\xff\xfe", b'{"messages": NaN}', b"[" * 100_000]


@pytest.mark.parametrize("body", [*NO_OBJECTS, b'{"a": "\\ud800"}'])
def test_what_is_no_object_is_refused(body):
    with pytest.raises(ApiError) as caught:
        parse(body, ChatRequest)
    assert caught.value.status == 400


def test_long_values_are_not_repeated_whole():
    assert len(str(refused(ChatRequest, temperature="x" * 100_000))) < 300


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(data=st.data())
@pytest.mark.parametrize("kind", LEAST)
def test_any_value_of_any_field_is_taken_or_refused_by_name(kind, data):
    name = data.draw(st.sampled_from([field.alias or name for name, field in kind.model_fields.items()]))
    body = json.dumps(LEAST[kind] | {name: data.draw(JSON)}).encode()
    try:
        parse(body, kind)
    except ApiError as error:
        assert error.status == 400
        assert error.param is None or error.param.startswith(name)
        assert json.dumps(error.body())


@given(JSON)
def test_any_json_is_taken_or_refused(value):
    for kind in LEAST:
        try:
            parse(json.dumps(value).encode(), kind)
        except ApiError as error:
            assert error.status == 400
