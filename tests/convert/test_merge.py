"""Merging: the weights are those that the adapter makes of them, in either layout, all or nothing."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from adapter_files import random_adapter
from flax.traverse_util import flatten_dict

from dsvl2_jax.checkpoint import rules
from dsvl2_jax.checkpoint.adapters import AdapterSettings, read_adapter
from dsvl2_jax.checkpoint.apply_adapter import base_digest, with_adapter
from dsvl2_jax.checkpoint.load import load_params
from dsvl2_jax.convert.merge import merge
from dsvl2_jax.convert.to_orbax import convert
from dsvl2_jax.convert.to_safetensors import export
from dsvl2_jax.errors import CheckpointError, UsageError
from dsvl2_jax.model.config import Config
from dsvl2_jax.model.quantization import Quantization
from dsvl2_jax.model.weights import is_stored_weight, merged, weight_of


@pytest.fixture(scope="module")
def config(checkpoints):
    return Config.from_file(checkpoints / "mini-small")


@pytest.fixture(scope="module")
def converted(checkpoints, tmp_path_factory):
    directory = tmp_path_factory.mktemp("merge") / "mini-small"
    convert(checkpoints / "mini-small", directory)
    return directory


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_the_merged_weights_are_those_that_the_adapter_makes(kind, checkpoints, converted, config, tmp_path):
    released = checkpoints / "mini-small"
    params = load_params(released, config)
    settings = AdapterSettings(kind, 2, 6.0, base_digest=base_digest(params))
    adapter = random_adapter(tmp_path / "adapter", config, settings, "s_1/")  # a layer of each part
    merge(released, adapter, tmp_path / "released")
    merge(converted, adapter, tmp_path / "orbax")
    found = flatten_dict(load_params(tmp_path / "released", config, verify=True))
    adapted = with_adapter(params, config, *read_adapter(adapter, config))
    expected = flatten_dict(adapted, is_leaf=lambda _, value: is_stored_weight(value))
    leaves = rules.linear_leaves(config)
    plain = flatten_dict(params)
    assert found.keys() == expected.keys()
    for path, value in expected.items():
        assert found[path].dtype == plain[path].dtype
        if isinstance(value, dict):
            axis = leaves[path].inputs[-1] - len(leaves[path].shape)
            value = merged(jax.tree.map(lambda x: x.astype(jnp.float32), weight_of(value, axis)), axis)
            # One unit of the stored dtype, where the sums fall between two numbers.
            atol = float(jnp.abs(value).max() * jnp.finfo(plain[path].dtype).eps)
            np.testing.assert_allclose(found[path].astype(jnp.float32), value, atol=2 * atol, err_msg=str(path))
        else:
            np.testing.assert_array_equal(found[path], value)
    # Both layouts hold the same numbers, and give each other.
    merge(converted, adapter, tmp_path / "orbax to released", layout="released")
    merge(released, adapter, tmp_path / "released to orbax", layout="orbax")
    for name in ("orbax", "orbax to released", "released to orbax"):
        again = flatten_dict(load_params(tmp_path / name, config))
        for path, array in found.items():
            np.testing.assert_array_equal(again[path], array, f"{name}: {path}")


def test_what_cannot_be_merged_is_refused_and_leaves_nothing(checkpoints, converted, config, tmp_path):
    settings = AdapterSettings("lora", 2, 6.0, base="the-other-one", base_digest="0" * 16 + "-" + "0" * 16)
    adapter = random_adapter(tmp_path / "adapter", config, settings, "o_proj")
    target = tmp_path / "merged"
    for source in (converted, checkpoints / "mini-small"):
        with pytest.raises(CheckpointError, match=r"trained on another checkpoint \(the-other-one, digest 0000"):
            merge(source, adapter, target)
    other = random_adapter(
        tmp_path / "other", Config.from_file(checkpoints / "mini-tiny"), AdapterSettings("lora", 2, 6.0)
    )
    with pytest.raises(CheckpointError, match="Give the checkpoint that the adapter was trained on"):
        merge(converted, other, target)
    with pytest.raises(UsageError, match="--layout flax"):
        merge(converted, other, target, layout="flax")
    convert(checkpoints / "mini-small", tmp_path / "int8", quantization=Quantization("int8"))
    with pytest.raises(CheckpointError, match=r"weights are in int8(.|\n)*quantize the result"):
        merge(tmp_path / "int8", adapter, target)
    with pytest.raises(CheckpointError, match="exists already"):
        merge(converted, adapter, converted)
    assert {path.name for path in tmp_path.iterdir()} == {"adapter", "other", "int8"}


def test_a_checkpoint_without_its_pooling_head_stays_without(checkpoints, config, tmp_path):
    from safetensors.numpy import load_file, save_file

    source = tmp_path / "source"
    source.mkdir()
    for file in (checkpoints / "mini-small").iterdir():
        if file.suffix == ".json" and not file.name.endswith(".index.json"):
            (source / file.name).write_bytes(file.read_bytes())
    tensors = {}
    for file in (checkpoints / "mini-small").glob("*.safetensors"):
        tensors |= {name: x for name, x in load_file(file).items() if not name.startswith(rules.UNUSED)}
    save_file(tensors, source / "model.safetensors")
    adapter = random_adapter(tmp_path / "adapter", config, AdapterSettings("lora", 2, 6.0), "o_proj")
    merge(source, adapter, tmp_path / "merged")
    merge(source, adapter, tmp_path / "orbax", layout="orbax")
    export(tmp_path / "orbax", tmp_path / "exported")
    for name in ("merged", "exported"):
        found = {}
        for file in (tmp_path / name).glob("*.safetensors"):
            found |= load_file(file)
        assert found.keys() == tensors.keys()
        changed = {key for key, x in found.items() if not np.array_equal(x, tensors[key])}
        assert changed and all(re.search(r"o_proj\.weight$", key) for key in changed)
