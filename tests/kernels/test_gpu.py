"""The GPU kernels, interpreted on the CPU, against plain formulas; they are compiled in tests/apps/plan."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsvl2_jax.kernels import gpu_grouped_matmul
from dsvl2_jax.kernels.fused_attention import (
    AttentionSpec,
    _fused_backward,
    _fused_forward,
    fused_attention,
    visible_ranges,
)
from dsvl2_jax.kernels.gpu_attention import attention_backward, attention_forward
from dsvl2_jax.kernels.grouped_matmul import _blocked, _blocked_tgmm
from dsvl2_jax.sharding import make_mesh


def normal(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def close(a: jax.Array, b: jax.Array) -> bool:
    return bool(jnp.abs(a - b).max() <= 2e-5 * jnp.maximum(jnp.abs(b).max(), 1.0))


@pytest.mark.parametrize(
    ("rows", "inner", "width", "sizes"),
    [
        (200, 96, 160, [0, 37, 5, 100, 0, 20]),  # empty groups, rows in no group, widths that blocks do not divide
        (64, 128, 256, [1, 2, 3, 4]),
        (24, 64, 128, [0, 0, 0]),
    ],
)
def test_grouped_products_and_their_gradients(rows, inner, width, sizes):
    sizes = jnp.array(sizes, jnp.int32)
    x, w, g = normal(0, rows, inner), normal(1, len(sizes), inner, width), normal(2, rows, width)
    used = int(sizes.sum())
    out = gpu_grouped_matmul.gmm(x, w, sizes, interpret=True)
    turned = gpu_grouped_matmul.gmm(x, w.swapaxes(1, 2), sizes, transposed=True, interpret=True)
    expected = _blocked(x, w, sizes)
    if used:
        assert close(out[:used], expected[:used]) and close(turned[:used], expected[:used])
    assert close(gpu_grouped_matmul.tgmm(x, g, sizes, interpret=True), _blocked_tgmm(x, g, sizes))


def plain(query: jax.Array, key: jax.Array, value: jax.Array, positions: jax.Array, scale: float, causal: bool):
    first, _ = visible_ranges(positions, causal)
    scores = jnp.einsum("bthd,bshd->bhts", query, key) * scale
    index = jnp.arange(query.shape[1])
    visible = index >= first[..., None]
    if causal:
        visible &= index <= index[:, None]
    p = jax.nn.softmax(jnp.where(visible[:, None], scores, -jnp.inf), axis=-1)
    return jnp.einsum("bhts,bshd->bthd", p, value)


def positions_of(length: int, starts: list[int]) -> jax.Array:
    index = np.arange(length)
    return jnp.asarray(index - np.max([np.where(index >= s, s, 0) for s in starts], axis=0), jnp.int32)


@pytest.mark.parametrize(
    ("length", "heads", "widths", "starts"),
    [
        (256, 2, (192, 128), [0, 100, 103, 200]),  # latent attention, a row of four samples
        (130, 3, (32, 16), [0, 77, 78]),  # a length that blocks do not divide
        (150, 2, (80, 80), None),  # all see all, as patches do
    ],
)
def test_attention_and_its_gradients(length, heads, widths, starts):
    causal, scale = starts is not None, widths[0] ** -0.5
    row = positions_of(length, starts) if causal else jnp.zeros(length, jnp.int32)
    positions = jnp.stack([row, jnp.arange(length) if causal else row]).astype(jnp.int32)
    q, k, v, g = (normal(i, 2, length, heads, width) for i, width in enumerate((*widths[:1] * 2, *widths[1:] * 2)))
    first, end = visible_ranges(positions, causal)
    out, lse = attention_forward(q, k, v, first, scale, causal, interpret=True)
    expected, gradients = jax.vjp(lambda *arrays: plain(*arrays, positions, scale, causal), q, k, v)
    assert close(out, expected)
    ours = attention_backward(q, k, v, first, end, out, lse, g, scale, causal, interpret=True)
    assert all(close(mine, theirs) for mine, theirs in zip(ours, gradients(g), strict=True))


def test_a_key_is_seen_until_its_sample_ends():
    first, end = visible_ranges(jnp.array([[0, 1, 2, 0, 1, 0]], jnp.int32), True)
    assert first.tolist() == [[0, 0, 0, 3, 3, 5]] and end.tolist() == [[3, 3, 3, 5, 5, 6]]


def test_heads_of_one_array():
    """Queries, keys and values as one product makes them, 24 wide: parts of 16, the second of which reaches beyond."""
    qkv, g, scale = normal(0, 2, 70, 6, 24), normal(1, 2, 70, 2, 24), 24**-0.5
    positions = jnp.zeros((2, 70), jnp.int32)
    first, end = visible_ranges(positions, False)
    split = lambda qkv: jnp.split(qkv, 3, axis=2)  # noqa: E731
    expected, pullback = jax.vjp(lambda qkv: plain(*split(qkv), positions, scale, False), qkv)
    options = {"packed": True, "interpret": True}
    out, lse = attention_forward(qkv, qkv, qkv, first, scale, False, **options)
    assert close(out, expected)
    gradients = attention_backward(qkv, qkv, qkv, first, end, out, lse, g, scale, False, **options)
    assert close(jnp.concatenate(gradients, axis=2), pullback(g)[0])


def test_elsewhere_the_plain_function_runs_and_gives_the_gradients():
    q, k, v, g = (normal(i, 1, 48, 2, 16) for i in range(4))
    positions = positions_of(48, [0, 20])[None]
    spec = AttentionSpec(lambda *a: plain(*a, 0.25, True), ("batch", "length", "heads", "head_dim"), 0.25, True, "out")
    out, gradients = jax.vjp(lambda *arrays: fused_attention(arrays, positions, spec), q, k, v)
    expected, theirs = jax.vjp(lambda *arrays: plain(*arrays, positions, 0.25, True), q, k, v)
    assert close(out, expected)
    assert all(close(a, b) for a, b in zip(gradients(g), theirs(g), strict=True))
    kept, residuals = _fused_forward((q, k, v), positions, spec)
    assert close(kept, expected) and _fused_backward(spec, residuals, g)[-1] is None


def test_on_a_mesh_each_device_attends_to_its_own_rows_and_heads():
    """What is lowered for CPUs is the plain function; the kernels' side is traced, sharded, with its gradients."""
    q, k, v = (normal(i, 4, 64, 4, 16).astype(jnp.bfloat16) for i in range(3))
    positions = jnp.stack([positions_of(64, [0, 20])] * 4)
    spec = AttentionSpec(lambda *a: plain(*a, 0.25, True), ("batch", "length", "heads", "head_dim"), 0.25, True, "out")

    def total(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return fused_attention((q, k, v), positions, spec).astype(jnp.float32).sum()

    alone = jax.jit(jax.grad(total, (0, 1, 2)))(q, k, v)
    with jax.set_mesh(make_mesh(data=2, tensor=2, expert=2)):
        traced = jax.jit(jax.grad(total, (0, 1, 2))).trace(q, k, v)
        sharded = traced.lower().compile()(q, k, v)
    assert str(traced.jaxpr).count("shard_map") == 2 and "attention_dkv" in str(traced.jaxpr)
    assert all(close(a.astype(jnp.float32), b.astype(jnp.float32)) for a, b in zip(sharded, alone, strict=True))
