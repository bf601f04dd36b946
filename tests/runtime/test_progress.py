"""The bar is for terminals alone, and counts bytes or items."""

import io

import pytest

from dsvl2_jax.runtime import progress as module
from dsvl2_jax.runtime.console import PrintableConsole
from dsvl2_jax.runtime.progress import progress


def test_nothing_is_shown_where_nobody_looks(capsys):
    with progress("reading", 10) as advance:
        advance(10)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(("unit", "amount"), [("items", "7/8"), ("bytes", "7/8 bytes")])
def test_a_terminal_shows_what_is_done(monkeypatch, unit, amount):
    screen = io.StringIO()
    monkeypatch.setattr(
        module,
        "PrintableConsole",
        lambda stderr: PrintableConsole(file=screen, force_terminal=True, width=120, no_color=True),
    )
    with progress("answering", 8, done=3, unit=unit) as advance:
        advance(4)
    assert "answering" in screen.getvalue()
    assert amount in screen.getvalue()
