"""What our Triton kernels have in common (tested with them, in tests/kernels/test_gpu.py)."""

from __future__ import annotations

import jax


def cost_metadata(flops: float) -> dict[str, str]:
    """What a kernel's call carries for those who read the compiled program: XLA keeps no cost of Triton kernels."""
    return {"flops": f"{flops:.0f}"}


def fits_int32(*arrays: jax.Array) -> bool:
    """Whether the kernels reach all of the arrays: their offsets have 32 bits."""
    return all(array.size < 2**31 for array in arrays)
