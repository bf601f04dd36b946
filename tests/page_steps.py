"""What a user does on the page, for the tests that drive it in a browser."""

from __future__ import annotations

from pathlib import Path

from playwright.sync_api import BrowserContext, Locator, Page, expect

from dsvl2_jax import configs

expect.set_options(timeout=120_000)  # compiling on a busy machine
IMAGES = Path(configs.__file__).parent / "images"
SHAPES, NUMBER, CHART = (IMAGES / f"{name}.png" for name in ("shapes", "number", "chart"))
LOCATE = "<|ref|>the blue circle<|/ref|>"
DESKTOP, PHONE = {"width": 1100, "height": 800}, {"width": 360, "height": 640}


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
