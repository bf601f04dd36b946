"""`dsvl2 bench serve`: every part in small against a real server, and what its figures are made of."""

from __future__ import annotations

import base64
import dataclasses
import io
import itertools
import json
import math
from collections import Counter
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
import quick_compilation
from hypothesis import given
from PIL import Image

from dsvl2_jax.apps.bench import serve, serve_cases, serve_parts
from dsvl2_jax.apps.bench.random_checkpoint import random_checkpoint
from dsvl2_jax.apps.bench.serve_cases import SHARES, bad_requests, good_requests, order
from dsvl2_jax.apps.bench.serve_client import Reply
from dsvl2_jax.apps.bench.serve_expected import conversation
from dsvl2_jax.apps.bench.serve_figures import Figure, Findings
from dsvl2_jax.apps.bench.serve_load import ClosedLoop
from dsvl2_jax.apps.bench.serve_options import PARTS, ServeLoad
from dsvl2_jax.apps.bench.serve_plot import plot
from dsvl2_jax.apps.bench.serve_requests import Requests, ask, chat, url
from dsvl2_jax.apps.bench.serve_soak import growth_of_memory
from dsvl2_jax.apps.cli.main import main
from dsvl2_jax.checkpoint.locate import open_model, resolve
from dsvl2_jax.errors import UsageError

CONTEXT = 1024
# fmt: off
SMALL = [
    "--clients", "1", "3", "--slots", "2", "--seconds", "1", "--input-tokens", "20", "--output-tokens", "12",
    "--trials", "2", "--megapixels", "0.1", "--soak", "4", "--soak-requests", "90", "--soak-distinct", "12",
]
# fmt: on


@pytest.fixture(scope="module")
def processor():
    _, processor = open_model(resolve(None))
    return processor


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A random checkpoint as small as can be, with the bundled model's tiles."""
    content = json.loads(Path("configs/micro/config.json").read_text())
    content["language_config"] |= {"hidden_size": 32, "intermediate_size": 32, "moe_intermediate_size": 16}
    content["language_config"] |= {"n_routed_experts": 4, "num_hidden_layers": 2, "num_attention_heads": 2}
    content["language_config"] |= {"num_key_value_heads": 2, "max_position_embeddings": CONTEXT}
    content["vision_config"] |= {"layers": 1}
    content["projector_config"]["n_embed"] = 32
    content["candidate_resolutions"] = [[126, 126], [252, 126], [126, 252]]
    directory = tmp_path_factory.mktemp("serve") / "model"
    random_checkpoint(directory, content)
    return directory


@pytest.fixture(scope="module")
def measured(checkpoint, tmp_path_factory):
    """(JSON, what was printed, the picture) of a run of all parts. One answer to compare with is wrong."""
    patch, out = pytest.MonkeyPatch(), tmp_path_factory.mktemp("out")
    right = serve.expected_answers

    def one_wrong(*arguments, **options):
        first, *others = right(*arguments, **options)
        return [dataclasses.replace(first, text=f"{first.text}!"), *others]

    patch.setattr(serve, "expected_answers", one_wrong)
    # Each bad request comes once and more.
    patch.setattr(serve_cases, "SHARES", SHARES | {"malformed": 0.5, "oversized": 0.1})
    patch.setattr(serve_parts, "_WINDOW", 1.0)  # what the loop's lag was before does no harm here
    patch.setenv("XLA_FLAGS", quick_compilation.FLAGS)  # one device
    streams = io.StringIO(), io.StringIO()
    patch.setattr("sys.stdout", streams[0])
    patch.setattr("sys.stderr", streams[1])
    try:
        picture = out / "figures.png"
        status = main(["--debug", "bench", "serve", str(checkpoint), *SMALL, "--json", "--plot", str(picture)])
    finally:
        patch.undo()
    assert status == 0
    return json.loads(streams[0].getvalue()), streams[1].getvalue(), picture


def figure(found, words):
    """The one figure whose description has these words."""
    (one,) = [figure for figure in found["figures"] if words in figure["what"]]
    return one


def test_every_part_is_measured(measured):
    found, printed, picture = measured
    assert {one["part"] for one in found["figures"]} == set(PARTS)
    assert all(math.isfinite(one["value"]) for one in found["figures"])
    assert found["serve"][1:] == ["--slots", "2", "--dtype", "float32"] and found["options"]["clients"] == [1, 3]
    for one in found["figures"]:
        assert one["what"] in printed
        assert one["reached"] is None or one["aim"] is not None
        assert one["p50"] is None or one["p50"] <= one["p95"]
    with Image.open(picture) as drawn:
        assert drawn.format == "PNG" and drawn.width > 1000


def test_the_same_tokens_are_asked_for_and_counted(measured):
    found, _, _ = measured
    assert figure(found, "1 client: output tokens/s")["value"] > 0
    assert figure(found, "tokens/s of 3 clients over 1")["aim"] is None  # the aim is for 32
    assert found["series"]["clients"] == [1, 3]
    requests = len(found["series"]["half load, text"]) + len(found["series"]["half load, picture"])
    assert f"{requests} in all" in figure(found, "half load: time to first token over")["note"]
    assert figure(found, "first turn, ")["what"].startswith("first turn, 2 tiles")
    assert len(found["series"]["second turn"]) == 2


def test_the_soak_notices_the_one_wrong_answer_and_nothing_else(measured, processor):
    found, _, _ = measured
    assert figure(found, "answers that differ")["value"] == sum(one["what"] == "wrong" for one in found["wrong"]) > 0
    assert {one["what"] for one in found["wrong"]} == {"wrong"}
    for one in found["wrong"]:
        assert one["got"] | {"text": f"{one['got']['text']}!"} == one["expected"]
    for words in ("answers that did not come", "not refused as such", "slots that are taken"):
        assert figure(found, words)["value"] == 0
    note = figure(found, "requests of mixed load")["note"]
    assert figure(found, "requests of mixed load")["value"] == 90
    told = {what: int(count) for count, _, what in (part.partition(" ") for part in note.split(", "))}
    assert told["right"] > 10 and told["cancelled"] > 0 and told["refused rightly"] > len(all_bad(processor))
    assert sum(told.values()) - told.get("refused for now", 0) == 90
    assert len(found["series"]["memory"]) > 3


def all_bad(processor):
    return [bad for some in bad_requests(Requests(0, processor), CONTEXT).values() for bad in some]


def test_bad_requests_have_names_of_their_own(processor):
    names = Counter(bad.name for bad in all_bad(processor))
    assert max(names.values()) == 1 and len(names) > 20


def test_no_two_requests_are_alike(processor):
    requests = Requests(0, processor)
    pictures = {requests.picture().tobytes() for _ in range(60)}
    assert len(pictures) == 60
    assert requests.picture(3, 3).size == (378, 378)
    assert Requests(5, processor).token_ids(100) == Requests(5, processor).token_ids(100)
    assert abs(len(processor.tokenizer.encode(requests.text(1000))) - 1000) < 100
    with Image.open(io.BytesIO(requests.photograph(0.5))) as photograph:
        assert photograph.format == "JPEG" and abs(photograph.width * photograph.height - 500_000) < 5000


@given(st.floats(0, 1))
def test_pictures_have_their_share_from_the_beginning(processor, share):
    requests = Requests(0, processor)
    requests.about_picture = dict  # drawing takes time
    kinds = [kind for kind, _ in itertools.islice(requests.mixed(share, 4), 40)]
    for count in range(1, 41):
        assert abs(kinds[:count].count("picture") - share * count) <= 1


def test_good_requests_fit_the_context_and_have_all_kinds(processor):
    kinds = good_requests(Requests(0, processor), 40, 4096)
    assert all(kinds.values()) and len(kinds) == 6
    bodies = [body for some in kinds.values() for body in some]
    for body in bodies:
        inputs = processor(*conversation(body))
        assert len(inputs.input_ids) + body["max_tokens"] <= 4096
    counts = {sum(part["type"] == "image_url" for m in b["messages"] for part in _parts(m)) for b in bodies}
    assert {0, 1} < counts and max(counts) <= 8
    assert any("temperature" in body for body in bodies) and any("logprobs" in body for body in bodies)
    assert set(order(Requests(0, processor), 500)) == set(SHARES)


def _parts(message):
    return message["content"] if isinstance(message["content"], list) else []


def test_messages_are_read_as_the_model_was_trained():
    picture = Image.new("RGB", (3, 2), "red")
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    one = url(buffer.getvalue(), "png")
    assert base64.b64decode(one.partition(",")[2]) == buffer.getvalue()
    turns, images = conversation(chat(ask([one, one], "What?"), {"role": "assistant", "content": "A"}, ask([], "B")))
    assert [turn["content"] for turn in turns] == ["<image>\n<image>\nWhat?", "A", "B"]
    assert [image.tobytes() for image in images] == [picture.tobytes()] * 2


def _event(when, **choice):
    return when, json.dumps({"choices": [{"index": 0, "finish_reason": None, **choice}]})


def test_a_stream_is_taken_apart():
    reply = Reply(sent=1.0)
    reply.read_events(
        [
            _event(2.0, delta={"role": "assistant", "content": ""}),
            _event(2.5, delta={"content": "a"}, token_ids=[7], logprobs={"content": [{"logprob": -1.5}]}),
            _event(3.5, delta={"content": "bc"}, token_ids=[8, 9]),
            _event(3.5, delta={}, finish_reason="length"),
            (3.6, json.dumps({"choices": [], "usage": {"prompt_tokens": 3}})),
            (3.6, "[DONE]"),
        ]
    )
    assert reply.whole and (reply.text, reply.token_ids, reply.logprobs) == ("abc", [7, 8, 9], [-1.5])
    assert reply.first_token_seconds == 1.5 and reply.seconds_per_token == 0.5 and reply.gaps == [(3.5, 1.0)]
    assert reply.usage == {"prompt_tokens": 3}


@pytest.mark.parametrize(
    "events",
    [
        [_event(1.0, delta={"content": "a"}, token_ids=[7])],
        [_event(1.0, delta={"content": "a"}, token_ids=[7]), (1.0, "[DONE]")],
        [
            _event(1.0, delta={}, finish_reason="stop"),
            (1.0, json.dumps({"error": {"message": "the device failed"}})),
            (1.0, "[DONE]"),
        ],
    ],
)
def test_a_stream_that_breaks_off_is_no_answer(events):
    reply = Reply()
    reply.read_events(events)
    assert not reply.whole


def test_throughput_counts_what_came_within_the_time():
    replies = [
        Reply(sent=0.5, ended=1.5, times=[0.9, 1.0, 1.4], counts=[1, 8, 8]),
        Reply(sent=1.5, ended=3.5, times=[1.9, 2.9, 3.1], counts=[1, 8, 8]),
    ]
    loop = ClosedLoop(2, 1.0, 3.0, replies)
    assert loop.tokens_per_second == (8 + 8 + 1 + 8) / 2 and loop.requests_per_second == 0.5
    assert loop.first_tokens == pytest.approx([0.4]) and loop.per_token == pytest.approx([1.2 / 16])


def test_throughput_is_measured_until_there_is_something_to_measure():
    loop = ClosedLoop(1, begin=-2.0, end=-1.0)
    loop.replies.append(Reply(sent=-3.0, ended=-1.5))
    assert not loop.over()
    loop.replies.append(Reply(sent=-1.5, ended=4.0))
    assert loop.over() and loop.end > 0
    end = loop.end
    assert loop.over() and loop.end == end


def test_figures_say_whether_their_aim_is_reached():
    most, least = Figure("loop", "stall", 60.0, "ms", aim=50.0), Figure("t", "x", 6.5, "×", aim=6.0, at_least=True)
    assert not most.reached and least.reached and Figure("t", "x", 1.0, "s").reached is None
    assert "≤ 50  MISSED" in most.line() and "≥ 6  reached" in least.line()
    said = []
    findings = Findings(said.append)
    findings.add("gaps", "gap", [1.0, 2.0, 3.0], "ms", aim=5.0)
    assert findings.figures[0].p50 == 2.0 and findings.figures[0].value == pytest.approx(2.9) and "gap" in said[0]


def test_memory_is_flat_or_grows():
    times = np.arange(0.0, 600.0)
    climbing = np.minimum(times, 50) * 1e6 + 1e9  # to where it stays
    assert growth_of_memory(list(zip(times, climbing, strict=True)))[0] == 0
    leaking = 1e9 * (1 + times / 600)
    growth, first, last = growth_of_memory(list(zip(times, leaking, strict=True)))
    assert growth == pytest.approx(100 * (last / first - 1)) and growth > 60


def test_what_was_not_measured_is_not_drawn(tmp_path):
    findings = Findings(lambda text: None)
    findings.series |= {"clients": [1, 8], "tokens/s": [10.0, 40.0]}
    plot(findings, tmp_path / "one.png")
    with Image.open(tmp_path / "one.png") as drawn:
        assert drawn.width < 1000
    with pytest.raises(UsageError, match="cannot be written"):
        plot(findings, tmp_path / "none" / "one.png")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "soak", "soke"], "--only: 'soke' is none of start, throughput"),
        (["--clients", "0"], "--clients"),
        (["--clients"], "--clients: must be one or more"),
        (["--picture-share", "1.5"], "--picture-share"),
        (["--plot", "figures.svg"], "--plot: must be a name that ends in .png"),
        (["--plot", "nowhere/figures.png"], "--plot nowhere/figures.png: there is no folder"),
        (["--layers", "2"], "--layers: found 2, expected at least 2, beside --size"),
        (["--size", "tiny", "--layers", "1"], "--layers: found 1"),
        (["somewhere", "--size", "tiny"], "--size: makes a random checkpoint, but one is given"),
    ],
)
def test_wrong_calls_are_named(arguments, message, capsys):
    assert main(["bench", "serve", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_parts_are_measured_in_their_order():
    assert ServeLoad().parts == PARTS
    assert ServeLoad(only=("soak", "gaps")).parts == ("gaps", "soak")


def test_a_server_that_does_not_start_is_told_with_its_log(checkpoint, tmp_path, capsys):
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in checkpoint.iterdir():
        if file.suffix == ".json":
            (broken / file.name).write_bytes(file.read_bytes())
    (broken / "model.safetensors.index.json").write_text("{}")
    assert main(["bench", "serve", str(broken), "--only", "gaps"]) == 1
    errors = capsys.readouterr().err
    assert "dsvl2 serve ended with status 1 before it was ready" in errors and "not an index of shards" in errors
