"""What our Mosaic GPU kernels have in common (tested with them, in tests/kernels/test_hopper.py)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from dsvl2_jax.runtime.lazy import LazyModule

# Only what traces these kernels needs them.
pl = LazyModule("jax.experimental.pallas")
plgpu = LazyModule("jax.experimental.pallas.mosaic_gpu")

H100_MULTIPROCESSORS = 132


def compiler_params() -> Any:
    """Of every kernel here."""
    return plgpu.CompilerParams(approx_math=True)


def multiprocessors() -> int:
    """Of the GPU that is here; of an H100 where none is."""
    return getattr(jax.local_devices()[0], "core_count", H100_MULTIPROCESSORS)


def shared_tile(shape: tuple[int, ...], dtype: Any) -> Any:
    """Shared memory […, rows, columns] that a product takes: in core matrices of 8 rows, swizzled against conflicts."""
    columns = shape[-1] * jnp.dtype(dtype).itemsize
    swizzle = next(size for size in (128, 64, 32) if columns % size == 0)
    transforms = plgpu.TilingTransform((8, swizzle // jnp.dtype(dtype).itemsize)), plgpu.SwizzleTransform(swizzle)
    return plgpu.SMEM(shape, dtype, transforms=transforms)


def cost_scope(flops: float) -> Any:
    """A scope whose name, in the compiled program, says what the kernel in it costs: Mosaic GPU keeps no metadata."""
    return jax.named_scope(f"flops={flops:.0f}")


@dataclasses.dataclass(frozen=True)
class Ring:
    """Buffers in shared memory that one warpgroup fills and others read, in turn.

    Attributes:
      loaded: a barrier of each buffer, complete when it has been filled.
      used: a barrier of each buffer, complete when all readers are done with it.
      stages: how many buffers there are.
    """

    loaded: Any
    used: Any
    stages: int

    def slot(self, count: jax.Array) -> jax.Array:
        return lax.rem(count, jnp.int32(self.stages))

    def acquire(self, count: jax.Array) -> jax.Array:
        """The buffer for the ``count``-th filling, when it may be filled."""
        slot = self.slot(count)
        pl.when(count >= self.stages)(lambda: plgpu.barrier_wait(self.used.at[slot]))
        return slot

    def wait(self, count: jax.Array) -> jax.Array:
        """The buffer of the ``count``-th filling, when it has been filled."""
        slot = self.slot(count)
        plgpu.barrier_wait(self.loaded.at[slot])
        return slot

    def release(self, count: jax.Array) -> None:
        """This reader is done with the ``count``-th filling."""
        plgpu.barrier_arrive(self.used.at[self.slot(count)])

    def drain(self, count: jax.Array) -> None:
        """Waits, after ``count`` fillings, until all are read."""

        def wait(i: jax.Array, _: None) -> None:
            plgpu.barrier_wait(self.used.at[self.slot(i)])

        lax.fori_loop(jnp.maximum(count - self.stages, 0), count, wait, None)


# What names a layout in registers: Pallas interprets neither it nor transposed operands of a product on CPUs, so that
# tests put plain functions in place of these.


def product(
    a: Any, b: Any, acc: jax.Array | None = None, *, transposed: bool = False, meanwhile: Any = None
) -> jax.Array:
    """f32[M, N]: ``acc`` (zeros without it) + a · b, or a · bᵀ when ``transposed``.

    Args:
      a: [M, K], a reference to shared memory or an array. b: a reference, [K, N] or, transposed, [N, K].
      meanwhile: is called when the product has been issued, before its result is awaited.
    """
    b = plgpu.transpose_ref(b, (1, 0)) if transposed else b

    def issue(acc_ref: Any) -> None:
        plgpu.wgmma(acc_ref, a, b)
        if meanwhile is not None:
            meanwhile()

    if acc is not None:
        return pl.run_state(issue)(plgpu.ACC.init(acc))

    def scope(acc_ref: Any) -> jax.Array:
        issue(acc_ref)
        return acc_ref[...]

    return pl.run_scoped(scope, plgpu.ACC((a.shape[0], b.shape[1]), jnp.float32))


def accumulate(
    count: jax.Array,
    operands: Callable[[jax.Array], tuple[Any, Any]],
    done: Callable[[jax.Array], None],
    shape: tuple[int, int],
    *,
    a_transposed: bool = False,
    b_transposed: bool = False,
) -> jax.Array:
    """f32[M, N], the sum of ``count`` products; one is issued while the one before it runs.

    Args:
      operands: the references of the i-th product, [M, K] and [K, N], or transposed as they lie.
      done: is called with i when nothing reads the operands of the i-th product any more.
      shape: (M, N).
    """

    def scope(acc_ref: Any) -> jax.Array:
        def step(i: jax.Array, _: None) -> None:
            a, b = operands(i)
            a = plgpu.transpose_ref(a, (1, 0)) if a_transposed else a
            plgpu.wgmma(acc_ref, a, plgpu.transpose_ref(b, (1, 0)) if b_transposed else b)
            plgpu.wgmma_wait(1)
            pl.when(i > 0)(lambda: done(i - 1))

        lax.fori_loop(0, count, step, None)
        return acc_ref[...]

    acc = pl.run_scoped(scope, plgpu.ACC(shape, jnp.float32))
    pl.when(count > 0)(lambda: done(count - 1))
    return acc


def clear_rows(ref: Any, first: jax.Array) -> None:
    """Sets rows from ``first`` on of a tile in shared memory to zero, for products that follow."""
    tile = plgpu.load(ref, (), layout=plgpu.Layout.WGMMA, optimized=False)
    ref[...] = jnp.where(iota(ref.shape, 0) < first, tile, jnp.zeros_like(tile))
    plgpu.commit_smem()


def zeros(shape: tuple[int, int]) -> jax.Array:
    """f32 zeros, laid out as products are."""
    return plgpu.layout_cast(jnp.zeros(shape, jnp.float32), plgpu.Layout.WGMMA)


def row_vector(size: int) -> jax.Array:
    """f32[size] zeros, laid out as the reduced rows of a product are."""
    return plgpu.layout_cast(jnp.zeros(size, jnp.float32), plgpu.Layout.WGMMA.reduce(1))


def iota(shape: tuple[int, int], dimension: int) -> jax.Array:
    """i32, the index along a dimension, laid out as products are."""
    return plgpu.broadcasted_iota(jnp.int32, shape, dimension, layout=plgpu.Layout.WGMMA)


def load_rows(ref: Any) -> jax.Array:
    """A vector in shared memory, one entry a row of a product."""
    return plgpu.load(ref, (), layout=plgpu.Layout.WGMMA.reduce(1))


def beside(rows: jax.Array, columns: int) -> jax.Array:
    """[M] → [M, columns], the same in each column."""
    return lax.broadcast_in_dim(rows, (rows.shape[0], columns), [0])
