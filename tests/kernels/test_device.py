"""The kernels on the device that the tests run on, called as the model calls them, against float32 references.

Here on the CPU, in small. `make test-gpu` runs them on a GPU, at the released models' shapes too, together with the
golden logits, tokens and gradients: DSVL2_TEST_PLATFORM=cuda takes the whole suite there.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from dsvl2_jax.apps.bench.model_kernels import attention, decoding, grouped
from dsvl2_jax.apps.plan.command import config_of

# ‖Δ‖/‖reference‖: rounding of the inputs' products' sums, and for bfloat16 that of the results and probabilities.
MOST = {"float32": 1e-5, "bfloat16": 5e-3}

released = pytest.mark.skipif(jax.default_backend() == "cpu", reason="the released shapes need a GPU: make test-gpu")


def close(kernels, dtype: str) -> None:
    kernels = list(kernels)
    assert kernels and all(kernel.error <= MOST[dtype] for kernel in kernels), {k.name: k.error for k in kernels}


@pytest.mark.parametrize("dtype", MOST)
@pytest.mark.parametrize(
    ("rows", "inner", "width", "groups"),
    [
        (96, 48, 80, 8),  # widths that blocks do not divide
        pytest.param(24576, 1280, 896, 64, marks=released),
        pytest.param(24576, 2048, 1408, 64, marks=released),
        pytest.param(384, 2560, 1536, 72, marks=released),
        pytest.param(6, 2048, 1408, 64, marks=released),
        pytest.param(1000, 896, 1280, 64, marks=released),
    ],
)
def test_grouped_products_and_their_gradients(rows, inner, width, groups, dtype):
    close(grouped(rows, inner, width, groups, jnp.dtype(dtype), backward=True), dtype)


@pytest.mark.parametrize("dtype", MOST)
@pytest.mark.parametrize(
    ("batch", "length", "heads", "key", "value", "causal"),
    [
        (2, 130, 2, 24, 16, True),  # a length that blocks do not divide
        (2, 81, 2, 24, 24, False),
        pytest.param(1, 4096, 16, 192, 128, True, marks=released),
        pytest.param(2, 1000, 16, 192, 128, True, marks=released),
        pytest.param(1, 4096, 10, 128, 128, True, marks=released),
        pytest.param(10, 729, 16, 72, 72, False, marks=released),
    ],
)
def test_attention_and_its_gradients(batch, length, heads, key, value, causal, dtype):
    close(attention(batch, length, heads, key, value, jnp.dtype(dtype), causal=causal), dtype)


@pytest.mark.parametrize("dtype", MOST)
@pytest.mark.parametrize(
    ("name", "slots", "context"),
    [
        ("micro", 3, 100),
        *(pytest.param(name, slots, 1024, marks=released) for name in ("tiny", "small", "base") for slots in (1, 64)),
    ],
)
def test_a_decode_steps_attention(name, slots, context, dtype):
    config = config_of(name)
    language = dataclasses.replace(config.language, num_hidden_layers=1)
    close([decoding(dataclasses.replace(config, language=language), slots, context, jnp.dtype(dtype))], dtype)
