"""Products of few rows on NVIDIA GPUs, for decode steps: Pallas Triton kernels that read each weight once.

A decode step multiplies a row for each slot with all weights, so that it takes as long as reading them, and beyond that
as long as launching its kernels. Hence one launch does what stands around a product too: the norm before it, SiLU, the
residual after it; weights with the same input share a launch. XLA writes out the products of a single row and a weight
before it adds them.

A norm's factor is applied after the product: the rows times the norm's weight go into it, while their squares are added
up. Quantized weights are converted in registers, where their scales are applied to sums and not to each value.

Tested in tests/model/test_gpu_decode.py; `dsvl2_jax.model.gpu_decode` calls them.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from dsvl2_jax.kernels.precision import matmul_precision
from dsvl2_jax.kernels.quantized import INT4_OFFSET, Quantized
from dsvl2_jax.kernels.triton import cost_metadata
from dsvl2_jax.runtime.lazy import LazyModule

# Only what traces these kernels needs them.
pl = LazyModule("jax.experimental.pallas")
plgpu = LazyModule("jax.experimental.pallas.triton")

MAX_ROWS = 128  # rows of a product here
MIN_ROWS = 16  # the least that a tensor core's product takes
MULTIPROCESSORS = 132  # of an H100: programs that a launch should have at least
STAGE_BYTES = 20 << 10  # of weights and rows that a stage of a program's pipeline holds
PIPELINE_BYTES = 4 * STAGE_BYTES  # of all its stages: what every GPU with bfloat16 has, Ada the least with 99 KB
STAGES = 2, 8  # the fewest and the most of them

# From the first of `step` inputs on: rows [rows, step], or what is stored of a weight, [step, columns].
Load = Callable[[jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True)
class Tile:
    """Columns of a weight inside a kernel, as they are read.

    Attributes:
      load: of what is stored; int4 has two inputs in a row of it.
      kind: None: a plain array, or as `Quantized.kind`.
      scale: number of a group of inputs → f32[columns], its scale.
      groups: of inputs.
    """

    load: Load
    kind: str | None = None
    scale: Callable[[Any], jax.Array] | None = None
    groups: int = 1


def row_count(rows: int) -> int:
    """Rows of a program's product: a power of two that holds so many."""
    return max(MIN_ROWS, 1 << (rows - 1).bit_length())


def column_block(columns: int) -> int:
    """Columns of a program, of so many that a launch makes in all: the most that leave one for each multiprocessor."""
    return next((size for size in (128, 64) if columns >= size * MULTIPROCESSORS), 32)


def depth_step(inner: int, rows: int, columns: int, itemsize: int, weight: Any = None) -> int:
    """Stored rows of a step of a product: a power of two that divides the inputs, so that a stage fits.

    Args:
      weight: if it is int4, a step is of one group of its inputs.
    """
    most = max(MIN_ROWS, min(128, STAGE_BYTES // (itemsize * (rows + columns))))
    if isinstance(weight, Quantized) and weight.kind == "int4":
        inner //= 2 * weight.scale.shape[weight.packed_axis]
    return min(inner & -inner, 1 << most.bit_length() - 1)


def stored_size(weight: Any) -> int:
    """Bytes of an entry of what is stored of a weight."""
    return (weight.values if isinstance(weight, Quantized) else weight).dtype.itemsize


def has_steps(weight: Quantized) -> bool:
    """Whether tensor cores can multiply it a step at a time: whether steps of inputs that they take divide a group."""
    groups = weight.scale.shape[weight.packed_axis]
    inputs = weight.values.shape[weight.packed_axis] // (groups if weight.kind == "int4" else 1)
    return inputs % MIN_ROWS == 0 and (weight.kind == "int4" or groups == 1)


def values_of(stored: jax.Array, kind: str | None, dtype: jnp.dtype) -> list[jax.Array]:
    """Inside a kernel: stored values as numbers of ``dtype``, without scale; of int4 the low ones and the high ones."""
    if kind is None:
        return [stored]
    if kind == "int8":
        return [stored.astype(dtype)]
    if kind == "int4":
        wide = stored.astype(jnp.int32)
        return [(half - INT4_OFFSET).astype(jnp.float32).astype(dtype) for half in (wide & 15, wide >> 4)]
    # By integers, since GPUs before Hopper and Ada cannot convert it: sign, exponent and mantissa at their places in
    # float16, whose exponents count from 8 higher.
    wide = lax.bitcast_convert_type(stored, jnp.int8).astype(jnp.int32) << 7
    half = lax.bitcast_convert_type((wide & 0xBF80).astype(jnp.int16), jnp.float16)
    return [(half.astype(jnp.float32) * 256.0).astype(dtype)]


def compiler_params(*tiles: tuple[int, int, int, int]) -> plgpu.CompilerParams:
    """Warps, and as many stages as fit, of a kernel with loops over such (step, rows, columns, itemsize)."""
    largest = max(step * (rows + columns) * itemsize for step, rows, columns, itemsize in tiles)
    least, most = STAGES
    return plgpu.CompilerParams(num_warps=4, num_stages=max(least, min(most, PIPELINE_BYTES // largest)))


def multiply(
    load_x: Load,
    weights: Sequence[Tile],
    inner: int,
    step: int,
    shape: tuple[int, int],
    *,
    norm: tuple[jax.Array, float] | None = None,
) -> list[jax.Array]:
    """Inside a kernel: rows times each of the weights, which are of one kind.

    Args:
      load_x: as `Load` says.
      weights: a float32 one with bfloat16 rows is multiplied to float32's accuracy.
      inner: inputs.
      step: stored rows of a step, see `depth_step`.
      shape: (rows, columns) of a product.
      norm: reference to the weight [inner] of the RMS norm before the product, and its epsilon.

    Returns:
      f32[rows, columns] for each weight.
    """

    kind, groups = weights[0].kind, weights[0].groups
    parts = 2 if kind == "int4" else 1
    of_part = inner // (groups * parts)  # inputs

    def body(i: jax.Array, carry: tuple[list[jax.Array], jax.Array]) -> tuple[list[jax.Array], jax.Array]:
        accs, squares = carry
        group = i * step // of_part
        xs = []
        for part in range(parts):
            begin = i * step if parts == 1 else i * step + (group + part) * of_part
            x = load_x(begin)  # [rows, step]
            if norm is not None:
                x32 = x.astype(jnp.float32)
                squares += jnp.sum(x32 * x32, axis=1)
                x = (x32 * norm[0][pl.ds(begin, step)].astype(jnp.float32)[None, :]).astype(x.dtype)
            xs.append(x)
        added = []
        for weight in weights:
            values = values_of(weight.load(i * step), kind, xs[0].dtype)
            total = sum(_dot(x, value) for x, value in zip(xs, values, strict=True))
            added.append(total * weight.scale(group)[None, :] if groups > 1 else total)
        return [acc + new for acc, new in zip(accs, added, strict=True)], squares

    first = [jnp.zeros(shape, jnp.float32) for _ in weights], jnp.zeros(shape[:1], jnp.float32)
    accs, squares = lax.fori_loop(0, inner // (parts * step), body, first)
    if kind is not None and groups == 1:
        accs = [acc * weight.scale(0)[None, :] for acc, weight in zip(accs, weights, strict=True)]
    if norm is None:
        return accs
    factor = lax.rsqrt(squares / inner + norm[1])[:, None]
    return [acc * factor for acc in accs]


def _dot(x: jax.Array, w: jax.Array) -> jax.Array:
    """f32[rows, columns]; a float32 weight of bfloat16 rows as three bfloat16 ones, of which it is the sum."""
    if x.dtype == w.dtype or x.dtype == jnp.float32:
        return plgpu.dot(x, w.astype(x.dtype), precision=matmul_precision(x.dtype))
    total = None
    for _ in range(3):
        part = w.astype(x.dtype)
        w = w - part.astype(jnp.float32)
        product = plgpu.dot(x, part)
        total = product if total is None else total + product
    return total


def load_tile(ref, index: tuple, inside: jax.Array | None) -> jax.Array:
    """Part of an array, zero where not ``inside``; None: all of it is."""
    return ref[index] if inside is None else plgpu.load(ref.at[index], mask=inside, other=0)


def tile(
    weight: Any,
    first: jax.Array,
    count: int,
    step: int,
    lead: tuple = (),
    part: tuple[jax.Array, int] = (0, 1),
) -> Tile:
    """Inside a kernel: ``count`` columns from ``first`` on.

    Args:
      weight: reference to [*lead, K, N], or a `Quantized` of references.
      step: stored rows of a step.
      lead: index of the axes before the inputs'.
      part: of how many equal parts of the inputs which one.
    """
    is_quantized = isinstance(weight, Quantized)
    ref = weight.values if is_quantized else weight
    columns, width = pl.ds(first, count), ref.shape[-1]
    mask = column_mask(first, count, width, step)

    number, of = part
    begin = 0 if of == 1 else number * (ref.shape[-2] // of)

    def load(start: jax.Array) -> jax.Array:
        return load_tile(ref, (*lead, pl.ds(begin + start, step), columns), mask)

    if not is_quantized:
        return Tile(load)
    inside = None if mask is None else first + jnp.arange(count) < width
    of_all = weight.scale.shape[-2]
    groups = max(1, of_all // of)

    def scale(group: Any) -> jax.Array:
        at = number * groups + group if of_all > 1 else np.int32(0)
        return load_tile(weight.scale, (*lead, at, columns), inside)

    return Tile(load, weight.kind, scale, groups)


def row_mask(rows: int, size: int, width: int) -> jax.Array | None:
    """bool[size, width], True for the first ``rows``; None: all are."""
    return None if rows == size else jnp.broadcast_to((jnp.arange(size) < rows)[:, None], (size, width))


def column_mask(first: jax.Array, size: int, columns: int, height: int) -> jax.Array | None:
    """bool[height, size], True for those of ``size`` columns from ``first`` on that are below ``columns``."""
    if columns % size == 0:
        return None
    return jnp.broadcast_to((first + jnp.arange(size) < columns)[None, :], (height, size))


def both(a: jax.Array | None, b: jax.Array | None) -> jax.Array | None:
    """True where both masks are."""
    return b if a is None else a if b is None else a & b


@functools.partial(jax.jit, static_argnames=("eps", "interpret"))
def project(
    x_mk: jax.Array,
    weights: Sequence[Any],
    scale_k: jax.Array | None = None,
    residual_mn: jax.Array | None = None,
    *,
    eps: float = 0.0,
    interpret: bool = False,
) -> list[jax.Array]:
    """Multiplies rows by several weights in one launch.

    Args:
      x_mk: [M, K], M up to `MAX_ROWS`, K a multiple of 16.
      weights: each [K, N_i], plain or `Quantized`, or a pair of them: the gate's and the other's of a gated MLP.
      scale_k: [K], weight of an RMS norm of the rows; None: there is none.
      residual_mn: [M, N], added to the one product; None: nothing is.
      eps: of the norm.
      interpret: run on the CPU, for tests.

    Returns:
      [M, N_i] for each weight, SiLU(gate) · other for a pair: in the dtype of ``x_mk``, float32 for a float32 weight.
    """
    weights = [w if isinstance(w, tuple) else (w,) for w in weights]
    (m, inner), rows = x_mk.shape, row_count(x_mk.shape[0])
    widths = [w[0].shape[1] for w in weights]
    block = column_block(sum(widths))
    counts = [pl.cdiv(width, block) for width in widths]
    # A plain float32 weight is the router's.
    dtypes = [jnp.float32 if getattr(w[0], "dtype", None) == jnp.float32 else x_mk.dtype for w in weights]
    flat, form = jax.tree.flatten(weights)

    def sizes(pair: tuple[Any, ...]) -> tuple[int, int, int, int]:
        shape = rows, block * len(pair), max(stored_size(w) for w in pair)
        return depth_step(inner, *shape, pair[0]), *shape

    extras = [a for a in (scale_k, residual_mn) if a is not None]

    def kernel(x_ref, *refs):
        w_refs, refs = refs[: len(flat)], refs[len(flat) :]
        (scale_ref, *refs) = refs if scale_k is not None else (None, *refs)
        (residual_ref, *outs) = refs if residual_mn is not None else (None, *refs)
        program, first = pl.program_id(0), 0

        def load_x(step: int) -> Load:
            mask = row_mask(m, rows, step)
            return lambda start: load_tile(x_ref, (pl.ds(0, rows), pl.ds(start, step)), mask)

        pairs = jax.tree.unflatten(form, w_refs)
        for pair, width, count, out_ref in zip(pairs, widths, counts, outs, strict=True):
            begin = program - first

            @pl.when((begin >= 0) & (begin < count))
            def _(pair=pair, width=width, begin=begin, out_ref=out_ref):
                step = sizes(pair)[0]
                columns = pl.ds(begin * block, block)
                norm = None if scale_ref is None else (scale_ref, eps)
                tiles = [tile(w, begin * block, block, step) for w in pair]
                out, *others = multiply(load_x(step), tiles, inner, step, (rows, block), norm=norm)
                if others:
                    out = out * jax.nn.sigmoid(out) * others[0]
                mask = both(row_mask(m, rows, block), column_mask(begin * block, block, width, rows))
                if residual_ref is not None:
                    out = out + load_tile(residual_ref, (pl.ds(0, rows), columns), mask).astype(jnp.float32)
                plgpu.store(out_ref.at[pl.ds(0, rows), columns], out.astype(out_ref.dtype), mask=mask)

            first += count

    made = [jax.ShapeDtypeStruct((m, width), dtype) for width, dtype in zip(widths, dtypes, strict=True)]
    moved = [x_mk, *flat, *extras, *made]
    return pl.pallas_call(
        kernel,
        grid=(sum(counts),),
        out_shape=made,
        compiler_params=compiler_params(*map(sizes, weights)),
        interpret=interpret,
        metadata=cost_metadata(2.0 * m * sum(math.prod(w.shape) for pair in weights for w in pair), moved),
        name="few_rows",
    )(x_mk, *flat, *extras)
