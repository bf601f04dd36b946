"""The conversation: kept, changed, exported."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from page_steps import LOCATE, SHAPES, answered, ask, attach, opened, said, texts, turn
from playwright.sync_api import expect

pytestmark = pytest.mark.exhaustive  # the boxes' tests and those of `dsvl2 serve` are the usual ones


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
