"""Block sizes of the GPU kernels: what a table of measurements chooses from (see `dsvl2_jax.kernels.tuning`).

Each class belongs to one kernel and says how much shared memory a block of it takes; the formulas are what the
compilers ask for (tests/apps/plan/test_gpu_compile.py).
"""

from __future__ import annotations

import dataclasses

SHARED_MEMORY = 227 << 10  # bytes that a block of an H100 may have
BFLOAT16 = 2  # bytes
WARPGROUP_ROWS = 64  # rows of a warpgroup's product on Hopper
CORE_ROWS = 8  # of a core matrix there, in whole ones of which arrays are fetched
HOPPER_STEP = 64  # depth of its step: 128 bytes of bfloat16, the widest swizzle


@dataclasses.dataclass(frozen=True)
class TritonProduct:
    """Of `gpu_grouped_matmul`: a tile [rows, columns] of the result, ``step`` deep at a time."""

    rows: int
    columns: int = 128
    step: int = 64
    warps: int = 8
    stages: int = 4

    def shared_memory(self, itemsize: int = BFLOAT16) -> int:
        return self.stages * self.step * (self.rows + self.columns) * itemsize


@dataclasses.dataclass(frozen=True)
class TritonAttention:
    """Of `gpu_attention`: queries and keys of a block."""

    queries: int = 64
    keys: int = 64
    warps: int = 4
    stages: int = 2

    def shared_memory(self, part: str, key_width: int, value_width: int) -> int:
        """Bytes of a block. ``part``: forward and dq go through keys stage by stage, dkv through queries."""
        row = (key_width + value_width) * BFLOAT16
        if part == "forward":
            return self.queries * key_width * BFLOAT16 + self.stages * self.keys * row
        if part == "dq":
            return (self.queries + self.stages * self.keys) * row
        vectors = 3 * 4 * (self.stages - 1) * self.queries  # first, lse and delta
        return (self.keys + self.stages * self.queries) * row + self.queries * self.keys * BFLOAT16 + vectors


@dataclasses.dataclass(frozen=True)
class HopperProduct:
    """Of `hopper_grouped_matmul`: warpgroups that multiply (64 rows each), columns, and stages of the ring."""

    warpgroups: int = 2
    columns: int = 128
    stages: int = 4

    @property
    def rows(self) -> int:
        return self.warpgroups * WARPGROUP_ROWS

    def shared_memory(self) -> int:
        """Bytes of a block: the ring, the tile that it writes, and some for barriers."""
        ring = self.stages * HOPPER_STEP * (self.rows + self.columns)
        return BFLOAT16 * (ring + self.rows * self.columns) + 1024


@dataclasses.dataclass(frozen=True)
class HopperAttention:
    """Of `hopper_attention`: keys of a block, and stages of the rings of keys and of values."""

    keys: int = 128
    stages: int = 2

    def shared_memory(self, key_width: int, value_width: int) -> int:
        """Bytes of a block: its queries, the rings, and some for vectors and barriers."""
        queries = 2 * WARPGROUP_ROWS * key_width
        return BFLOAT16 * (queries + self.stages * self.keys * (key_width + value_width)) + 2048


Blocks = TritonProduct | TritonAttention | HopperProduct | HopperAttention
# Operation → kernel → its block sizes.
KERNELS: dict[str, dict[str, type]] = {
    "gmm": {"triton": TritonProduct, "hopper": HopperProduct},
    "gmm_transposed": {"triton": TritonProduct, "hopper": HopperProduct},
    "tgmm": {"triton": TritonProduct, "hopper": HopperProduct},
    "attention_forward": {"triton": TritonAttention, "hopper": HopperAttention},
    "attention_dq": {"triton": TritonAttention},
    "attention_dkv": {"triton": TritonAttention},
}


def kernel_of(operation: str, blocks: Blocks) -> str:
    """The name of the kernel that block sizes are of."""
    return next(name for name, sizes in KERNELS[operation].items() if isinstance(blocks, sizes))
