"""POST /v1/chat/completions over real HTTP: its answers, its stream, its counts."""

from __future__ import annotations

import json

import httpx2 as httpx
import pytest
from thread_engine import wait_for

from dsvl2_jax.infer.request import FailedError, RefusedError
from dsvl2_jax.infer.sampling import SamplingParams

PATH = "/v1/chat/completions"
QUESTION = "What colour is the circle?"
LOCATE = "Locate <|ref|>the blue circle<|/ref|> in the image."


def about(url, text=QUESTION):
    return [
        {
            "role": "user",
            "content": [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": text}],
        }
    ]


def events(response):
    """(name of the event, data) of a stream; data is parsed, but for [DONE]."""
    out = []
    for block in response.text.strip().split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.split("\n"))
        data = fields["data"]
        out.append((fields.get("event"), data if data == "[DONE]" else json.loads(data)))
    return out


@pytest.fixture(scope="module")
def direct(micro):
    """Answers of the model itself."""

    def answer(conversation, images, max_new_tokens=512, **sampling):
        inputs = micro.processor(conversation, images)
        return micro.generate(inputs, max_new_tokens, SamplingParams(**sampling), logprobs=True)

    return answer


def test_an_answer_is_that_of_the_model_token_for_token(running, shapes, shapes_url, direct):
    expected = direct([{"role": "user", "content": f"<image>\n{QUESTION}"}], [shapes])
    body = {"model": "micro", "messages": about(shapes_url), "return_token_ids": True}
    answer = running.http.post(PATH, json=body).raise_for_status().json()
    (choice,) = answer["choices"]
    assert choice["message"]["content"] == expected.text and expected.text
    assert choice["token_ids"] == expected.token_ids
    assert choice["finish_reason"] == "stop" and choice["index"] == 0 and choice["logprobs"] is None
    assert answer["object"] == "chat.completion" and answer["model"] == "micro"
    assert len(answer["prompt_token_ids"]) == expected.prompt_tokens
    usage = answer["usage"]
    assert usage["prompt_tokens"] == expected.prompt_tokens
    assert usage["completion_tokens"] == len(expected.token_ids)
    assert usage["total_tokens"] == expected.prompt_tokens + len(expected.token_ids)
    details = usage["prompt_tokens_details"]
    assert details["image_tokens"] == expected.image_tokens > 0
    assert details["text_tokens"] == expected.prompt_tokens - expected.image_tokens
    assert details["cached_tokens"] == 0
    assert details["tiles"] == len(running.last_request().inputs.tiles)


def test_the_stream_joined_is_the_answer(running, shapes_url):
    body = {"messages": about(shapes_url, "Describe the image."), "max_tokens": 60}
    whole = running.http.post(PATH, json=body).json()
    response = running.http.post(PATH, json=body | {"stream": True, "stream_options": {"include_usage": True}})
    assert response.headers["content-type"].startswith("text/event-stream")
    *chunks, last, done = [data for _, data in events(response)]
    assert done == "[DONE]"
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": "", "refusal": None}
    assert all(chunk["object"] == "chat.completion.chunk" and chunk["usage"] is None for chunk in chunks)
    assert len({chunk["id"] for chunk in [*chunks, last]}) == 1
    text = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
    assert text == whole["choices"][0]["message"]["content"]
    reasons = [chunk["choices"][0]["finish_reason"] for chunk in chunks]
    assert reasons == [None] * (len(chunks) - 1) + [whole["choices"][0]["finish_reason"]]
    assert last["choices"] == [] and last["usage"] == whole["usage"]
    assert len(chunks) > 4  # several pieces, not one


def test_a_stream_has_no_counts_unless_asked(running):
    response = running.http.post(PATH, json={"messages": [{"role": "user", "content": "Hello"}], "stream": True})
    assert all("usage" not in data for _, data in events(response)[:-1])


def test_boxes_are_told_in_pixels_of_their_picture(running, shapes, shapes_url, direct):
    expected = direct([{"role": "user", "content": f"<image>\n{LOCATE}"}], [shapes])
    assert expected.boxes
    body = {"messages": about(shapes_url, LOCATE)}
    choice = running.http.post(PATH, json=body).json()["choices"][0]
    boxes = [vars(box) for box in expected.boxes]
    assert choice["boxes"] == boxes
    *_, (_, last), _ = events(running.http.post(PATH, json=body | {"stream": True}))
    assert last["choices"][0]["boxes"] == boxes


def test_settings_reach_the_engine(running):
    body = {
        "messages": [{"role": "user", "content": "Hello"}],
        "temperature": 0.5, "top_p": 0.9, "top_k": -1, "min_p": 0.1, "repetition_penalty": 1.1, "seed": 7,
        "presence_penalty": 0.5, "frequency_penalty": -0.5, "logit_bias": {"5": -100, "6": 3.5}, "stop": ["x", "y"],
        "ignore_eos": True, "max_completion_tokens": 3,
    }  # fmt: skip
    assert running.http.post(PATH, json=body).status_code == 200
    request = running.last_request()
    assert request.sampling == SamplingParams(
        0.5, 0.9, 0, 1.1, 7, ("x", "y"), 0.1, 0.5, -0.5, ((5, -100.0), (6, 3.5)), True
    )
    assert request.max_new_tokens == 3 and request.top_logprobs is None and request.owner == ""


def test_without_settings_an_answer_is_what_generate_gives(running):
    assert running.http.post(PATH, json={"messages": [{"role": "user", "content": "Hello"}]}).status_code == 200
    request = running.last_request()
    assert request.max_new_tokens == 512
    assert request.sampling.temperature == 0 and request.sampling.top_k == SamplingParams().top_k


def test_seeds_differ_unless_one_is_given(running):
    body = {"messages": [{"role": "user", "content": "Hello"}], "temperature": 1, "max_tokens": 1}
    seeds = set()
    for _ in range(3):
        running.http.post(PATH, json=body)
        seeds.add(running.last_request().sampling.seed)
    assert len(seeds) == 3


def test_max_tokens_ends_at_the_context(running, micro):
    body = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 2**31 - 1, "stop": "e"}
    assert running.http.post(PATH, json=body).status_code == 200
    request = running.last_request()
    context = micro.config.language.max_position_embeddings
    assert request.max_new_tokens == context - len(request.inputs.input_ids) + 1


def test_several_answers(running):
    body = {
        "messages": [{"role": "user", "content": "Describe the image."}], "n": 3, "temperature": 1.5, "seed": 1,
        "max_tokens": 12,
    }  # fmt: skip
    whole = running.http.post(PATH, json=body).json()
    assert [choice["index"] for choice in whole["choices"]] == [0, 1, 2]
    texts = [choice["message"]["content"] for choice in whole["choices"]]
    assert len(set(texts)) > 1
    requests = [answer.request for answer in running.engine.answers[-3:]]
    assert [request.choice for request in requests] == [0, 1, 2]
    counts = whole["usage"]
    assert counts["prompt_tokens"] == len(requests[0].inputs.input_ids)  # once
    streamed = events(running.http.post(PATH, json=body | {"stream": True}))[:-1]
    for index, text in enumerate(texts):
        own = [data["choices"][0] for _, data in streamed if data["choices"][0]["index"] == index]
        assert own[0]["delta"]["role"] == "assistant"
        assert "".join(choice["delta"].get("content", "") for choice in own) == text


def test_logprobs(running, micro):
    body = {
        "messages": [{"role": "user", "content": "Hello"}], "logprobs": True, "top_logprobs": 3, "max_tokens": 10,
        "return_token_ids": True,
    }  # fmt: skip
    choice = running.http.post(PATH, json=body).json()["choices"][0]
    content, text, eos = choice["logprobs"]["content"], choice["message"]["content"], micro.processor.tokenizer.eos_id
    assert bytes(byte for entry in content for byte in entry["bytes"]).decode() == text
    assert len(content) == len([token for token in choice["token_ids"] if token != eos])
    for entry in content:
        assert len(entry["top_logprobs"]) == 3
        # Greedy: the chosen one is the most likely.
        assert entry["top_logprobs"][0]["token"] == entry["token"]
        assert entry["logprob"] == pytest.approx(entry["top_logprobs"][0]["logprob"], abs=1e-3)
    streamed = events(running.http.post(PATH, json=body | {"stream": True}))[:-1]
    parts = [data["choices"][0]["logprobs"] for _, data in streamed]
    assert [entry for part in parts if part for entry in part["content"]] == content


def test_stop_strings_never_show(running):
    plain = running.http.post(PATH, json={"messages": [{"role": "user", "content": "Hello"}]}).json()
    text = plain["choices"][0]["message"]["content"]
    assert len(text) > 4
    stop = text[2:4]
    body = {"messages": [{"role": "user", "content": "Hello"}], "stop": stop}
    whole = running.http.post(PATH, json=body).json()["choices"][0]
    assert whole["message"]["content"] == text[: text.index(stop)] and whole["finish_reason"] == "stop"
    streamed = events(running.http.post(PATH, json=body | {"stream": True}))[:-1]
    assert "".join(data["choices"][0]["delta"].get("content", "") for _, data in streamed) == text[: text.index(stop)]


@pytest.mark.parametrize("status, wait", [(429, 2.2), (413, None), (503, 5)])
def test_a_refusal_has_status_reason_and_when_to_try_again(running, status, wait):
    running.engine.refusal = RefusedError("the queue is full (256 answers wait).", status, wait)
    response = running.http.post(PATH, json={"messages": [{"role": "user", "content": "Hello"}], "stream": True})
    assert response.status_code == status
    assert "queue is full" in response.json()["error"]["message"]
    assert response.headers.get("retry-after") == (None if wait is None else str({2.2: 3, 5: 5}[wait]))


def test_when_one_of_several_answers_is_refused_none_is_left(running):
    submit, count = running.engine.submit, len(running.engine.answers)

    def once(request):
        if request.choice:
            raise RefusedError("full", 429, 1.0)
        return submit(request)

    running.engine.submit = once
    try:
        response = running.http.post(PATH, json={"messages": [{"role": "user", "content": "Hello"}], "n": 2})
    finally:
        running.engine.submit = submit
    assert response.status_code == 429
    assert [answer.cancelled for answer in running.engine.answers[count:]] == [True]


def test_a_failure_before_the_first_token_has_its_status_even_when_streamed(running):
    running.engine.failure = (0, FailedError("the device failed; ask again.", 503))
    for stream in (False, True):
        body = {"messages": [{"role": "user", "content": "Hello"}], "stream": stream}
        response = running.http.post(PATH, json=body)
        assert response.status_code == 503
        assert response.json()["error"] == {
            "message": "the device failed; ask again.", "type": "server_error", "param": None, "code": "unavailable"
        }  # fmt: skip


def test_a_failure_later_is_an_event(running, shapes_url):
    running.engine.failure = (1, FailedError("the device failed; ask again.", 503))
    response = running.http.post(PATH, json={"messages": about(shapes_url, "Describe the image."), "stream": True})
    assert response.status_code == 200
    *before, (name, error), done = events(response)
    assert name == "error" and error["error"]["type"] == "server_error" and done == (None, "[DONE]")
    assert before[0][1]["choices"][0]["delta"]["role"] == "assistant"


def test_what_nobody_thought_of_is_a_500_that_tells_nothing(running, caplog):
    running.engine.failure = (0, ValueError("secret prompt"))
    response = running.http.post(PATH, json={"messages": [{"role": "user", "content": "Hello"}]})
    assert response.status_code == 500 and "secret" not in response.text
    assert "ValueError" in caplog.text and "secret" not in caplog.text


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_frees_its_slot(running, stream):
    running.engine.pause_after, count = 0, len(running.engine.answers)
    body = {"messages": [{"role": "user", "content": "Hello"}], "stream": stream}
    with pytest.raises(httpx.TimeoutException):
        httpx.post(running.url + PATH, json=body, timeout=0.5, trust_env=False)
    wait_for(lambda: len(running.engine.answers) > count and running.engine.answers[-1].cancelled)


def test_a_client_that_goes_away_amid_a_stream_frees_its_slot(running, shapes_url):
    running.engine.pause_after = 1
    body = {"messages": about(shapes_url, "Describe the image."), "stream": True}
    with httpx.stream("POST", running.url + PATH, json=body, timeout=600, trust_env=False) as response:
        lines = response.iter_lines()  # kept: without it the connection would be closed here
        assert "assistant" in next(lines)
        assert not running.engine.answers[-1].cancelled
    wait_for(lambda: running.engine.answers[-1].cancelled)
    metrics = running.http.get("/metrics").text
    assert 'request_success_total{finished_reason="abort",model_name="micro"}' in metrics
