"""How a weight may be kept: as a plain array, quantized, or with an adapter. The model's code does not ask which.

In the nested dict of parameters a weight is an array or, in its place, a dict of arrays:

  quantized  {"int8" | "int4" | "float8": values, "scale": scale}, see `dsvl2_jax.kernels.quantized`
  adapted    {"base": an array or a quantized weight, "lora_a": [*lead, *inputs, R], "lora_b": [*lead, R, *outputs], …}

``lead`` are the axes that count experts; what else an adapted weight may have is in `Adapted`. `dsvl2_jax.model.layers`
turns such dicts into the objects below where a module declares its weight, and multiplies with them.

Tested in tests/model/test_weights.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from dsvl2_jax.kernels.quantized import KINDS, Quantized, dequantize


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Adapted:
    """A weight with a low-rank addition: base + lora_a · lora_b (LoRA, arXiv 2106.09685), then times ``gain`` (DoRA).

    Several adapters lie side by side along R, each with ranks of its own; ``owner`` says whose each rank is, ``rows``
    which adapter each row wants. What a row gets does not depend on the adapters of others.

    Attributes:
      base: the weight of the model.
      lora_a: [*lead, *inputs, R]. lora_b: [*lead, R, *outputs], the adapter's factor (alpha / rank) included.
      gain: of DoRA (arXiv 2402.09353), magnitude / norm of each output: [*lead, *outputs], or with ``owner``
        [adapters + 1, *lead, *outputs], whose last entry is of rows without an adapter; None: 1.
      owner: i32[R], or None: one adapter, for every row.
      rows: i32[B], -1 for a row without an adapter; None until `for_rows`.
      dropout: (f32 rate, key data of a random key), in training; None: no dropout.
    """

    base: jax.Array | Quantized
    lora_a: jax.Array
    lora_b: jax.Array
    gain: jax.Array | None = None
    owner: jax.Array | None = None
    rows: jax.Array | None = None
    dropout: tuple[jax.Array, jax.Array] | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return self.base.shape

    @property
    def ndim(self) -> int:
        return self.base.ndim

    def astype(self, dtype: DTypeLike) -> Adapted:
        """With every plain array in ``dtype``."""
        gain = None if self.gain is None else self.gain.astype(dtype)
        cast = {"base": self.base.astype(dtype), "lora_a": self.lora_a.astype(dtype), "gain": gain}
        return dataclasses.replace(self, lora_b=self.lora_b.astype(dtype), **cast)

    def dropped(self, x: jax.Array) -> jax.Array:
        """What enters ``lora_a``: x, in training with dropout."""
        if self.dropout is None:
            return x
        rate, key = self.dropout
        kept = jax.random.uniform(jax.random.wrap_key_data(key), x.shape) >= rate
        return jnp.where(kept, x / (1 - rate).astype(x.dtype), 0)

    def own_ranks(self, hidden: jax.Array) -> jax.Array:
        """Of x · lora_a, [B, …, R], the ranks of each row's own adapter; zeros elsewhere."""
        if self.owner is None:
            return hidden
        if self.rows is None:
            raise ValueError("several adapters lie side by side: say which each row wants (`for_rows`)")
        mask = self.rows[:, None] == self.owner
        return jnp.where(mask.reshape(len(mask), *(1,) * (hidden.ndim - 2), -1), hidden, 0)

    def row_gain(self, ndim: int) -> jax.Array | None:
        """The gain of each row's adapter, to multiply an output [B, …, *outputs] of ``ndim`` dimensions; None: 1."""
        if self.gain is None or self.owner is None:
            return self.gain
        chosen = self.gain[self.rows]
        return chosen.reshape(len(chosen), *(1,) * (ndim - chosen.ndim), *chosen.shape[1:])


Weight = jax.Array | Quantized | Adapted


def is_quantized(value: Any) -> bool:
    """True for the dict of a quantized weight."""
    return isinstance(value, Mapping) and any(kind in value for kind in KINDS)


def is_stored_weight(value: Any) -> bool:
    """True for a dict that stands in the place of a weight."""
    return is_quantized(value) or (isinstance(value, Mapping) and "base" in value)


def are_plain(params: Any) -> bool:
    """True for parameters all of which are plain arrays."""
    if not isinstance(params, Mapping):
        return True
    return not is_stored_weight(params) and all(are_plain(value) for value in params.values())


def weight_of(value: Any, packed_axis: int) -> Weight:
    """The weight that lies in the parameters as ``value``: an array, or a dict (see the module's text).

    Args:
      value: of the nested dict of parameters.
      packed_axis: the weight's last input axis, from the end.
    """
    if not isinstance(value, Mapping):
        return value
    if "base" not in value:
        kind = next(kind for kind in KINDS if kind in value)
        return Quantized(value[kind], value["scale"], kind, packed_axis)
    rest = {name: value[name] for name in ("lora_a", "lora_b", "gain", "owner", "rows") if name in value}
    dropout = (value["dropout_rate"], value["dropout_key"]) if "dropout_rate" in value else None
    weight = Adapted(weight_of(value["base"], packed_axis), **rest, dropout=dropout)
    if "magnitude" in value:
        weight = dataclasses.replace(weight, gain=_gain(weight, value["magnitude"], packed_axis))
    return weight


def _gain(weight: Adapted, magnitude: jax.Array, packed_axis: int) -> jax.Array:
    """magnitude / norm of (base + lora_a · lora_b) over its inputs; the norm counts as a constant (DoRA, §4.3)."""
    whole = lax.stop_gradient(merged(weight, packed_axis))
    inputs = whole.ndim - magnitude.ndim
    last = packed_axis % whole.ndim
    norm = jnp.sqrt(jnp.square(whole).sum(tuple(range(last - inputs + 1, last + 1))))
    return magnitude / norm


def merged(weight: Weight, packed_axis: int) -> jax.Array:
    """base + lora_a · lora_b, then times the gain, in float32: one plain array (one adapter, without dropout)."""
    if isinstance(weight, Quantized):
        return dequantize(weight, jnp.float32)
    if not isinstance(weight, Adapted):
        return weight.astype(jnp.float32)
    base = merged(weight.base, packed_axis)
    a, b = (x.astype(jnp.float32) for x in (weight.lora_a, weight.lora_b))
    last = packed_axis % base.ndim
    if last == base.ndim - 1:  # outputs lie before the input, as released: kv_b_proj
        delta = jnp.einsum("ir,r...->...i", a, b, precision=lax.Precision.HIGHEST)
    else:
        lead = a.ndim + b.ndim - 2 - base.ndim  # axes that both have
        lead_shape, rank = a.shape[:lead], a.shape[-1]
        flat = a.reshape(*lead_shape, -1, rank), b.reshape(*lead_shape, rank, -1)
        delta = jnp.matmul(*flat, precision=lax.Precision.HIGHEST).reshape(base.shape)
    whole = base + delta
    if weight.gain is None:
        return whole
    outputs = weight.gain.astype(jnp.float32)
    if last == base.ndim - 1:
        return whole * outputs[..., None]
    lead = a.ndim + b.ndim - 2 - base.ndim
    return whole * outputs.reshape(*outputs.shape[:lead], *(1,) * (last + 1 - lead), *outputs.shape[lead:])


def for_rows(params: Any, rows: jax.Array | None) -> Any:
    """Parameters whose adapted weights know which adapter each row of a batch wants.

    Args:
      params: nested dict, of the model or of a part of it.
      rows: i32[B], a number of `Adapted.owner`, or -1; None: no adapters lie side by side.
    """
    if rows is None or not isinstance(params, Mapping):
        return params
    if "owner" in params:
        return {**params, "rows": rows}
    return {name: for_rows(value, rows) for name, value in params.items()}


def taken_rows(weight: Weight, index: jax.Array) -> Weight:
    """The weight for a batch whose row i is row ``index[i]`` of the one that it was made for."""
    if isinstance(weight, Adapted) and weight.rows is not None:
        return dataclasses.replace(weight, rows=weight.rows[index])
    return weight


def own_dropout(weight: Weight, number: int | jax.Array) -> Weight:
    """The weight with another random key for its dropout, if it has any: one for each ``number``."""
    if not isinstance(weight, Adapted) or weight.dropout is None:
        return weight
    rate, key = weight.dropout
    own = jax.random.fold_in(jax.random.wrap_key_data(key), number)
    return dataclasses.replace(weight, dropout=(rate, jax.random.key_data(own)))
