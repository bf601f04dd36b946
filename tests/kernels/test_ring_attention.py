"""Ring attention on eight devices against attention on one, and the kernels of a part against plain products."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsvl2_jax.kernels import ring_attention
from dsvl2_jax.kernels.attention import causal_self_attention
from dsvl2_jax.sharding import make_mesh

TOLERANCE = 2e-5  # of the largest element
HEADS, KEYS, VALUES = 4, 12, 8


def positions_of(*rows: tuple[int, ...]) -> jax.Array:
    """Rows of samples of some lengths."""
    return jnp.array([np.concatenate([np.arange(n) for n in row]) for row in rows], jnp.int32)


def attended(arrays, positions, weights):
    """(out, gradients of q, k and v)."""

    @jax.jit
    def run(arrays, positions):
        def total(*arrays):
            out = causal_self_attention(*arrays, positions, 0.3)
            return (out * weights).sum(), out

        (_, out), gradients = jax.value_and_grad(total, (0, 1, 2), has_aux=True)(*arrays)
        return out, *gradients

    return run(arrays, positions)


@pytest.mark.parametrize("sizes", [{"sequence": 8}, {"data": 2, "tensor": 2, "sequence": 2}], ids=str)
@pytest.mark.parametrize("rows", [((64,), (64,)), ((5, 30, 1, 28), (40, 24))], ids=["whole", "packed"])
def test_the_result_and_its_gradients_are_those_of_one_device(rows, sizes):
    rng, positions = np.random.default_rng(0), positions_of(*rows)
    q, k, v, weights = (
        jnp.asarray(rng.normal(size=(2, 64, HEADS, width)), jnp.float32) for width in (KEYS, KEYS, VALUES, VALUES)
    )
    expected = attended((q, k, v), positions, weights)
    with jax.set_mesh(make_mesh(**sizes)):
        found = attended((q, k, v), positions, weights)
    for one, other in zip(found, expected, strict=True):
        assert np.abs(one - other).max() <= TOLERANCE * np.abs(other).max()


@pytest.mark.parametrize("causal", [True, False])
def test_the_kernels_of_a_part_give_what_plain_products_give(causal):
    """Some queries see none of the keys of an earlier part."""
    rng, length = np.random.default_rng(1), 64
    q, k, v, do = (jnp.asarray(rng.normal(size=(1, length, 2, width)), jnp.bfloat16) for width in (32, 32, 16, 16))
    first = np.sort(rng.integers(0, length, (1, length)))
    first = np.minimum(first, np.arange(length)) if causal else np.where(np.arange(length) < 50, first, length)
    first, end = jnp.asarray(first, jnp.int32), jnp.full((1, length), length, jnp.int32)
    how = {"scale": 0.2, "causal": causal}
    out, lse = ring_attention._part_forward(q, k, v, first, **how)
    kernel_out, kernel_lse = ring_attention._kernel_forward(q, k, v, first, **how, interpret=True)
    np.testing.assert_allclose(kernel_out, out, atol=0.02)
    np.testing.assert_allclose(kernel_lse, lse, rtol=1e-3, atol=1e-3)
    if not causal:
        assert (out[:, 50:] == 0).all() and (lse[..., 50:] == ring_attention.LEAST).all()
    delta = jnp.einsum("bthd,bthd->bht", out, do.astype(jnp.float32))
    shared = (lse + 0.5, delta, do)  # other parts have a share of the softmax
    expected = ring_attention._part_backward(q, k, v, first, end, *shared, **how)
    found = jax.jit(functools.partial(ring_attention._kernel_backward, **how, interpret=True))(
        q, k, v, first, end, *shared
    )
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=0.02 * float(jnp.abs(other).max()))


def test_a_part_is_attended_to_by_our_kernels_where_the_program_is_for_a_gpu():
    shape = jax.ShapeDtypeStruct((1, 1024, 2, 32), jnp.bfloat16)
    positions = jax.ShapeDtypeStruct((1, 1024), jnp.int32)

    def gradients(q, k, v, positions):
        return jax.grad(lambda *a: causal_self_attention(*a, positions, 0.2).astype(jnp.float32).sum(), (0, 1, 2))(
            q, k, v
        )

    with jax.set_mesh(make_mesh(sequence=8)):
        traced = jax.jit(gradients).trace(shape, shape, shape, positions)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    kernels = [name for name in ("attention_forward", "attention_dq", "attention_dkv") if f'name = "{name}"' in text]
    assert kernels == ["attention_forward", "attention_dq", "attention_dkv"]
    # The own part, which is causal, and a loop's body for the others: of the forward pass and the backward pass.
    assert text.count('name = "attention_dq"') == 2
