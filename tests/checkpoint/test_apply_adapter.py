"""Adapters put into parameters: where their arrays lie, and which base they are for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from adapter_files import random_adapter, random_arrays
from flax.traverse_util import flatten_dict

import dsvl2_jax
from dsvl2_jax.checkpoint import apply_adapter, rules
from dsvl2_jax.checkpoint.adapters import AdapterSettings, array_shapes
from dsvl2_jax.checkpoint.apply_adapter import base_digest, merged_weight, with_adapter
from dsvl2_jax.checkpoint.load import load_params
from dsvl2_jax.convert.to_orbax import convert
from dsvl2_jax.errors import CheckpointError, UsageError
from dsvl2_jax.infer.adapters import side_by_side
from dsvl2_jax.model.config import Config
from dsvl2_jax.model.quantization import Quantization
from dsvl2_jax.runtime import stored_programs
from dsvl2_jax.sharding import make_mesh


@pytest.fixture(scope="module")
def config(checkpoints):
    return Config.from_file(checkpoints / "mini-small")


def test_the_digest_of_a_base_is_that_of_its_numbers(checkpoints, config, tmp_path):
    """In any layout and dtype, and as far as it goes of quantized weights; another checkpoint has another."""
    released = checkpoints / "mini-small"
    expected = base_digest(load_params(released, config))
    convert(released, tmp_path / "converted")
    convert(released, tmp_path / "quantized", quantization=Quantization("int4"))
    mesh = make_mesh(data=2, tensor=2, expert=2)
    assert base_digest(load_params(released, config, "float32")) == expected
    assert base_digest(load_params(tmp_path / "converted", config, "bfloat16", mesh)) == expected
    quantized = base_digest(load_params(tmp_path / "quantized", config))
    assert quantized == expected.split("-")[0]
    params = load_params(released, config)
    params["language"]["layers_1"]["mlp"]["experts"]["up_proj"] += 0.01
    assert base_digest(params).split("-")[0] == quantized and base_digest(params) != expected
    params["language"]["norm"]["scale"] += 0.01
    assert base_digest(params).split("-")[0] != quantized


def test_an_adapter_of_another_checkpoint_is_refused(checkpoints, config, tmp_path):
    params = load_params(checkpoints / "mini-small", config)
    for digest in (base_digest(params), base_digest(params).split("-")[0], None):
        settings = AdapterSettings("lora", 2, 4.0, base_digest=digest)
        with_adapter(params, config, random_arrays(config, settings, "o_proj"), settings)
    settings = AdapterSettings("lora", 2, 4.0, base="runs/other", base_digest="0123456789abcdef")
    adapter = random_adapter(tmp_path / "adapter", config, settings, "o_proj")
    with pytest.raises(CheckpointError, match=r"adapter: the adapter was trained on another checkpoint \(runs/other"):
        dsvl2_jax.load(checkpoints / "mini-small", adapter=adapter)


def test_arrays_lie_where_their_base_does(checkpoints, config):
    """On a mesh they are split as its axes are, and the gains of DoRA are the same."""
    settings = AdapterSettings("dora", 2, 4.0)
    arrays = random_arrays(config, settings, "layers_1")
    mesh = make_mesh(data=2, tensor=2, expert=2)
    one, many = (
        flatten_dict(
            with_adapter(
                load_params(checkpoints / "mini-small", config, "bfloat16", mesh), config, arrays, settings, mesh
            )
        )
        for mesh in (None, mesh)
    )
    experts = ("language", "layers_1", "mlp", "experts", "up_proj")
    assert many[*experts, "lora_a"].sharding.spec[:1] == many[*experts, "base"].sharding.spec[:1] == ("expert",)
    assert many[*experts, "lora_b"].sharding.spec[2] == many[*experts, "base"].sharding.spec[2] == "tensor"
    gains = [path for path in one if path[-1] == "gain"]
    assert len(gains) > 5
    for path in gains:
        np.testing.assert_allclose(one[path], many[path], rtol=1e-6)
    assert one[*experts, "lora_a"].dtype == jnp.bfloat16 and one[*experts, "gain"].dtype == jnp.float32


def test_a_whole_weight_takes_the_place_of_the_models_own(checkpoints, config):
    """Alone, or under an adapter of the same weight; then the model cannot be shared with other adapters."""
    params = load_params(checkpoints / "mini-small", config)
    settings = AdapterSettings("lora", 2, 4.0)
    arrays = random_arrays(config, settings, "layers_0/self_attn/o_proj")
    whole = np.full(params["language"]["layers_0"]["self_attn"]["o_proj"]["kernel"].shape, 0.5, np.float32)
    arrays["language"]["layers_0"]["self_attn"]["o_proj"]["kernel"]["base"] = whole
    arrays["language"]["norm"] = {"scale": np.full(params["language"]["norm"]["scale"].shape, 2, np.float32)}
    for changed in ({"language": {"norm": arrays["language"].pop("norm")}}, arrays):
        adapted = with_adapter(params, config, changed, settings)
        with pytest.raises(UsageError, match=r"adapter one: brings a whole language/\w+"):
            side_by_side(params, {"one": adapted})
        if changed is arrays:
            base = adapted["language"]["layers_0"]["self_attn"]["o_proj"]["kernel"]["base"]
            assert base.dtype == jnp.bfloat16 and (base == 0.5).all()
        else:
            assert (adapted["language"]["norm"]["scale"] == 2).all()


@pytest.mark.parametrize("name", ["self_attn/kv_b_proj", "self_attn/o_proj/kernel", "mlp/experts/down_proj"])
def test_a_large_weight_is_merged_in_parts(name, config, monkeypatch):
    leaf = next(leaf for leaf in rules.linear_leaves(config).values() if leaf.name == f"language/layers_1/{name}")
    draw = np.random.default_rng(0)
    arrays = {part: draw.normal(size=shape) for part, shape in array_shapes(leaf, 3).items()}
    base = draw.normal(size=leaf.shape).astype(np.float32)
    whole = merged_weight(base, leaf, arrays, 0.5)
    monkeypatch.setattr(apply_adapter, "_MERGED_AT_ONCE", base.size // 3)
    np.testing.assert_allclose(merged_weight(base, leaf, arrays, 0.5), whole, rtol=1e-5, atol=1e-5)
    plain = base.astype(np.float64)
    a, b = arrays["lora_a"], 0.5 * arrays["lora_b"]
    out, into = leaf.outputs, leaf.inputs
    delta = np.einsum(
        "eir,ero->eio" if leaf.stacked else "ir,ro->io",
        *(array.reshape(*leaf.shape[: int(leaf.stacked)], *shape) for array, shape in ((a, (-1, 3)), (b, (3, -1)))),
    )
    plain += (np.swapaxes(delta, -1, -2) if into[0] > out[-1] else delta).reshape(leaf.shape)
    gain = arrays["magnitude"].reshape([1 if axis in into else size for axis, size in enumerate(leaf.shape)])
    plain *= gain / np.sqrt(np.square(plain).sum(into, keepdims=True))
    np.testing.assert_allclose(whole, plain, rtol=1e-4, atol=1e-4)


def test_stored_programs_tell_adapted_parameters_from_plain_ones(checkpoints, config, tmp_path):
    params = load_params(checkpoints / "mini-small", config)
    programs = stored_programs.StoredPrograms([jax.devices()[0]], [], tmp_path)
    names = set()
    for kind in (None, "lora", "dora"):
        settings = AdapterSettings(kind or "lora", 2, 4.0)
        arrays = random_arrays(config, settings, "o_proj") if kind else {}
        adapted = with_adapter(params, config, arrays, settings)
        names.add(programs._name(jax.jit(lambda params: params), {}, {"params": adapted}))
    assert len(names) == 3
