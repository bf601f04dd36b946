"""The base and its adapters: how a server names them, and that each endpoint asks the one that is named."""

from __future__ import annotations

import json
import logging

import pytest
from prometheus_client.parser import text_string_to_metric_families
from thread_engine import ThreadEngine, wait_for

import dsvl2_jax
from dsvl2_jax.errors import UsageError
from dsvl2_jax.infer.adapters import BASE, Adapters
from dsvl2_jax.infer.request import Delta
from dsvl2_jax.infer.serve.media import MediaOptions
from dsvl2_jax.infer.serve.models import parse_adapters
from dsvl2_jax.infer.serve.state import OPENAI_NAMES, ServeOptions

CHAT, COMPLETIONS, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"
HELLO = {"messages": [{"role": "user", "content": "Hello"}]}
BODIES = {CHAT: HELLO, COMPLETIONS: {"prompt": "Hello"}, RESPONSES: {"input": "Hello"}}
NAMES = {"micro": "the base", "red": "red", "org/blue": "org/blue", None: "the base", "gpt-4o": "the base"}


class NamingEngine(ThreadEngine):
    """Answers with the name of the adapter that is asked."""

    def _deltas(self, request):
        name = "the base" if request.adapter == BASE else self.model.adapters.names[request.adapter]
        return [Delta(name, [5], [], [], "stop")]


@pytest.fixture(scope="module")
def server(micro, started):
    adapters = Adapters(("red", "org/blue"), frozenset({0, 1}), frozenset({1}))
    model = dsvl2_jax.Model(micro.config, micro.params, micro.processor, None, adapters)
    named = ("red", "/srv/adapters/red-3"), ("org/blue", "hub/blue")
    running, end = started(model, MediaOptions(), engine_of=NamingEngine, adapters=named, root="checkpoint")
    yield running
    end()


def test_the_base_and_each_adapter_are_listed_as_vllm_lists_them(server):
    models = server.http.get("/v1/models").json()["data"]
    told = [(model["id"], model["root"], model["parent"]) for model in models]
    # Of a directory the last part alone: where a server keeps its files is nobody's business.
    assert told == [("micro", "checkpoint", None), ("red", "red-3", "micro"), ("org/blue", "blue", "micro")]
    for model in models:
        assert server.http.get(f"/v1/models/{model['id']}").json() == model


@pytest.mark.parametrize("path", BODIES)
def test_each_endpoint_asks_the_model_that_is_named_and_says_so(server, path):
    for name, text in NAMES.items():
        body = BODIES[path] | ({} if name is None else {"model": name})
        answer = server.http.post(path, json=body).json()
        assert answer["model"] == (text if text in NAMES else "micro")
        assert text in json.dumps(answer.get("choices", answer.get("output")))
        stream = server.http.post(path, json=body | {"stream": True}).text
        assert text in stream and f'"model": "{answer["model"]}"'.replace(" ", "") in stream.replace(" ", "")


@pytest.mark.parametrize("path", [*BODIES, "/tokenize", "/detokenize"])
@pytest.mark.parametrize("name", ["green", "red/../blue", "/srv/adapters/red-3", "Red", "red ", ""])
def test_another_name_is_no_model_and_no_path(server, path, name):
    more = BODIES | {"/tokenize": {"prompt": "Hello"}, "/detokenize": {"tokens": [5]}}
    response = server.http.post(path, json=more[path] | {"model": name})
    error = response.json()["error"]
    assert response.status_code == 404 and error["code"] == "model_not_found" and error["param"] == "model"
    assert '"micro" or "red" or "org/blue"' in error["message"]
    assert server.http.post(path, json=more[path] | {"model": "red"}).status_code == 200


def test_metrics_and_the_log_tell_which_model_was_asked(server, caplog):
    def count(model, name="dsvl2:request_success_total"):
        families = text_string_to_metric_families(server.http.get("/metrics").text)
        samples = [sample for family in families for sample in family.samples if sample.name == name]
        assert {sample.labels["model_name"] for sample in samples} <= {"micro", "red", "org/blue"}
        return sum(sample.value for sample in samples if sample.labels["model_name"] == model)

    before = {model: count(model) for model in ("micro", "red")}
    with caplog.at_level(logging.INFO, logger="dsvl2.serve.access"):
        for name in ("red", "red", "gpt-4o", "green"):
            server.http.post(CHAT, json=HELLO | {"model": name})

        def asked():
            return [record.args[-2] for record in caplog.records if record.args[1] == CHAT]

        wait_for(lambda: len(asked()) == 4)  # a line is written once its answer is on its way
    assert {model: count(model) - before[model] for model in before} == {"micro": 1, "red": 2}
    assert asked() == ["red", "red", "micro", "-"]


def test_adapters_on_the_command_line():
    assert parse_adapters(["a=/x/y", "org/b.c:1=hub/z=1"]) == (("a", "/x/y"), ("org/b.c:1", "hub/z=1"))
    for value in ("", "a", "a=", "=x", "a b=x", "-a=x", "ä=x", "a\n=x", f"{'a' * 101}=x"):
        with pytest.raises(UsageError, match="expected NAME=DIR"):
            parse_adapters([value])
    with pytest.raises(UsageError, match="a is x's name already"):
        parse_adapters(["a=x", "a=y"])


@pytest.mark.parametrize(
    "name, means", [("micro", "is the name of the base"), ("gpt-mine", "means the base too, by --model-alias 'gpt-")]
)
def test_an_adapter_may_not_be_called_as_the_base(name, means):
    with pytest.raises(UsageError, match=means):
        ServeOptions(model_name="micro", aliases=OPENAI_NAMES, adapters=((name, "x"),))
