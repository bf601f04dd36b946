"""API keys: where they come from, and that nothing but /health is had without one."""

from __future__ import annotations

import base64
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsvl2_jax.errors import UsageError
from dsvl2_jax.infer.serve.auth import ENVIRONMENT, ApiKey, read_keys

KEYS = (ApiKey("ann", "sk-ann-1"), ApiKey("bob", "sk-bob-22"))
PATHS = [
    ("GET", "/"), ("GET", "/ready"), ("GET", "/metrics"), ("GET", "/v1/models"), ("GET", "/v1/models/micro"),
    ("GET", "/openapi.json"), ("GET", "/no-such-path"), ("POST", "/v1/chat/completions"), ("POST", "/v1/completions"),
    ("POST", "/v1/responses"), ("POST", "/tokenize"), ("POST", "/detokenize"),
]  # fmt: skip


@pytest.fixture
def locked(serve):
    return serve(keys=KEYS)


def test_everything_but_health_needs_a_key(locked):
    assert locked.http.get("/health").status_code == 200
    for method, path in PATHS:
        for header in (None, "Bearer wrong", "Bearer", "sk-ann-1", "Basic sk-ann-1"):
            response = locked.http.request(method, path, headers={} if header is None else {"Authorization": header})
            assert response.status_code == 401, (method, path)
            error = response.json()["error"]
            assert error["code"] == "invalid_api_key" and "sk-" not in error["message"]
            assert response.headers["www-authenticate"].startswith("Basic" if path == "/" else "Bearer")


@pytest.mark.parametrize("key", KEYS)
def test_each_key_opens_and_names_its_owner(locked, key):
    headers = {"Authorization": f"Bearer {key.key}"}
    assert locked.http.get("/metrics", headers=headers).status_code == 200
    body = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 1}
    assert locked.http.post("/v1/chat/completions", json=body, headers=headers).status_code == 200
    assert locked.last_request().owner == key.name


def test_a_browser_may_give_the_key_as_a_password(locked):
    word = base64.b64encode(b"anybody:sk-bob-22").decode()
    assert locked.http.get("/v1/models", headers={"Authorization": f"Basic {word}"}).status_code == 200
    for wrong in ("anybody", "sk-bob-22:x", "%%%"):
        word = base64.b64encode(wrong.encode()).decode() if wrong.isalnum() or ":" in wrong else wrong
        assert locked.http.get("/v1/models", headers={"Authorization": f"Basic {word}"}).status_code == 401


def test_the_openapi_document_says_that_a_key_is_needed(locked):
    document = locked.http.get("/openapi.json", headers={"Authorization": "Bearer sk-ann-1"}).json()
    assert document["security"] == [{"key": []}] and document["paths"]["/health"]["get"]["security"] == []


def test_the_log_names_owners_and_holds_no_key_prompt_or_query(locked, caplog):
    caplog.set_level("INFO", "dsvl2")
    headers = {"Authorization": "Bearer sk-ann-1"}
    body = {"messages": [{"role": "user", "content": "a secret question"}], "max_tokens": 1}
    assert locked.http.post("/v1/chat/completions?key=sk-query", json=body, headers=headers).status_code == 200
    locked.http.post("/v1/chat/completions", json={"messages": "a secret question"}, headers=headers)
    end = time.monotonic() + 60
    while "POST /v1/chat/completions 400" not in caplog.text and time.monotonic() < end:
        time.sleep(0.01)  # the line is written once the answer has been sent
    assert "POST /v1/chat/completions 200" in caplog.text and " ann micro req_" in caplog.text
    assert "POST /v1/chat/completions 400" in caplog.text
    for word in ("sk-", "secret"):
        assert word not in caplog.text


def test_keys_come_from_a_file(tmp_path):
    file = tmp_path / "keys"
    file.write_text("# ours\n\nann  sk-ann-1\n  sk-nameless  \n")
    assert read_keys(file) == (ApiKey("ann", "sk-ann-1"), ApiKey("key-4", "sk-nameless"))
    assert "sk-" not in repr(read_keys(file))


def test_keys_come_from_the_environment(monkeypatch):
    monkeypatch.delenv(ENVIRONMENT, raising=False)
    assert read_keys(None) == ()
    monkeypatch.setenv(ENVIRONMENT, "sk-one")
    assert read_keys(None) == (ApiKey("key-1", "sk-one"),)
    monkeypatch.setenv(ENVIRONMENT, " ")
    with pytest.raises(UsageError, match="has no key"):
        read_keys(None)


@pytest.mark.parametrize(
    "content, problem",
    [("", "has no key"), ("# x\n", "has no key"), ("a b c", "line 1 has 3 words"), ("schlüssel", "line 1")],
)
def test_a_file_without_keys_is_refused_and_its_words_are_not_repeated(tmp_path, content, problem):
    file = tmp_path / "keys"
    file.write_text(content)
    with pytest.raises(UsageError, match=problem) as caught:
        read_keys(file)
    assert "schlüssel" not in str(caught.value)


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(UsageError, match="no-such-file"):
        read_keys(tmp_path / "no-such-file")


@given(st.text(st.characters(codec="latin-1", exclude_categories=["Cc"]), max_size=30))
def test_no_other_header_opens(header):
    from dsvl2_jax.infer.serve.auth import RequireKey, _given

    layer = RequireKey(lambda: None, KEYS)
    expected = {f"Bearer {key.key}": key.name for key in KEYS}.get(header)
    assert layer._owner(_given(header)) == expected
