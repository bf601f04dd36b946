"""The pictures for the README."""

from __future__ import annotations

import subprocess
import sys

import pytest
from PIL import Image

from dsvl2_jax.apps.screenshots import LARGEST_FILE, SHOTS

pytestmark = pytest.mark.exhaustive  # the boxes' tests and those of `dsvl2 serve` are the usual ones


def test_screenshots_are_written(server, tmp_path):
    def run(url: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "dsvl2_jax.apps.screenshots", url, str(tmp_path)]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    done = run(server.url)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("kB") == len(SHOTS)
    for name, ((width, _), _) in SHOTS.items():
        assert Image.open(tmp_path / name).width == width * 1.5
        assert 10_000 < (tmp_path / name).stat().st_size <= LARGEST_FILE
    refused = run("http://127.0.0.1:9")
    assert refused.returncode == 1
    assert refused.stderr.startswith("error: http://127.0.0.1:9: the page did not answer")
