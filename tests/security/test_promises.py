"""SECURITY.md names the tests of its promises, and all of them are there."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_every_promise_has_its_tests():
    table = (ROOT / "SECURITY.md").read_text(encoding="utf-8").partition("## Tests")[2]
    named = set(re.findall(r"`(tests/[^`]+)`", table))
    assert [name for name in sorted(named) if not (ROOT / name).is_file()] == []
    own = {path.relative_to(ROOT).as_posix() for path in Path(__file__).parent.glob("test_*.py")} - {
        Path(__file__).relative_to(ROOT).as_posix()
    }
    assert own <= named
