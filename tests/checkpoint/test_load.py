"""Loading: both layouts give the same tree, in the wanted dtypes, placed on the mesh; damage is named."""

import os

import jax
import numpy as np
import pytest
import released_checkpoint
from flax.traverse_util import flatten_dict

from dsvl2_jax.checkpoint import rules
from dsvl2_jax.checkpoint.leaves import batches
from dsvl2_jax.checkpoint.load import load_params
from dsvl2_jax.checkpoint.locate import MANIFEST_NAME, PARAMS_NAME
from dsvl2_jax.checkpoint.safetensors_source import Source
from dsvl2_jax.convert.to_orbax import convert
from dsvl2_jax.errors import CheckpointError, UsageError
from dsvl2_jax.model.config import Config
from dsvl2_jax.model.deepseek_vl2 import abstract_params, param_shardings
from dsvl2_jax.sharding import make_mesh

NAMES = ("mini-tiny", "mini-base", "mini-small-f32")


@pytest.fixture(scope="module")
def converted(checkpoints, tmp_path_factory):
    """name → converted directory."""
    directory = tmp_path_factory.mktemp("converted")
    for name in NAMES:
        convert(checkpoints / name, directory / name)
    return {name: directory / name for name in NAMES}


@pytest.fixture
def broken(converted, tmp_path):
    """A converted directory that the test may damage."""
    return released_checkpoint.copy(converted["mini-base"], tmp_path / "broken")


def flat(params):
    return flatten_dict(params)


def assert_same(found, expected):
    found, expected = flat(found), flat(expected)
    assert found.keys() == expected.keys()
    for path, array in expected.items():
        assert found[path].dtype == array.dtype, path
        np.testing.assert_array_equal(np.asarray(found[path]), np.asarray(array), str(path))


@pytest.mark.parametrize("dtype", [None, "float32", "bfloat16"])
@pytest.mark.parametrize("name", NAMES)
def test_both_layouts_load_the_same_tree(checkpoints, converted, name, dtype):
    config = Config.from_file(checkpoints / name)
    from_released = load_params(checkpoints / name, config, dtype)
    assert_same(load_params(converted[name], config, dtype), from_released)
    shapes, _ = abstract_params(config)
    assert jax.tree.structure(from_released) == jax.tree.structure(shapes)
    assert jax.tree.map(lambda leaf: leaf.shape, from_released) == jax.tree.map(lambda leaf: leaf.shape, shapes)
    stored = "float32" if name.endswith("f32") else "bfloat16"
    for path, array in flat(from_released).items():
        assert array.dtype == ("float32" if "router" in path else dtype or stored), path


@pytest.mark.parametrize("name", NAMES)
def test_halves_of_released_parameters_are_read_as_they_are_of_the_whole(checkpoints, name, monkeypatch):
    read, preadv = [], os.preadv
    monkeypatch.setattr(os, "preadv", lambda *a: read.append(preadv(*a)) or read[-1])
    with Source(checkpoints / name) as source:
        for leaf in rules.expand(Config.from_file(checkpoints / name)):
            stored = source.leaf_dtype(leaf)
            wholes = {dtype: source.read_leaf(leaf, dtype) for dtype in {stored, np.dtype(np.float32)}}
            for axis, size in enumerate(leaf.shape):
                for half in (slice(0, size // 2), slice(size // 2, size)):
                    where = tuple(half if a == axis else slice(0, n) for a, n in enumerate(leaf.shape))
                    for dtype, whole in wholes.items():
                        read.clear()
                        found = source.read_slice(leaf, where, dtype)
                        assert found.dtype == dtype
                        np.testing.assert_array_equal(found, whole[where], leaf.name)
                    if leaf.stacked and axis == 0:  # of the other half's experts not a byte
                        assert sum(read) == found.size * stored.itemsize


def test_large_leaves_are_read_alone_and_cast_the_same(checkpoints, converted, monkeypatch):
    config = Config.from_file(checkpoints / "mini-base")
    expected = load_params(converted["mini-base"], config, "float32")
    monkeypatch.setattr(batches, "__defaults__", (10_000,))
    assert_same(load_params(converted["mini-base"], config, "float32"), expected)


@pytest.mark.parametrize("sizes", [(2, 2, 2), (1, 1, 8), (1, 8, 1)])
def test_a_mesh_places_every_parameter(checkpoints, converted, sizes):
    mesh = make_mesh(*sizes)
    for name in ("mini-tiny", "mini-base"):
        config = Config.from_file(checkpoints / name)
        wanted = flat(param_shardings(config, mesh))
        expected = load_params(checkpoints / name, config, "float32")
        for directory in (checkpoints / name, converted[name]):
            params = load_params(directory, config, "float32", mesh)
            assert_same(params, expected)
            for path, array in flat(params).items():
                assert array.sharding.is_equivalent_to(wanted[path], array.ndim), path


def test_an_unknown_dtype_is_a_usage_error(converted):
    with pytest.raises(UsageError, match="int4"):
        load_params(converted["mini-tiny"], Config.from_file(converted["mini-tiny"]), "int4")


def data_files(directory):
    files = [file for file in (directory / PARAMS_NAME).rglob("*") if file.is_file()]
    return sorted(files, key=lambda file: -file.stat().st_size)


def overwrite(file):
    file.write_bytes(b"\xff" * file.stat().st_size)


DAMAGE = {
    "no manifest": (lambda d: (d / MANIFEST_NAME).unlink(), "did not finish"),
    "manifest that is no json": (lambda d: (d / MANIFEST_NAME).write_text("{"), "cannot be read"),
    "manifest of another version": (
        lambda d: released_checkpoint.edit_json(d / MANIFEST_NAME, lambda m: m.update(version=99)),
        "version 99",
    ),
    "missing data file": (lambda d: data_files(d)[0].unlink(), "missing, expected"),
    "truncated data file": (lambda d: data_files(d)[0].write_bytes(b"cut"), "3 bytes, expected"),
    "overwritten metadata": (lambda d: overwrite(d / "params" / "state" / "_METADATA"), "not a readable Orbax"),
    "overwritten index": (lambda d: overwrite(d / "params" / "state" / "manifest.ocdbt"), "convert"),
    "config of another model": (
        lambda d: released_checkpoint.edit_json(
            d / "config.json", lambda c: c["language_config"].update(num_hidden_layers=2)
        ),
        "unexpected: language/layers_2",
    ),
    "config of another shape": (
        lambda d: released_checkpoint.edit_json(
            d / "config.json", lambda c: c["language_config"].update(vocab_size=1000)
        ),
        r"embed_tokens: found \[1024, 64\], expected \[1000, 64\]",
    ),
}


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # from Orbax's own threads
@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_converted_directory_is_named(broken, case):
    damage, message = DAMAGE[case]
    damage(broken)
    with pytest.raises(CheckpointError, match=message) as error:
        load_params(broken, Config.from_file(broken))
    assert str(broken) in str(error.value)
    assert "again" in str(error.value)


def test_edited_text_files_do_not_matter(broken):
    (broken / "README.md").write_text("my notes")
    (broken / "special_tokens_map.json").unlink()
    load_params(broken, Config.from_file(broken))
