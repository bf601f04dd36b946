"""What our Triton kernels have in common (tested with them, in tests/kernels/test_gpu.py)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TypeVar

import jax

from dsvl2_jax.kernels.block_sizes import SHARED_MEMORY, TritonAttention, TritonProduct

T = TypeVar("T", TritonAttention, TritonProduct)


def cost_metadata(
    flops: float, moved: Sequence[jax.Array | jax.ShapeDtypeStruct] = (), more_bytes: float = 0.0
) -> dict[str, str]:
    """What a kernel's call carries for those who read the compiled program: XLA keeps no cost of Triton kernels.

    Args:
      moved: arrays that it reads or writes whole; with none of them and no ``more_bytes``, all operands and results.
      more_bytes: that it reads or writes besides.
    """
    declared = {"flops": f"{flops:.0f}"}
    if moved or more_bytes:
        total = sum(array.size * array.dtype.itemsize for array in moved) + more_bytes
        declared["bytes_accessed"] = f"{total:.0f}"
    return declared


def fits_shared_memory(blocks: object, taken: int) -> None:
    """Raises ValueError for block sizes that take more shared memory than a block may have (see `_limit`)."""
    if taken > _limit():
        raise ValueError(f"{blocks} takes {taken} bytes of shared memory; a block may have {_limit()}.")


def fewer_stages(blocks: T, taken: Callable[[T], int]) -> T:
    """Block sizes with as many of their stages as fit: GPUs other than an H100 have less shared memory."""
    while blocks.stages > 1 and taken(blocks) > _limit():
        blocks = dataclasses.replace(blocks, stages=blocks.stages - 1)
    return blocks


def _limit() -> int:
    """Bytes of shared memory that a block may have on the GPU that is here; on an H100 where none is."""
    return getattr(jax.local_devices()[0], "shared_memory_per_block_optin", SHARED_MEMORY)


def fits_int32(*arrays: jax.Array) -> bool:
    """Whether the kernels reach all of the arrays: their offsets have 32 bits."""
    return all(array.size < 2**31 for array in arrays)
