"""By keyboard, on a phone, in both themes, and with what screen readers need."""

from __future__ import annotations

import pytest
from page_steps import CHART, DESKTOP, NUMBER, PHONE, SHAPES, answered, ask, attach, opened, turn
from playwright.sync_api import expect


@pytest.mark.exhaustive  # on a busy machine it sometimes waits in vain
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
