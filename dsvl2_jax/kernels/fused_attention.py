"""Attention of rows to themselves on NVIDIA GPUs, with its gradients: which of our kernels runs, and on which device.

cuDNN's attention would need values as wide as keys, or a bias [B, 1, T, S] for packed rows, and asks the machine for
a GPU while it is lowered, so that it cannot be compiled ahead of time.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from dsvl2_jax.kernels.block_sizes import Blocks, HopperAttention
from dsvl2_jax.kernels.gpu_attention import attention_backward, attention_forward
from dsvl2_jax.kernels.triton import fits_int32
from dsvl2_jax.kernels.tuning import chosen
from dsvl2_jax.sharding import shard_map_kernel


@dataclasses.dataclass(frozen=True)
class AttentionSpec:
    """What `fused_attention` computes.

    Attributes:
      plain: (the arrays, positions_bt) → out_bthd, what runs on other platforms; its gradients too come from it.
      axes: logical axes of the arrays and the result.
      scale: factor on the scores.
      causal: a query sees no keys after it.
      name: of the result, for rematerialisation policies.
    """

    plain: Callable[..., jax.Array]
    axes: tuple[str | None, ...]
    scale: float
    causal: bool
    name: str


def is_supported(q_bthd: jax.Array, v_bthd: jax.Array) -> bool:
    """Whether the kernels are for these: tensor cores multiply 16 bits, and float32 is for exactness."""
    return v_bthd.dtype == jnp.bfloat16 and fits_int32(q_bthd, v_bthd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def fused_attention(arrays: tuple[jax.Array, ...], positions_bt: jax.Array, spec: AttentionSpec) -> jax.Array:
    """Attention of rows to themselves: the kernels where the program is lowered for CUDA, ``spec.plain`` elsewhere.

    Args:
      arrays: q, k [B, T, H, Dk] and v [B, T, H, Dv]; or one array, [B, T, 3H, D], in which q's heads come first, then
        k's and v's, so that what one product made need not be copied apart. See `is_supported`.
      positions_bt: i32[B, T]. Causal: a token sees those since position 0 of its own sample. Else: zeros.

    Returns:
      [B, T, H, Dv].
    """
    kernel = lambda *arrays: _sharded(_forward, spec, len(arrays) - 1)(*arrays)[0]  # noqa: E731
    return lax.platform_dependent(*arrays, positions_bt, cuda=kernel, default=spec.plain)


def _fused_forward(arrays, positions_bt, spec):
    b, t, h, _ = arrays[0].shape
    h = h // 3 if len(arrays) == 1 else h

    def plain(*arrays):
        return spec.plain(*arrays), jnp.zeros((b, h, t), jnp.float32)

    kernel = _sharded(_forward, spec, len(arrays))
    out_bthd, lse_bht = lax.platform_dependent(*arrays, positions_bt, cuda=kernel, default=plain)
    # Named here, so that a policy which keeps the result does not run the kernel once more for the lse.
    out_bthd, lse_bht = checkpoint_name(out_bthd, spec.name), checkpoint_name(lse_bht, spec.name)
    return out_bthd, (arrays, positions_bt, out_bthd, lse_bht)


def _fused_backward(spec, residuals, do_bthd):
    arrays, *others = residuals

    def plain(*inputs):
        arrays, (positions_bt, _, _, do_bthd) = inputs[:-4], inputs[-4:]
        return jax.vjp(lambda *arrays: spec.plain(*arrays, positions_bt), *arrays)[1](do_bthd)

    kernel = _sharded(_backward, spec, len(arrays))
    return lax.platform_dependent(*arrays, *others, do_bthd, cuda=kernel, default=plain), None


fused_attention.defvjp(_fused_forward, _fused_backward)


def _sharded(function: Callable, spec: AttentionSpec, count: int) -> Callable:
    """`_forward` or `_backward` of so many arrays on each device's own rows and heads."""
    batch, length, heads, _ = axes = spec.axes
    positions, lse = (batch, length), (batch, heads, length)
    in_axes, out_axes = (*(axes,) * count, positions), (axes, lse)
    if function is _backward:
        in_axes, out_axes = (*in_axes, axes, lse, axes), (axes,) * count
    return shard_map_kernel(functools.partial(function, spec), in_axes, out_axes)


def _forward(spec: AttentionSpec, *inputs):
    *arrays, positions_bt = inputs
    first_bt, _ = visible_ranges(positions_bt, spec.causal)
    blocks = _measured("attention_forward", arrays, spec.causal)
    if isinstance(blocks, HopperAttention):
        from dsvl2_jax.kernels import hopper_attention

        q, k, v = arrays if len(arrays) == 3 else jnp.split(arrays[0], 3, axis=2)
        return hopper_attention.attention_forward(q, k, v, first_bt, spec.scale, spec.causal, blocks=blocks)
    return attention_forward(*_three(arrays), first_bt, spec.scale, spec.causal, blocks=blocks, packed=len(arrays) == 1)


def _backward(spec: AttentionSpec, *inputs):
    *arrays, positions_bt, out_bthd, lse_bht, do_bthd = inputs
    residuals = *visible_ranges(positions_bt, spec.causal), out_bthd, lse_bht, do_bthd
    blocks = tuple(_measured(f"attention_{part}", arrays, spec.causal) for part in ("dq", "dkv"))
    packed = len(arrays) == 1
    gradients = attention_backward(*_three(arrays), *residuals, spec.scale, spec.causal, blocks=blocks, packed=packed)
    return (jnp.concatenate(gradients, axis=2),) if packed else gradients


def _three(arrays: Sequence[jax.Array]) -> Sequence[jax.Array]:
    """What the kernels take for q, k and v."""
    return arrays if len(arrays) == 3 else [arrays[0]] * 3


def _measured(operation: str, arrays: Sequence[jax.Array], causal: bool) -> Blocks | None:
    b, t, h, key_width = arrays[0].shape
    widths = {"key_width": key_width, "value_width": arrays[-1].shape[-1]}
    heads = b * (h if len(arrays) == 3 else h // 3)
    return chosen(operation, **widths, causal=int(causal), length=t, heads=heads)


def visible_ranges(positions_bt: jax.Array, causal: bool) -> tuple[jax.Array, jax.Array]:
    """i32[B, T] the index of the first key that a query sees; i32[B, S] the index after the last query of a key."""
    length = positions_bt.shape[1]
    index_bt = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), positions_bt.shape)
    if not causal:
        return jnp.zeros_like(index_bt), jnp.full_like(index_bt, length)
    starts_bt = jnp.where(positions_bt == 0, index_bt, length)
    next_bt = jnp.concatenate([starts_bt[:, 1:], jnp.full_like(starts_bt[:, :1], length)], axis=1)
    return (index_bt - positions_bt).astype(jnp.int32), lax.cummin(next_bt, axis=1, reverse=True)
