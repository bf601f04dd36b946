"""`dsvl2 serve` as a process: one line once it is ready, the answers of `dsvl2 generate`, status 0 at the end."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import httpx2 as httpx
import pytest
import quick_compilation

pytest.importorskip("dsvl2_jax.infer.serve.async_engine")

ROOT = Path(__file__).parents[2]
IMAGE = ROOT / "configs/images/shapes.png"
COMMAND = [sys.executable, "-m", "dsvl2_jax"]
QUESTION = "What colour is the circle?"


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """A running server with a key: (process, address, headers)."""
    keys = tmp_path_factory.mktemp("keys") / "keys"
    keys.write_text("ann sk-test")
    command = [*COMMAND, "serve", "--port", "0", "--slots", "2", "--api-key-file", keys]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=_environment())
    address = process.stdout.readline().strip()
    assert address.startswith("http://127.0.0.1:"), process.communicate()[1]
    yield process, address, {"Authorization": "Bearer sk-test"}
    process.kill()
    process.communicate()


def test_a_request_is_what_generate_says(served):
    _, address, headers = served
    data = base64.b64encode(IMAGE.read_bytes()).decode()
    content = [
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}},
        {"type": "text", "text": QUESTION},
    ]
    body = {"messages": [{"role": "user", "content": content}], "return_token_ids": True, "max_tokens": 32}
    response = httpx.post(f"{address}/v1/chat/completions", json=body, headers=headers, timeout=120)
    (choice,) = response.raise_for_status().json()["choices"]
    command = [*COMMAND, "generate", "--image", IMAGE, "--prompt", QUESTION, "--max-new-tokens", "32", "--json"]
    generated = json.loads(subprocess.run(command, capture_output=True, check=True, env=_environment()).stdout)
    assert choice["message"]["content"] == generated["text"]
    assert choice["token_ids"] == generated["token_ids"] and choice["finish_reason"] == generated["finish_reason"]


def test_the_model_is_named_and_metrics_need_the_key(served):
    _, address, headers = served
    assert httpx.get(f"{address}/metrics").status_code == 401
    assert "dsvl2:num_requests_running" in httpx.get(f"{address}/metrics", headers=headers).text
    (model,) = httpx.get(f"{address}/v1/models", headers=headers).json()["data"]
    assert model["id"] == "micro"
    page = httpx.get(f"{address}/", headers=headers)
    assert page.status_code == 200 and "script-src 'sha256-" in page.headers["content-security-policy"]


def test_a_person_asks_on_the_page_and_sees_a_box_on_the_picture(served):
    sync_api = pytest.importorskip("playwright.sync_api")
    import page_steps

    from dsvl2_jax.apps.screenshots import chromium

    _, address, headers = served
    with contextlib.ExitStack() as stack:
        try:
            browser = stack.enter_context(chromium())
        except sync_api.Error as error:
            pytest.skip(f"no Chromium here: {error}")
        key = {"username": "ann", "password": headers["Authorization"].removeprefix("Bearer ")}
        context = browser.new_context(viewport=page_steps.DESKTOP, http_credentials=key)
        context.set_default_timeout(120_000)
        page = context.new_page()
        page.goto(address)
        sync_api.expect(page.locator("#examples button")).to_have_count(4)
        page_steps.attach(page, page_steps.SHAPES)
        page_steps.ask(page, "the blue circle", "Find")
        sync_api.expect(page.locator(".boxes li")).to_have_text(re.compile(r"^the blue circle \(\d+, \d+\) – "))
        sync_api.expect(page.locator(".frame")).to_have_count(1)
        page_steps.ask(page, "What colour is the circle?")
        sync_api.expect(page.locator(".turn .text").last).to_have_text("blue")


def test_sigterm_ends_it_with_0_and_the_address_was_all_it_printed(served):
    process, _, _ = served
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0 and out == ""
    assert "POST /v1/chat/completions 200" in err and "sk-test" not in err and QUESTION not in err


@pytest.mark.parametrize(
    "options, problem",
    [
        (["--port", "70000"], "--port"),
        (["--slots", "0"], "--slots"),
        (["--max-body", "much"], "much"),
        (["--api-key-file", "/no/such/file"], "--api-key-file"),
        (["--media-path", "/no/such/folder"], "/no/such/folder"),
        (["--ssl-certfile", "/no/such/file"], "--ssl-certfile"),
    ],
)
def test_options_that_cannot_be_end_it_with_2(options, problem):
    done = subprocess.run(
        [*COMMAND, "serve", *options], capture_output=True, text=True, env=_environment(), timeout=300
    )
    assert done.returncode == 2 and problem in done.stderr and done.stdout == ""


def _environment():
    return os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": quick_compilation.FLAGS}
