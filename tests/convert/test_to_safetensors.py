"""Export: what the official loader reads, in shards of the wanted size, all or nothing."""

import json

import numpy as np
import pytest
import released_checkpoint
import safetensors
from hypothesis import given
from hypothesis import strategies as st

from dsvl2_jax.checkpoint.locate import MANIFEST_NAME
from dsvl2_jax.checkpoint.safetensors_source import Source, numpy_dtype
from dsvl2_jax.convert import to_safetensors
from dsvl2_jax.convert.to_orbax import convert
from dsvl2_jax.convert.to_safetensors import ShardWriter, export, split_into_shards
from dsvl2_jax.errors import CheckpointError, UsageError

torch = pytest.importorskip("torch")


@pytest.fixture(scope="module")
def converted(checkpoints, tmp_path_factory):
    directory = tmp_path_factory.mktemp("export") / "mini-base"
    convert(checkpoints / "mini-base", directory)
    return directory


def test_shards_and_index_are_what_the_official_loader_reads(converted, checkpoints, tmp_path):
    export(converted, tmp_path / "out", max_shard_bytes="400kB")
    index = json.loads((tmp_path / "out" / released_checkpoint.INDEX).read_text())
    files = sorted(file.name for file in (tmp_path / "out").glob("*.safetensors"))
    count = len(files)
    assert count > 3
    assert files == [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    assert set(index["weight_map"].values()) == set(files)
    expected = released_checkpoint.tensors(checkpoints / "mini-base")
    assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in expected.values())
    for file in files:
        with safetensors.safe_open(tmp_path / "out" / file, framework="pt") as shard:
            assert shard.metadata() == {"format": "pt"}
            assert {name for name, where in index["weight_map"].items() if where == file} == set(shard.keys())
            assert sum(shard.get_tensor(name).nbytes for name in shard.keys()) <= 400_000  # noqa: SIM118
    released_checkpoint.assert_same_tensors(released_checkpoint.tensors(tmp_path / "out"), expected)
    assert not (tmp_path / "out" / MANIFEST_NAME).exists()


def test_one_shard_has_an_index_too_and_converts_again(converted, tmp_path):
    export(converted, tmp_path / "out")
    assert [file.name for file in (tmp_path / "out").glob("*.safetensors")] == ["model-00001-of-00001.safetensors"]
    convert(tmp_path / "out", tmp_path / "again")
    export(tmp_path / "again", tmp_path / "out2")
    for file in (tmp_path / "out").iterdir():
        assert file.read_bytes() == (tmp_path / "out2" / file.name).read_bytes(), file.name


@given(st.lists(st.integers(1, 50), min_size=1, max_size=30), st.integers(1, 100))
def test_shards_keep_the_order_and_the_limit(sizes, limit):
    tensors = {f"t{i}": ((size,), np.dtype(np.float32)) for i, size in enumerate(sizes)}
    shards = split_into_shards(tensors, limit)
    assert [name for shard in shards for name in shard] == list(tensors)
    for shard in shards:
        assert shard
        assert len(shard) == 1 or sum(4 * tensors[name][0][0] for name in shard) <= limit


shapes_and_dtypes = st.tuples(
    st.lists(st.integers(0, 5), max_size=3), st.sampled_from(["float32", "float16", "bfloat16"])
)


@given(st.lists(shapes_and_dtypes))
def test_any_tensors_are_read_back_by_the_safetensors_library(tmp_path_factory, entries):
    directory = tmp_path_factory.mktemp("shards")
    random = np.random.default_rng(0)
    tensors = {f"t{i}": (tuple(shape), numpy_dtype(dtype)) for i, (shape, dtype) in enumerate(entries)}
    arrays = {
        name: random.standard_normal(shape[::-1]).astype(dtype).transpose() for name, (shape, dtype) in tensors.items()
    }
    with ShardWriter(directory, tensors) as writer:
        writer.write(arrays)
        writer.finish()
    found = released_checkpoint.tensors(directory)
    assert found.keys() == tensors.keys()
    for name, array in arrays.items():
        assert tuple(found[name].shape) == array.shape
        assert found[name].reshape(-1).view(torch.uint8).numpy().tobytes() == array.tobytes()
    if tensors:
        with Source(directory) as source:
            starts = {name: tensor.start for name, tensor in source.tensors.items()}
        assert all(starts[name] % tensors[name][1].itemsize == 0 for name in tensors)


def test_what_cannot_be_exported_is_named_and_nothing_is_written(converted, checkpoints, tmp_path):
    with pytest.raises(CheckpointError, match="released layout already"):
        export(checkpoints / "mini-base", tmp_path / "out")
    with pytest.raises(CheckpointError, match="no such directory"):
        export(tmp_path / "absent", tmp_path / "out")
    with pytest.raises(UsageError, match="not a size"):
        export(converted, tmp_path / "out", max_shard_bytes="many")
    (tmp_path / "mine").write_text("precious")
    with pytest.raises(CheckpointError, match="exists already"):
        export(converted, tmp_path / "mine")
    assert [file.name for file in tmp_path.iterdir()] == ["mine"]
    assert (tmp_path / "mine").read_text() == "precious"


def test_a_failed_export_leaves_nothing(converted, tmp_path, monkeypatch):
    def fail(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(to_safetensors.os, "pwrite", fail)
    with pytest.raises(CheckpointError, match="the disk filled up"):
        export(converted, tmp_path / "out")
    assert not list(tmp_path.iterdir())
