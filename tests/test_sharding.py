"""The tables from logical to mesh axes: every array of every released size gets a valid layout on any mesh."""

import functools
import logging
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden import DATA
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AxisType, PartitionSpec

from dsvl2_jax import sharding
from dsvl2_jax.errors import UsageError
from dsvl2_jax.model.config import Config
from dsvl2_jax.model.deepseek_vl2 import abstract_params
from dsvl2_jax.sharding import (
    ACTIVATION_RULES,
    MESH_AXES,
    PARAM_RULES,
    add_fsdp_axis,
    make_mesh,
    mesh_axes,
    parse_mesh,
    partition_spec,
)

REFERENCE = DATA / "reference"
MESHES = [(2, 2, 2), (1, 1, 8), (1, 8, 1), (8, 1, 1), (1, 3, 5), (4, 4, 4), (1, 1, 72), (1, 7, 1), (16, 16, 1)]


@functools.cache
def released(size: str) -> list[tuple[str, tuple[int, ...], tuple[str | None, ...]]]:
    """(path, shape, logical axes) of every parameter."""
    shapes, axes = abstract_params(Config.from_file(REFERENCE / f"released_config_{size}.json"))
    leaves = jax.tree_util.tree_flatten_with_path(shapes)[0]
    named = jax.tree.leaves(axes, is_leaf=lambda a: isinstance(a, tuple))
    return [(jax.tree_util.keystr(k), leaf.shape, a) for (k, leaf), a in zip(leaves, named, strict=True)]


def axes_of(spec: PartitionSpec) -> list[str]:
    """Every mesh axis that the spec uses."""
    return [name for entry in spec for name in mesh_axes(entry)]


@pytest.mark.parametrize("size", ["tiny", "small", "base"])
def test_every_released_parameter_has_a_valid_layout_on_every_mesh(size):
    for sizes in MESHES:
        mesh = dict(zip(MESH_AXES, sizes, strict=True))
        for name, shape, axes in released(size):
            spec = partition_spec(shape, axes, mesh, PARAM_RULES)
            used = axes_of(spec)
            assert len(spec) == len(shape), name
            assert len(set(used)) == len(used), f"{name} uses a mesh axis twice: {spec}"
            for dim, entry in zip(shape, spec, strict=True):
                assert dim % math.prod(mesh[n] for n in axes_of([entry])) == 0, f"{name}: {shape} {spec} {mesh}"


def test_the_large_arrays_of_the_decoder_are_split_over_tensor_and_expert_and_the_encoder_is_whole():
    mesh = {"data": 2, "tensor": 2, "expert": 2}
    for name, shape, axes in released("base"):
        used = set(axes_of(partition_spec(shape, axes, mesh, PARAM_RULES)))
        if "['language']" not in name:
            assert not used, name
        elif math.prod(shape) > 2560 * 1152 and "kv_a_proj" not in name:
            assert used == {"tensor", "expert"}, name


def test_in_training_large_arrays_are_split_over_every_axis():
    mesh = {"data": 2, "tensor": 2, "expert": 2}
    for name, shape, axes in released("base"):
        spec = add_fsdp_axis(partition_spec(shape, axes, mesh, PARAM_RULES), shape, mesh)
        if math.prod(shape) > 2560 * 1152:
            assert sorted(axes_of(spec)) == ["data", "expert", "tensor"], name
    assert add_fsdp_axis(PartitionSpec(None, None), (4, 4), mesh) == PartitionSpec(None, None)  # too small
    stacked = add_fsdp_axis(PartitionSpec(None, None, "tensor"), (26, 1 << 10, 1 << 10), mesh, layers=True)
    assert stacked == PartitionSpec(None, ("data", "expert"), "tensor")


def test_what_does_not_divide_is_replicated_and_the_reason_logged_once(caplog):
    sharding._log_once.cache_clear()
    mesh = {"data": 1, "tensor": 4, "expert": 1}
    with caplog.at_level(logging.INFO, logger="dsvl2_jax.sharding"):
        for _ in range(2):
            spec = partition_spec((1280, 10, 128), ("embed", "heads", "head_dim"), mesh, PARAM_RULES)
            assert spec == PartitionSpec(None, None, None)
    assert [r.message for r in caplog.records] == ["axis heads of size 10 does not divide over tensor = 4: replicated"]


def test_axes_of_size_one_are_left_out():
    mesh = {"data": 8, "tensor": 1, "expert": 1}
    assert partition_spec((64, 8), ("tiles", None), mesh, ACTIVATION_RULES) == PartitionSpec("data", None)


def test_a_dimension_is_split_over_those_axes_of_its_rule_that_divide_it():
    mesh = {"data": 2, "tensor": 2, "expert": 4}
    assert partition_spec((16,), ("tiles",), mesh, ACTIVATION_RULES) == PartitionSpec(("data", "expert", "tensor"))
    assert partition_spec((12,), ("tiles",), mesh, ACTIVATION_RULES) == PartitionSpec(("data", "tensor"))
    assert partition_spec((10,), ("heads",), mesh, ACTIVATION_RULES) == PartitionSpec("tensor")
    assert partition_spec((9,), ("tiles",), mesh, ACTIVATION_RULES) == PartitionSpec(None)


def test_a_dimension_takes_the_axes_that_those_before_it_left():
    mesh = {"data": 2, "tensor": 2, "expert": 2}
    axes = ("batch", "length", "heads", "head_dim")
    assert partition_spec((4, 8, 4, 16), axes, mesh, ACTIVATION_RULES) == PartitionSpec(
        ("data", "expert"), None, "tensor", None
    )
    assert partition_spec((1, 8, 4, 16), axes, mesh, ACTIVATION_RULES) == PartitionSpec(
        None, None, ("tensor", "expert"), None
    )
    cache = ("slots", None, "kv_heads", "head_dim")
    assert partition_spec((8, 8, 4, 16), cache, mesh, ACTIVATION_RULES) == PartitionSpec(
        ("data", "tensor", "expert"), None, None, None
    )


def test_a_replicated_axis_leaves_the_mesh_axis_free_for_another():
    mesh = {"data": 1, "tensor": 4, "expert": 1}
    assert partition_spec((10, 8), ("heads", "mlp"), mesh, PARAM_RULES) == PartitionSpec(None, "tensor")


@pytest.mark.parametrize("sizes", [(1, 4), (4, 1), (2, 2), (1, 8), (2, 4), (1, 16), (2, 8)], ids=str)
def test_the_width_of_a_head_takes_what_the_heads_of_tiny_leave(sizes, caplog):
    mesh = dict(zip(("data", "tensor", "expert"), (1, *sizes), strict=True))
    with caplog.at_level(logging.INFO, logger="dsvl2_jax.sharding"):
        spec = partition_spec((1280, 10, 128), ("embed", "heads", "mha_head_dim"), mesh, PARAM_RULES)
    parts = math.prod(mesh[name] for entry in spec for name in mesh_axes(entry))
    assert parts == math.prod(sizes) and not caplog.records


def test_axes_without_a_rule_and_of_another_rank_are_refused():
    with pytest.raises(ValueError, match=r"'no_such_axis' .* has no rule"):
        partition_spec((4,), ("no_such_axis",), {"tensor": 2}, PARAM_RULES)
    with pytest.raises(ValueError, match=r"shape \(4, 4\) has 1 logical axes"):
        partition_spec((4, 4), ("heads",), {"tensor": 2}, PARAM_RULES)


@given(
    dims=st.lists(st.tuples(st.integers(1, 48), st.sampled_from([*PARAM_RULES, None])), max_size=4),
    sizes=st.tuples(*[st.integers(1, 8)] * 3),
)
def test_any_array_gets_a_layout_that_divides_it_and_uses_no_axis_twice(dims, sizes):
    shape, axes = [d for d, _ in dims], [a for _, a in dims]
    mesh = dict(zip(MESH_AXES, sizes, strict=True))
    plain = partition_spec(shape, axes, mesh, PARAM_RULES)
    for spec in (plain, add_fsdp_axis(plain, shape, mesh)):
        used = axes_of(spec)
        assert len(set(used)) == len(used)
        assert all(d % math.prod(mesh[n] for n in axes_of([entry])) == 0 for d, entry in zip(shape, spec, strict=True))


def test_mesh_has_the_named_automatic_axes():
    mesh = make_mesh(data=2, tensor=2, expert=2)
    assert mesh.axis_names == MESH_AXES
    assert dict(mesh.shape) == {"data": 2, "tensor": 2, "expert": 2}
    assert set(mesh.axis_types) == {AxisType.Auto}


@pytest.mark.parametrize("sizes", [(2, 2, 1), (0, 1, 8), (3, 3, 1), (-2, -4, 1)])
def test_a_mesh_that_does_not_use_every_device_is_refused(sizes):
    with pytest.raises(UsageError, match=r"needs .* devices, but there are 8"):
        make_mesh(*sizes)


def test_constrain_follows_the_ambient_mesh_and_does_nothing_without_one():
    x = jnp.zeros((4, 6, 8))
    assert sharding.constrain(x, "batch", "length", "mlp") is x
    with jax.set_mesh(make_mesh(data=2, tensor=4)):
        out = jax.jit(lambda x: sharding.constrain(x, "batch", "length", "mlp"))(x)
    assert out.sharding.spec == PartitionSpec("data", None, "tensor")
    assert out.addressable_shards[0].data.shape == (2, 6, 2)
    np.testing.assert_array_equal(out, x)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("data=2,tensor=2,expert=2", (2, 2, 2)),
        ("expert=8", (1, 1, 8)),
        (" tensor = 4 , data=2 ", (2, 4, 1)),
        ("", (1, 1, 1)),
    ],
)
def test_mesh_is_parsed(text, expected):
    assert parse_mesh(text) == dict(zip(MESH_AXES, expected, strict=True))


@pytest.mark.parametrize("text", ["model=2", "data", "data=", "data=0", "data=-1", "data=2.5", "data=two", "=2"])
def test_a_mesh_that_cannot_be_read_is_refused(text):
    with pytest.raises(UsageError, match="--mesh: "):
        parse_mesh(text)


def test_a_mesh_axis_named_twice_is_refused():
    with pytest.raises(UsageError, match="--mesh: data is given twice"):
        parse_mesh("data=2,data=4")
