"""A server with the page, and a browser."""

from __future__ import annotations

import page_server
import pytest
from browsers import chromium_or_skip
from page_steps import DESKTOP, opened
from playwright.sync_api import Browser, BrowserContext, Page

import dsvl2_jax


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
    with chromium_or_skip() as started:
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
