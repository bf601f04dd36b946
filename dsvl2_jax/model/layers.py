"""Weights, and the small layers that the encoder, the adaptor and the decoder share.

The last part of an array's name gives its axes, one letter each, the same letters everywhere:

  B batch (rows)        T tokens             S positions of the cache     V vocabulary
  D language width      H heads              R latent rank                W vision width
  N tiles               P patches of a tile  E routed experts             F width of an expert's MLP
  K experts of a token  C assigned tokens    G experts held by a device

So ``x_btd`` is [batch, tokens, language width]. In ``q_bthd`` and wherever heads stand beside it, d is a head's width.

Tested in tests/model/test_attention.py, test_moe.py and test_deepseek_vl2.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from jax import lax
from jax.typing import DTypeLike

from dsvl2_jax.kernels import quantized_matmul
from dsvl2_jax.kernels.cpu import weight_product
from dsvl2_jax.kernels.grouped_matmul import grouped_matmul, grouped_swiglu, named_product
from dsvl2_jax.kernels.precision import matmul_precision
from dsvl2_jax.kernels.quantized import Quantized
from dsvl2_jax.model.weights import Adapted, Weight, is_stored_weight, weight_of
from dsvl2_jax.sharding import batch_axis, constrain

Axes = tuple[str | None, ...]


def partitioned(init: nn.initializers.Initializer, axes: Axes) -> nn.initializers.Initializer:
    """An initializer whose result carries the logical names of its axes; see `dsvl2_jax.sharding.PARAM_RULES`."""
    return nn.with_logical_partitioning(init, axes)


class WeightBox(nn.LogicallyPartitioned):
    """What `declare` gives a weight at initialisation: as `partitioned`, and its ``inputs``."""

    inputs: int | None = struct.field(default=None, pytree_node=False)


def declare(
    module: nn.Module,
    name: str,
    shape: Sequence[int],
    axes: Axes,
    init: nn.initializers.Initializer,
    inputs: int | None = None,
) -> Weight:
    """Declares a parameter of a module, and returns it as it is stored.

    Every weight of the model is declared here and enters a product by `linear`, `einsum_weight` or `grouped` below; no
    other code knows how a weight is kept (`dsvl2_jax.model.weights`).

    Args:
      module: which the parameter belongs to.
      name: in the module's parameters.
      shape: of the array, drawn in float32.
      axes: a logical axis name, or None, for each dimension.
      init: from (random key, shape, dtype) to the initial values.
      inputs: of a weight, the last axis that products contract, as its released layout counts; None: of anything that
        is kept as a plain array only.
    """
    if inputs is not None:
        stored = module.get_variable("params", name)
        if is_stored_weight(stored):
            return weight_of(stored, inputs - len(shape))
        return module.param(name, lambda *drawn: WeightBox(init(*drawn), axes, inputs=inputs), tuple(shape))
    return module.param(name, partitioned(init, axes), tuple(shape))


def linear(
    x: jax.Array, kernel: Weight, bias: jax.Array | None = None, *, dtype: DTypeLike, contract: int = 1
) -> jax.Array:
    """x · kernel + bias, computed in ``dtype``.

    Args:
      x: [..., inputs]. kernel: [inputs, features]. bias: [features], or None.
      contract: how many dimensions ``inputs`` are.

    Returns:
      [..., features] in ``dtype``.
    """
    out = _product(x.astype(dtype), kernel.astype(dtype), contract)
    return out if bias is None else out + bias.astype(dtype).reshape((1,) * (out.ndim - bias.ndim) + bias.shape)


def _product(x: jax.Array, kernel: Weight, contract: int) -> jax.Array:
    """x · kernel over the last ``contract`` dimensions of x and the first of kernel."""
    if isinstance(kernel, Quantized):
        rows, features = x.shape[: x.ndim - contract], kernel.shape[contract:]
        x_mk = x.reshape(-1, math.prod(kernel.shape[:contract]))
        return quantized_matmul.product(x_mk, quantized_matmul.as_matrices(kernel, contract)).reshape(*rows, *features)
    if not isinstance(kernel, Adapted):
        return weight_product(x, kernel, contract)
    entered = kernel.dropped(x)
    hidden = kernel.own_ranks(weight_product(entered, kernel.lora_a, contract))
    added = weight_product(hidden, kernel.lora_b, 1)
    gain = kernel.row_gain(added.ndim)
    return _combined(kernel, lambda x: _product(x, kernel.base, contract), x, entered, added, gain)


def _combined(
    weight: Adapted,
    of_base: Callable[[jax.Array], jax.Array],
    x: jax.Array,
    entered: jax.Array,
    added: jax.Array,
    gain: jax.Array | None,
) -> jax.Array:
    """The base's product and what an adapter adds, times the gain.

    With dropout, what the gain changes of the base's product is of the inputs that are left, as `peft` has it.

    Args:
      of_base: from inputs to their product with the base.
      entered: x with dropout. added: its product with the adapter.
    """
    out = of_base(x)
    if gain is None:
        return out + added
    if weight.dropout is None:
        return (out + added) * gain
    return out + (gain - 1) * of_base(entered) + gain * added


def einsum_weight(
    subscripts: str, x: jax.Array, weight: Weight, *, dtype: DTypeLike, rows: slice | None = None
) -> jax.Array:
    """``jnp.einsum(subscripts, x, weight)`` in ``dtype``; ``rows``: of the weight's second dimension, these alone.

    The weight lies as released: its outputs before its one input, whichever of them the product contracts.
    """
    x, weight = x.astype(dtype), weight.astype(dtype)
    if isinstance(weight, Adapted):
        return _adapted_einsum(subscripts, x, weight, rows)
    if isinstance(weight, Quantized):
        return quantized_matmul.einsum(subscripts, slice(None) if rows is None else rows, x, weight)
    weight = weight if rows is None else weight[:, rows]
    return jnp.einsum(subscripts, x, weight, precision=matmul_precision(dtype))


def _adapted_einsum(subscripts: str, x: jax.Array, weight: Adapted, rows: slice | None) -> jax.Array:
    """`einsum_weight` of a weight with an adapter; Z is the rank in the subscripts."""
    terms, out = subscripts.split("->")
    x_axes, (*outputs, inputs) = terms.split(",")
    outputs = "".join(outputs)
    lora_b, gain = weight.lora_b, weight.row_gain(x.ndim)
    if rows is not None:
        lora_b = lora_b[:, :, rows]
        gain = gain if gain is None else gain[..., rows]
    expanded = inputs in x_axes
    if not expanded and gain is not None:
        x = x * gain
    first, second = (weight.lora_a, lora_b) if expanded else (lora_b, weight.lora_a)
    first_axes, second_axes = (inputs + "Z", "Z" + outputs) if expanded else ("Z" + outputs, inputs + "Z")
    # The axes that both of the product's sides keep: batch, tokens and, in the absorbed form, heads.
    kept = "".join(axis for axis in x_axes if axis in out)
    precision = matmul_precision(x.dtype)
    entered = weight.dropped(x) if expanded else x
    hidden = jnp.einsum(f"{x_axes},{first_axes}->{kept}Z", entered, first, precision=precision)
    added = jnp.einsum(f"{kept}Z,{second_axes}->{out}", weight.own_ranks(hidden), second, precision=precision)
    return _combined(
        weight,
        lambda x: einsum_weight(subscripts, x, weight.base, dtype=x.dtype, rows=rows),
        x,
        entered,
        added,
        gain if expanded else None,
    )


def grouped(x_cd: jax.Array, weights_gdf: Weight, group_sizes_g: jax.Array) -> jax.Array:
    """Consecutive rows, each group times its own matrix: [C, D], [G, D, F], i32[G] → [C, F]; see `grouped_matmul`."""
    if isinstance(weights_gdf, Quantized):
        return quantized_matmul.named_product(x_cd, weights_gdf, group_sizes_g)
    if not isinstance(weights_gdf, Adapted):
        return named_product(x_cd, weights_gdf, group_sizes_g)
    entered_cd = weights_gdf.dropped(x_cd)
    hidden_cr = grouped_matmul(entered_cd, weights_gdf.lora_a, group_sizes_g)
    added_cf = grouped_matmul(weights_gdf.own_ranks(hidden_cr), weights_gdf.lora_b, group_sizes_g)
    gain = weights_gdf.gain
    if gain is not None:
        ends_g = jnp.cumsum(group_sizes_g)
        group_c = jnp.minimum(jnp.searchsorted(ends_g, jnp.arange(len(x_cd)), side="right"), len(ends_g) - 1)
        gain = gain[group_c] if weights_gdf.owner is None else gain[weights_gdf.rows, group_c]
    return _combined(
        weights_gdf, lambda x_cd: grouped(x_cd, weights_gdf.base, group_sizes_g), x_cd, entered_cd, added_cf, gain
    )


def grouped_gated(x_cd: jax.Array, gate_gdf: Weight, up_gdf: Weight, group_sizes_g: jax.Array) -> jax.Array:
    """silu(x · gate) · (x · up) of each group of rows, [C, D] → [C, F]; without adapters a kernel may do it at once."""
    if isinstance(gate_gdf, jax.Array) and isinstance(up_gdf, jax.Array):
        return grouped_swiglu(x_cd, gate_gdf, up_gdf, group_sizes_g)
    if isinstance(gate_gdf, Quantized) and isinstance(up_gdf, Quantized):
        return quantized_matmul.grouped_gated(x_cd, gate_gdf, up_gdf, group_sizes_g)
    return nn.silu(grouped(x_cd, gate_gdf, group_sizes_g)) * grouped(x_cd, up_gdf, group_sizes_g)


class Linear(nn.Module):
    """`linear` with parameters of its own: ``kernel``, and ``bias`` if there is one.

    Attributes:
      features: the size of the output's last dimension, or the sizes of its last ones.
      axes: logical axes of the kernel, inputs first.
      dtype: in which the product is computed.
      std: of the normal distribution from which the kernel is drawn.
      contract: how many of the input's last dimensions the kernel takes.
      bias: whether one is added.
    """

    features: int | Sequence[int]
    axes: Axes
    dtype: DTypeLike
    std: float
    contract: int = 1
    bias: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        features = (self.features,) if isinstance(self.features, int) else tuple(self.features)
        shape = (*x.shape[-self.contract :], *features)
        init = nn.initializers.normal(self.std)
        kernel = declare(self, "kernel", shape, self.axes, init, inputs=self.contract - 1)
        bias = None
        if self.bias:
            bias = declare(self, "bias", features, self.axes[self.contract :], nn.initializers.zeros)
        return linear(x, kernel, bias, dtype=self.dtype, contract=self.contract)


class RMSNorm(nn.Module):
    """Root-mean-square norm: float32 inside, cast to the input's dtype, then times the weight, as the reference does.

    The weight multiplies after the cast: in bfloat16 the order matters (``DeepseekV2RMSNorm``).
    """

    eps: float
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = declare(self, "scale", x.shape[-1:], (self.axis_name,), nn.initializers.ones)
        x32 = x.astype(jnp.float32)
        normed = x32 * lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + self.eps)
        return normed.astype(x.dtype) * scale.astype(x.dtype)


class GatedMLP(nn.Module):
    """SwiGLU, down(silu(gate(x)) · up(x)): the MLP of dense layers and of the shared experts."""

    width: int
    dtype: DTypeLike
    std: float

    @nn.compact
    def __call__(self, x_btd: jax.Array, *, decode: bool = False) -> jax.Array:
        """[B, T, D] → [B, T, D]; ``decode``: static, whether this is a decode step."""
        axes = ("embed", "mlp")
        gate = Linear(self.width, axes, self.dtype, self.std, name="gate_proj")(x_btd)
        up = Linear(self.width, axes, self.dtype, self.std, name="up_proj")(x_btd)
        hidden = constrain(nn.silu(gate) * up, batch_axis(decode), "length", "mlp")
        return Linear(x_btd.shape[-1], axes[::-1], self.dtype, self.std, name="down_proj")(hidden)


def rotate_half(x_bthd: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotary embedding over pairs (i, i + width/2): the layout of multi-head attention (tiny).

    Args:
      x_bthd: [B, T, H, width]. cos, sin: f32[B, T, width/2].
    """
    first, second = jnp.split(x_bthd.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[:, :, None], sin[:, :, None]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x_bthd.dtype)


def rotate_interleaved(x_bthd: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotary embedding over pairs (2i, 2i + 1), written as halves: the layout of latent attention (small, base)."""
    pairs = x_bthd.reshape(*x_bthd.shape[:-1], -1, 2)
    return rotate_half(jnp.concatenate([pairs[..., 0], pairs[..., 1]], axis=-1), cos, sin)
