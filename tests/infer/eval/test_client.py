"""`dsvl2 eval --server`: the same scores as with the model loaded, and what each failure of the server does."""

from __future__ import annotations

import dataclasses
import json
import re
import signal
import socket
import subprocess
import sys
import threading
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path

import chat_server
import httpx2
import pytest
from chat_server import ChatServer, Reply, completion, failure
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import dsvl2_jax
from dsvl2_jax.apps.cli.main import main
from dsvl2_jax.apps.micro import synthetic
from dsvl2_jax.errors import DataError, RunError, UsageError
from dsvl2_jax.infer.eval import client
from dsvl2_jax.infer.eval.chat_request import KEY_VARIABLE, ServerOptions
from dsvl2_jax.infer.eval.client import Server, parse_retry_after
from dsvl2_jax.infer.eval.evaluate import EvalOptions, evaluate
from dsvl2_jax.infer.eval.samples import Sample

KEY = "sk-0123456789abcdef"
COUNT = 8


@pytest.fixture(autouse=True)
def waits(monkeypatch):
    """The seconds that the client would have waited; it does not."""
    seconds: list[float] = []
    pause = client._sleep

    async def note(delay):
        seconds.append(delay)
        await pause(0)

    monkeypatch.setattr(client, "_sleep", note)
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    return seconds


@pytest.fixture
def questions(tmp_path):
    """`COUNT` questions whose answers are their numbers, about one small picture."""
    Image.new("RGB", (30, 20), "blue").save(tmp_path / "small.png")
    records = [{"question": f"number {i}?", "image": "small.png", "answer": str(i)} for i in range(COUNT)]
    return write(tmp_path / "data.jsonl", records)


@pytest.fixture
def teller():
    """A server that knows the answers to `questions`."""
    with ChatServer(tell).running() as server:
        yield server


def tell(body):
    return completion(re.search(r"\d+", chat_server.question_of(body))[0], prompt_tokens=9, completion_tokens=1)


def write(path: Path, records) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def options(tmp_path, server, **changes):
    names = [field.name for field in dataclasses.fields(ServerOptions) if field.name in changes]
    asked = ServerOptions(server.url, **{name: changes.pop(name) for name in names})
    return dataclasses.replace(EvalOptions(metric="exact", out=tmp_path / "out", server=asked), **changes)


def results(folder):
    lines = (folder / "results.jsonl").read_text().splitlines()
    return {result["line"]: result for result in map(json.loads, lines)}


def everything_written(folder):
    return b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())


def test_a_server_with_the_bundled_model_gets_the_scores_of_the_model_here(tmp_path):
    data = synthetic.write(tmp_path, "questions", 11, seed=3, mixture="tasks")
    Image.new("RGB", (150, 90), "red").save(tmp_path / "red.jpg")
    Image.new("RGB", (90, 150), "blue").save(tmp_path / "blue.bmp")
    turns = ["<image>\nWhat is in the image?", "nothing", "Look at this: <image>\nWhat is there?\n"]
    roles = ("user", "assistant", "user")
    conversation = [{"role": role, "content": text} for role, text in zip(roles, turns, strict=True)]
    with data.open("a") as file:
        file.write(
            json.dumps({"messages": conversation, "images": ["red.jpg", "blue.bmp"], "answer": "x", "metric": "anls"})
        )
    here = evaluate(None, data, EvalOptions(out=tmp_path / "here", max_new_tokens=40))
    model, one_at_a_time = dsvl2_jax.load(), threading.Lock()

    def answer(body):
        assert (body["temperature"], body["max_tokens"], body["model"]) == (0, 40, "org/teller")
        turns, images = chat_server.prompt_of(body)
        inputs = model.processor(turns, images)
        with one_at_a_time:
            generation = model.generate(inputs, body["max_tokens"])
        details = {"image_tokens": generation.image_tokens}
        reply = completion(
            generation.text,
            prompt_tokens=generation.prompt_tokens,
            completion_tokens=len(generation.token_ids),
            prompt_tokens_details=details,
        )
        reply.body["choices"][0]["finish_reason"] = generation.finish_reason
        return reply

    with ChatServer(answer).running() as server:
        there = evaluate(None, data, options(tmp_path, server, max_new_tokens=40, metric=None))
    assert there["tasks"] == here["tasks"]
    assert results(tmp_path / "out") == results(tmp_path / "here")
    assert any(result.get("boxes") for result in results(tmp_path / "out").values())
    assert there["model"] == "org/teller" and there["server"] == f"{server.url}/v1"


def test_the_order_of_answers_changes_nothing(questions, tmp_path):
    together, arrived, order = threading.Condition(), [], []

    def answer_backwards(body):
        """Waits for four questions, and answers the last one first."""
        with together:
            mine = len(arrived)
            arrived.append(mine)
            together.notify_all()
            full = mine // 4 * 4 + 4
            together.wait_for(
                lambda: len(arrived) >= full and order[-1:] == ([mine + 1] if mine % 4 < 3 else order[-1:])
            )
            order.append(mine)
            together.notify_all()
        return tell(body)

    with ChatServer(answer_backwards).running() as server:
        summary = evaluate(None, questions, options(tmp_path, server, concurrency=4))
        assert server.most_at_once == 4
    assert order == [3, 2, 1, 0, 7, 6, 5, 4]
    assert summary["tasks"] == {"data": {"metric": "exact", "samples": COUNT, "score": 1.0}}
    assert {line: r["answer"] for line, r in results(tmp_path / "out").items()} == {i + 1: str(i) for i in range(COUNT)}
    shown = re.search(r'id="data">(.*?)</script>', (tmp_path / "out" / "report.html").read_text(), re.DOTALL)[1]
    assert [entry["answer"] for entry in json.loads(shown)] == [str(i) for i in range(COUNT)]


def test_one_at_a_time_is_one_at_a_time_and_in_order(questions, tmp_path, teller):
    evaluate(None, questions, options(tmp_path, teller, concurrency=1))
    assert teller.most_at_once == 1
    assert teller.questions() == [f"number {i}?" for i in range(COUNT)]


def test_a_busy_server_is_waited_for(questions, tmp_path, waits):
    replies = [failure(429, "slow down", Retry_After="7"), failure(503, "starting"), Reply(502, b"<html>bad gateway")]

    def answer(body):
        return replies.pop(0) if replies else tell(body)

    with ChatServer(answer).running() as server:
        summary = evaluate(None, questions, options(tmp_path, server, concurrency=1))
    assert summary["tasks"]["data"] == {"metric": "exact", "samples": COUNT, "score": 1.0}
    assert server.questions()[:5] == ["number 0?"] * 4 + ["number 1?"]
    assert len(waits) == 3
    assert 7.5 <= waits[0] <= 8
    assert 1 <= waits[1] <= 2 <= waits[2] <= 4


def test_a_server_that_stays_busy_ends_the_run_and_later_it_goes_on(questions, tmp_path, waits):
    def answer(body):
        return tell(body) if len(server.asked) <= 3 else failure(503, "out of order")

    with ChatServer(answer).running() as server:
        with pytest.raises(RunError, match=r"out of order; tried 10 times. What was answered is kept: start the same"):
            evaluate(None, questions, options(tmp_path, server, concurrency=1))
        assert len(server.asked) == 3 + 10
        assert sum(waits) > 100
        assert sorted(results(tmp_path / "out")) == [1, 2, 3]
        server.answer = tell
        assert evaluate(None, questions, options(tmp_path, server))["answered_now"] == COUNT - 3


def test_a_question_waits_while_others_are_answered(questions, tmp_path):
    turn = threading.Condition()
    counts = {"refused": 0, "answered": 0}

    def answer(body):
        """Refuses question 0 as often as a client would bear it, before each answer to another one."""
        with turn:
            if chat_server.question_of(body) == "number 0?":
                if counts["answered"] == COUNT - 1:
                    return tell(body)
                counts["refused"] += 1
                turn.notify_all()
                return failure(429, "others first")
            turn.wait_for(lambda: counts["refused"] >= 8 * (counts["answered"] + 1))
            counts["answered"] += 1
            return tell(body)

    with ChatServer(answer).running() as server:
        summary = evaluate(None, questions, options(tmp_path, server, concurrency=2))
    assert summary["tasks"]["data"]["score"] == 1.0
    assert counts["refused"] >= 8 * (COUNT - 1)


def test_a_server_that_wants_a_long_pause_ends_the_run(questions, tmp_path, teller):
    teller.answer = lambda body: failure(429, "quota", Retry_After="86400")
    with pytest.raises(RunError, match=r"asks to wait for 86,400 seconds \(HTTP 429: quota\)"):
        evaluate(None, questions, options(tmp_path, teller))


def test_a_question_that_is_refused_has_no_answer(questions, tmp_path):
    def answer(body):
        return failure(400, "picture\ntoo large") if "3" in chat_server.question_of(body) else tell(body)

    with ChatServer(answer).running() as server:
        summary = evaluate(None, questions, options(tmp_path, server))
        assert summary["tasks"]["data"] == {"metric": "exact", "samples": COUNT, "score": 0.875, "unanswered": 1}
        assert results(tmp_path / "out")[4]["error"] == "HTTP 400: picture too large"
        assert len(server.asked) == COUNT
        assert evaluate(None, questions, options(tmp_path, server))["answered_now"] == 0
    assert len(server.asked) == COUNT


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        (failure(500, "out of memory"), "HTTP 500: out of memory"),
        (Reply(504, b""), "HTTP 504: Gateway Timeout"),
        (Reply(200, b"<html>hello"), "not a chat completion (HTTP 200: <html>hello)"),
        (Reply(200, {"choices": []}), "not a chat completion (HTTP 200: "),
        (Reply(200, {"error": {"message": "upstream is gone"}}), "not a chat completion (HTTP 200: upstream is gone)"),
        (Reply(), "the connection broke (Server disconnected"),
    ],
)
def test_a_question_that_fails_the_server_is_asked_again_by_a_later_run(questions, tmp_path, reply, reason):
    def answer(body):
        return reply if "3" in chat_server.question_of(body) else tell(body)

    with ChatServer(answer).running() as server:
        summary = evaluate(None, questions, options(tmp_path, server))
        assert summary["tasks"]["data"]["unanswered"] == 1
        assert server.questions().count("number 3?") == 3
        assert results(tmp_path / "out")[4]["error"].startswith(reason)
        server.answer = tell
        again = evaluate(None, questions, options(tmp_path, server))
    assert again["answered_now"] == 1
    assert again["tasks"]["data"] == {"metric": "exact", "samples": COUNT, "score": 1.0}


def test_an_answer_that_never_comes_is_not_waited_for_for_ever(questions, tmp_path):
    over = threading.Event()

    def answer(body):
        over.wait()
        return tell(body)

    write(questions, [{"question": "number 0?", "answer": "0"}])
    with ChatServer(answer).running() as server:
        summary = evaluate(None, questions, options(tmp_path, server, timeout=0.05))
        over.set()
    assert summary["tasks"]["data"]["unanswered"] == 1
    assert results(tmp_path / "out")[1]["error"] == "no answer within 0.05 seconds (--timeout)"


def test_a_server_that_fails_every_question_ends_the_run(questions, tmp_path, teller):
    write(questions, [{"question": f"number {i}?", "answer": str(i)} for i in range(60)])
    teller.answer = lambda body: failure(500, "no device")
    with pytest.raises(RunError, match=r"has failed 20 questions in a row; the last: HTTP 500: no device"):
        evaluate(None, questions, options(tmp_path, teller))


@pytest.mark.parametrize("status", [401, 403])
def test_a_refused_key_ends_the_run_and_is_told_to_nobody(questions, tmp_path, capsys, status):
    (tmp_path / "key").write_text(KEY)
    command = ["eval", str(questions), "--metric", "exact", "--out", str(tmp_path / "out"), "--json"]

    def answer(body):
        if chat_server.question_of(body) == "number 0?":
            return completion("0")
        return failure(status, f"incorrect API key provided: {KEY}")

    with ChatServer(answer).running() as server:
        command += ["--server", server.url, "--concurrency", "1", "--api-key-file", str(tmp_path / "key")]
        assert main(command) == 1
        shown = capsys.readouterr()
        assert f"refuses the API key (HTTP {status}: incorrect API key provided: ***)" in shown.err
        assert f"--api-key-file, or set {KEY_VARIABLE}" in shown.err
        assert len(server.asked) == 2
        server.models = failure(status, f"who is {KEY}?")
        assert main(command) == 1
        assert "who is ***?" in (again := capsys.readouterr()).err
        server.models, server.answer = Reply(404, {}), lambda body: failure(400, f"not for {KEY}")
        assert main([*command, "--server-model", "org/teller"]) == 0
        last = capsys.readouterr()
    assert set(server.keys) == {f"Bearer {KEY}"}
    assert "not for ***" in json.dumps(results(tmp_path / "out"))
    assert all(KEY not in text for out in (shown, again, last) for text in out)
    assert KEY.encode() not in everything_written(tmp_path / "out")


def test_without_a_key_none_is_sent_and_a_server_that_wants_one_is_named(questions, tmp_path, teller):
    teller.answer = lambda body: failure(401, "who are you?")
    with pytest.raises(RunError, match=r"refuses to answer without an API key \(HTTP 401: who are you\?\)"):
        evaluate(None, questions, options(tmp_path, teller))
    assert set(teller.keys) == {None}


def test_a_server_that_is_not_there_ends_the_run_at_once(questions, tmp_path, capsys, waits):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        for more in ([], ["--server-model", "any"]):
            assert main(["eval", str(questions), "--metric", "exact", "--server", url, *more]) == 1
            assert f"{url}/v1: cannot be reached (" in capsys.readouterr().err
    assert waits == []


class NotThereYet(httpx2.AsyncHTTPTransport):
    """Connects in vain twice."""

    tries = 0

    async def handle_async_request(self, request):
        self.tries += 1
        if self.tries <= 2:
            raise httpx2.ConnectError("connection refused", request=request)
        return await super().handle_async_request(request)


def test_a_server_that_goes_away_may_come_back(questions, tmp_path, teller, waits, monkeypatch):
    connect = httpx2.AsyncClient
    monkeypatch.setattr(httpx2, "AsyncClient", lambda **settings: connect(transport=NotThereYet(), **settings))
    assert evaluate(None, questions, options(tmp_path, teller, concurrency=1))["tasks"]["data"]["score"] == 1.0
    assert len(waits) == 2


def test_a_wrong_address_or_model_ends_the_run(questions, tmp_path, teller):
    teller.models = Reply(404, {"detail": "Not Found"})
    with pytest.raises(RunError, match=r"does not say which models there are \(HTTP 404: Not Found\). Name one with"):
        evaluate(None, questions, options(tmp_path, teller))
    teller.answer = lambda body: failure(404, f"The model {body['model']} does not exist")
    with pytest.raises(RunError, match=r"completions: no such page or model \(HTTP 404: The model x does not exist\)"):
        evaluate(None, questions, options(tmp_path, teller, server_model="x"))
    teller.answer = lambda body: Reply(307, b"", {"Location": "https://elsewhere.example/v1"})
    with pytest.raises(RunError, match=r"it leads to https://elsewhere.example/v1"):
        evaluate(None, questions, options(tmp_path, teller, server_model="x"))


def test_an_image_that_cannot_be_read_names_its_line(questions, tmp_path, teller):
    (tmp_path / "cut.png").write_bytes((tmp_path / "small.png").read_bytes()[:60])
    write(questions, [{"question": "number 1?", "answer": "1", "image": name} for name in ("small.png", "cut.png")])
    with pytest.raises(DataError, match=r"data.jsonl:2: .*cut.png: the image cannot be read"):
        evaluate(None, questions, options(tmp_path, teller))


def test_an_interrupted_run_keeps_what_was_answered(questions, tmp_path):
    """In a process of its own, without jax: Ctrl-C while the fifth question waits for its answer."""
    waiting = threading.Event()
    over = threading.Event()

    def answer(body):
        if len(server.asked) > 4:
            waiting.set()
            over.wait()
        return tell(body)

    with ChatServer(answer).running() as server:
        command = ["eval", str(questions), "--metric", "exact", "--server", server.url, "--concurrency", "1"]
        command += ["--out", str(tmp_path / "out")]
        program = "import signal, sys; sys.modules['jax'] = None\n"
        # A shell's background jobs, and what they start, ignore Ctrl-C otherwise.
        program += "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        program += "from dsvl2_jax.apps.cli.main import main; sys.exit(main())"
        process = subprocess.Popen([sys.executable, "-c", program, *command], stderr=subprocess.PIPE, text=True)
        assert waiting.wait(120), process.communicate()
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=120)
        over.set()
        assert (process.returncode, said) == (130, "dsvl2: interrupted\n")
        assert sorted(results(tmp_path / "out")) == [1, 2, 3, 4]
        server.answer = tell
        server.asked.clear()
        summary = evaluate(None, questions, options(tmp_path, server))
        assert sorted(server.questions()) == [f"number {i}?" for i in range(4, COUNT)]
    assert summary["answered_now"] == COUNT - 4
    assert summary["tasks"] == {"data": {"metric": "exact", "samples": COUNT, "score": 1.0}}


def test_another_server_model_or_field_is_another_evaluation(questions, tmp_path, teller):
    evaluate(None, questions, options(tmp_path, teller))
    with pytest.raises(RunError, match=r'server.model was "org/teller", is "other"'):
        evaluate(None, questions, options(tmp_path, teller, server_model="other"))
    with pytest.raises(RunError, match=r"server.extra_body"):
        evaluate(None, questions, options(tmp_path, teller, extra_body='{"top_k": 1}'))
    with pytest.raises(RunError, match=r"server.url was"):
        other = ServerOptions(f"{teller.url}/else", server_model="org/teller")
        evaluate(None, questions, EvalOptions(metric="exact", out=tmp_path / "out", server=other))
    with pytest.raises(RunError, match=r"checkpoint"):
        evaluate(None, questions, EvalOptions(metric="exact", out=tmp_path / "out"))
    changed = options(tmp_path, teller, concurrency=3, timeout=5.0)
    assert evaluate(None, questions, changed)["answered_now"] == 0


def test_results_go_below_the_name_of_model_and_server(questions, tmp_path, teller, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["eval", str(questions), "--metric", "exact", "--server", teller.url]) == 0
    folder = tmp_path / "eval" / f"teller@{teller.url.removeprefix('http://').replace(':', '-')}" / "data"
    assert "100.0 %" in capsys.readouterr().out
    served = json.loads((folder / "run.json").read_text())["server"]
    assert served == {"url": f"{teller.url}/v1", "model": "org/teller"}
    assert "teller@127.0.0.1:" in (folder / "report.html").read_text()
    assert len(list((folder / "thumbnails").iterdir())) == 1


def test_further_fields_are_sent_and_null_takes_one_out(questions, tmp_path, teller):
    extra = '{"temperature": null, "max_tokens": null, "max_completion_tokens": 7, "seed": 3}'
    evaluate(None, questions, options(tmp_path, teller, extra_body=extra))
    assert {name: value for name, value in teller.asked[0].items() if name != "messages"} == {
        "model": "org/teller",
        "max_completion_tokens": 7,
        "seed": 3,
    }


def test_the_extra_to_install_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "httpx2", None)
    with pytest.raises(UsageError, match=r"needs httpx2, which is not installed: pip install -e '.\[serve\]'"):
        Server(ServerOptions("http://host.example"), 8)


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        (None, None),
        ("3", 3),
        (" 0.5 ", 0.5),
        ("soon", None),
        ("-1", None),
        ("Sun, 06 Nov 1994 08:49:37 GMT", 0),
        ("", None),
    ],
)
def test_retry_after(value, seconds):
    assert parse_retry_after(value) == seconds


def test_retry_after_a_date():
    then = datetime.now(UTC) + timedelta(days=1000)
    assert 999 * 86400 < parse_retry_after(format_datetime(then, usegmt=True)) <= 1000 * 86400


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters()),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["choices", "message", "content", "usage", "error", "detail", "prompt_tokens_details"]),
            inner,
            max_size=3,
        )
    ),
    max_leaves=12,
)
choices = st.fixed_dictionaries({"choices": st.lists(json_values, max_size=2)}, optional={"usage": json_values})
answers = st.builds(
    lambda text, more: {"choices": [{"message": {"content": text}}], **more},
    st.text(st.characters()),
    st.fixed_dictionaries({}, optional={"usage": json_values}),
)


@given(st.integers(100, 599), json_values | choices | answers, st.none() | st.text(st.characters(codec="ascii")))
def test_whatever_a_server_says_is_an_answer_or_an_error_for_people(status, body, retry_after):
    server = object.__new__(Server)  # it need not ask for models
    server._key, server._url, server.model = KEY, "http://h/v1", "m"
    sample = Sample(1, "1", "t", "exact", ({"role": "user", "content": "?"},), (), (), ("5",))
    response = httpx2.Response(
        status,
        content=json.dumps(body).encode(),
        headers={} if retry_after is None else {"Retry-After": retry_after.encode("ascii", "ignore")},
        request=httpx2.Request("POST", "http://h/v1/chat/completions"),
    )
    try:
        result = server._result(sample, response)
    except (RunError, client._FailedError) as error:
        assert str(error)
        str(error).encode()
    else:
        json.dumps(result, ensure_ascii=False).encode()
        assert ("error" in result) == (status != 200)
