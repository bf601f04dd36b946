"""Weights kept quantized or with adapters, against plain ones: of products, and of a whole model."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsvl2_jax.kernels.quantized import Quantized, dequantize, pack_int4, unpack_int4
from dsvl2_jax.model.layers import einsum_weight, grouped, linear
from dsvl2_jax.model.weights import Adapted, are_plain, for_rows, merged, own_dropout, taken_rows, weight_of


def normal(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


def close(found: jax.Array, expected: jax.Array) -> None:
    np.testing.assert_allclose(found, expected, atol=2e-5 * float(jnp.abs(expected).max()))


def quantized(kind: str, *shape: int, axis: int, groups: int = 1) -> dict[str, jax.Array]:
    """A random weight as it is stored."""
    axis %= len(shape)
    scale_shape = [size if i != axis else groups for i, size in enumerate(shape)]
    scale = jnp.abs(normal(1, *scale_shape)) + 0.1
    if kind == "int4":
        values = pack_int4(jax.random.randint(jax.random.key(0), shape, -8, 8), groups, axis)
    elif kind == "int8":
        values = jax.random.randint(jax.random.key(0), shape, -127, 128).astype(jnp.int8)
    else:
        values = normal(0, *shape).astype(jnp.float8_e4m3fn)
    return {kind: values, "scale": scale}


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_int4_packs_and_unpacks(axis):
    values = jax.random.randint(jax.random.key(0), (16, 32, 8), -8, 8).astype(jnp.int8)
    packed = pack_int4(values, 2, axis)
    assert packed.dtype == jnp.uint8 and packed.size * 2 == values.size
    np.testing.assert_array_equal(unpack_int4(packed, 2, axis), values)
    np.testing.assert_array_equal(packed, pack_int4(np.asarray(values), 2, axis))


@pytest.mark.parametrize(("kind", "groups"), [("int8", 1), ("int4", 2), ("float8", 1)])
def test_products_with_quantized_weights_equal_those_with_plain_ones(kind, groups):
    stored = quantized(kind, 3, 16, 8, axis=1, groups=groups)
    weight = weight_of(stored, -2)
    assert weight.shape == (3, 16, 8)
    rows, sizes = normal(5, 7, 16), jnp.array([2, 0, 5])
    close(grouped(rows, weight, sizes), grouped(rows, dequantize(weight, jnp.float32), sizes))

    output = weight_of(quantized(kind, 4, 16, 8, axis=1, groups=groups), -2)
    x = normal(6, 2, 3, 4, 16)
    close(linear(x, output, dtype=jnp.float32, contract=2), jnp.einsum("bthd,hdm->btm", x, dequantize(output, x.dtype)))

    latent = weight_of(quantized(kind, 4, 6, 16, axis=-1, groups=groups), -1)
    found = einsum_weight("bsr,hnr->bshn", rows[None], latent, dtype=jnp.float32, rows=slice(2))
    close(found, jnp.einsum("bsr,hnr->bshn", rows[None], dequantize(latent, jnp.float32)[:, :2]))


def stored_adapter(*, lead=(), inputs=(16,), outputs=(4, 8), rank=3, seed=0, gain=False, input_last=False):
    base_shape = (*lead, *outputs, *inputs) if input_last else (*lead, *inputs, *outputs)
    stored = {
        "base": normal(seed, *base_shape),
        "lora_a": normal(seed + 1, *lead, *inputs, rank),
        "lora_b": normal(seed + 2, *lead, rank, *outputs),
    }
    return stored | ({"gain": normal(seed + 3, *lead, *outputs)} if gain else {})


@pytest.mark.parametrize("gain", [False, True])
def test_products_with_an_adapter_equal_those_with_the_merged_weight(gain):
    x = normal(9, 2, 5, 16)
    weight = weight_of(stored_adapter(gain=gain), -3)
    close(linear(x, weight, dtype=jnp.float32), jnp.einsum("btd,dhe->bthe", x, merged(weight, -3)))

    weight = weight_of(stored_adapter(lead=(3,), outputs=(8,), gain=gain), -2)
    sizes = jnp.array([4, 0, 5])
    close(grouped(x[0], weight, sizes - sizes // 2), grouped(x[0], merged(weight, -2), sizes - sizes // 2))

    weight = weight_of(stored_adapter(gain=gain, input_last=True), -1)
    whole, part = merged(weight, -1), slice(3, None)
    found = einsum_weight("bsr,hnr->bshn", x, weight, dtype=jnp.float32, rows=part)
    close(found, jnp.einsum("bsr,hnr->bshn", x, whole[:, part]))
    queries = normal(10, 2, 5, 4, 5)
    found = einsum_weight("bthn,hnr->bthr", queries, weight, dtype=jnp.float32, rows=part)
    close(found, jnp.einsum("bthn,hnr->bthr", queries, whole[:, part]))


def side_by_side(stored: list[dict[str, jax.Array]]) -> dict[str, jax.Array]:
    """Adapters of one base as one weight."""
    lead = stored[0]["lora_a"].ndim + stored[0]["lora_b"].ndim - 2 - stored[0]["base"].ndim
    return {
        "base": stored[0]["base"],
        "lora_a": jnp.concatenate([s["lora_a"] for s in stored], axis=-1),
        "lora_b": jnp.concatenate([s["lora_b"] for s in stored], axis=lead),
        "owner": jnp.repeat(jnp.arange(len(stored)), jnp.array([s["lora_a"].shape[-1] for s in stored])),
    }


def test_every_row_gets_its_own_adapter_whatever_the_others_are():
    adapters = [stored_adapter(rank=rank, seed=10 * i) for i, rank in enumerate((2, 4, 3))]
    both = for_rows({"kernel": side_by_side(adapters)}, jnp.array([2, -1, 0]))["kernel"]
    x = normal(9, 3, 5, 16)
    found = linear(x, weight_of(both, -3), dtype=jnp.float32)
    base = adapters[0]["base"]
    for row, adapter in enumerate([adapters[2], None, adapters[0]]):
        expected = base if adapter is None else merged(Adapted(base, adapter["lora_a"], adapter["lora_b"]), -3)
        close(found[row], jnp.einsum("td,dhe->the", x[row], expected))
    others = for_rows({"kernel": side_by_side(adapters)}, jnp.array([2, 1, 1]))["kernel"]
    np.testing.assert_array_equal(linear(x, weight_of(others, -3), dtype=jnp.float32)[0], found[0])


def test_grouped_rows_take_their_adapters_with_them():
    adapters = [stored_adapter(lead=(3,), outputs=(8,), rank=2, seed=10 * i) for i in range(2)]
    weight = weight_of(for_rows({"w": side_by_side(adapters)}, jnp.array([1, 0]))["w"], -2)
    rows, sizes, index = normal(4, 6, 16), jnp.array([2, 3, 1]), jnp.array([0, 1, 1, 0, 0, 1])
    found = grouped(rows, taken_rows(weight, index), sizes)
    for which in (0, 1):
        one = merged(Adapted(adapters[0]["base"], adapters[which]["lora_a"], adapters[which]["lora_b"]), -2)
        mine = np.flatnonzero(np.array([1, 0])[np.array(index)] == which)
        close(found[mine], grouped(rows, one, sizes)[mine])


def test_dora_in_training_divides_by_the_norm_of_the_whole_weight():
    stored = stored_adapter() | {"magnitude": jnp.abs(normal(7, 4, 8))}
    weight = weight_of(stored, -3)
    whole = merged(dataclasses.replace(weight, gain=None), -3)
    expected = whole * stored["magnitude"] / jnp.linalg.norm(whole, axis=0)
    close(merged(weight, -3), expected)


def test_parameters_with_a_dict_in_a_weights_place_are_not_plain():
    assert are_plain({"q_proj": {"kernel": normal(0, 2, 2)}})
    assert not are_plain({"q_proj": {"kernel": quantized("int8", 4, 4, axis=0)}})
    assert isinstance(weight_of(quantized("int8", 4, 4, axis=0), -2), Quantized)


def test_dropout_reaches_the_adapter_and_what_the_gain_changes():
    """As `peft` computes DoRA: base(x) + (gain − 1) · base(dropped x) + gain · B(A(dropped x))."""
    x = normal(9, 2, 5, 16)
    key = jax.random.key_data(jax.random.key(1))
    for gain in (False, True):
        stored = stored_adapter(gain=gain) | {"dropout_rate": jnp.float32(0.3), "dropout_key": key}
        weight = weight_of(stored, -3)
        dropped = weight.dropped(x)
        assert 0.2 < float((dropped == 0).mean()) < 0.4
        added = jnp.einsum("btd,dr,rhe->bthe", dropped, weight.lora_a, weight.lora_b)
        expected = jnp.einsum("btd,dhe->bthe", x, weight.base) + added
        if gain:
            changed = jnp.einsum("btd,dhe->bthe", dropped, weight.base)
            expected += (weight.gain - 1) * (changed + added)
        close(linear(x, weight, dtype=jnp.float32), expected)
        other = own_dropout(weight, 1)
        assert (other.dropped(x) != dropped).any()
