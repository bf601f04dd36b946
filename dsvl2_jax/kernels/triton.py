"""What our Triton kernels have in common (tested with them, in tests/kernels/test_gpu.py)."""

from __future__ import annotations

from collections.abc import Sequence

import jax

from dsvl2_jax.kernels.block_sizes import SHARED_MEMORY


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
    """Raises ValueError for block sizes that take more shared memory than a block may have on the GPU that is here.

    Where none is, more than on an H100.
    """
    limit = getattr(jax.local_devices()[0], "shared_memory_per_block_optin", SHARED_MEMORY)
    if taken > limit:
        raise ValueError(f"{blocks} takes {taken} bytes of shared memory; a block may have {limit}.")


def fits_int32(*arrays: jax.Array) -> bool:
    """Whether the kernels reach all of the arrays: their offsets have 32 bits."""
    return all(array.size < 2**31 for array in arrays)
