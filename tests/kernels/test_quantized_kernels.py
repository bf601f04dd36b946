"""The GPU's and the TPU's kernels for quantized weights, interpreted on the CPU, against plain formulas.

They are compiled in tests/apps/plan.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsvl2_jax.kernels import gpu_quantized, tpu_quantized
from dsvl2_jax.kernels.grouped_matmul import _blocked
from dsvl2_jax.kernels.quantized import Quantized, dequantize, quantize
from dsvl2_jax.kernels.quantized_matmul import _plain, _plain_transposed

KINDS = ("int8", "int4", "float8")
SIZES = jnp.array([0, 21, 3, 9], jnp.int32)
ROWS, USED = 40, 33


def normal(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def quantized(kind: str, *shape: int) -> Quantized:
    stored = quantize(normal(0, *shape), kind, (len(shape) - 2,))
    return Quantized(stored[kind], stored["scale"], kind, -2)


def close(found: jax.Array, expected: jax.Array) -> None:
    np.testing.assert_allclose(found, expected, atol=2e-5 * float(jnp.abs(expected).max()))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("platform", [gpu_quantized, tpu_quantized])
def test_grouped_products(platform, kind):
    """Empty groups, rows in no group, and columns that blocks do not divide."""
    weight = quantized(kind, 4, 96, 80)
    x, cotangent = normal(1, ROWS, 96), normal(2, ROWS, 80)
    plain = dequantize(weight, jnp.float32)
    if platform is gpu_quantized:
        assert gpu_quantized.is_supported(x, weight)
        out = gpu_quantized.gmm(x, weight, SIZES, interpret=True)
        turned = gpu_quantized.gmm_transposed(cotangent, weight, SIZES, interpret=True)
    else:
        out = tpu_quantized.gmm(x, (weight,), SIZES, interpret=True)
        turned = tpu_quantized.gmm(cotangent, (weight,), SIZES, transposed=True, interpret=True)
        gated = tpu_quantized.gmm(x, (weight, weight), SIZES, interpret=True)
        expected = _blocked(x, plain, SIZES)
        close(gated, jax.nn.silu(expected) * expected)
    close(out[:USED], _blocked(x, plain, SIZES)[:USED])
    close(turned[:USED], _blocked(cotangent, plain.swapaxes(1, 2), SIZES)[:USED])


@pytest.mark.parametrize("kind", KINDS)
def test_products_in_operations_of_xla(kind):
    stored = quantize(normal(0, 2, 64, 3, 8), kind, (0, 1))
    weight = Quantized(stored[kind], stored["scale"], kind, -3)
    x, cotangent, plain = normal(1, 5, 2, 64), normal(2, 5, 3, 8), dequantize(weight, jnp.float32)
    close(_plain(x, weight, 2), jnp.einsum("mhd,hdef->mef", x, plain))
    close(_plain_transposed(cotangent, weight, 2), jnp.einsum("mef,hdef->mhd", cotangent, plain))
