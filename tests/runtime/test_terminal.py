import contextlib
import io
import os
import pty
import subprocess
import sys
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.table import Table

from dsvl2_jax.messages import printable
from dsvl2_jax.runtime.console import PrintableConsole
from dsvl2_jax.runtime.terminal import escaped, escaped_output, unescaped

EVIL = "a\x1b[2Jb\x07\x9b31m\r\u202ec\x7f\ud83d\ttab\nline"
SHOWN = r"a\x1b[2Jb\x07\x9b31m\r\u202ec\x7f\ud83d" + "\ttab\nline"


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_printable_keeps_text_and_spells_out_what_a_terminal_obeys():
    assert printable(EVIL) == SHOWN
    assert printable("naïve 世界 😀\n\tשלום") == "naïve 世界 😀\n\tשלום"


@given(st.text(), st.integers(0, 20))
def test_printable_is_decided_character_by_character(text, cut):
    assert printable(text[:cut]) + printable(text[cut:]) == printable(text) == printable(printable(text))
    assert printable(text).encode()


def test_a_terminal_gets_escaped_text_and_a_pipe_the_text(monkeypatch):
    terminal, pipe, errors = Terminal(), io.StringIO(), io.StringIO()
    for stream in (terminal, pipe):
        monkeypatch.setattr(sys, "stdout", stream)
        monkeypatch.setattr(sys, "stderr", errors)
        with escaped_output():
            for piece in EVIL:  # an answer comes in pieces
                print(piece, end="", flush=True)
            print(EVIL, file=sys.stderr)
        assert (sys.stdout, sys.stderr) == (stream, errors)
    assert (terminal.getvalue(), pipe.getvalue()) == (SHOWN, EVIL)
    assert errors.getvalue() == f"{SHOWN}\n" * 2


def test_streams_are_wrapped_once_and_can_be_unwrapped():
    terminal = Terminal()
    assert escaped(escaped(terminal)) is not terminal and unescaped(escaped(escaped(terminal))) is terminal
    assert escaped(None) is None and escaped(stream := io.StringIO()) is stream


def test_consoles_show_their_own_styles_and_no_texts_escapes():
    out = Terminal()
    console = PrintableConsole(file=out, force_terminal=True, width=200, color_system="standard", highlight=False)
    table = Table("name", title="t\x1b[5m")
    table.add_row("[red]x\x1b]0;title\x07y[/red]")
    console.print(table)
    console.print("plain \x1b[2J \u202e")
    text = out.getvalue()
    assert r"x\x1b]0;title\x07y" in text and r"t\x1b[5m" in text and r"plain \x1b[2J \u202e" in text
    assert "\x1b[31m" in text and "\x1b[2J" not in text and "\x07" not in text and "\u202e" not in text


def terminal_output(command, **options):
    """What a command writes to a terminal that is its standard output and standard error."""
    ours, theirs = pty.openpty()
    pieces = []

    def read():
        with contextlib.suppress(OSError):  # the other end has closed
            while piece := os.read(ours, 1 << 16):
                pieces.append(piece)

    reader = threading.Thread(target=read)
    reader.start()
    status = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=theirs, stderr=theirs, **options).returncode
    os.close(theirs)
    reader.join()
    os.close(ours)
    return status, b"".join(pieces).decode()


@pytest.mark.parametrize("command", ["check", "missing"])
def test_names_and_data_reach_a_terminal_escaped(tmp_path, command):
    file = tmp_path / "evil\x1b[2J.jsonl"
    file.write_text('{"messages": [{"role": "\\u001b]0;title\\u0007\\u202e", "content": "x"}]}\n')
    path = file if command == "check" else tmp_path / "none\x1b[5m.jsonl"
    status, text = terminal_output([sys.executable, "-m", "dsvl2_jax", "data", "check", str(path)])
    assert status == 1 and "\\x1b[" in text
    assert not [escape for escape in ("\x1b[2J", "\x1b[5m", "\x07", "\u202e", "\x1b]0;") if escape in text]
