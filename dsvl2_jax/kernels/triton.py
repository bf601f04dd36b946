"""What our Triton kernels have in common (tested with them, in tests/kernels/test_gpu.py)."""

from __future__ import annotations

import jax

from dsvl2_jax.kernels.block_sizes import SHARED_MEMORY


def cost_metadata(flops: float) -> dict[str, str]:
    """What a kernel's call carries for those who read the compiled program: XLA keeps no cost of Triton kernels."""
    return {"flops": f"{flops:.0f}"}


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
