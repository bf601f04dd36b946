"""The documents' Python runs as it stands, and prints what the pages say."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent

_BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_PRINTED = re.compile(r"# → (.*)$", re.MULTILINE)


@pytest.mark.parametrize("page", ["README.md", "docs/python.md"])
def test_every_block_of_a_page_prints_what_it_says(page, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)  # the pages name files from here
    text = (ROOT / page).read_text(encoding="utf-8")
    namespace: dict[str, Any] = {}  # of the page: a block uses the names of those before it
    blocks = list(_BLOCK.finditer(text))
    assert blocks
    for block in blocks:
        before = text.count("\n", 0, block.start(1))
        # Leading newlines, so that a traceback names the page's own line.
        exec(compile("\n" * before + block[1], page, "exec"), namespace)
        assert capsys.readouterr().out.splitlines() == _PRINTED.findall(block[1]), f"{page}:{before + 1}"
