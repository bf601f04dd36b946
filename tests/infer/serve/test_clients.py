"""Clients as they are: the openai package, and the messages of VLMEvalKit, lmms-eval and Open WebUI."""

from __future__ import annotations

import asyncio

import openai
import pytest

from dsvl2_jax.infer.request import FailedError

QUESTION = "What colour is the circle?"


@pytest.fixture
def client(running):
    with openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0, timeout=600) as client:
        yield client


def about(url, text=QUESTION, **image):
    return [
        {"role": "user", "content": [
            {"type": "image_url", "image_url": {"url": url, **image}}, {"type": "text", "text": text},
        ]},
    ]  # fmt: skip


@pytest.fixture(scope="module")
def expected(micro, shapes):
    return micro.generate(micro.processor([{"role": "user", "content": f"<image>\n{QUESTION}"}], [shapes])).text


def test_chat(client, shapes_url, expected):
    (model,) = client.models.list().data
    answer = client.chat.completions.create(model=model.id, messages=about(shapes_url), seed=1, user="me", store=False)
    assert answer.choices[0].message.content == expected and answer.choices[0].finish_reason == "stop"
    assert answer.usage.prompt_tokens_details.cached_tokens == 0
    assert client.models.retrieve(model.id).id == answer.model


def test_chat_streamed(client, shapes_url, expected):
    stream = client.chat.completions.create(
        model="gpt-4o", messages=about(shapes_url), stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == expected
    assert chunks[0].choices[0].delta.role == "assistant" and chunks[-1].usage.completion_tokens > 0


def test_chat_streamed_by_the_helper(client, shapes_url, expected):
    with client.chat.completions.stream(model="micro", messages=about(shapes_url), logprobs=True) as stream:
        deltas = [event.delta for event in stream if event.type == "content.delta"]
        final = stream.get_final_completion()
    assert "".join(deltas) == final.choices[0].message.content == expected
    assert "".join(entry.token for entry in final.choices[0].logprobs.content) == expected


def test_a_conversation_goes_on_with_what_came_before(client, running, shapes_url):
    messages = about(shapes_url)
    answer = client.chat.completions.create(model="micro", messages=messages)
    messages += [answer.choices[0].message.model_dump(), {"role": "user", "content": "And the square?"}]
    client.chat.completions.create(model="micro", messages=messages, max_tokens=5)
    assert f"<|Assistant|>:{answer.choices[0].message.content}" in running.last_request().inputs.prompt


def test_many_at_once_asynchronously(running, shapes_url, expected):
    async def ask():
        async with openai.AsyncOpenAI(base_url=f"{running.url}/v1", api_key="none", timeout=600) as client:

            async def one():
                stream = await client.chat.completions.create(model="micro", messages=about(shapes_url), stream=True)
                return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

            return await asyncio.gather(*(one() for _ in range(4)))

    assert asyncio.run(ask()) == [expected] * 4


def test_completions(client, micro):
    answer = client.completions.create(model="micro", prompt=["Hello", "A red"], n=2, logprobs=2, max_tokens=6)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    whole = micro.generate(micro.processor(prompt="A red"), 6)
    choice = answer.choices[2]
    assert choice.text == whole.text and choice.finish_reason == whole.finish_reason
    logprobs = choice.logprobs
    assert "".join(logprobs.tokens) == choice.text and len(logprobs.top_logprobs[0]) == 2
    for offset, token in zip(logprobs.text_offset, logprobs.tokens, strict=True):
        assert choice.text[offset : offset + len(token)] == token
    assert answer.usage.prompt_tokens == sum(len(micro.processor(prompt=p).input_ids) for p in ("Hello", "A red"))
    tokens = micro.processor(prompt="A red").input_ids.tolist()
    by_ids = client.completions.create(model="micro", prompt=tokens, max_tokens=6)
    assert by_ids.choices[0].text == whole.text
    stream = client.completions.create(model="micro", prompt="A red", max_tokens=6, stream=True, logprobs=0)
    chunks = list(stream)
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.text
    assert [x for chunk in chunks for x in chunk.choices[0].logprobs.text_offset] == logprobs.text_offset


def test_responses(client, shapes_url, expected):
    content = [
        {"type": "input_image", "image_url": shapes_url, "detail": "auto"},
        {"type": "input_text", "text": QUESTION},
    ]
    answer = client.responses.create(model="micro", input=[{"role": "user", "content": content}])
    assert answer.output_text == expected and answer.status == "completed" and answer.error is None
    assert answer.usage.output_tokens > 0 and answer.usage.input_tokens_details.cached_tokens == 0
    longer = [{"role": "user", "content": content}, *answer.output, {"role": "user", "content": "And the square?"}]
    again = client.responses.create(model="micro", input=longer, instructions="Be brief.", max_output_tokens=2)
    assert again.status == "incomplete" and again.incomplete_details.reason == "max_output_tokens"


def test_responses_streamed(client, shapes_url, expected):
    content = [{"type": "input_text", "text": QUESTION}, {"type": "input_image", "image_url": shapes_url}]
    with client.responses.stream(
        model="micro", input=[{"role": "user", "content": content[::-1]}], include=["message.output_text.logprobs"]
    ) as stream:
        events = list(stream)
        final = stream.get_final_response()
    kinds = [event.type for event in events]
    opening = ["response.created", "response.in_progress", "response.output_item.added", "response.content_part.added"]
    closing = [
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    assert kinds[:4] == opening and kinds[-4:] == closing
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == expected
    assert final.output_text == expected
    assert "".join(entry.token for entry in final.output[0].content[0].logprobs) == expected


def test_errors_are_the_clients_own(client, running, shapes_url):
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="micro", messages=[{"role": "user", "content": "x"}], temperature=-1)
    assert caught.value.param == "temperature" and caught.value.code == "invalid_value"
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="other", messages=[{"role": "user", "content": "x"}])
    with pytest.raises(openai.BadRequestError, match="calls no tools"):
        client.chat.completions.create(model="micro", messages=[{"role": "user", "content": "x"}], tools=[{}])
    running.engine.failure = (1, FailedError("the device failed", 503))
    prompt = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 12, "seed": 1, "temperature": 2}
    with pytest.raises(openai.APIError, match="the device failed"):
        for _ in client.chat.completions.create(model="micro", stream=True, extra_body={"ignore_eos": True}, **prompt):
            pass
    content = [{"type": "input_image", "image_url": shapes_url}, {"type": "input_text", "text": "Describe the image."}]
    events = list(client.responses.create(model="micro", stream=True, input=[{"role": "user", "content": content}]))
    assert [event.type for event in events[-2:]] == ["error", "response.failed"]


@pytest.mark.parametrize(
    "body",
    [
        # VLMEvalKit, vlmeval/api/gpt.py: list content, detail low, n and temperature always.
        {"model": "micro", "max_tokens": 8, "n": 1, "temperature": 0, "seed": None, "messages": [
            {"role": "system", "content": "You are brief."},
            {"role": "user", "content": [
                {"type": "image_url", "image_url": {"url": "IMAGE", "detail": "low"}},
                {"type": "text", "text": QUESTION},
            ]},
        ]},
        # lmms-eval, lmms_eval/models/openai_compatible.py.
        {"model": "micro", "max_tokens": 8, "temperature": 0, "messages": [
            {"role": "user", "content": [
                {"type": "text", "text": QUESTION}, {"type": "image_url", "image_url": {"url": "IMAGE"}},
            ]},
        ]},
        # Open WebUI: a system message, the picture after the text, a stream with its counts.
        {"model": "micro", "stream": True, "stream_options": {"include_usage": True}, "max_tokens": 8, "messages": [
            {"role": "system", "content": "You are brief."},
            {"role": "user", "content": "Hello"},
            {"role": "assistant", "content": "Hello!"},
            {"role": "user", "content": [
                {"type": "text", "text": QUESTION}, {"type": "image_url", "image_url": {"url": "IMAGE"}},
            ]},
        ]},
        # Judges that ask for plain text, and content parts without a picture.
        {"model": "gpt-4o-mini", "response_format": {"type": "text"}, "top_p": 1, "max_tokens": 8,
         "presence_penalty": 0, "frequency_penalty": 0, "stop": None, "logit_bias": {}, "messages": [
            {"role": "user", "content": [{"type": "text", "text": "Is this right?"}]}]},
    ],
)  # fmt: skip
def test_messages_of_kits_and_pages(running, shapes_url, body):
    import json

    body = json.loads(json.dumps(body).replace("IMAGE", shapes_url))
    response = running.http.post("/v1/chat/completions", json=body)
    assert response.status_code == 200, response.text
    tiles = running.last_request().inputs.tiles
    assert len(tiles) > 2 or "IMAGE" not in json.dumps(body)  # detail: low is not meant
