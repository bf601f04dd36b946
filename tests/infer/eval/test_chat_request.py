"""What `dsvl2 eval --server` sends, and which options, addresses and keys it takes."""

from __future__ import annotations

import io
import re

import chat_server
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from dsvl2_jax.apps.cli.main import main
from dsvl2_jax.errors import UsageError
from dsvl2_jax.infer.eval.chat_request import KEY_VARIABLE, base_url, data_url, messages, read_key
from dsvl2_jax.inputs.images import load_image, read_image
from dsvl2_jax.inputs.tile_budget import NO_BUDGET

KEY = "sk-0123456789abcdef"


@pytest.fixture(autouse=True)
def no_key(monkeypatch):
    """None in the environment of whoever runs the tests."""
    monkeypatch.delenv(KEY_VARIABLE, raising=False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dtype", "float32"], "--dtype: is for a model that is loaded here, but --server answers"),
        (["--mesh", "data=2"], "--mesh: is for a model that is loaded here"),
        (["--max-tiles", "18"], "--max-tiles: is for a model"),
        (["--batch-size", "16"], "--batch-size: is for a model"),
        (["--processes", "2"], "--processes: is for a model"),
        (["more.jsonl"], "found 2 arguments, expected DATA.jsonl alone with --server"),
        (["--concurrency", "0"], "--concurrency: must be positive, not 0"),
        (["--timeout", "0"], "--timeout: must be positive, not 0"),
        (["--extra-body", "{"], "--extra-body: found '{', which is not JSON"),
        (["--extra-body", "[]"], "--extra-body: found '[]', expected a JSON object"),
        (["--extra-body", '{"stream": true, "n": 2}'], "--extra-body: n, stream cannot be set here"),
        (["--api-key-file", "no-such"], "no-such: not found, and it is needed. Give --api-key-file"),
    ],
)
def test_options_that_do_not_go_together_are_usage_errors(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = ["eval", "data.jsonl", *arguments, "--metric", "exact", "--server", "http://127.0.0.1:9"]
    assert main(command) == UsageError.exit_status
    assert message in capsys.readouterr().err
    assert not (tmp_path / "eval").exists()


@pytest.mark.parametrize("option", ["server-model", "api-key-file", "concurrency", "timeout", "extra-body"])
def test_options_of_a_server_need_one(option, capsys):
    assert main(["eval", "data.jsonl", f"--{option}", "1"]) == UsageError.exit_status
    assert f"--{option}: belongs to a server: give its address with --server." in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("http://127.0.0.1:8000", "http://127.0.0.1:8000/v1"),
        ("http://127.0.0.1:8000/", "http://127.0.0.1:8000/v1"),
        ("https://host.example/v1/", "https://host.example/v1"),
        ("https://host.example/api/v1/chat/completions", "https://host.example/api/v1"),
        ("https://host.example/v1beta/openai", "https://host.example/v1beta/openai"),
        ("http://[::1]:80", "http://[::1]:80/v1"),
    ],
)
def test_addresses(given, expected):
    assert base_url(given) == expected


@pytest.mark.parametrize(
    "url", ["", "localhost:8000", "ftp://h", "http://", "http://h:99999", "http://h:0", "http://[h"]
)
def test_what_is_no_address_is_refused(url):
    with pytest.raises(UsageError, match=r"--server: found .*, expected an address as in http://127.0.0.1:8000"):
        base_url(url)


@pytest.mark.parametrize("url", [f"https://me:{KEY}@host.example", f"http://h/v1?key={KEY}", f"http://h/#{KEY}"])
def test_an_address_holds_no_secret(url):
    with pytest.raises(UsageError, match=r"has a user name, a query or a fragment") as caught:
        base_url(url)
    assert KEY not in str(caught.value)


@pytest.mark.parametrize("content", [KEY, f"  {KEY}\n\n", f"# of the lab\n\nalice {KEY}\n"])
def test_the_key_of_a_file_comes_before_that_of_the_environment(tmp_path, monkeypatch, content):
    assert read_key(None) == ""
    monkeypatch.setenv(KEY_VARIABLE, "another")
    assert read_key(None) == "another"
    (tmp_path / "key").write_text(content)
    assert read_key(tmp_path / "key") == KEY


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("\n# nothing\n", "has 0 keys, expected one"),
        (f"{KEY}\nb {KEY}\n", "has 2 keys, expected one"),
        (f"the key is {KEY}", "expected KEY or NAME KEY"),
        (f"{KEY}é", "expected KEY or NAME KEY, the key of ASCII characters"),
        (b"\xff" + KEY.encode(), "not UTF-8 text"),
    ],
)
def test_a_file_without_one_key_is_refused_and_not_shown(tmp_path, content, message):
    file = tmp_path / "key"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UsageError, match=re.escape(message)) as caught:
        read_key(file)
    assert KEY not in str(caught.value)


pieces = st.lists(st.sampled_from(["<image>", "\n", "text", " ", "<image>\n", "é", "<|ref|>it<|/ref|>"])).map("".join)


@given(st.lists(pieces, min_size=1))
def test_images_stand_where_their_tags_stood(contents):
    roles = ["user", "assistant"]
    conversation = tuple({"role": roles[i % 2], "content": text} for i, text in enumerate(contents))
    asked = "".join(turn["content"] for turn in conversation[::2])
    urls = [f"data:image/png;base64,{i:04}" for i in range(asked.count("<image>"))]
    sent = messages(conversation, urls, [NO_BUDGET] * len(urls))
    assert [turn["role"] for turn in sent] == [turn["role"] for turn in conversation]
    seen = []
    for before, after in zip(conversation, sent, strict=True):
        parts = after["content"]
        if isinstance(parts, str):
            assert parts == before["content"]
            continue
        seen += [part["image_url"]["url"] for part in parts if part["type"] == "image_url"]
        read = "".join(part.get("text", "<image>\n") for part in parts)  # as dsvl2 serve reads parts
        assert read == re.sub("<image>\n?", "<image>\n", before["content"])
        assert all(part.get("text") != "" for part in parts)
    assert seen == urls


def test_an_image_that_servers_read_differently_is_sent_as_it_was_read(tmp_path):
    Image.new("RGBA", (8, 4), (200, 0, 0, 0)).save(tmp_path / "clear.png")
    for as_seen, colour in ((False, (200, 0, 0)), (True, (255, 255, 255))):
        image, traits = read_image(tmp_path / "clear.png", as_seen)
        sent = Image.open(io.BytesIO(chat_server.content_of(data_url(tmp_path / "clear.png", image, traits))))
        assert (sent.format, sent.mode, sent.getpixel((0, 0))) == ("PNG", "RGB", colour)


@pytest.mark.parametrize("kind", ["png", "jpeg", "gif", "webp", "bmp", "tiff"])
@pytest.mark.parametrize("in_memory", [False, True])
def test_images_of_usual_formats_are_sent_as_they_are(tmp_path, kind, in_memory):
    file = tmp_path / "picture"
    Image.radial_gradient("L").convert("RGB").save(file, kind)
    content = file.read_bytes()
    url = data_url(content if in_memory else str(file), load_image(file))
    sent = chat_server.content_of(url)
    if kind in ("bmp", "tiff"):
        assert url.startswith("data:image/png;base64,")
        assert Image.open(io.BytesIO(sent)).tobytes() == Image.open(file).tobytes()
    else:
        assert url.startswith(f"data:image/{kind};base64,")
        assert sent == content
