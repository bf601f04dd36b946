"""The kernels for Hopper GPUs, interpreted on the CPU with a race detector, against plain formulas.

Pallas interprets their copies, barriers and warpgroups, but neither layouts in registers nor transposed operands: plain
functions stand in for those (`dsvl2_jax.kernels.hopper`). tests/apps/plan/test_gpu_compile.py compiles them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from dsvl2_jax.kernels import hopper, hopper_attention, hopper_grouped_matmul
from dsvl2_jax.kernels.block_sizes import HopperAttention, HopperProduct
from dsvl2_jax.kernels.fused_attention import visible_ranges
from dsvl2_jax.kernels.grouped_matmul import _blocked, _blocked_tgmm

# jax has no public name for it.
interpreter = pytest.importorskip("jax._src.pallas.mosaic_gpu.interpret.params")
gpu_callbacks = pytest.importorskip("jax._src.pallas.mosaic_gpu.interpret.gpu_callbacks")


def _product(a, b, acc=None, *, transposed=False, meanwhile=None):
    a, b = a[...], b[...]
    out = jnp.dot(a, b.T if transposed else b, preferred_element_type=jnp.float32)
    if meanwhile is not None:
        meanwhile()
    return out if acc is None else acc + out


def _accumulate(count, operands, done, shape, *, a_transposed=False, b_transposed=False):
    def step(i, acc):
        a, b = (ref[...] for ref in operands(i))
        a, b = a.T if a_transposed else a, b.T if b_transposed else b
        done(i)
        return acc + jnp.dot(a, b, preferred_element_type=jnp.float32)

    return lax.fori_loop(0, count, step, jnp.zeros(shape, jnp.float32))


def _clear_rows(ref, first):
    tile = ref[...]
    ref[...] = jnp.where(lax.broadcasted_iota(jnp.int32, tile.shape, 0) < first, tile, 0)


@pytest.fixture
def interpreted(monkeypatch):
    """A context in which kernels are interpreted; leaving it, no two warpgroups may have raced."""
    plain = {
        "product": _product,
        "accumulate": _accumulate,
        "clear_rows": _clear_rows,
        "zeros": lambda shape: jnp.zeros(shape, jnp.float32),
        "row_vector": lambda size: jnp.zeros(size, jnp.float32),
        "iota": lambda shape, dimension: lax.broadcasted_iota(jnp.int32, shape, dimension),
        "load_rows": lambda ref: ref[...],
    }
    for name, function in plain.items():
        monkeypatch.setattr(hopper, name, function)
    monkeypatch.setattr(hopper_grouped_matmul, "multiprocessors", lambda: 2)  # each has several tiles

    @contextlib.contextmanager
    def context() -> Iterator[None]:
        with interpreter.force_gpu_interpret_mode(interpreter.InterpretGPUParams(detect_races=True)):
            yield
        assert not gpu_callbacks.get_races().races_found

    return context


def normal(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.bfloat16)


def close(a: jax.Array, b: jax.Array) -> bool:
    """Within bfloat16's rounding."""
    return bool(jnp.abs(a.astype(jnp.float32) - b).max() <= 2**-7 * jnp.abs(b).max())


def float32(*arrays: jax.Array) -> list[jax.Array]:
    return [array.astype(jnp.float32) for array in arrays]


def test_grouped_products(interpreted):
    sizes = jnp.array([0, 40, 88], jnp.int32)
    x, w = normal(0, 192, 64), normal(1, 3, 64, 64)
    with interpreted():
        out = hopper_grouped_matmul.gmm(x, w, sizes, blocks=HopperProduct(1, 64, 2))
    assert close(out[:128], _blocked(*float32(x, w), sizes)[:128])


def test_the_gradient_of_the_matrices(interpreted):
    sizes = jnp.array([0, 40, 88], jnp.int32)
    x, dout = normal(0, 192, 64), normal(1, 192, 64)
    with interpreted():
        dw = hopper_grouped_matmul.tgmm(x, dout, sizes, blocks=HopperProduct(1, 64, 2))
    assert close(dw, _blocked_tgmm(*float32(x, dout), sizes))


def test_attention_of_packed_samples(interpreted):
    starts, scale = np.array([0, 100, 103, 200]), 0.2
    index = np.arange(256)
    positions = jnp.asarray((index - starts[np.searchsorted(starts, index, "right") - 1])[None], jnp.int32)
    first, _ = visible_ranges(positions, True)
    q, k, v = normal(0, 1, 256, 1, 32), normal(1, 1, 256, 1, 32), normal(2, 1, 256, 1, 16)
    with interpreted():
        out, lse = hopper_attention.attention_forward(q, k, v, first, scale, True, blocks=HopperAttention(64, 2))
    scores = jnp.einsum("bthd,bshd->bhts", *float32(q, k)) * scale
    visible = (index >= first[..., None]) & (index <= index[:, None])
    scores = jnp.where(visible[:, None], scores, -jnp.inf)
    assert jnp.isfinite(lse).all()  # a block that hides all its keys from a query leaves no trace
    assert close(out, jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(scores), *float32(v)))
    assert jnp.abs(lse - jax.nn.logsumexp(scores, axis=-1) * np.log2(np.e)).max() < 1e-4
