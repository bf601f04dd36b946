"""What benchmarks share."""

from __future__ import annotations

import numpy as np
import pytest

from dsvl2_jax.apps.bench.measure import drop_from_page_cache, machine, need_at_least, own_bytes
from dsvl2_jax.errors import DSVL2Error, UsageError


def test_the_machine_is_named_with_its_versions():
    line = machine()
    assert "CPU cores, " in line and "GiB memory; Python 3." in line and ", jaxlib " in line and "\n" not in line


def test_a_number_that_is_too_small_is_a_usage_error():
    need_at_least("--rows", 2, 2)
    with pytest.raises(UsageError, match="--rows: found 1, expected at least 2"):
        need_at_least("--rows", 1, 2)


def test_memory_and_bytes_read_are_this_process_own(tmp_path):
    file = tmp_path / "file"
    file.write_bytes(b"x" * 3_000_000)
    before = own_bytes("rchar")
    file.read_bytes()
    assert 3_000_000 <= own_bytes("rchar") - before < 4_000_000
    before = own_bytes("VmRSS")
    held = np.ones(20_000_000)  # 160 MB
    assert 0.9 * held.nbytes < own_bytes("VmRSS") - before < 1.3 * held.nbytes
    assert own_bytes("VmHWM") >= own_bytes("VmRSS") * 0.99
    with pytest.raises(DSVL2Error, match="has no VmNone"):
        own_bytes("VmNone")


def test_files_are_left_as_they_are(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").write_text("content")
    drop_from_page_cache(tmp_path)
    assert (tmp_path / "folder" / "file").read_text() == "content"
