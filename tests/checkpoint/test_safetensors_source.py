"""Files that are missing, damaged or not as ``SHA256SUMS`` says are named, and nothing is loaded from them."""

from __future__ import annotations

import hashlib
import json
import shutil
import struct
import subprocess

import hypothesis.strategies as st
import ml_dtypes
import numpy as np
import pytest
import released_checkpoint
from hypothesis import given

import dsvl2_jax
from dsvl2_jax.checkpoint.digests import SUMS_NAME, check_sums, sums
from dsvl2_jax.checkpoint.safetensors_source import Source, copy_rows
from dsvl2_jax.convert.to_orbax import convert
from dsvl2_jax.errors import CheckpointError


@pytest.fixture
def mini(checkpoints, tmp_path):
    """A copy of mini-small that the test may damage."""
    return released_checkpoint.copy(checkpoints / "mini-small", tmp_path / "mini")


@pytest.fixture
def listed(checkpoints, tmp_path):
    """A checkpoint with the digests of all its files."""
    directory = released_checkpoint.copy(checkpoints / "mini-tiny", tmp_path / "mini")
    names = sorted(file.name for file in directory.iterdir())
    (directory / SUMS_NAME).write_text(sums(directory, names))
    return directory


def test_lines_are_those_of_sha256sum(tmp_path):
    (tmp_path / "a.json").write_bytes(b"{}\n")
    (tmp_path / "b c.txt").write_bytes("Grüße".encode())
    text = sums(tmp_path, ["a.json", "b c.txt"])
    assert text.splitlines()[0] == hashlib.sha256(b"{}\n").hexdigest() + "  a.json"
    if shutil.which("sha256sum"):
        ran = subprocess.run(["sha256sum", "a.json", "b c.txt"], cwd=tmp_path, capture_output=True, check=True)
        assert ran.stdout.decode() == text


def test_files_that_agree_are_read_and_so_are_files_without_digests(listed):
    check_sums(listed)
    with Source(listed) as source:
        assert source.tensors
    (listed / "more.txt").write_text("not listed, so it may change")
    check_sums(listed)
    (listed / SUMS_NAME).unlink()
    (listed / "config.json").write_text("{}")
    check_sums(listed)


def test_every_changed_and_missing_file_is_named(listed):
    (listed / "tokenizer.json").unlink()
    shard = sorted(listed.glob("*.safetensors"))[-1]
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    with (listed / "config.json").open("a") as file:
        file.write("\n")
    with pytest.raises(CheckpointError) as caught:
        check_sums(listed)
    message = str(caught.value)
    assert message.startswith(f"{listed}: its files are not those that {SUMS_NAME} lists; get them again")
    for line in ("tokenizer.json: missing", f"{shard.name}: changed", "config.json: changed"):
        assert line in message
    assert "processor_config.json" not in message


def test_neither_source_nor_load_takes_a_changed_file(listed):
    shard = sorted(listed.glob("*.safetensors"))[0]
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1  # a number like any other: only the digest tells
    shard.write_bytes(content)
    for use in (Source, dsvl2_jax.load):
        with pytest.raises(CheckpointError, match=rf"{shard.name}: changed"):
            use(listed)


def shard(directory, number):
    return sorted(directory.glob("*.safetensors"))[number]


def rewrite_header(file, edit):
    """Changes a safetensors header without touching the data, padding it back to the same length."""
    content = file.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    edit(header)
    text = json.dumps(header, separators=(",", ":")).encode()
    assert len(text) <= length
    file.write_bytes(content[:8] + text.ljust(length) + content[8 + length :])


def first_entry(header):
    return next(entry for name, entry in header.items() if name != "__metadata__")


def write_header(file, text):
    file.write_bytes(struct.pack("<Q", len(text)) + text.encode() + bytes(4))


def lie_about_offsets(header):
    first_entry(header)["data_offsets"][1] -= 2


def lie_about_the_shape(header):
    first_entry(header)["shape"] = [1]


def cut(file, size):
    with file.open("r+b") as opened:
        opened.truncate(size)


def add_to_index(directory):
    released_checkpoint.edit_json(
        directory / released_checkpoint.INDEX, lambda i: i["weight_map"].update({"ghost": shard(directory, 0).name})
    )


def remove_from_index(directory):
    released_checkpoint.edit_json(
        directory / released_checkpoint.INDEX, lambda i: i["weight_map"].pop("view_seperator")
    )


def escape_with_index(directory):
    released_checkpoint.edit_json(
        directory / released_checkpoint.INDEX, lambda i: i["weight_map"].update(view_seperator="../other.safetensors")
    )


# How to damage a checkpoint, and what the message must contain.
DAMAGE = {
    "missing shard": (lambda d: shard(d, 1).unlink(), ["model-00002-of-000004", "missing"]),
    "truncated shard": (
        lambda d: cut(shard(d, 0), 300_000),
        ["model-00001-of-000004", "has 300000 bytes, its header says 399400", "download this file again"],
    ),
    "shard cut inside its header": (lambda d: cut(shard(d, 0), 100), ["model-00001", "100 bytes"]),
    "empty shard": (lambda d: cut(shard(d, 0), 0), ["model-00001", "0 bytes"]),
    "shard that is something else": (
        lambda d: shard(d, 0).write_text("<html>rate limited</html>"),
        ["model-00001", "not a complete safetensors file"],
    ),
    "two bad shards at once": (
        lambda d: (cut(shard(d, 1), 200), shard(d, 0).unlink()),
        ["model-00001", "model-00002"],
    ),
    "header lying about offsets": (
        lambda d: rewrite_header(shard(d, 1), lie_about_offsets),
        ["model-00002", "not a complete safetensors file"],
    ),
    "header lying about a shape": (
        lambda d: rewrite_header(shard(d, 1), lie_about_the_shape),
        ["model-00002", "not a complete safetensors file"],
    ),
    "index naming an absent tensor": (
        add_to_index,
        [released_checkpoint.INDEX, "ghost", "does not have it"],
    ),
    "tensor not in the index": (
        remove_from_index,
        ["view_seperator", "is not in", released_checkpoint.INDEX],
    ),
    "index leaving its directory": (
        escape_with_index,
        [released_checkpoint.INDEX, "../other.safetensors"],
    ),
    "index that is no json": (
        lambda d: (d / released_checkpoint.INDEX).write_text("{"),
        [released_checkpoint.INDEX, "not an index"],
    ),
    "shards without index, of which one is missing": (
        lambda d: ((d / released_checkpoint.INDEX).unlink(), shard(d, 1).unlink()),
        ["by the numbers in the names of the others: model-00002-of-000004.safetensors"],
    ),
    "a tensor in two files without index": (
        lambda d: ((d / released_checkpoint.INDEX).unlink(), shutil.copy(shard(d, 0), d / "more.safetensors")),
        ["tensors are in more than one of 5 files", "in model-00001-of-000004.safetensors and in more.safetensors"],
    ),
    "header of a billion bytes": (
        lambda d: shard(d, 0).write_bytes(struct.pack("<Q", 10**9) + b"{}" + bytes(100)),
        ["model-00001", "not a complete safetensors file"],
    ),
    "header of lists in lists": (
        lambda d: write_header(shard(d, 0), "[" * 100_000),
        ["model-00001", "not a complete safetensors file"],
    ),
    "header with a number of 5,000 digits": (
        lambda d: write_header(shard(d, 0), f'{{"a":{{"dtype":"F32","shape":[{"9" * 5000}],"data_offsets":[0,4]}}}}'),
        ["model-00001", "not a complete safetensors file"],
    ),
    "header with a negative size": (
        lambda d: write_header(shard(d, 0), '{"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}}'),
        ["model-00001", "not a complete safetensors file"],
    ),
    "header with a dtype that there is not": (
        lambda d: write_header(shard(d, 0), '{"a":{"dtype":"F33","shape":[1],"data_offsets":[0,4]}}'),
        ["model-00001", "not a complete safetensors file"],
    ),
    "index naming a file whose name is too long": (
        lambda d: released_checkpoint.edit_json(
            d / released_checkpoint.INDEX, lambda i: i["weight_map"].update(a="x" * 5000 + ".safetensors")
        ),
        [released_checkpoint.INDEX, "tensor a is said to be in"],
    ),
    "index of lists in lists": (
        lambda d: (d / released_checkpoint.INDEX).write_text('{"weight_map":' + "[" * 100_000),
        [released_checkpoint.INDEX, "not an index"],
    ),
    "digests that are no text": (
        lambda d: (d / SUMS_NAME).write_bytes(b"\xff\xfe"),
        [SUMS_NAME, "not UTF-8"],
    ),
    "digests that are something else": (
        lambda d: (d / SUMS_NAME).write_text("404: Not Found\n"),
        [f"{SUMS_NAME}:1: found '404: Not Found', expected 64 hexadecimal digits"],
    ),
    "digests of a file elsewhere": (
        lambda d: (d / SUMS_NAME).write_text(f"{'0' * 64}  ../other\n"),
        [f"{SUMS_NAME}:1: found", "a file in the same directory"],
    ),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_broken_file_is_named_before_anything_is_written(mini, tmp_path, case):
    damage, parts = DAMAGE[case]
    damage(mini)
    with pytest.raises(CheckpointError) as error:
        convert(mini, tmp_path / "out")
    for part in parts:
        assert part in str(error.value)
    assert error.value.exit_status == 1
    assert [file.name for file in tmp_path.iterdir()] == ["mini"]


def test_a_shard_that_shrinks_while_it_is_read_is_named(mini):
    with Source(mini) as source:
        cut(shard(mini, 0), 200)
        name = next(name for name, tensor in source.tensors.items() if tensor.file == shard(mini, 0))
        with pytest.raises(CheckpointError, match="while it is being read"):
            list(source.blocks(name))


DTYPES = st.sampled_from([np.dtype(name) for name in (ml_dtypes.bfloat16, np.float16, np.float32)])


@given(st.lists(st.integers(1, 70), min_size=1, max_size=3), st.randoms(), DTYPES, DTYPES)
def test_copies_between_any_orders_of_axes_and_dtypes_are_numpys_own(shape, random, of, into):
    bits = np.random.default_rng(random.randrange(2**32)).integers(0, 256, (*shape, of.itemsize), np.uint8)
    rows = bits.view(of)[..., 0]  # every number there is, such as NaN and the smallest
    axes = random.sample(range(len(shape)), len(shape))
    out = np.empty([shape[axis] for axis in axes], into).transpose(np.argsort(axes))
    with np.errstate(all="ignore"):
        copy_rows(out, rows)
        expected = rows.astype(into)
    whole = np.dtype(f"u{into.itemsize}")
    np.testing.assert_array_equal(np.ascontiguousarray(out).view(whole), np.ascontiguousarray(expected).view(whole))
    back = np.empty(shape, into)
    copy_rows(back, out)
    np.testing.assert_array_equal(back.view(whole), np.ascontiguousarray(out).view(whole))
