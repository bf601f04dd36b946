"""The Python chapter's code runs as it stands, and prints what the page says."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent

_BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_PRINTED = re.compile(r"# → (.*)$", re.MULTILINE)


def test_every_block_of_the_python_chapter_prints_what_it_says(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)  # the page names files from here
    page = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
    namespace: dict[str, Any] = {}
    blocks = list(_BLOCK.finditer(page))
    assert blocks
    for block in blocks:
        first_line = page.count("\n", 0, block.start(1))
        # Leading newlines, so that a traceback names the page's own line.
        exec(compile("\n" * first_line + block[1], "docs/python.md", "exec"), namespace)
        line = first_line + 1
        assert capsys.readouterr().out.splitlines() == _PRINTED.findall(block[1]), f"docs/python.md:{line}"
