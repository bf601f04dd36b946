"""Chromium for the tests of pages, which are skipped where there is none."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest


@contextlib.contextmanager
def chromium_or_skip() -> Iterator:
    """A running Chromium."""
    pytest.importorskip("playwright.sync_api")
    from playwright.sync_api import Error

    from dsvl2_jax.apps.screenshots import chromium

    with contextlib.ExitStack() as stack:
        try:
            started = stack.enter_context(chromium())
        except Error as error:
            pytest.skip(f"no Chromium here (apt-get install chromium, or playwright install chromium): {error}")
        yield started
