"""The page in headless Chromium: what a user does with it, by mouse, keyboard and on a phone."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import re
import subprocess
import sys
from pathlib import Path

import hypothesis.strategies as st
import page_server
import pytest
from hypothesis import given, settings
from PIL import Image
from playwright.sync_api import Browser, BrowserContext, Error, Locator, Page, expect

import dsvl2_jax
from dsvl2_jax import configs
from dsvl2_jax.apps.screenshots import LARGEST_FILE, SHOTS, chromium
from dsvl2_jax.infer.serve.page import load_page
from dsvl2_jax.inputs.grounding import parse_boxes

IMAGES = Path(configs.__file__).parent / "images"
SHAPES, NUMBER, CHART = (IMAGES / f"{name}.png" for name in ("shapes", "number", "chart"))
LOCATE = "<|ref|>the blue circle<|/ref|>"
expect.set_options(timeout=120_000)  # compiling on a busy machine
DESKTOP, PHONE = {"width": 1100, "height": 800}, {"width": 360, "height": 640}


@pytest.fixture(scope="module")
def model():
    return dsvl2_jax.load(None)


@pytest.fixture(scope="module")
def served(model):
    yield from page_server.serving(model)


@pytest.fixture
def server(served):
    served.requests.clear()
    yield served
    served.key = ""


@pytest.fixture(scope="module")
def browser():
    with contextlib.ExitStack() as stack:
        try:
            started = stack.enter_context(chromium())
        except Error as error:
            pytest.skip(f"no Chromium here (apt-get install chromium, or playwright install chromium): {error}")
        yield started


@pytest.fixture
def context(browser: Browser, server):
    """A browser profile. Afterwards: no request went to another host, and the console is empty."""
    context = browser.new_context(viewport=DESKTOP, permissions=["clipboard-read", "clipboard-write"])
    context.set_default_timeout(120_000)
    addresses, said = [], []
    context.on("request", lambda request: addresses.append(request.url))
    context.on("console", lambda message: said.append(message.text))
    context.on("weberror", lambda error: said.append(str(error.error)))
    yield context
    context.close()
    assert {a for a in addresses if not a.startswith((server.url, "data:", f"blob:{server.url}"))} == set()
    # Chromium itself reports refused requests on the console.
    assert [text for text in said if "Failed to load resource: the server responded with" not in text] == []


@pytest.fixture
def page(context: BrowserContext, server) -> Page:
    return opened(context, server.url)


def opened(context: BrowserContext, url: str) -> Page:
    page = context.new_page()
    page.goto(url)
    expect(page.locator("#examples button")).to_have_count(4)
    return page


def attach(page: Page, *files: Path) -> None:
    page.locator("#files").set_input_files(files)
    expect(page.locator("#attached .chip")).to_have_count(len(files))


def ask(page: Page, text: str, mode: str = "Text") -> None:
    """Sends a question and waits for its answer."""
    answers = page.locator(".turn.assistant").count()
    page.get_by_role("radio", name=mode, exact=True).check()
    page.get_by_role("textbox", name="Message", exact=True).fill(text)
    page.get_by_role("button", name="Send").click()
    answered(page, answers + 1)


def answered(page: Page, count: int = 1) -> None:
    expect(page.locator(".turn.assistant .statistics")).to_have_count(count)
    expect(page.locator("body")).not_to_have_class("running")


def turn(page: Page, number: int) -> Locator:
    return page.locator(".turn").nth(number)


def texts(page: Page) -> list[str]:
    return page.locator(".turn .text").all_inner_texts()


def said(model, *questions: str, images: tuple[Path, ...] = (SHAPES,)) -> list[str]:
    """What the model answers to these questions in turn, the first with pictures."""
    turns = []
    for question in questions:
        tags = "<image>\n" * len(images) if not turns else ""
        turns.append({"role": "user", "content": tags + question} | ({} if turns else {"images": list(images)}))
        turns.append({"role": "assistant", "content": model.generate(model.processor(turns), 512).text})
    return [one["content"] for one in turns[1::2]]


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


@pytest.mark.parametrize("viewport", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_the_box_is_drawn_where_the_answer_says(page, model, viewport):
    page.set_viewport_size(viewport)
    attach(page, SHAPES)
    ask(page, "the blue circle", "Find")
    inputs = model.processor([{"role": "user", "content": f"<image>\n{LOCATE}", "images": [SHAPES]}])
    (box,) = model.generate(inputs, 512).boxes
    expect(page.locator(".boxes li")).to_have_text(f"the blue circle ({box.x1}, {box.y1}) – ({box.x2}, {box.y2})")
    page.locator(".canvas").scroll_into_view_if_needed()
    picture, frame = (page.locator(f".canvas {part}").bounding_box() for part in ("img", ".frame"))
    assert picture["width"] <= viewport["width"]
    for side, place, size, (low, high) in (
        ("width", "x", 244, (box.x1, box.x2)),
        ("height", "y", 122, (box.y1, box.y2)),
    ):
        scale = picture[side] / size
        assert abs(frame[place] - (picture[place] + low * scale)) < 1
        assert abs(frame[side] - (high - low) * scale) < 1
    # The same on the screen: a vertical line of the box's colour at its left side, and the picture in its middle.
    screen = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
    middle = frame["y"] + frame["height"] / 2
    assert screen.getpixel((round(frame["x"] + 0.6), round(middle))) == pytest.approx((249, 177, 6), abs=12)
    red, green, blue = screen.getpixel((round(frame["x"] + frame["width"] / 2), round(middle)))
    assert blue > 180 > green > red  # the circle


def test_text_with_boxes_draws_each(page, server, model):
    attach(page, SHAPES)
    ask(page, "Describe the image.", "Text + boxes")
    (answer,) = said(model, "<|grounding|>Describe the image.")
    boxes = parse_boxes(answer, [(244, 122)])
    assert len(boxes) > 1
    expect(page.locator(".frame")).to_have_count(len(boxes))
    expect(page.locator(".boxes li")).to_have_count(len(boxes))
    assert page.locator(".turn.assistant mark").all_inner_texts() == [box.label for box in boxes]
    assert "<|" not in turn(page, 1).inner_text()
    assert server.requests[-1]["grounding"] is True


QUADS = st.lists(st.lists(st.integers(-1, 1200), min_size=3, max_size=5), max_size=3).map(str)
TAGS = st.sampled_from(["<|ref|>", "<|/ref|>", "<|det|>", "<|/det|>"])
WELL_FORMED = st.builds("<|ref|>{}<|/ref|><|det|>{}<|/det|>".format, st.text("ab cé\n", max_size=5), QUADS)


@given(
    text=st.lists(st.one_of(WELL_FORMED, TAGS, QUADS, st.text("ref<|[ ,"), st.just("ref")), max_size=8).map("".join),
    sizes=st.lists(st.tuples(st.integers(1, 5000), st.integers(1, 5000)), max_size=3),
)
@settings(max_examples=100)
def test_boxes_in_a_text_are_read_as_the_library_reads_them(plain, text, sizes):
    pictures = [{"width": width, "height": height} for width, height in sizes]
    found = plain.evaluate("(turn) => parsed(turn).boxes", {"text": text, "role": "assistant", "pictures": pictures})
    assert found == [dataclasses.asdict(box) for box in parse_boxes(text, sizes)]


@pytest.fixture(scope="module")
def plain(browser: Browser, served):
    """One page for many examples."""
    page = browser.new_page()
    page.goto(served.url)
    return page


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
    expect(page.locator(".problem")).to_contain_text("not an image in a format that PIL reads")
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


def test_the_conversation_survives_a_reload_and_goes_on(page, server, model):
    attach(page, SHAPES)
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("Seed").fill("7")
    page.get_by_role("button", name="Close").click()
    ask(page, "the blue circle", "Find")
    page.reload()
    answered(page)
    expect(page.locator(".frame")).to_have_count(1)
    expect(page.locator(".turn.user img")).to_have_js_property("naturalWidth", 244)
    ask(page, "What colour is the circle?")
    assert texts(page)[3] == said(model, LOCATE, "What colour is the circle?")[1]
    first, second = server.requests
    assert second["messages"][0] == first["messages"][0]  # the picture, byte for byte
    assert second["seed"] == 7
    page.get_by_role("button", name="New").click()
    expect(page.locator(".turn")).to_have_count(0)
    page.reload()
    expect(page.locator("#welcome")).to_be_visible()


def test_two_tabs_show_the_newest_conversation(context, page, server):
    other = opened(context, server.url)
    attach(page, SHAPES)
    ask(page, "How many shapes are there?")
    other.evaluate("document.dispatchEvent(new Event('visibilitychange'))")
    expect(other.locator(".turn")).to_have_count(2)


def test_a_browser_that_keeps_nothing_says_so(page, context, server):
    page.add_init_script("IDBObjectStore.prototype.put = () => { throw new DOMException('', 'QuotaExceededError'); }")
    page.reload()
    expect(page.locator("#examples button")).to_have_count(4)
    attach(page, SHAPES)
    ask(page, "How many shapes are there?")
    expect(page.locator("#notice")).to_contain_text("does not keep the conversation (QuotaExceededError)")
    assert texts(page)[1]


def test_turns_are_edited_asked_again_and_removed(page, server, model):
    attach(page, SHAPES)
    ask(page, "What colour is the circle?")
    ask(page, "How many shapes are there?")
    # An edited question, asked again: what came after it goes, and can be had back.
    turn(page, 0).get_by_role("button", name="Edit").click()
    page.get_by_label("Text of this turn").fill("What colour is the cross?")
    page.keyboard.press("Enter")
    answered(page)
    assert texts(page) == ["What colour is the cross?", *said(model, "What colour is the cross?")]
    expect(page.locator("#notice")).to_contain_text("2 later turns removed.")
    page.get_by_role("button", name="Undo").click()
    expect(page.locator(".turn")).to_have_count(4)
    # Escape leaves a turn as it was; leaving the field keeps what was typed, and later turns stay.
    turn(page, 3).get_by_role("button", name="Edit").click()
    page.get_by_label("Text of this turn").fill("no")
    page.keyboard.press("Escape")
    assert texts(page)[3] != "no"
    turn(page, 1).get_by_role("button", name="Edit").click()
    page.get_by_label("Text of this turn").fill("a deep blue")
    page.get_by_role("textbox", name="Message", exact=True).click()
    expect(page.locator(".turn")).to_have_count(4)
    # The last answer again, from the edited conversation.
    turn(page, 3).get_by_role("button", name="Regenerate").click()
    answered(page, 2)
    assert server.requests[-1]["messages"][1] == {"role": "assistant", "content": "a deep blue"}
    # An answer goes alone, a question with its answer.
    turn(page, 3).get_by_role("button", name="Remove").click()
    expect(page.locator(".turn")).to_have_count(3)
    turn(page, 0).get_by_role("button", name="Remove").click()
    expect(page.locator(".turn")).to_have_count(1)
    page.get_by_role("button", name="Undo").click()
    expect(page.locator(".turn")).to_have_count(3)


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


def test_the_keyboard_is_enough(page, model, server):
    expect(page.get_by_role("textbox", name="Message", exact=True)).to_be_focused()
    page.keyboard.press("Tab")
    expect(page.get_by_role("button", name="Add picture")).to_be_focused()
    with page.expect_file_chooser() as chooser:
        page.keyboard.press("Enter")
    chooser.value.set_files(SHAPES)
    expect(page.locator(".chip")).to_have_count(1)
    expect(page.get_by_role("textbox", name="Message", exact=True)).to_be_focused()
    page.keyboard.press("Tab")
    page.keyboard.press("Tab")
    expect(page.get_by_role("radio", name="Text", exact=True)).to_be_focused()
    page.keyboard.press("ArrowRight")
    expect(page.get_by_role("radio", name="Find", exact=True)).to_be_checked()
    page.keyboard.press("Shift+Tab")
    page.keyboard.press("Shift+Tab")
    page.keyboard.type("the blue")
    page.keyboard.press("Shift+Enter")
    page.keyboard.press("Backspace")
    page.keyboard.type(" circle")
    page.keyboard.press("Enter")
    answered(page)
    expect(page.locator(".frame")).to_have_count(1)
    # Back from the field to the answer's buttons.
    for _ in range(20):
        page.keyboard.press("Shift+Tab")
        if page.evaluate("document.activeElement.textContent") == "Remove":
            break
    page.keyboard.press("Enter")
    expect(page.locator(".turn")).to_have_count(1)
    # The settings open, take the focus, and Escape gives it back.
    page.get_by_role("button", name="Settings").focus()
    page.keyboard.press("Enter")
    expect(page.get_by_role("dialog", name="Settings")).to_be_visible()
    assert page.evaluate("document.getElementById('settings').contains(document.activeElement)")
    page.keyboard.press("Escape")
    expect(page.get_by_role("dialog", name="Settings")).to_be_hidden()
    expect(page.get_by_role("button", name="Settings")).to_be_focused()


def test_a_phone_shows_everything_without_scrolling_sideways(browser, server):
    context = browser.new_context(viewport=PHONE, has_touch=True, is_mobile=True)
    page = opened(context, server.url)

    def fits() -> bool:
        return page.evaluate("document.documentElement.scrollWidth <= innerWidth && innerWidth === screen.width")

    assert fits()
    attach(page, SHAPES, CHART, NUMBER)
    assert fits()
    field = page.get_by_role("textbox", name="Message", exact=True)
    field.fill("w" * 200)
    field.press("Enter")  # a new line here: Send is a button
    assert field.input_value().endswith("w\n")
    page.get_by_role("button", name="Send").tap()
    answered(page)
    ask(page, "<|ref|>bar A<|/ref|>", "Find")
    assert fits()
    page.get_by_role("button", name="Settings").tap()
    expect(page.get_by_role("button", name="Reset settings")).to_be_visible()
    assert fits()
    context.close()


def test_light_and_dark_follow_the_system_until_the_switch(page):
    def background() -> str:
        return page.evaluate("getComputedStyle(document.body).backgroundColor")

    light, dark = "rgb(247, 248, 248)", "rgb(19, 22, 24)"
    page.emulate_media(color_scheme="dark")
    page.reload()
    assert background() == dark
    page.get_by_role("button", name="Light", exact=True).click()
    assert background() == light
    page.reload()
    assert background() == light
    page.get_by_role("button", name="Dark", exact=True).click()
    assert background() == dark


@pytest.mark.parametrize("colours", ["light", "dark"])
@pytest.mark.parametrize("viewport", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_axe_finds_nothing_inaccessible(page, colours, viewport):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    page.set_viewport_size(viewport)
    page.emulate_media(color_scheme=colours)
    page.reload()
    expect(page.locator("#examples button")).to_have_count(4)
    rules = {"runOnly": ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"]}
    assert axe.run(page, options=rules).generate_report() == EMPTY_REPORT
    attach(page, SHAPES)
    ask(page, "the blue circle", "Find")
    ask(page, "word " * 5000)
    turn(page, 2).get_by_role("button", name="Remove").click()
    ask(page, "word " * 5000)
    attach(page, CHART, NUMBER)
    assert axe.run(page, options=rules).generate_report() == EMPTY_REPORT
    page.get_by_role("button", name="Settings").click()
    assert axe.run(page, options=rules).generate_report() == EMPTY_REPORT


EMPTY_REPORT = "Found 0 accessibility violations:\n"


def test_the_conversation_is_exported(page, server):
    attach(page, SHAPES)
    ask(page, "the blue circle", "Find")
    with page.expect_download() as download:
        page.get_by_role("button", name="Export").click()
    exported = json.loads(Path(download.value.path()).read_text(encoding="utf-8"))
    question, answer = exported["messages"]
    assert question == server.requests[0]["messages"][0]
    assert exported["turns"][1]["text"] == answer["content"]
    assert exported["turns"][1]["boxes"][0]["label"] == "the blue circle"
    assert exported["settings"]["temperature"] == 0


def test_the_text_can_be_copied(page):
    attach(page, SHAPES)
    ask(page, "the blue circle", "Find")
    turn(page, 0).get_by_role("button", name="Copy").click()
    expect(turn(page, 0).get_by_role("button", name="Copied")).to_be_visible()
    assert page.evaluate("navigator.clipboard.readText()") == LOCATE


def test_an_api_key_is_asked_for_when_the_server_wants_one(context, server):
    server.key = "secret"
    page = context.new_page()
    page.goto(server.url)
    expect(page.locator("#refused")).to_contain_text("Incorrect API key.")
    expect(page.get_by_label("API key")).to_be_focused()
    page.keyboard.type("wrong")
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


def test_the_policy_allows_the_page_alone():
    content, headers = load_page()
    assert len(content.decode().splitlines()) < 700
    assert re.search(r"https?://(?!www\.w3\.org/2000/svg)", content.decode()) is None
    policy = dict(part.split(" ", 1) for part in headers["Content-Security-Policy"].split("; "))
    assert policy["default-src"] == "'none'"
    assert re.fullmatch(r"'sha256-[A-Za-z0-9+/]{43}='", policy["script-src"])
    assert policy["connect-src"] == "'self'"


def test_screenshots_are_written(server, tmp_path):
    def run(url: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "dsvl2_jax.apps.screenshots", url, str(tmp_path)]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    done = run(server.url)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("kB") == len(SHOTS)
    for name, ((width, _), _) in SHOTS.items():
        assert Image.open(tmp_path / name).width == width * 1.5
        assert 10_000 < (tmp_path / name).stat().st_size <= LARGEST_FILE
    refused = run("http://127.0.0.1:9")
    assert refused.returncode == 1
    assert refused.stderr.startswith("error: http://127.0.0.1:9: the page did not answer")
