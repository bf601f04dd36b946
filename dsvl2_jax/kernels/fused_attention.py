"""Attention of rows to themselves on NVIDIA GPUs, with its gradients: which of our kernels runs, and on which device.

cuDNN's attention would need values as wide as keys, or a bias [B, 1, T, S] for packed rows, and asks the machine for
a GPU while it is lowered, so that it cannot be compiled ahead of time.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from dsvl2_jax.kernels.block_sizes import Blocks, HopperAttention
from dsvl2_jax.kernels.gpu_attention import attention_backward, attention_forward, padded
from dsvl2_jax.kernels.triton import fits_int32
from dsvl2_jax.kernels.tuning import chosen
from dsvl2_jax.sharding import shard_map_kernel


@dataclasses.dataclass(frozen=True)
class AttentionSpec:
    """What `fused_attention` computes.

    Attributes:
      plain: (q_bthd, k_bthd, v_bthd, positions_bt) → out_bthd, what runs on other platforms; its gradients too come
        from it.
      axes: logical axes of q, k, v and the result.
      scale: factor on the scores.
      causal: a query sees no keys after it.
      name: of the result, for rematerialisation policies.
    """

    plain: Callable[[jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]
    axes: tuple[str | None, ...]
    scale: float
    causal: bool
    name: str


def is_supported(q_bthd: jax.Array, v_bthd: jax.Array) -> bool:
    """Whether the kernels are for these: tensor cores multiply 16 bits, and float32 is for exactness."""
    return v_bthd.dtype == jnp.bfloat16 and fits_int32(q_bthd, v_bthd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def fused_attention(
    q_bthd: jax.Array, k_bthd: jax.Array, v_bthd: jax.Array, positions_bt: jax.Array, spec: AttentionSpec
) -> jax.Array:
    """Attention of rows to themselves: the kernels where the program is lowered for CUDA, ``spec.plain`` elsewhere.

    Args:
      q_bthd, k_bthd: [B, T, H, Dk]; v_bthd: [B, T, H, Dv]; see `is_supported`.
      positions_bt: i32[B, T]. Causal: a token sees those since position 0 of its own sample. Else: zeros.

    Returns:
      [B, T, H, Dv].
    """
    kernel = lambda *arrays: _sharded(_forward, spec)(*arrays)[0]  # noqa: E731
    return lax.platform_dependent(q_bthd, k_bthd, v_bthd, positions_bt, cuda=kernel, default=spec.plain)


def _fused_forward(q_bthd, k_bthd, v_bthd, positions_bt, spec):
    b, t, h, _ = q_bthd.shape

    def plain(*arrays):
        return spec.plain(*arrays), jnp.zeros((b, h, t), jnp.float32)

    kernel = _sharded(_forward, spec)
    out_bthd, lse_bht = lax.platform_dependent(q_bthd, k_bthd, v_bthd, positions_bt, cuda=kernel, default=plain)
    # Named here, so that a policy which keeps the result does not run the kernel once more for the lse.
    out_bthd, lse_bht = checkpoint_name(out_bthd, spec.name), checkpoint_name(lse_bht, spec.name)
    return out_bthd, (q_bthd, k_bthd, v_bthd, positions_bt, out_bthd, lse_bht)


def _fused_backward(spec, residuals, do_bthd):
    def plain(q_bthd, k_bthd, v_bthd, positions_bt, out_bthd, lse_bht, do_bthd):
        del out_bthd, lse_bht
        return jax.vjp(lambda *arrays: spec.plain(*arrays, positions_bt), q_bthd, k_bthd, v_bthd)[1](do_bthd)

    kernel = _sharded(_backward, spec)
    return (*lax.platform_dependent(*residuals, do_bthd, cuda=kernel, default=plain), None)


fused_attention.defvjp(_fused_forward, _fused_backward)


def _sharded(function: Callable, spec: AttentionSpec) -> Callable:
    """`_forward` or `_backward` on each device's own rows and heads."""
    batch, length, heads, _ = arrays = spec.axes
    positions, lse = (batch, length), (batch, heads, length)
    in_axes, out_axes = (arrays, arrays, arrays, positions), (arrays, lse)
    if function is _backward:
        in_axes, out_axes = (*in_axes, arrays, lse, arrays), (arrays,) * 3
    return shard_map_kernel(functools.partial(function, spec), in_axes, out_axes)


def _forward(spec: AttentionSpec, q_bthd, k_bthd, v_bthd, positions_bt):
    width = v_bthd.shape[-1]
    first_bt, _ = visible_ranges(positions_bt, spec.causal)
    q_bthd, k_bthd, v_bthd = (padded(x) for x in (q_bthd, k_bthd, v_bthd))
    blocks, forward = _measured("attention_forward", q_bthd, v_bthd, spec.causal), attention_forward
    if isinstance(blocks, HopperAttention):
        from dsvl2_jax.kernels.hopper_attention import attention_forward as forward
    out_bthd, lse_bht = forward(q_bthd, k_bthd, v_bthd, first_bt, spec.scale, spec.causal, blocks=blocks)
    return out_bthd[..., :width], lse_bht


def _backward(spec: AttentionSpec, q_bthd, k_bthd, v_bthd, positions_bt, out_bthd, lse_bht, do_bthd):
    first_bt, end_bs = visible_ranges(positions_bt, spec.causal)
    arrays = tuple(padded(x) for x in (q_bthd, k_bthd, v_bthd))
    out_bthd, do_bthd = padded(out_bthd), padded(do_bthd)
    blocks = tuple(_measured(f"attention_{part}", arrays[0], arrays[2], spec.causal) for part in ("dq", "dkv"))
    residuals = first_bt, end_bs, out_bthd, lse_bht, do_bthd
    gradients = attention_backward(*arrays, *residuals, spec.scale, spec.causal, blocks=blocks)
    return tuple(dx[..., : x.shape[-1]] for dx, x in zip(gradients, (q_bthd, k_bthd, v_bthd), strict=True))


def _measured(operation: str, q_bthd: jax.Array, v_bthd: jax.Array, causal: bool) -> Blocks | None:
    b, t, h, key_width = q_bthd.shape
    widths = {"key_width": key_width, "value_width": v_bthd.shape[-1]}
    return chosen(operation, **widths, causal=int(causal), length=t, heads=b * h)


def visible_ranges(positions_bt: jax.Array, causal: bool) -> tuple[jax.Array, jax.Array]:
    """i32[B, T] the index of the first key that a query sees; i32[B, S] the index after the last query of a key."""
    length = positions_bt.shape[1]
    index_bt = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), positions_bt.shape)
    if not causal:
        return jnp.zeros_like(index_bt), jnp.full_like(index_bt, length)
    starts_bt = jnp.where(positions_bt == 0, index_bt, length)
    next_bt = jnp.concatenate([starts_bt[:, 1:], jnp.full_like(starts_bt[:, :1], length)], axis=1)
    return (index_bt - positions_bt).astype(jnp.int32), lax.cummin(next_bt, axis=1, reverse=True)
