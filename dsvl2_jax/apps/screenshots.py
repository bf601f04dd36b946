"""Pictures of the server's page for the README, taken in a real browser:

dsvl2 serve --port 8000
python -m dsvl2_jax.apps.screenshots http://127.0.0.1:8000 docs

Needs the Python package `playwright` and Chromium: Debian's (``apt-get install chromium``), or playwright's own
(``playwright install chromium``).
"""

from __future__ import annotations

import contextlib
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro
from tyro.conf import Positional

from dsvl2_jax.errors import DSVL2Error, UsageError

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

LARGEST_FILE = 300_000  # bytes: the README loads all of them
# File name → what the browser is like: (width, height) in CSS pixels, and the colours.
SHOTS: dict[str, tuple[tuple[int, int], str]] = {
    "page.png": ((1100, 1040), "light"),
    "page-dark.png": ((1100, 1040), "dark"),
    "page-phone.png": ((390, 844), "light"),
}
PATIENCE = 120_000  # milliseconds for an answer: a large model on a small machine takes its time


@contextlib.contextmanager
def chromium(**options: Any) -> Iterator[Browser]:
    """A headless Chromium: the system's where there is one, playwright's own otherwise.

    Args:
      options: further arguments of playwright's ``launch``.

    Raises:
      UsageError: playwright is not installed.
    """
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        raise UsageError("screenshots need the package playwright: pip install playwright") from None
    with sync_playwright() as playwright:
        # Chromium's own sandbox refuses to run for root, as which containers run.
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"], **options)
        try:
            yield browser
        finally:
            browser.close()


def screenshots(url: Positional[str], out: Positional[Path]) -> None:
    """Have the bundled model find a shape in an example and name its colour, and write what the page shows.

    Args:
      url: of a running `dsvl2 serve`.
      out: folder for page.png, page-dark.png and page-phone.png.

    Raises:
      UsageError: the page cannot be reached, shows an error, or a picture is larger than `LARGEST_FILE`.
    """
    out.mkdir(parents=True, exist_ok=True)
    with chromium() as browser:
        for name, ((width, height), colours) in SHOTS.items():
            page = browser.new_page(
                viewport={"width": width, "height": height}, color_scheme=colours, device_scale_factor=1.5
            )
            page.set_default_timeout(PATIENCE)
            _converse(page, url)
            page.screenshot(path=out / name)
            page.close()
            size = (out / name).stat().st_size
            if size > LARGEST_FILE:
                raise UsageError(f"{out / name}: has {size} bytes, more than {LARGEST_FILE}. Take a smaller window.")
            print(f"{out / name}  {size / 1000:.0f} kB")


def _converse(page: Page, url: str) -> None:
    from playwright.sync_api import Error

    try:
        page.goto(url)
        page.get_by_role("button", name="Find: the blue circle").click()
        page.locator(".frame").wait_for()
        page.get_by_role("textbox", name="Message").fill("What colour is the circle?")
        page.get_by_role("button", name="Send").click()
        page.locator(".turn.assistant .statistics", has_text="tokens/s").nth(1).wait_for()
    except Error as error:
        problem = []
        with contextlib.suppress(Error):  # there may be no page at all
            problem = page.locator(".problem, #notice, #refused").all_inner_texts()
        said = " ".join(filter(None, problem)) or str(error).splitlines()[0]
        raise UsageError(f"{url}: the page did not answer: {said}") from None


if __name__ == "__main__":
    try:
        tyro.cli(screenshots)
    except DSVL2Error as problem:
        sys.exit(f"error: {problem}")
