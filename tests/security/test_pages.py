"""The report of an evaluation runs nothing of what models and files say, in a real browser, under its strict policy."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest
from browsers import chromium_or_skip
from PIL import Image

from dsvl2_jax.infer.content_security import content_security_policy
from dsvl2_jax.infer.eval.page import PAGE, POLICY
from dsvl2_jax.infer.eval.report import Thumbnails, write_report
from dsvl2_jax.infer.serve.page import load_page

HOSTILE = [
    "<img src=x onerror=hit()>",
    "</script><script>hit()</script><!--",
    "<!--<script>",
    "<svg onload=hit()><a xlink:href='javascript:hit()'>x</a></svg>",
    "javascript:hit()",
    "\"' onmouseover=hit() x='",
    "</title></textarea></style></noscript><iframe srcdoc='<script>parent.hit()</script>'></iframe>",
    "@@DATA@@ @@POLICY@@ \\u003cscript>hit()\\u003c/script>",
    "\u202e<b>hit()\u2028\u2029\ufeff\0\x1b[31m\ud7ff＜script＞hit()",
    "<meta http-equiv=refresh content='0;url=https://example.org/'><base href=https://example.org/>",
    "{{constructor.constructor('hit()')()}} ${hit()}",
]


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """A report in which every text is hostile."""
    out = tmp_path_factory.mktemp("report")
    samples, results = [], {}
    for line, text in enumerate(HOSTILE, 1):
        samples.append(
            SimpleNamespace(
                line=line, id=text, task=text, metric="exact", question=text, references=(text,), sizes=((8, 8),),
                images=(text + ".png",), boxes=((1, 1, 5, 5),),
            )
        )  # fmt: skip
        results[line] = {"answer": text, "score": 0.5, "boxes": [(2, 2, 6, 6)], "error": text}
    thumbnails = Thumbnails(out, samples, 100)
    for sample in samples:
        thumbnails.make(sample, [Image.new("RGB", (8, 8), "red")])
    tasks = {text: {"metric": text, "samples": 1, "score": 0.5, "unanswered": text} for text in HOSTILE}
    summary = {"data": f"{HOSTILE[0]}.jsonl", "tasks": tasks}
    return write_report(out, HOSTILE[1], samples, results, summary, thumbnails)


@pytest.fixture(scope="module")
def browser():
    with chromium_or_skip() as started:
        yield started


def test_a_report_shows_hostile_labels_as_text_and_runs_and_loads_nothing_of_them(report, browser):
    page = browser.new_page()
    hits, said, asked = [], [], []
    page.expose_function("hit", lambda: hits.append(1))
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("dialog", lambda dialog: hits.append(dialog.message))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(report.as_uri())
    cards = page.locator("#list article")
    assert cards.count() == len(HOSTILE)
    answers = page.locator("#list dd:nth-of-type(3)").all_text_contents()
    assert [answer.replace("\0", "") for answer in answers] == [text.replace("\0", "") for text in HOSTILE]
    assert page.locator("tbody th").count() == len(HOSTILE)
    assert page.locator("#task option").count() == len(HOSTILE) + 1
    # Nothing of a text has become an element, and the pictures and boxes are there.
    assert page.locator("iframe, svg, base, textarea, main script, [onerror], [onload], [onmouseover]").count() == 0
    page.evaluate("Promise.all([...document.images].map(image => { image.loading = 'eager'; return image.decode(); }))")
    assert page.evaluate("[...document.images].map(image => image.naturalWidth)") == [8] * len(HOSTILE)
    assert page.locator(".box").count() == 2 + 2 * len(HOSTILE)
    assert page.evaluate("getComputedStyle(document.querySelector('#list .box')).left") != "auto"
    page.fill("#text", "srcdoc")
    page.press("#text", "Enter")
    assert cards.count() == 1
    assert (hits, said) == ([], [])
    assert {re.match(r"[a-z]+:", url)[0] for url in asked} == {"file:"}
    page.close()


def test_the_policy_stops_what_would_be_written_into_a_report(report, browser):
    page = browser.new_page()
    hits, asked, stopped = [], [], []
    page.expose_function("hit", lambda: hits.append(1))
    page.on("request", lambda request: asked.append(request.url))
    page.on("requestfailed", lambda request: stopped.append(request.url) if request.failure == "csp" else None)
    injected = report.with_name("injected.html")
    evil = (
        "<img src=x onerror=hit()><script>hit()</script><svg onload=hit()></svg><a id=a href=javascript:hit()>a</a>"
        "<img src=https://example.invalid/a><link rel=stylesheet href=https://example.invalid/b>"
        "<iframe srcdoc='<script>parent.hit()</script>'></iframe><form id=f action=https://example.invalid/c></form>"
    )
    injected.write_text(report.read_text().replace("<main", evil + "<main", 1))
    page.goto(injected.as_uri())
    page.locator("#a").dispatch_event("click")
    page.evaluate("document.getElementById('f').submit()")
    page.wait_for_timeout(300)
    assert hits == []
    assert [url for url in asked if "example.invalid" in url and url not in stopped] == []
    assert "https://example.invalid/b" in stopped
    assert page.locator("#list article").count() == len(HOSTILE)  # the page's own script runs
    page.close()


@pytest.mark.parametrize("policy", [POLICY, load_page()[1]["Content-Security-Policy"]], ids=["report", "server"])
def test_every_page_has_a_strict_policy(policy):
    directives = dict(part.split(" ", 1) for part in policy.split("; "))
    assert directives["default-src"] == directives["base-uri"] == directives["form-action"] == "'none'"
    for kind in ("script-src", "style-src"):
        assert re.fullmatch(r"'sha256-[\w+/=]+'", directives[kind])
    assert "unsafe" not in policy and "*" not in policy and "http" not in policy


def test_the_policy_stands_before_everything_that_it_governs(report):
    text = report.read_text()
    assert f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">' in text
    assert text.index("Content-Security-Policy") < min(text.index(tag) for tag in ("<title", "<style", "<script"))
    assert content_security_policy(PAGE.replace("let page = 0", "let page = 1"), img_src="'self' file:") != POLICY
