"""Products that read quantized weights, and their gradients: against plain ones, row by row, and in the program."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsvl2_jax.kernels import quantized_cpu
from dsvl2_jax.kernels.quantized import Quantized, dequantize, quantize
from dsvl2_jax.kernels.quantized_matmul import as_matrices, einsum, grouped_gated, grouped_product, product

KINDS = ("int8", "int4", "float8")


def normal(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def quantized(kind: str, *shape: int, inputs: tuple[int, ...], seed: int = 0) -> Quantized:
    stored = quantize(normal(seed, *shape), kind, inputs)
    return Quantized(stored[kind], stored["scale"], kind, inputs[-1] - len(shape))


def close(found: jax.Array, expected: jax.Array) -> None:
    np.testing.assert_allclose(found, expected, atol=2e-5 * float(jnp.abs(expected).max()))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [1, 3, 7])  # few of them go another way
def test_a_product_and_its_gradient(kind, rows, monkeypatch):
    monkeypatch.setattr(quantized_cpu, "TILE_BYTES", 1 << 13)  # several blocks, of which the last begins early
    weight = quantized(kind, 2, 48, 5, 7, inputs=(0, 1))
    x, cotangent = normal(1, rows, 96), normal(2, rows, 35)
    plain = dequantize(weight, jnp.float32).reshape(96, 35)
    out, pullback = jax.vjp(jax.jit(lambda x: product(x, as_matrices(weight, 2))), x)
    close(out, x @ plain)
    close(pullback(cotangent)[0], cotangent @ plain.T)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [6, 300])
def test_a_grouped_product_and_its_gradient(kind, rows):
    weight = quantized(kind, 4, 32, 24, inputs=(1,))
    sizes = jnp.array([0, rows // 2, 1, rows // 3], jnp.int32)
    group = np.repeat(np.arange(4), sizes)
    x, cotangent = normal(1, rows, 32), normal(2, rows, 24)
    plain, used = dequantize(weight, jnp.float32), len(group)
    out, pullback = jax.vjp(jax.jit(lambda x: grouped_product(x, weight, sizes)), x)
    close(out[:used], jnp.einsum("mk,mkn->mn", x[:used], plain[group]))
    close(pullback(cotangent)[0][:used], jnp.einsum("mn,mkn->mk", cotangent[:used], plain[group]))
    assert not out[used:].any() and not pullback(cotangent)[0][used:].any()
    if rows == 6:
        gated, pullback = jax.vjp(lambda x: grouped_gated(x, weight, weight, sizes), x)
        close(gated, jax.nn.silu(out) * out)
        both = lambda x: jax.nn.silu(grouped_product(x, weight, sizes)) * grouped_product(x, weight, sizes)  # noqa: E731
        close(pullback(cotangent)[0], jax.vjp(both, x)[1](cotangent)[0])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("subscripts", "shape"),
    [("bsr,hnr->bshn", (2, 3, 32)), ("bthn,hnr->bthr", (2, 1, 4, 5)), ("bthr,hnr->bthn", (2, 1, 4, 32))],
)
def test_products_of_heads_and_their_gradients(kind, subscripts, shape, monkeypatch):
    monkeypatch.setattr(quantized_cpu, "TILE_BYTES", 1 << 12)  # two heads at a time
    weight, x, rows = quantized(kind, 4, 8, 32, inputs=(2,)), normal(1, *shape), slice(3, None)
    expected, back = jax.vjp(lambda x: jnp.einsum(subscripts, x, dequantize(weight, jnp.float32)[:, rows]), x)
    found, pullback = jax.vjp(lambda x: einsum(subscripts, rows, x, weight), x)
    close(found, expected)
    close(pullback(expected)[0], back(expected)[0])


def test_every_value_of_float8_is_converted_exactly():
    stored = jnp.arange(256, dtype=jnp.uint8)
    stored = stored[(stored & 127) != 127]  # not a number
    (found,) = quantized_cpu.converted(jax.lax.bitcast_convert_type(stored, jnp.int8), "float8")
    expected = jax.lax.bitcast_convert_type(stored, jnp.float8_e4m3fn).astype(jnp.float32)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [4, 9])
def test_a_row_has_the_same_bits_in_any_company(kind, rows):
    """The columns are a number that no vector divides."""
    weight = as_matrices(quantized(kind, 128, 45, inputs=(0,)), 1)
    call, x = jax.jit(product), normal(1, rows, 128)
    out = np.asarray(call(x, weight))
    for shift in range(1, rows):
        others = jnp.roll(x, shift, axis=0).at[shift - 1].set(jnp.nan)
        np.testing.assert_array_equal(np.asarray(call(others, weight))[shift:], out[: rows - shift])


def float_buffers(text: str, least: int) -> list[str]:
    """Arrays of at least so many floating-point numbers that a program holds, outside of fusions' insides."""
    inside = re.compile(r"^%?fused_computation.*?^}", re.MULTILINE | re.DOTALL)
    found = re.findall(r"= ((?:f32|f16|bf16)\[([\d,]+)\])\S* (?!parameter)", inside.sub("", text))
    return [name for name, sizes in found if math.prod(map(int, sizes.split(","))) >= least]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_no_program_holds_a_converted_weight(kind, dtype, monkeypatch):
    """Beside the arguments, a program takes less than a quarter of what the weight would in float32."""
    monkeypatch.setattr(quantized_cpu, "TILE_BYTES", 1 << 16)
    dense = jax.eval_shape(lambda: as_matrices(quantized(kind, 512, 1024, inputs=(0,)), 1))
    experts = jax.eval_shape(lambda: quantized(kind, 8, 256, 256, inputs=(1,)))
    sizes = jax.ShapeDtypeStruct((8,), jnp.int32)

    def repeated(call: Callable, x: jax.Array, *arguments: jax.Array) -> jax.Array:
        """As a decode group does: nothing is converted once for all steps."""
        step = lambda x: call(x, *arguments)[:, : x.shape[1]]  # noqa: E731
        return jax.lax.while_loop(lambda x: x[0, 0] < 5, step, x)

    for rows in (1, 8):
        for call, width, arguments in ((product, 512, (dense,)), (grouped_product, 256, (experts, sizes))):
            x = jax.ShapeDtypeStruct((rows, width), dtype)
            program = jax.jit(functools.partial(repeated, call)).lower(x, *arguments).compile()
            assert not float_buffers(program.as_text(), 1 << 18), (rows, call)
            assert program.memory_analysis().temp_size_in_bytes < 1 << 19
    heads = jax.eval_shape(lambda: quantized(kind, 16, 64, 512, inputs=(2,)))
    x = jax.ShapeDtypeStruct((1, 1, 16, 32), dtype)
    program = jax.jit(functools.partial(einsum, "bthn,hnr->bthr", slice(32))).lower(x, heads).compile()
    assert program.memory_analysis().temp_size_in_bytes < 1 << 19
