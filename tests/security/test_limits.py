"""Small files that claim or unpack to far more end in an error before the memory is taken."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BOMBS = Path(__file__).with_name("bombs.py")
# The beginning of what each of bombs.py comes to, and a part of it.
EXPECTED = {
    **{f"{form} pixels": ("ImageError", "too large to be safe") for form in ("PNG", "BMP", "GIF", "TIFF", "PPM")},
    **{
        f"PNG {kind}": ("ImageError", "Decompressed data too large")
        for kind in ("text", "international text", "profile")
    },
    "PNG many texts": ("ImageError", "Too much memory used in text chunks"),
    "video pixels": ("ImageError", "the video is damaged"),
    "video playlist": ("ImageError", "not a video in a format that is read"),
    "animation": ("read", "(1000, 1000)"),  # of which the first frame alone is decoded
    "base64": ("ImageError", "too large to be safe"),
    "tar member": ("DataError", "cut short within a.png"),
    "tar member beyond all numbers": ("DataError", "cut short within a.png"),
    "compressed tar": ("DataError", "not a whole, uncompressed tar"),
    "weights' header": ("CheckpointError", "header too large"),
    "weights' header of the file's size": ("CheckpointError", "header too large"),
}


@pytest.fixture(scope="module")
def came_to(tmp_path_factory):
    pytest.importorskip("resource")
    pytest.importorskip("av", reason="videos need the extra video")
    helpers = str(BOMBS.parent.parent)
    environment = os.environ | {"PYTHONWARNINGS": "error::ResourceWarning", "PYTHONPATH": helpers}
    child = subprocess.run(
        [sys.executable, str(BOMBS), str(tmp_path_factory.mktemp("bombs"))],
        capture_output=True,
        text=True,
        timeout=300,
        env=environment,
    )
    assert child.returncode == 0, child.stderr
    return json.loads(child.stdout)


def test_each_has_its_expectation(came_to):
    assert set(came_to) == set(EXPECTED)


@pytest.mark.parametrize("bomb", EXPECTED)
def test_decompression_and_pixel_limits_hold_before_allocation(came_to, bomb):
    kind, part = EXPECTED[bomb]
    assert came_to[bomb].startswith(f"{kind}: ") and part in came_to[bomb]
    assert "MemoryError" not in came_to[bomb] and "Unable to allocate" not in came_to[bomb]
