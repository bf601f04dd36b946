"""Boxes, read and drawn; and what the page is allowed."""

from __future__ import annotations

import dataclasses
import io
import re

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings
from page_steps import DESKTOP, LOCATE, PHONE, SHAPES, ask, attach, said, turn
from PIL import Image
from playwright.sync_api import Browser, expect

from dsvl2_jax.infer.serve.page import load_page
from dsvl2_jax.inputs.grounding import parse_boxes


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


def test_the_policy_allows_the_page_alone():
    content, headers = load_page()
    assert len(content.decode().splitlines()) < 700
    assert re.search(r"https?://(?!www\.w3\.org/2000/svg)", content.decode()) is None
    policy = dict(part.split(" ", 1) for part in headers["Content-Security-Policy"].split("; "))
    assert policy["default-src"] == "'none'"
    assert re.fullmatch(r"'sha256-[A-Za-z0-9+/]{43}='", policy["script-src"])
    assert policy["connect-src"] == "'self'"
