"""Which weights are quantized, how well numbers are rounded and packed, and how the arrays are split over a mesh."""

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsvl2_jax.errors import UsageError
from dsvl2_jax.kernels.quantized import (
    KINDS,
    Quantized,
    dequantize,
    group_size,
    pack_int4,
    quantize,
)
from dsvl2_jax.model.config import Config
from dsvl2_jax.model.deepseek_vl2 import abstract_leaves, weight_inputs
from dsvl2_jax.model.parameter_paths import path_name
from dsvl2_jax.model.quantization import (
    Quantization,
    leaves_of,
    mismatches,
    quantization_of,
    quantized_weights,
    stored_specs,
)
from dsvl2_jax.model.released import SIZES, released_config

STEPS = {"int8": 127, "float8": 14}  # a number of the scale's size is rounded by at most half a step of it


@pytest.fixture(scope="module", params=SIZES)
def config(request):
    return Config.from_dict(released_config(request.param))


def unpacked(packed, groups, axis):
    """`unpack_int4` in numpy, value by value of the bytes."""
    packed = np.moveaxis(packed, axis, -1)
    halves = packed.reshape(*packed.shape[:-1], groups, 1, -1)
    values = np.concatenate([halves & 15, halves >> 4], axis=-2).astype(np.int8) - 8
    return np.moveaxis(values.reshape(*packed.shape[:-1], -1), -1, axis)


def restored(stored, kind, inputs):
    """`dequantize` in numpy, which compiles nothing for every new shape."""
    axis, scale = inputs[-1], stored["scale"]
    values = unpacked(stored[kind], scale.shape[axis], axis) if kind == "int4" else stored[kind]
    return values.astype(np.float32) * np.repeat(scale, values.shape[axis] // scale.shape[axis], axis)


@settings(max_examples=60)
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 5)),
    size=st.sampled_from([2, 16, 48, 128, 176]),
    axis=st.sampled_from([0, 1, 2]),
    seed=st.integers(0, 2**32 - 1),
)
def test_packing_loses_nothing_whatever_the_sizes(shape, size, axis, seed):
    shape = (*shape[:axis], size, *shape[axis:])
    groups = size // (group_size(size) or size)
    values = np.random.default_rng(seed).integers(-8, 8, shape).astype(np.int8)
    packed = pack_int4(values, groups, axis)
    assert packed.nbytes * 2 == values.nbytes
    np.testing.assert_array_equal(unpacked(packed, groups, axis), values)


@settings(max_examples=40)
@given(
    kind=st.sampled_from(KINDS),
    layout=st.sampled_from([((32, 7), (0,)), ((3, 48, 5), (1,)), ((2, 144, 3), (0, 1)), ((2, 5, 32), (2,))]),
    exponent=st.integers(-20, 20),
    zeros=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_a_weight_is_rounded_by_at_most_half_a_step(kind, layout, exponent, zeros, seed):
    shape, inputs = layout
    weight = np.random.default_rng(seed).normal(size=shape).astype(np.float32) * np.float32(2.0**exponent)
    weight[(0,) * len(shape)] *= 0 if zeros else 1
    weight[..., 0] *= 0 if zeros else 1
    stored = quantize(weight, kind, inputs)
    assert stored["scale"].dtype == np.float32 and stored["scale"].ndim == weight.ndim
    found = restored(stored, kind, inputs)
    largest = np.abs(weight).max()
    assert np.abs(found - weight).max() <= largest * (0.32 if kind == "int4" else 0.501 / STEPS[kind])  # int4 may cut
    # bfloat16 has 8 bits: enough for the values of int4 and float8, one too few for those of int8.
    again = quantize(found if kind == "int8" else found.astype(ml_dtypes.bfloat16), kind, inputs)
    np.testing.assert_allclose(restored(again, kind, inputs), found, rtol=1e-5 if kind == "int8" else 0.008)


@pytest.mark.parametrize("kind", KINDS)
def test_numpy_and_jax_agree(kind):
    weight = np.random.default_rng(0).normal(size=(2, 32, 5)).astype(np.float32)
    stored, by_jax = quantize(weight, kind, (1,)), quantize(jnp.asarray(weight), kind, (1,))
    np.testing.assert_allclose(by_jax["scale"], stored["scale"], rtol=1e-6)
    by_numpy = {name: jnp.asarray(array) for name, array in stored.items()}
    for found in (by_jax, by_numpy):
        whole = dequantize(Quantized(found[kind], found["scale"], kind, -2), jnp.float32)
        # Where the scale differs by its last bit, so may what lies half-way between two values.
        close = np.isclose(whole, restored(stored, kind, (1,)), rtol=1e-5)
        assert close.all() if found is by_numpy else close.mean() > 0.95


def test_scales_are_one_per_output_or_per_group_of_inputs():
    heads = np.ones((4, 256, 6), np.float32)  # an output projection: heads and their widths are its inputs
    assert quantize(heads, "int8", (0, 1))["scale"].shape == (1, 1, 6)
    assert quantize(heads, "int4", (0, 1))["scale"].shape == (4, 2, 6)
    assert quantize(heads, "int4", (2 - 1,))["int4"].shape == (4, 128, 6)
    assert [group_size(size) for size in (4096, 192, 10944, 4304, 72)] == [128, 64, 64, 16, None]


def test_bfloat16_weights_are_rounded_as_they_are():
    weight = np.random.default_rng(0).normal(size=(64, 8)).astype(ml_dtypes.bfloat16)
    for name, array in quantize(weight, "int8", (0,)).items():
        np.testing.assert_array_equal(array, quantize(weight.astype(np.float32), "int8", (0,))[name])


def test_products_are_quantized_and_nothing_else(config):
    kinds = {path_name(path): kind for path, kind in quantized_weights(config, Quantization("int4")).items()}
    every = {path_name(path) for path in abstract_leaves(config)}
    plain = every - kinds.keys()
    assert all(any(part in path for part in ("proj", "mlp", "attn", "projector/layers")) for path in kinds)
    for part in ("router", "norm", "embed", "lm_head", "bias", "attn_pool", "image_newline", "view_seperator"):
        assert not any(part in path for path in kinds) and any(part in path for path in plain), part
    assert not any("proj" in path and "attn_pool" not in path for path in plain if not path.endswith("bias"))
    assert {kind for path, kind in kinds.items() if "experts" in path} == {"int4"}
    assert {kind for path, kind in kinds.items() if "experts" not in path} == {"int8"}


def test_bytes_of_the_released_sizes(config):
    def size(kind):
        leaves = leaves_of(config, quantized_weights(config, kind and Quantization(kind)))
        quantized = sum(np.prod(s) * dtype.itemsize for s, dtype in leaves.values() if dtype is not None)
        return quantized, quantized + sum(2 * np.prod(s) for s, dtype in leaves.values() if dtype is None)

    _, whole = size(None)
    for kind, ratio in (("int8", 0.52), ("float8", 0.52), ("int4", 0.31 if config.language.use_mla is False else 0.29)):
        quantized, total = size(kind)
        plain = whole - (total - quantized)  # what the quantized ones take in bfloat16
        assert quantized <= ratio * plain


def test_rules_choose_and_what_they_cannot_mean_is_an_error(config):
    kinds = quantized_weights(config, quantization_of("int8", ["self_attn|vision|projector=keep", "lm_head=float8"]))
    assert {path[2] for path in kinds if path[0] == "language" and len(path) > 3} == {"mlp"}
    assert kinds["language", "lm_head", "kernel"] == "float8" and not any(path[0] == "vision" for path in kinds)
    every = quantized_weights(config, quantization_of("int4", [".=int4"]))
    assert len(every) == len(weight_inputs(config)) and list(every.values()).count("int4") > len(every) - 40
    for rule, message in (("nothing=keep", "no weight"), (".=keep", "leaves no weight")):
        with pytest.raises(UsageError, match=message):
            quantized_weights(config, quantization_of("int8", [rule]))
    for rule, message in (("(=keep", "regular expression"), ("head", "after the ="), ("head=int5", "after the =")):
        with pytest.raises(UsageError, match=message):
            quantization_of("int8", [rule])
    with pytest.raises(UsageError, match=r"int5.*did you mean int"):
        quantization_of("int5")
    with pytest.raises(UsageError, match="--rule"):
        quantization_of(None, ["head=keep"])
    assert quantization_of(None) is None
    given = quantization_of("int4", ["self_attn=int4"])
    assert Quantization.of(given.described()) == given


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sizes", [{"data": 2, "tensor": 2, "expert": 2}, {"data": 1, "tensor": 1, "expert": 8}])
@pytest.mark.parametrize("fsdp", [False, True])
def test_a_devices_scales_are_those_of_its_values(config, kind, sizes, fsdp):
    kinds = quantized_weights(config, Quantization(kind))
    leaves = {path: shape for path, (shape, _) in leaves_of(config, kinds).items()}
    specs = stored_specs(config, sizes, leaves, fsdp=fsdp)

    def parts(entry):
        return int(np.prod([sizes[name] for name in ((entry,) if isinstance(entry, str) else entry or ())]))

    for path, name in kinds.items():
        values, scale = (*path, name), (*path, "scale")
        for axis, (size, scales) in enumerate(zip(leaves[values], leaves[scale], strict=True)):
            cut = parts(specs[values][axis])
            assert size % cut == 0 and scales % parts(specs[scale][axis]) == 0
            assert scales == 1 or parts(specs[scale][axis]) == cut
            if scales == 1 and cut > 1:  # one scale for all of the axis, none of whose groups is cut
                assert name != "int4"


def test_arrays_that_do_not_belong_together_are_named(config):
    kinds = quantized_weights(config, Quantization("int8"))
    leaves = {path: (shape, dtype or np.dtype(np.float32)) for path, (shape, dtype) in leaves_of(config, kinds).items()}
    assert mismatches(config, leaves) == []
    path = next(iter(kinds))
    wrong = leaves | {(*path, "scale"): ((3,), np.dtype(np.float32)), (*path, "int8"): ((3,), np.dtype(np.uint8))}
    assert any("expected" in problem for problem in mismatches(config, wrong))
    without = {p: entry for p, entry in leaves.items() if p != (*path, "scale")}
    assert any("missing" in problem for problem in mismatches(config, without))
    router = next(p for p in leaves if p[-2:] == ("router", "kernel"))
    odd = {p: entry for p, entry in leaves.items() if p != router}
    odd |= {(*router, "int8"): leaves[router], (*router, "scale"): leaves[router]}
    assert any("unexpected" in problem and "router" in problem for problem in mismatches(config, odd))
