"""What a device reaches at most in the run that measures it: a dense product, and a copy.

Tested in tests/apps/bench/test_model.py.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from dsvl2_jax.kernels.precision import matmul_precision

SERIES = 5
LEAST_SECONDS = 0.05  # of a series
SMALL_PRODUCT = 2048  # on a CPU
LONG_SECONDS = 1.0  # a run that takes so long is a series of its own, and three series will do


@dataclasses.dataclass(frozen=True)
class Speeds:
    """FLOP/s of products, and bytes/s through memory."""

    flops: float
    bandwidth: float

    def seconds(self, flops: float, moved: float) -> float:
        """The least that so many FLOPs and bytes take."""
        return max(flops / self.flops, moved / self.bandwidth)


def median_seconds(function: Callable[..., Any], *arrays: Any) -> float:
    """Seconds of a call of a jitted function: the median of several series, without the first call."""
    jax.block_until_ready(function(*arrays))

    def series(runs: int) -> float:
        begun = time.perf_counter()
        for _ in range(runs):
            out = function(*arrays)
        jax.block_until_ready(out)
        return (time.perf_counter() - begun) / runs

    runs = runs_of(series(1))
    return statistics.median(series(runs) for _ in range(SERIES))


def runs_of(seconds: float) -> int:
    """How many runs a series has, of something that takes so long."""
    return max(1, min(100, round(LEAST_SECONDS / max(seconds, 1e-9))))


def ceilings(dtype: Any) -> Speeds:
    """Of the first device: a square product in the model's precision, and a copy that changes every number."""
    small = jax.devices()[0].platform == "cpu"
    width, count = (SMALL_PRODUCT, 2**26) if small else (8192, 2**30)
    x, y = (jax.random.uniform(jax.random.key(i, impl="rbg"), (width, width), dtype, -1, 1) for i in range(2))
    product = jax.jit(lambda x, y: jnp.dot(x, y, precision=matmul_precision(dtype)))
    flops = 2 * width**3 / median_seconds(product, x, y)
    z = jnp.ones(count, dtype)
    moved = 2 * z.nbytes
    # In place: fresh memory would be given by the system page by page, which no program of the engine waits for.
    change = jax.jit(lambda z: z + jnp.ones((), dtype), donate_argnums=0)

    def call() -> jax.Array:
        nonlocal z
        z = change(z)
        return z

    return Speeds(flops, moved / median_seconds(call))
