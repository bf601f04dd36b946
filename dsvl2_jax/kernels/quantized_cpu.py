"""Products with quantized weights on CPUs: the packed bytes are read once, and no converted copy of a weight is kept.

XLA's compiler for CPUs converts a product's whole operand before it multiplies: a token's decode would write and read
more bytes than with float32 weights. Two forms avoid that:

- For few rows, a sum of single rows of the weight, each times a number, is one loop over columns: it is vectorised,
  split over threads, and converts bytes in registers. Written as a reduction it goes to a library that takes ten times
  as long. What such sums of sixteen inputs give is added up by a product with ones, which the loop does not absorb.
- For more rows, a block of columns is converted into the processor's cache, and multiplied there.

Letters in array names are those of `dsvl2_jax.kernels.grouped_matmul`, the form of weights is that of
`dsvl2_jax.kernels.quantized_matmul`, which calls these functions. Tested in tests/kernels/test_quantized.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from dsvl2_jax.kernels.cpu import LEAST_ROWS, as_bits, bits_to_slice
from dsvl2_jax.kernels.precision import matmul_precision
from dsvl2_jax.kernels.quantized import INT4_OFFSET, Quantized

FEW_ROWS = 4  # up to so many, bytes are converted anew for each row
# Rows of a sum in one loop, whose factors stay in registers. Of float8 no more than fifteen, or the compiler takes its
# bits out of the loop.
SUMMED = {"int8": 16, "int4": 8, "float8": 8}
TILE_BYTES = 4 << 20  # of a converted block, in the processor's cache


def parts(weight: Quantized) -> int:
    """Values in a byte."""
    return 2 if weight.kind == "int4" else 1


def converted(stored: jax.Array, kind: str, offset: int = INT4_OFFSET) -> list[jax.Array]:
    """What `as_bits` gave of values as float32, without the scale; of int4, each byte's low value and its high one."""
    if kind == "int8":
        return [stored.astype(jnp.float32)]
    if kind == "int4":
        wide = stored.astype(jnp.int32)
        return [(half - offset if offset else half).astype(jnp.float32) for half in (wide & 15, wide >> 4)]
    # Sign, exponent and mantissa at their places in float16, whose exponents count from 8 higher. Processors convert
    # that at once, the numbers below the normal ones too; there is no NaN among a weight's values.
    moved = (stored.astype(jnp.int16) * jnp.int16(1 << 7)) & jnp.int16(0xBF80 - (1 << 16))
    return [lax.bitcast_convert_type(moved, jnp.float16).astype(jnp.float32) * 256.0]


def product(x_mk: jax.Array, weight: Quantized, group: int | jax.Array = 0) -> jax.Array:
    """[M, K] times one of the matrices of a weight, in the dtype of ``x_mk``."""
    return (_few_rows if x_mk.shape[0] <= FEW_ROWS else _by_columns)(x_mk, weight, group)


def _split_inputs(x_mk: jax.Array, weight: Quantized) -> jax.Array:
    """[M, K] → [M, groups of inputs, `parts`, rows of a group's values]."""
    return x_mk.reshape(len(x_mk), weight.scale.shape[1], parts(weight), -1)


def _few_rows(x_mk: jax.Array, weight: Quantized, group: int | jax.Array) -> jax.Array:
    m, (count, stored, n), groups = len(x_mk), weight.values.shape, weight.scale.shape[1]
    height = stored // groups
    summed = math.gcd(height, SUMMED[weight.kind])
    # Tied to the rows, or a decode loop's compiler would convert the weight once, before the loop. It unties what is not
    # used afterwards.
    x_mk, values = lax.optimization_barrier((x_mk, weight.values.reshape(count, groups, -1, summed, n)))
    values = as_bits(values)
    x = _split_inputs(x_mk.astype(jnp.float32), weight)
    x = x.reshape(m, groups, parts(weight), height // summed, summed).transpose(1, 3, 2, 4, 0)[..., None]
    # The offset of int4 is taken off once for a sum, not of every value.
    total = -INT4_OFFSET * x.sum((2, 3)) if weight.kind == "int4" else jnp.zeros((), jnp.float32)
    for row in range(summed):
        # A slice for each row: a slice of the whole matrix would be written out.
        start = (group, 0, 0, row, 0)
        line = lax.dynamic_slice(values, start, (1, *values.shape[1:3], 1, n))[0]  # [groups, sums, 1, N]
        for part, value in enumerate(converted(line, weight.kind, offset=0)):
            total = total + x[:, :, part, row] * value  # [groups, sums, M, N]
    scale = lax.dynamic_index_in_dim(weight.scale, group, keepdims=False).astype(jnp.float32)
    if groups > 1:
        total = total * scale[:, None, None]
    total = total.reshape(-1, m * n)
    out = jnp.dot(jnp.ones((1, len(total))), total, precision=lax.Precision.HIGHEST).reshape(m, n)
    return (out if groups > 1 else out * scale).astype(x_mk.dtype)


def _dot(x_mk: jax.Array, w_kn: jax.Array, transposed: bool = False) -> jax.Array:
    """[M, K] · [K, N], or · [N, K] when ``transposed``, in float32."""
    w_kn = w_kn.astype(x_mk.dtype)
    m = len(x_mk)
    x_mk = jnp.pad(x_mk, ((0, max(0, LEAST_ROWS - m)), (0, 0))) if x_mk.dtype == jnp.bfloat16 else x_mk
    dims = (((1,), (1 if transposed else 0,)), ((), ()))
    out = lax.dot_general(x_mk, w_kn, dims, matmul_precision(x_mk.dtype), preferred_element_type=jnp.float32)
    return out[:m]


def _blocks(length: int, other: int) -> tuple[int, int, Callable[[jax.Array], jax.Array]]:
    """How ``length`` columns of ``other`` values each are cut: (size, count, number of a block → its first column).

    The last block begins early enough to be whole; what two have in common is computed twice. There are several, since
    the compiler takes what a single one converts out of a decode loop.
    """
    most = max(1, min(TILE_BYTES // (4 * other), length // 2))
    size = 1 << (most.bit_length() - 1)
    return size, -(-length // size), lambda i: jnp.minimum(i * size, length - size)


def _by_columns(x_mk: jax.Array, weight: Quantized, group: int | jax.Array) -> jax.Array:
    m, (_, stored, n), groups = len(x_mk), weight.values.shape, weight.scale.shape[1]
    scale, split = weight.scale, _split_inputs(x_mk, weight)
    xs = [split[:, :, part].reshape(m, stored) for part in range(parts(weight))]
    width, count, first = _blocks(n, stored * parts(weight))

    def body(i: jax.Array, out_mn: jax.Array) -> jax.Array:
        start = first(i)
        tile = lax.dynamic_slice(bits_to_slice(weight.values, i), (group, 0, start), (1, stored, width))[0]
        factor = lax.dynamic_slice(scale, (group, 0, start), (1, groups, width))[0].astype(jnp.float32)
        y = jnp.zeros((m, width), jnp.float32)
        for x, value in zip(xs, converted(tile, weight.kind), strict=True):
            if groups > 1:
                value = (value.reshape(groups, -1, width) * factor[:, None]).reshape(stored, width)
            y += _dot(x, value)
        y = y if groups > 1 else y * factor
        return lax.dynamic_update_slice_in_dim(out_mn, y.astype(x_mk.dtype), start, axis=1)

    return lax.fori_loop(0, count, body, jnp.zeros((m, n), x_mk.dtype))


def product_transposed(x_mn: jax.Array, weight: Quantized, group: int | jax.Array = 0) -> jax.Array:
    """[M, N] times the transposed matrix: [M, K], in the dtype of ``x_mn``."""
    m, (_, stored, n), groups = len(x_mn), weight.values.shape, weight.scale.shape[1]
    scale = lax.dynamic_index_in_dim(weight.scale, group, keepdims=False).astype(jnp.float32)  # [groups, N]
    if groups == 1:
        x_mn = (x_mn * scale).astype(x_mn.dtype)
    height, count, first = _blocks(stored, n * parts(weight))

    def body(i: jax.Array, outs: list[jax.Array]) -> list[jax.Array]:
        start = first(i)
        tile = lax.dynamic_slice(bits_to_slice(weight.values, i), (group, start, 0), (1, height, n))[0]
        rows = (start + jnp.arange(height)) * groups // stored  # the group of each
        made = []
        for out, value in zip(outs, converted(tile, weight.kind), strict=True):
            y = _dot(x_mn, value * scale[rows] if groups > 1 else value, transposed=True).astype(out.dtype)
            made.append(lax.dynamic_update_slice_in_dim(out, y, start, axis=1))
        return made

    outs = [jnp.zeros((m, stored), x_mn.dtype) for _ in range(parts(weight))]
    outs = lax.fori_loop(0, count, body, outs)
    return jnp.stack([out.reshape(m, groups, -1) for out in outs], axis=2).reshape(m, -1)


def einsum(subscripts: str, rows: slice, x: jax.Array, weight: Quantized) -> jax.Array:
    """`dsvl2_jax.kernels.quantized_matmul.einsum`: some heads at a time."""
    (x_axes, weight_axes), out_axes = subscripts.split("->")[0].split(","), subscripts.split("->")[1]
    lead, _, inputs = weight_axes
    heads, height, stored = weight.values.shape
    begin, end, _ = rows.indices(height)
    groups, height = weight.scale.shape[2], end - begin
    most = max(1, min(TILE_BYTES // (16 * height * stored * parts(weight)), heads // 2))
    block = math.gcd(heads, 1 << (most.bit_length() - 1))
    is_input = inputs in x_axes
    # The input axis in two: Y the groups and Z what a part has of one.
    names = [axes.replace(inputs, "YZ") for axes in (x_axes, weight_axes, out_axes)]
    if is_input:  # it is the last axis of x
        split = x.reshape(*x.shape[:-1], groups, parts(weight), -1)

    def body(i: jax.Array, out: jax.Array) -> jax.Array:
        first = i * block
        tile = lax.dynamic_slice(bits_to_slice(weight.values, i), (first, begin, 0), (block, height, stored))
        tile = tile.reshape(block, height, groups, -1)
        factor = lax.dynamic_slice(weight.scale, (first, begin, 0), (block, height, groups))[..., None]
        made = []
        for part, value in enumerate(converted(tile, weight.kind)):
            mine = split[..., part, :] if is_input else x
            if lead in x_axes:
                mine = lax.dynamic_slice_in_dim(mine, first, block, axis=x_axes.index(lead))
            value = (value * factor.astype(jnp.float32)).astype(x.dtype)
            made.append(
                jnp.einsum(
                    f"{names[0]},{names[1]}->{names[2]}",
                    mine,
                    value,
                    precision=matmul_precision(x.dtype),
                    preferred_element_type=jnp.float32,
                )
            )
        if is_input:
            y = sum(made)
        else:
            y = jnp.stack(made, axis=-2)
            y = y.reshape(*y.shape[:-3], -1)
        if lead not in out_axes:
            return out + y
        return lax.dynamic_update_slice_in_dim(out, y, first, axis=out_axes.index(lead))

    shapes = (x_axes, x.shape), (weight_axes, (heads, height, weight.shape[2]))
    sizes = {axis: size for axes, shape in shapes for axis, size in zip(axes, shape, strict=True)}
    out = jnp.zeros([sizes[axis] for axis in out_axes], jnp.float32)
    return lax.fori_loop(0, heads // block, body, out).astype(x.dtype)
