"""Which grammar a request's answer gets."""

from __future__ import annotations

import numpy as np
import pytest

PATH = "/v1/chat/completions"
HELLO = [{"role": "user", "content": "Hello"}]
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": False}


def allows(running, text):
    """Whether the last request's grammar lets an answer be this text and no longer one."""
    tokenizer = running.engine.model.processor.tokenizer
    matcher = running.last_request().grammar.matcher()
    for token in tokenizer.encode(text):
        if not matcher.mask()[token]:
            return False
        matcher.advance(token)
    mask = matcher.mask()
    return bool(mask[tokenizer.eos_id]) and set(np.flatnonzero(mask)) <= {tokenizer.eos_id} | set(
        tokenizer.all_special_ids
    )


@pytest.mark.parametrize(
    "fields, right, wrong",
    [
        ({"choice": ["yes", "no"]}, "yes", "maybe"),
        ({"regex": "[ab]{2}"}, "ab", "abc"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}}, None, "[1]"),
        ({"response_format": {"type": "json_object"}}, None, "[1]"),
        ({"grounding": True}, None, "<|ref|>a<|/ref|><|det|>[[5, 5, 1, 1]]<|/det|>"),
    ],
)
def test_an_answer_obeys_what_is_asked(running, fields, right, wrong):
    response = running.http.post(PATH, json={"messages": HELLO, "max_tokens": 1, **fields})
    assert response.status_code == 200, response.text
    assert not allows(running, wrong)
    assert right is None or allows(running, right)


def test_responses_have_formats_too(running):
    form = {"type": "json_schema", "name": "x", "schema": SCHEMA, "strict": True}
    body = {"input": "Hello", "max_output_tokens": 1, "text": {"format": form}}
    answer = running.http.post("/v1/responses", json=body).raise_for_status().json()
    assert answer["text"]["format"] == form
    assert running.last_request().grammar is not None and not allows(running, "[1]")


@pytest.mark.parametrize(
    "fields", [{}, {"response_format": {"type": "text"}}, {"response_format": None, "grounding": False}]
)
def test_without_them_an_answer_is_free(running, fields):
    running.http.post(PATH, json={"messages": HELLO, "max_tokens": 1, **fields}).raise_for_status()
    assert running.last_request().grammar is None


@pytest.mark.parametrize(
    "fields, param",
    [
        ({"regex": "("}, "regex"),
        ({"choice": [""]}, "choice"),
        ({"choice": ["a", ""]}, "choice"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nonsense"}}}},
            "response_format.json_schema.schema",
        ),
    ],
)
def test_one_that_cannot_be_is_refused(running, fields, param):
    response = running.http.post(PATH, json={"messages": HELLO, **fields})
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["param"] == param and error["message"].startswith(param)


def test_a_tokenizer_without_grammars_says_so(running):
    serving = running.app.state.serving
    grammars, serving.grammars = serving.grammars, None
    try:
        response = running.http.post(PATH, json={"messages": HELLO, "choice": ["a"]})
        assert response.status_code == 400 and "tokenizer.json" in response.json()["error"]["message"]
        assert running.http.post(PATH, json={"messages": HELLO, "max_tokens": 1}).status_code == 200
    finally:
        serving.grammars = grammars
