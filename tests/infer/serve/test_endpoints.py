"""The endpoints beside the chat, and what all of them refuse."""

from __future__ import annotations

import base64
import dataclasses
import gzip
import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from thread_engine import data_url

from dsvl2_jax.infer.serve.media import MediaOptions

CHAT = "/v1/chat/completions"
PICTURE = [{"type": "input_image", "image_url": "data:,"}]
FIELDS = ["messages", "prompt", "input", "tokens", "n", "stop", "max_tokens", "choice", "stream", "text"]
INNER = ["role", "content", "type", "text", "image_url", "url"]
UNREADABLE = ["data:image/png;base64,AAAA", "data:,x", "nonsense", "ftp://x/y", "", "data:image/png;base64,%%"]
ENDPOINTS = [CHAT, "/v1/completions", "/v1/responses", "/tokenize", "/detokenize"]
HELLO = [{"role": "user", "content": "Hello"}]


def error_of(response, status, param=None):
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["message"] and error["code"]
    assert param is None or error["param"] == param
    return error


def test_models(running):
    answer = running.http.get("/v1/models").json()
    (model,) = answer["data"]
    assert answer["object"] == "list" and model["id"] == "micro" and model["max_model_len"] == 4096
    assert running.http.get("/v1/models/micro").json() == model
    assert error_of(running.http.get("/v1/models/other"), 404)["code"] == "model_not_found"


@pytest.mark.parametrize("name, status", [("micro", 200), ("gpt-4o-mini", 200), ("o3", 200), ("Micro", 404), ("", 404)])
def test_the_model_is_the_one_there_is_or_one_of_openais(running, name, status):
    response = running.http.post("/tokenize", json={"model": name, "prompt": "x"})
    assert response.status_code == status
    if status == 404:
        assert "micro" in error_of(response, 404, "model")["message"]


def test_health_and_ready_say_what_the_engine_does(running):
    for state, healthy, ready in (
        ("starting", 200, 503), ("ok", 200, 200), ("recovering", 503, 503), ("stopping", 200, 503),
    ):  # fmt: skip
        running.engine.health = state
        for path, status in (("/health", healthy), ("/ready", ready)):
            response = running.http.get(path)
            assert response.status_code == status and response.json() == {"status": state}


@pytest.mark.parametrize("text", ["Hello", "naïve 漢字 🙂", "<|ref|>x<|/ref|>", " a\n b"])
def test_tokens_there_and_back(running, micro, text):
    tokenizer = micro.processor.tokenizer
    answer = running.http.post("/tokenize", json={"prompt": text, "return_token_strs": True}).json()
    assert answer["tokens"] == [tokenizer.bos_id, *tokenizer.encode(text)] and answer["count"] == len(answer["tokens"])
    assert len(answer["token_strs"]) == answer["count"] and answer["max_model_len"] == 4096
    plain = running.http.post("/tokenize", json={"prompt": text, "add_special_tokens": False}).json()["tokens"]
    assert plain == answer["tokens"][1:]
    back = running.http.post("/detokenize", json={"tokens": plain}).json()
    assert back == {"prompt": tokenizer.decode(plain)}


def test_tokenizing_a_chat_counts_its_pictures(running, shapes_url):
    content = [{"type": "image_url", "image_url": {"url": shapes_url}}, {"type": "text", "text": "What?"}]
    body = {"messages": [{"role": "user", "content": content}]}
    count = running.http.post("/tokenize", json=body).json()["count"]
    answer = running.http.post(CHAT, json=body | {"max_tokens": 1}).json()
    assert count == answer["usage"]["prompt_tokens"]


@pytest.mark.parametrize(
    "path, body, param",
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "x", "messages": HELLO}, "prompt"),
        ("/tokenize", {"messages": HELLO, "add_special_tokens": False}, "add_special_tokens"),
        ("/detokenize", {"tokens": [10**6]}, "tokens[0]"),
        ("/v1/completions", {"prompt": [3, 10**6]}, "prompt[1]"),
        ("/v1/completions", {"prompt": "an <image>"}, "prompt"),
        ("/v1/completions", {"prompt": ["x", "an <image>"]}, "prompt[1]"),
        ("/v1/completions", {"prompt": "x" * 20_000}, "prompt"),
        ("/v1/completions", {"prompt": [5] * 5000}, "prompt"),
        (CHAT, {"messages": [*HELLO, {"role": "assistant", "content": "x"}]}, "messages"),
        (CHAT, {"messages": [{"role": "assistant", "content": "x"}, *HELLO]}, "messages"),
        (CHAT, {"messages": [*HELLO, {"role": "system", "content": "x"}]}, "messages"),
        (CHAT, {"messages": HELLO, "top_logprobs": 2}, "top_logprobs"),
        (CHAT, {"messages": HELLO, "max_tokens": 1, "max_completion_tokens": 1}, "max_completion_tokens"),
        (CHAT, {"messages": HELLO, "stream_options": {"include_usage": True}}, "stream_options"),
        (CHAT, {"messages": HELLO, "logit_bias": {"x": 1}}, "logit_bias"),
        (CHAT, {"messages": HELLO, "logit_bias": {"100000": 1}}, "logit_bias"),
        (CHAT, {"messages": HELLO, "regex": "a", "choice": ["b"]}, "choice"),
        (CHAT, {"messages": HELLO, "grounding": True, "response_format": {"type": "json_object"}}, "grounding"),
        (CHAT, {"messages": HELLO, "response_format": {"type": "json_schema"}}, "response_format"),
        (CHAT, {"messages": HELLO, "response_format": {"type": "text", "json_schema": {"schema": {}}}},
         "response_format.json_schema.schema"),
        ("/v1/responses", {"input": "x", "stream_options": {}}, "stream_options"),
        ("/v1/responses", {"input": "x", "text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format"),
        ("/v1/responses", {"input": [{"role": "system", "content": PICTURE}]}, "input[0].content[0].image_url"),
        ("/v1/responses", {"input": [{"role": "user", "content": PICTURE}]}, "input[0].content[0].image_url"),
    ],
)  # fmt: skip
def test_what_fields_say_together_is_checked(running, path, body, param):
    error_of(running.http.post(path, json=body), 400, param)


@pytest.mark.parametrize("url", UNREADABLE)
def test_a_picture_that_cannot_be_read_is_named(running, url):
    content = [{"type": "text", "text": "What?"}, {"type": "image_url", "image_url": {"url": url}}]
    response = running.http.post(CHAT, json={"messages": [{"role": "user", "content": content}]})
    assert response.status_code in (400, 403)
    error_of(response, response.status_code, "messages[0].content[1].image_url.url")


def test_too_many_pictures_are_refused(serve, shapes_url):
    server = serve(MediaOptions(max_images=1))
    content = [{"type": "image_url", "image_url": {"url": shapes_url}}] * 2
    error_of(server.http.post(CHAT, json={"messages": [{"role": "user", "content": content}]}), 413, "messages")


@pytest.mark.parametrize("path", ENDPOINTS)
def test_bodies_that_are_no_json(running, path):
    for data in (b"", b"{", b"\xff", b"[]", b"null", b"nul", b'{"a": 1e999}'):
        response = running.http.post(path, content=data, headers={"Content-Type": "application/json"})
        error_of(response, 400)
    error_of(running.http.post(path, content=b"{}"), 415)
    error_of(running.http.post(path, content=b"a=b", headers={"Content-Type": "text/plain"}), 415)
    packed = {"Content-Type": "application/json", "Content-Encoding": "gzip"}
    error_of(running.http.post(path, content=gzip.compress(b"{}"), headers=packed), 400)


@pytest.mark.parametrize("path", ENDPOINTS)
def test_a_body_over_the_limit_is_not_parsed(serve, path):
    server = serve(max_body=1000)
    for size in (1001, 5000, 50_000):
        for content in (b"{" * size, iter([b"{" * 100] * (size // 100 + 1))):
            try:
                response = server.http.post(path, content=content, headers={"Content-Type": "application/json"})
            except Exception:  # far over the limit the connection is closed
                assert size == 50_000
            else:
                assert "1000 bytes" in error_of(response, 413)["message"]


def test_paths_and_methods_that_are_not_there(running):
    error_of(running.http.get("/no/such/path"), 404)
    error_of(running.http.get(CHAT), 405)
    error_of(running.http.post("/v1/models", json={}), 405)


def test_the_queue_is_not_filled_by_one_request(running):
    error_of(running.http.post("/v1/completions", json={"prompt": ["x"] * 65}), 400, "prompt")


def test_answers_carry_an_id_and_are_not_guessed_at_by_browsers(running):
    ids = {running.http.get("/health").headers["x-request-id"] for _ in range(2)}
    assert len(ids) == 2
    assert running.http.get("/health").headers["x-content-type-options"] == "nosniff"


def test_other_origins_are_let_in_only_when_told(running, serve):
    asked = {"Origin": "https://example.org", "Access-Control-Request-Method": "POST"}
    headers = asked | {"Access-Control-Request-Headers": "authorization,content-type"}
    assert "access-control-allow-origin" not in running.http.options(CHAT, headers=headers).headers
    from dsvl2_jax.infer.serve.auth import ApiKey

    open_to = serve(cors_origins=("https://example.org",), keys=(ApiKey("a", "k"),))
    response = open_to.http.options(CHAT, headers=headers)
    assert response.status_code == 200 and response.headers["access-control-allow-origin"] == "https://example.org"
    other = headers | {"Origin": "https://example.com"}
    assert "access-control-allow-origin" not in open_to.http.options(CHAT, headers=other).headers


def test_detail_is_honoured_only_where_the_operator_says_so(running, serve):
    url = data_url(Image.new("RGB", (400, 200), "white"))
    parts = [{"type": "image_url", "image_url": {"url": url, "detail": "low"}}, {"type": "text", "text": "What?"}]
    body = {"messages": [{"role": "user", "content": parts}], "max_tokens": 1}
    running.http.post(CHAT, json=body).raise_for_status()
    assert len(running.last_request().inputs.tiles) > 2
    honouring = serve(honour_detail=True)
    honouring.http.post(CHAT, json=body).raise_for_status()
    assert len(honouring.last_request().inputs.tiles) == 2


LARGE = data_url(Image.new("RGB", (900, 450), "white"))


def picture(**options):
    return {"type": "image_url", "image_url": {"url": LARGE, **options}}


def tiles_of(running, parts, path=CHAT, **fields):
    """How many tiles each picture of a request had."""
    if path == CHAT:
        body = {"messages": [{"role": "user", "content": [*parts, {"type": "text", "text": "What?"}]}], "max_tokens": 1}
    else:
        body = {"input": [{"role": "user", "content": [*parts, {"type": "input_text", "text": "What?"}]}]}
        body |= {"max_output_tokens": 1}
    running.http.post(path, json=body | fields).raise_for_status()
    return running.last_request().inputs.tile_grid.prod(axis=1).tolist()


def test_tiles_are_as_many_as_a_request_or_a_picture_says(running):
    assert tiles_of(running, [picture()]) == [8]
    assert tiles_of(running, [picture()], max_tiles=2) == [2]
    assert tiles_of(running, [picture(max_tiles=2), picture()]) == [2, 8]
    assert tiles_of(running, [picture(max_tiles=2), picture(), picture(min_tiles=6)]) == [2, 1, 8]
    assert tiles_of(running, [picture()] * 3, max_tiles=4, min_tiles=2) == [2, 2, 2]
    other = {"type": "input_image", "image_url": LARGE}
    assert tiles_of(running, [other | {"max_tiles": 2}, other], "/v1/responses", max_tiles=1) == [2, 1]
    body = {"messages": [{"role": "user", "content": [picture()]}]}
    counts = [running.http.post("/tokenize", json=body | more).json()["count"] for more in ({}, {"max_tiles": 1})]
    assert counts[0] > counts[1]


def test_detail_high_means_tiles_among_many_and_a_number_beats_it(serve):
    honouring = serve(honour_detail=True)
    parts = [picture(detail="high"), picture(detail="low"), picture(detail="auto"), picture(detail="low", max_tiles=2)]
    assert tiles_of(honouring, parts) == [8, 1, 1, 2]


@pytest.mark.parametrize(
    ("parts", "fields", "param", "expected"),
    [
        ([picture(max_tiles=10)], {}, "messages[0].content[0].image_url.max_tiles", "at most 9, which this server"),
        ([picture()], {"max_tiles": 10}, "max_tiles", "(--max-image-tiles)"),
        ([picture(max_tiles=0)], {}, "messages[0].content[0].image_url.max_tiles", "equal to 1"),
        ([picture(max_tiles="4")], {}, "messages[0].content[0].image_url.max_tiles", "whole number"),
        ([picture()], {"max_tiles": 2, "min_tiles": 3}, "max_tiles", "more than max_tiles"),
        ([picture(max_tiles=2, min_tiles=3)], {}, "messages[0].content[0].image_url", "more than max_tiles"),
        (
            [{"type": "video_url", "video_url": {"url": "data:,", "frames": 0}}],
            {},
            "messages[0].content[0].video_url.frames",
            "equal to 1",
        ),
        (
            [{"type": "video_url", "video_url": {"url": "data:,", "frame_choice": "odd"}}],
            {},
            "messages[0].content[0].video_url.frame_choice",
            "scene",
        ),
        (
            [{"type": "video_url", "video_url": {"url": "data:,", "fps": 1}}],
            {},
            "messages[0].content[0].video_url.fps",
            "no field",
        ),
    ],
)
def test_budgets_and_videos_that_cannot_be_are_refused_by_their_field(running, parts, fields, param, expected):
    body = {"messages": [{"role": "user", "content": parts}], "max_tokens": 1} | fields
    error = error_of(running.http.post(CHAT, json=body), 400, param)
    assert expected in error["message"]


def test_more_tiles_than_a_request_may_have_are_refused_before_they_are_cut(running, monkeypatch):
    monkeypatch.setattr(running.engine, "options", dataclasses.replace(running.engine.options, max_tiles=8))
    monkeypatch.setattr("dsvl2_jax.inputs.processor.tile_image", lambda *_: pytest.fail("it was cut"))
    body = {"messages": [{"role": "user", "content": [picture()]}], "max_tokens": 1}
    assert "9 tiles" in error_of(running.http.post(CHAT, json=body), 413)["message"]


def test_a_video_is_shown_as_its_frames(running):
    videos = pytest.importorskip("videos", reason="videos need the extra video")
    film = videos.video([20 * i for i in range(12)])
    url = f"data:video/mp4;base64,{base64.b64encode(film).decode()}"
    part = {"type": "video_url", "video_url": {"url": url, "frames": 3, "frame_choice": "even"}}
    assert tiles_of(running, [part]) == [1, 1, 1]
    prompt = running.last_request().inputs
    assert prompt.image_sizes.tolist() == [[64, 48]] * 3 and "<image>\n<image>\n<image>\nWhat?" in prompt.prompt
    assert tiles_of(running, [part, picture(), {"type": "video_url", "video_url": url}]) == [1] * 12
    part["video_url"] |= {"min_tiles": 2, "max_tiles": 2}
    assert tiles_of(running, [part]) == [2, 2, 2]
    other = {"type": "input_video", "video_url": url, "frames": 2}
    assert tiles_of(running, [other], "/v1/responses", max_tiles=1) == [1, 1]
    body = {"messages": [{"role": "system", "content": [part]}, {"role": "user", "content": "x"}]}
    assert "found a video in a message of the system" in error_of(running.http.post(CHAT, json=body), 400)["message"]


@given(
    body=st.dictionaries(
        st.sampled_from(FIELDS),
        st.recursive(
            st.none() | st.booleans() | st.integers(-3, 3) | st.text(max_size=5),
            lambda inner: st.lists(inner, max_size=2)
            | st.dictionaries(st.sampled_from(INNER), inner, max_size=3),
            max_leaves=5,
        ),
        max_size=3,
    ),
    path=st.sampled_from(ENDPOINTS),
)  # fmt: skip
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_body_brings_the_server_down(running, body, path):
    """Whatever is wrong, it is told; whatever is right, is answered with at most the fewest tokens."""
    body = {"max_tokens": 1} | body if path in (CHAT, "/v1/completions") else body
    response = running.http.post(path, content=json.dumps(body), headers={"Content-Type": "application/json"})
    assert response.status_code == 200 or error_of(response, response.status_code)
    assert response.status_code < 500
