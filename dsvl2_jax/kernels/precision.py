"""The accuracy of matrix products (tested by every comparison of float32 results)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike


def matmul_precision(dtype: DTypeLike) -> lax.Precision:
    """float32 products keep float32 accuracy; TPUs and GPUs would otherwise round the operands."""
    return lax.Precision.HIGHEST if jnp.dtype(dtype) == jnp.float32 else lax.Precision.DEFAULT


def product_in_float32(subscripts: str, x: jax.Array, y: jax.Array) -> jax.Array:
    """``jnp.einsum`` of two arrays, summed and returned in float32."""
    return jnp.einsum(subscripts, x, y, precision=matmul_precision(x.dtype), preferred_element_type=jnp.float32)
