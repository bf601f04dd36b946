"""Pictures and questions in, answers and errors out."""

from __future__ import annotations

import re

import page_server
import pytest
from page_steps import CHART, NUMBER, SHAPES, answered, ask, attach, opened, said, texts, turn
from playwright.sync_api import expect

import dsvl2_jax

pytestmark = pytest.mark.exhaustive  # the boxes' tests and those of `dsvl2 serve` are the usual ones


def test_an_uploaded_picture_is_sent_as_it_is_and_asked_about(page, server, model):
    attach(page, SHAPES)
    expect(page.locator(".chip")).to_contain_text("244 × 122, 16 kB")
    ask(page, "Describe the image.")
    assert texts(page) == ["Describe the image.", *said(model, "Describe the image.")]
    (request,) = server.requests
    picture, text = request["messages"][0]["content"]
    assert text == {"type": "text", "text": "Describe the image."}
    name, _, data = picture["image_url"]["url"].partition(",")
    assert name == "data:image/png;base64"
    assert page_server.resolve_image(data, None) == SHAPES.read_bytes()
    assert (request["model"], request["temperature"], request["max_tokens"]) == ("micro", 0, 512)
    statistics = page.locator(".statistics").inner_text()
    assert re.fullmatch(
        r"97 prompt tokens \(86 image tokens, 3 tiles\) · 30 tokens · first after \d+\.\d\d s · [\d.]+ tokens/s",
        statistics,
    )


def test_the_answer_is_written_piece_by_piece_and_read_out(page, model):
    page.evaluate(
        """() => {
            window.seen = new Set();
            new MutationObserver(() => seen.add(document.querySelector(".turn.assistant .text")?.innerText))
                .observe(document.getElementById("turns"), {subtree: true, childList: true, characterData: true});
        }"""
    )
    attach(page, SHAPES)
    ask(page, "Describe the image.")
    (answer,) = said(model, "Describe the image.")
    seen = page.evaluate("[...seen]")
    assert all(answer.startswith(text) for text in seen if text)
    assert answer in seen
    expect(page.locator("[aria-live=polite]")).to_contain_text(answer)


def test_several_pictures_can_be_dropped_and_pasted(page, server, model):
    files = [[*file.read_bytes()] for file in (SHAPES, CHART)]
    transfer = """([bytes, name]) => {
        const transfer = new DataTransfer();
        transfer.items.add(new File([new Uint8Array(bytes)], name, {type: "image/png"}));
        return transfer;
    }"""
    dropped = page.evaluate_handle(transfer, [files[0], "dropped.png"])
    page.dispatch_event("body", "drop", {"dataTransfer": dropped})
    expect(page.locator(".chip")).to_have_count(1)
    pasted = page.evaluate_handle(transfer, [files[1], "pasted.png"])
    page.evaluate(
        """(clipboardData) => document.getElementById("question").dispatchEvent(
            new ClipboardEvent("paste", {clipboardData, bubbles: true}))""",
        pasted,
    )
    expect(page.locator(".chip")).to_have_count(2)
    expect(page.locator("#whole")).to_be_hidden()
    ask(page, "Describe the second image.")
    assert texts(page)[1:] == said(model, "Describe the second image.", images=(SHAPES, CHART))
    expect(page.locator(".turn.user img")).to_have_count(2)
    # A third one changes how all are seen, which is said.
    attach(page, NUMBER)
    expect(page.locator("#whole")).to_be_visible()
    page.get_by_role("button", name="Remove number.png").click()
    expect(page.locator("#whole")).to_be_hidden()


def test_what_is_no_picture_is_refused_and_a_broken_one_is_the_servers_to_judge(page, tmp_path, model, server):
    (tmp_path / "notes.txt").write_text("no picture")
    (tmp_path / "broken.png").write_bytes(b"neither")
    page.locator("#files").set_input_files([tmp_path / "notes.txt", tmp_path / "broken.png"])
    expect(page.locator("#notice")).to_have_text("Not a picture: notes.txt.")
    expect(page.locator(".chip")).to_contain_text("broken.pngno preview")
    ask(page, "What is this?")
    expect(page.locator(".problem")).to_contain_text("not an image in a format that is read")
    expect(turn(page, 1).get_by_role("button", name="Try again")).to_be_visible()


def test_errors_are_shown_as_the_server_words_them(page, model):
    ask(page, "word " * 5000)
    with pytest.raises(dsvl2_jax.DSVL2Error) as error:
        model.check_context(model.processor([{"role": "user", "content": ("word " * 5000).strip()}]))
    expect(page.locator(".problem")).to_have_text(str(error.value))


def test_an_answer_can_be_stopped(page, server, model):
    attach(page, SHAPES)
    # The browser reads no further once it shows some text, so that there is something to stop.
    page.evaluate(
        """() => {
            const read = ReadableStreamDefaultReader.prototype.read;
            const held = new Promise((resolve) => { window.release = resolve; });
            ReadableStreamDefaultReader.prototype.read = async function () {
                if (document.querySelector(".turn.assistant .text")?.innerText) await held;
                return read.call(this);
            };
        }"""
    )
    page.get_by_role("textbox", name="Message", exact=True).fill("What is in each part of the image?")
    page.keyboard.press("Enter")
    expect(turn(page, 1).locator(".text")).not_to_be_empty()
    expect(page.get_by_role("button", name="Send")).to_be_hidden()
    page.get_by_role("button", name="Stop").click()
    page.evaluate("release()")
    answered(page)
    (whole,) = said(model, "What is in each part of the image?")
    part = texts(page)[1]
    assert whole.startswith(part)
    assert 0 < len(part) < len(whole)
    assert page.locator(".statistics").inner_text().startswith("stopped")
    ask(page, "How many shapes are there?")  # what was written is part of the conversation
    assert server.requests[-1]["messages"][1] == {"role": "assistant", "content": part}


def test_settings_go_with_the_question_and_wrong_ones_do_not(page, server):
    page.get_by_role("button", name="Settings").click()
    for label, value in (
        ("System message", "Be brief."),
        ("Temperature", "0.5"),
        ("Longest answer", "3"),
        ("Top p", "2"),
        ("Top k", "5"),
        ("Stop at", "zebra\nlion"),
    ):
        page.get_by_label(label).fill(value)
    page.get_by_role("textbox", name="Message", exact=True).fill("Hello")
    page.keyboard.press("Enter")
    expect(page.get_by_label("Top p")).to_be_focused()  # with the browser's own words for what is wrong
    assert server.requests == []
    page.get_by_label("Top p").fill("0.9")
    ask(page, "Hello")
    (body,) = server.requests
    assert body["messages"] == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    sampling = {"temperature": 0.5, "max_tokens": 3, "top_p": 0.9, "top_k": 5, "stop": ["zebra", "lion"]}
    rest = {"model": "micro", "stream": True, "stream_options": {"include_usage": True}}
    assert {key: value for key, value in body.items() if key != "messages"} == sampling | rest
    page.get_by_role("button", name="Reset settings").click()
    ask(page, "Hello")
    assert "top_p" not in server.requests[-1]


def test_an_api_key_is_asked_for_when_the_server_wants_one(context, server):
    server.key = "secret"
    page = context.new_page()
    page.goto(server.url)
    expect(page.locator("#refused")).to_contain_text("Incorrect API key.")
    expect(page.get_by_label("API key")).to_be_focused()
    page.keyboard.type("wrong")
    with page.expect_response("**/v1/models"):
        page.keyboard.press("Enter")
    expect(page.get_by_label("API key")).to_have_value("")
    expect(page.get_by_label("API key")).to_be_focused()
    page.keyboard.type("secret")
    page.keyboard.press("Enter")
    expect(page.locator("#gate")).to_be_hidden()
    expect(page.locator("#examples button")).to_have_count(4)
    page.reload()  # the tab keeps it
    page.get_by_role("button", name="Find: the blue circle").click()
    expect(page.locator(".frame")).to_have_count(1)


def test_a_server_that_is_gone_is_named(browser, model):
    gone = page_server.PageServer(model)
    page = opened(browser.new_context(), gone.url)
    gone.shutdown()
    gone.server_close()
    ask(page, "Hello")
    expect(page.locator(".problem")).to_contain_text("The server does not answer")
    page.context.close()


@pytest.mark.parametrize(
    ("number", "answer"),
    [
        (
            0,
            "a green diamond at the top left, a green square at the top, a red cross at the bottom and a blue circle "
            "at the bottom right",
        ),
        (1, "the blue circle"),
        (2, "7063"),
        (3, "a bar chart: blue A is 5, orange B is 1, black C is 8 and purple D is 10"),
    ],
)
def test_every_example_is_answered_right(page, number, answer):
    page.locator("#examples button").nth(number).click()
    answered(page)
    assert texts(page)[1] == answer
