"""A few kills and faults of `make chaos`, over the commands that take least."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.skipif(shutil.which("gcc") is None, reason="the fault layer is compiled by gcc")
def test_kills_and_faults_lose_nothing():
    arguments = ["--kills", "4", "--faults", "1", "--only", "data import", "--kinds", "disk full", "I/O error"]
    arguments += ["partial writes", "clock jumps", "two at once", "closed pipe", "ascii", "Ctrl-C"]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)}
    done = subprocess.run([sys.executable, "-m", "chaos", *arguments], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " kills\n" in done.stdout and "\n8 faults\n" in done.stdout
