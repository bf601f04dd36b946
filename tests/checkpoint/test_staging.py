"""A directory or file appears whole or not at all: other runs, full disks, interrupts, and writers at the same time."""

import errno
import fcntl
import os
import subprocess
import threading

import pytest

from dsvl2_jax.checkpoint import orbax_io, staging
from dsvl2_jax.checkpoint.staging import PARTIAL_SUFFIX, replacing, write_text
from dsvl2_jax.convert.to_orbax import convert
from dsvl2_jax.errors import CheckpointError


def test_a_live_run_is_left_alone(checkpoints, tmp_path):
    partial = tmp_path / f".out{PARTIAL_SUFFIX}"
    partial.mkdir()
    (partial / "theirs").touch()
    descriptor = os.open(partial, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    with pytest.raises(CheckpointError, match="another run is writing"):
        convert(checkpoints / "mini-small", tmp_path / "out")
    os.close(descriptor)
    assert (partial / "theirs").exists()


def test_a_destination_that_exists_is_not_touched(checkpoints, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("precious")
    (tmp_path / "link").symlink_to("nowhere")
    for name in ("out", "link"):
        with pytest.raises(CheckpointError, match=f"{name}: exists already"):
            convert(checkpoints / "mini-small", tmp_path / name)
    assert (tmp_path / "out" / "mine").read_text() == "precious"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["link", "out"]
    with pytest.raises(CheckpointError, match="no such directory to write into"):
        convert(checkpoints / "mini-small", tmp_path / "no" / "out")


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 2 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("mounting a small file system needs root")
    yield disk
    subprocess.run(["umount", disk], check=True)


def test_too_small_a_disk_is_refused_before_writing(checkpoints, small_disk):
    with pytest.raises(CheckpointError, match="MB are free on this disk"):
        convert(checkpoints / "mini-small", small_disk / "out")
    assert not list(small_disk.iterdir())


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # from Orbax's own threads
def test_a_disk_that_fills_up_while_writing_is_cleaned(checkpoints, small_disk, monkeypatch):
    monkeypatch.setattr(staging, "_check_space", lambda directory, need_bytes: None)
    with pytest.raises(CheckpointError, match="the disk filled up"):
        convert(checkpoints / "mini-small-f32", small_disk / "out")
    assert not list(small_disk.iterdir())
    (small_disk / "usable").write_bytes(bytes(1_000_000))


def test_a_full_disk_without_a_small_disk(checkpoints, tmp_path, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(orbax_io.ParamWriter, "finalize", full)
    with pytest.raises(CheckpointError, match="the disk filled up"):
        convert(checkpoints / "mini-small", tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_an_interrupt_removes_what_was_written(checkpoints, tmp_path, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(orbax_io.ParamWriter, "finalize", interrupt)
    with pytest.raises(KeyboardInterrupt):
        convert(checkpoints / "mini-small", tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_file_is_replaced_whole_and_stays_when_the_writer_fails(tmp_path):
    file = tmp_path / "a.json"
    write_text(file, "before ü")
    assert file.read_text(encoding="utf-8") == "before ü"
    with pytest.raises(RuntimeError, match="broken"), replacing(file) as new:
        new.write_text("half")
        raise RuntimeError("broken")
    assert file.read_text(encoding="utf-8") == "before ü"
    assert list(tmp_path.iterdir()) == [file]


def test_what_a_kill_left_of_a_new_file_does_not_stay(tmp_path):
    file = tmp_path / "a.json"
    (tmp_path / f"a.json{staging.NEW_SUFFIX}").write_text("half of a longer text")
    write_text(file, "whole")
    assert file.read_text() == "whole"
    assert list(tmp_path.iterdir()) == [file]


def test_a_disk_that_fails_is_one_message(checkpoints, tmp_path, monkeypatch):
    def fail(*args):
        raise ValueError("UNKNOWN: Failed to fsync file: Input/output error [os_error_code='5']")

    monkeypatch.setattr(orbax_io.ParamWriter, "finalize", fail)
    with pytest.raises(CheckpointError, match="was not made, as a file cannot be read or written"):
        convert(checkpoints / "mini-small", tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_scratch_of_a_run_that_has_renamed_it_does_not_remove_the_next_runs(tmp_path):
    with staging.scratch(tmp_path / "out") as partial:
        partial.rename(tmp_path / "out")
        partial.mkdir()
        (partial / "theirs").touch()
    assert (partial / "theirs").exists()


def test_writers_at_the_same_time_leave_one_whole_file(tmp_path):
    file, texts = tmp_path / "a.txt", [letter * 100_000 for letter in "abcd"]
    writers = [threading.Thread(target=write_text, args=(file, text)) for text in texts]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert file.read_text() in texts
    assert list(tmp_path.iterdir()) == [file]
