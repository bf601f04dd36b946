"""``SHA256SUMS``: files that are not as it says are named, and nothing is loaded from them."""

from __future__ import annotations

import hashlib
import shutil
import subprocess

import pytest
import released_checkpoint

import dsvl2_jax
from dsvl2_jax.checkpoint.safetensors_source import DIGESTS_NAME, Source, check_digests, digests
from dsvl2_jax.errors import CheckpointError


@pytest.fixture
def mini(checkpoints, tmp_path):
    """A checkpoint with the digests of all its files."""
    directory = released_checkpoint.copy(checkpoints / "mini-tiny", tmp_path / "mini")
    names = sorted(file.name for file in directory.iterdir())
    (directory / DIGESTS_NAME).write_text(digests(directory, names))
    return directory


def test_lines_are_those_of_sha256sum(tmp_path):
    (tmp_path / "a.json").write_bytes(b"{}\n")
    (tmp_path / "b c.txt").write_bytes("Grüße".encode())
    text = digests(tmp_path, ["a.json", "b c.txt"])
    assert text.splitlines()[0] == hashlib.sha256(b"{}\n").hexdigest() + "  a.json"
    if shutil.which("sha256sum"):
        ran = subprocess.run(["sha256sum", "a.json", "b c.txt"], cwd=tmp_path, capture_output=True, check=True)
        assert ran.stdout.decode() == text


def test_files_that_agree_are_read_and_so_are_files_without_digests(mini):
    check_digests(mini)
    with Source(mini) as source:
        assert source.tensors
    (mini / "more.txt").write_text("not listed, so it may change")
    check_digests(mini)
    (mini / DIGESTS_NAME).unlink()
    (mini / "config.json").write_text("{}")
    check_digests(mini)


def test_every_changed_and_missing_file_is_named(mini):
    (mini / "tokenizer.json").unlink()
    shard = sorted(mini.glob("*.safetensors"))[-1]
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    with (mini / "config.json").open("a") as file:
        file.write("\n")
    with pytest.raises(CheckpointError) as caught:
        check_digests(mini)
    message = str(caught.value)
    assert message.startswith(f"{mini}: its files are not those that {DIGESTS_NAME} lists; get them again")
    for line in ("tokenizer.json: missing", f"{shard.name}: changed", "config.json: changed"):
        assert line in message
    assert "processor_config.json" not in message


def test_neither_source_nor_load_takes_a_changed_file(mini):
    shard = sorted(mini.glob("*.safetensors"))[0]
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1  # a number like any other: only the digest tells
    shard.write_bytes(content)
    for use in (Source, dsvl2_jax.load):
        with pytest.raises(CheckpointError, match=rf"{shard.name}: changed"):
            use(mini)
