"""Causal attention of rows that are longer than a device holds: ring attention (arXiv 2310.01889).

Each device has the queries, keys and values of one part of a row. Keys and values go round the devices; each attends to
the part that is there, and what the parts give is joined by their log-sum-exp. The gradients go round likewise, with
the keys and values that they are of. No device ever holds a whole row, nor scores of more than a part.

A part is attended to by our kernels on NVIDIA GPUs in bfloat16, and by plain products elsewhere.

Tested in tests/kernels/test_ring_attention.py and tests/train/test_sequence.py.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from dsvl2_jax.kernels.fused_attention import visible_ranges
from dsvl2_jax.kernels.gpu_attention import attention_dkv, attention_dq, attention_forward
from dsvl2_jax.kernels.precision import product_in_float32
from dsvl2_jax.kernels.triton import fits_int32
from dsvl2_jax.sharding import shard_map_kernel

QUERY_BLOCK = 512  # queries whose scores are held at a time, without a kernel
LEAST = float(jnp.finfo(jnp.float32).min)  # the log-sum-exp of nothing
AXES = ("batch", "length", "heads", "head_dim")


class _Ring(NamedTuple):
    """Static: the mesh axis that rows are split over, into how many parts, and what else attention needs."""

    axis: str
    parts: int
    scale: float
    name: str


def ring_attention(
    q_bthd: jax.Array,
    k_bthd: jax.Array,
    v_bthd: jax.Array,
    positions_bt: jax.Array,
    scale: float,
    *,
    axis: str,
    parts: int,
    name: str,
) -> jax.Array:
    """As `dsvl2_jax.kernels.attention.causal_self_attention`, of rows that are split over the mesh axis ``axis``.

    Args:
      q_bthd, k_bthd: [B, T, H, Dk]; v_bthd: [B, T, H, Dv].
      positions_bt: i32[B, T], from 0 in each sample of a row.
      scale: factor on the scores.
      axis, parts: static; T is split into so many parts.
      name: static, of the result, for rematerialisation policies.

    Returns:
      [B, T, H, Dv] in the dtype of ``v_bthd``. Differentiable.
    """
    first_bt, end_bt = visible_ranges(positions_bt, causal=True)
    ring = _Ring(axis, parts, scale, name)

    def local(*arrays: jax.Array) -> tuple[jax.Array]:
        return (_attend(ring, *arrays),)

    call = shard_map_kernel(local, (AXES, AXES, AXES, AXES[:2], AXES[:2]), (AXES,), [v_bthd])
    return call(q_bthd, k_bthd, v_bthd, first_bt, end_bt)[0]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(
    ring: _Ring, q_bthd: jax.Array, k_bshd: jax.Array, v_bshd: jax.Array, first_bt: jax.Array, end_bs: jax.Array
) -> jax.Array:
    """One device's part of the result.

    Args:
      q_bthd, k_bshd, v_bshd: of this device's part, T = S.
      first_bt: i32[B, T], the index in the row of the first key that a query sees.
      end_bs: i32[B, S], the index in the row after the last query that sees a key.
    """
    return _forward(ring, q_bthd, k_bshd, v_bshd, first_bt, end_bs)[0]


def _rotate(ring: _Ring, arrays: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    """What the device before this one in the ring has."""
    following = [(i, (i + 1) % ring.parts) for i in range(ring.parts)]
    return tuple(lax.ppermute(array, ring.axis, following) for array in arrays)


def _is_seen(me: jax.Array, step: jax.Array, first_bt: jax.Array, length: int) -> jax.Array:
    """Whether a query here sees a key of the part that is here after so many rotations: none of a later part."""
    return (step <= me) & (first_bt.min() < (me - step + 1) * length)


def _forward(ring, q_bthd, k_bshd, v_bshd, first_bt, end_bs):
    length, me = q_bthd.shape[1], lax.axis_index(ring.axis)

    def part(step: jax.Array | int, k: jax.Array, v: jax.Array, causal: bool) -> tuple[jax.Array, jax.Array]:
        return _part_forward(q_bthd, k, v, first_bt - (me - step) * length, ring.scale, causal)

    def body(step: jax.Array, carry: tuple) -> tuple:
        (k, v), out, lse = carry
        k, v = _rotate(ring, (k, v))

        def joined() -> tuple[jax.Array, jax.Array]:
            more, more_lse = part(step, k, v, False)
            total = jnp.logaddexp(lse, more_lse)
            shares = (jnp.exp(x - total).swapaxes(1, 2)[..., None] for x in (lse, more_lse))
            return sum(x * share for x, share in zip((out, more), shares, strict=True)), total

        out, lse = lax.cond(_is_seen(me, step, first_bt, length), joined, lambda: (out, lse))
        return (k, v), out, lse

    # The own part first: every query sees itself, so that no sum is empty.
    own = part(0, k_bshd, v_bshd, True)
    _, out_bthd, lse_bht = lax.fori_loop(1, ring.parts, body, ((k_bshd, v_bshd), *own))
    out_bthd, lse_bht = (checkpoint_name(x, ring.name) for x in (out_bthd.astype(v_bshd.dtype), lse_bht))
    return out_bthd, (q_bthd, k_bshd, v_bshd, first_bt, end_bs, out_bthd, lse_bht)


def _backward(ring, residuals, do_bthd):
    q_bthd, k_bshd, v_bshd, first_bt, end_bs, out_bthd, lse_bht = residuals
    length, me = q_bthd.shape[1], lax.axis_index(ring.axis)
    delta_bht = jnp.einsum("bthd,bthd->bht", out_bthd, do_bthd, preferred_element_type=jnp.float32)

    def part(step: jax.Array | int, k, v, end, causal: bool) -> tuple[jax.Array, ...]:
        ranges = first_bt - (me - step) * length, jnp.clip(end - me * length, 0, length)
        return _part_backward(q_bthd, k, v, *ranges, lse_bht, delta_bht, do_bthd, ring.scale, causal)

    def body(step: jax.Array, carry: tuple) -> tuple:
        travelling, dq = carry
        k, v, end, dk, dv = _rotate(ring, travelling)

        def added() -> tuple[jax.Array, ...]:
            more = part(step, k, v, end, False)
            return tuple(x + y for x, y in zip((dq, dk, dv), more, strict=True))

        dq, dk, dv = lax.cond(_is_seen(me, step, first_bt, length), added, lambda: (dq, dk, dv))
        return (k, v, end, dk, dv), dq

    dq, dk, dv = part(0, k_bshd, v_bshd, end_bs, True)
    travelling, dq = lax.fori_loop(1, ring.parts, body, ((k_bshd, v_bshd, end_bs, dk, dv), dq))
    dk, dv = _rotate(ring, travelling[3:])  # home
    gradients = (g.astype(x.dtype) for g, x in zip((dq, dk, dv), residuals, strict=False))
    return *gradients, None, None


_attend.defvjp(_forward, _backward)


# One part of the keys.


def _part_forward(q_bthd, k_bshd, v_bshd, first_bt, scale: float, causal: bool) -> tuple[jax.Array, jax.Array]:
    """f32[B, T, H, Dv], zero for queries that see none of these keys, and lse f32[B, H, T], least there.

    ``first_bt``: the index among these keys of the first that a query sees, perhaps beyond them or negative.
    """
    first_bt = jnp.clip(first_bt, 0, k_bshd.shape[1])

    def plain(*arrays: jax.Array) -> tuple[jax.Array, jax.Array]:
        q, k, v, first = arrays

        def block(queries: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
            q, first, index = queries
            scores, visible = _scores(q, k, first, index, scale, causal)
            m = scores.max(-1, keepdims=True)
            p = jnp.where(visible, jnp.exp(scores - m), 0.0)
            l = p.sum(-1, keepdims=True)  # noqa: E741
            out = product_in_float32("bhts,bshd->bhtd", p.astype(v.dtype), v) / jnp.maximum(
                l, jnp.finfo(jnp.float32).tiny
            )
            lse = jnp.where(l > 0, m + jnp.log(l), LEAST)
            return out.swapaxes(1, 2), lse[..., 0].swapaxes(1, 2)

        out, lse_bth = _by_blocks(block, (q, first, _indices(first)))
        return out, lse_bth.swapaxes(1, 2)

    kernel = functools.partial(_kernel_forward, scale=scale, causal=causal)
    return _chosen(kernel, plain, q_bthd, k_bshd, v_bshd, first_bt)


def _kernel_forward(q, k, v, first, *, scale: float, causal: bool, interpret: bool = False):
    out, lse_bht = attention_forward(q, k, v, first, scale, causal, interpret=interpret)
    sees_bt = first < k.shape[1]
    out = jnp.where(sees_bt[..., None, None], out.astype(jnp.float32), 0.0)
    return out, jnp.where(sees_bt[:, None], lse_bht * math.log(2), LEAST)


def _part_backward(
    q_bthd, k_bshd, v_bshd, first_bt, end_bs, lse_bht, delta_bht, do_bthd, scale: float, causal: bool
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """What these keys add to the gradients of q, k and v, f32.

    ``first_bt`` as in `_part_forward`; ``end_bs``: the index among the queries after the last that sees a key;
    ``lse_bht``, ``delta_bht``: of all keys.
    """
    first_bt = jnp.clip(first_bt, 0, k_bshd.shape[1])

    def plain(q, k, v, first, end, lse, delta, do) -> tuple[jax.Array, ...]:
        del end

        def block(sums: tuple[jax.Array, jax.Array], queries: tuple[jax.Array, ...]) -> tuple[tuple, jax.Array]:
            q, first, index, lse, delta, do = queries
            scores, visible = _scores(q, k, first, index, scale, causal)
            lse, delta = (x.swapaxes(1, 2)[..., None] for x in (lse, delta))
            p = jnp.where(visible, jnp.exp(scores - lse), 0.0)
            ds = (p * (product_in_float32("bthd,bshd->bhts", do, v) - delta) * scale).astype(k.dtype)
            dk = sums[0] + product_in_float32("bhts,bthd->bshd", ds, q)
            dv = sums[1] + product_in_float32("bhts,bthd->bshd", p.astype(v.dtype), do)
            return (dk, dv), product_in_float32("bhts,bshd->bthd", ds, k)

        by_token = q, first, _indices(first), lse.swapaxes(1, 2), delta.swapaxes(1, 2), do.astype(v.dtype)
        zeros = tuple(jnp.zeros(x.shape, jnp.float32) for x in (k, v))
        (dk, dv), dq = lax.scan(block, zeros, _split(by_token))
        return _join(dq), dk, dv

    kernel = functools.partial(_kernel_backward, scale=scale, causal=causal)
    return _chosen(kernel, plain, q_bthd, k_bshd, v_bshd, first_bt, end_bs, lse_bht, delta_bht, do_bthd)


def _kernel_backward(q, k, v, first, end, lse, delta, do, *, scale: float, causal: bool, interpret: bool = False):
    arrays = q, k, v, first, end, lse / math.log(2), delta, do.astype(q.dtype), scale, causal
    dq, (dk, dv) = attention_dq(*arrays, interpret=interpret), attention_dkv(*arrays, interpret=interpret)
    return tuple(g.astype(jnp.float32) for g in (dq, dk, dv))


def _chosen(kernel: Callable, plain: Callable, *arrays: jax.Array) -> tuple[jax.Array, ...]:
    """By the kernels where the program is lowered for CUDA, if they are for these arrays."""
    if arrays[2].dtype != jnp.bfloat16 or not fits_int32(arrays[0], arrays[2]):
        return plain(*arrays)
    return lax.platform_dependent(*arrays, cuda=kernel, default=plain)


def _indices(first_bt: jax.Array) -> jax.Array:
    return jnp.broadcast_to(jnp.arange(first_bt.shape[1]), first_bt.shape)


def _scores(q_bthd, k_bshd, first_bt, index_bt, scale: float, causal: bool) -> tuple[jax.Array, jax.Array]:
    """f32[B, H, T, S] scores, least where they do not count, and bool[B, 1, T, S] where they do."""
    key_index = jnp.arange(k_bshd.shape[1])
    visible_bts = key_index >= first_bt[..., None]
    if causal:
        visible_bts &= key_index <= index_bt[..., None]
    visible = visible_bts[:, None]
    return jnp.where(visible, product_in_float32("bthd,bshd->bhts", q_bthd, k_bshd) * scale, LEAST), visible


def _split(arrays: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    """[B, T, …] → [blocks, B, `QUERY_BLOCK`, …]; one block where T is no multiple of it."""
    length = arrays[0].shape[1]
    size = QUERY_BLOCK if length % QUERY_BLOCK == 0 else length
    return tuple(jnp.moveaxis(x.reshape(x.shape[0], length // size, size, *x.shape[2:]), 1, 0) for x in arrays)


def _join(x: jax.Array) -> jax.Array:
    """[blocks, B, size, …] → [B, T, …]."""
    return jnp.moveaxis(x, 0, 1).reshape(x.shape[1], -1, *x.shape[3:])


def _by_blocks(function: Callable, arrays: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    return jax.tree.map(_join, lax.map(function, _split(arrays)))
