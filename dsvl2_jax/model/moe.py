"""DeepSeekMoE (arXiv 2401.06066, §3; DeepSeek-V3, arXiv 2412.19437, §2.1.2): router, routed and shared experts.

Dropless: every token reaches each of its experts, whatever the balance; there is no capacity.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike

from dsvl2_jax.kernels.quantized import Quantized
from dsvl2_jax.model.config import LanguageConfig
from dsvl2_jax.model.expert_chunks import run_chunked
from dsvl2_jax.model.layers import GatedMLP, declare, grouped, grouped_gated, linear
from dsvl2_jax.model.weights import Adapted, Weight, own_dropout, taken_rows
from dsvl2_jax.sharding import ACTIVATION_RULES, PARAM_RULES, ambient_mesh_shape, batch_axis, mesh_axes, partition_spec


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Routing:
    """What the router decided for T tokens, and what the balance loss needs."""

    experts: jax.Array  # i32[B, T, K], chosen experts
    weights: jax.Array  # f32[B, T, K], factor on each expert's output
    scores: jax.Array  # f32[B, T, E], softmax or sigmoid of the router's logits, without bias


def choose_experts(logits_bte: jax.Array, bias_e: jax.Array | None, config: LanguageConfig) -> Routing:
    """Turns router logits into chosen experts and their weights.

    Args:
      logits_bte: f32[B, T, E].
      bias_e: f32[E] of ``noaux_tc``, added for the choice only; None for the other methods.
      config: names the scoring function and the method.
    """
    cfg = config
    scores = nn.softmax(logits_bte, axis=-1) if cfg.scoring_func == "softmax" else nn.sigmoid(logits_bte)
    choice = scores if bias_e is None else scores + bias_e
    if cfg.topk_method in ("group_limited_greedy", "noaux_tc") and cfg.n_group > 1:
        by_group = choice.reshape(*choice.shape[:-1], cfg.n_group, -1)
        if cfg.topk_method == "noaux_tc":
            best = min(2, by_group.shape[-1])
            group_scores = lax.top_k(by_group, best)[0].sum(-1)
        else:
            group_scores = by_group.max(-1)
        chosen_groups = lax.top_k(group_scores, cfg.topk_group)[1]
        inside = jax.nn.one_hot(chosen_groups, cfg.n_group, dtype=jnp.bool_).any(-2)
        # The official code fills with 0.0, so a negative biased score inside a group can lose to one outside.
        choice = jnp.where(inside[..., None], by_group, 0.0).reshape(choice.shape)
    experts = lax.top_k(choice, cfg.num_experts_per_tok)[1]
    # The scores are gathered by one-hot products: exact, and their gradient is no scatter.
    chosen = jax.nn.one_hot(experts, scores.shape[-1], dtype=scores.dtype)
    weights = jnp.einsum("btke,bte->btk", chosen, scores, precision=lax.Precision.HIGHEST)
    if cfg.norm_topk_prob and cfg.num_experts_per_tok > 1:
        weights = weights / (weights.sum(-1, keepdims=True) + 1e-20)
    return Routing(experts, weights * cfg.routed_scaling_factor, scores)


class Router(nn.Module):
    """Token → expert scores, in float32 whatever the model's dtype."""

    config: LanguageConfig

    @nn.compact
    def __call__(self, x_btd: jax.Array) -> Routing:
        """[B, T, D], normed → the chosen experts of each token."""
        cfg = self.config
        shape, axes = (x_btd.shape[-1], cfg.n_routed_experts), ("embed", "router_expert")
        kernel = declare(self, "kernel", shape, axes, nn.initializers.normal(cfg.initializer_range))
        bias = None
        if cfg.topk_method == "noaux_tc":
            bias = declare(self, "correction_bias", shape[1:], axes[1:], nn.initializers.zeros)
            bias = lax.stop_gradient(bias.astype(jnp.float32))
        return choose_experts(linear(x_btd, kernel, dtype=jnp.float32), bias, cfg)


class RoutedExperts(nn.Module):
    """The routed experts: E gated MLPs of width F, of which each token visits K."""

    config: LanguageConfig
    dtype: DTypeLike

    @nn.compact
    def __call__(
        self, x_btd: jax.Array, experts_btk: jax.Array, weights_btk: jax.Array, *, decode: bool = False
    ) -> jax.Array:
        """Returns the weighted sum of the chosen experts' outputs, [B, T, D].

        An expert id outside 0 … E−1 adds nothing: padding tokens carry E.
        """
        cfg = self.config
        d, e, f = x_btd.shape[-1], cfg.n_routed_experts, cfg.moe_intermediate_size
        into, back = ("expert", "embed", "expert_mlp"), ("expert", "expert_mlp", "embed")

        weights = ("gate_proj", (e, d, f), into), ("up_proj", (e, d, f), into), ("down_proj", (e, f, d), back)
        init = nn.initializers.normal(cfg.initializer_range)
        gate, up, down = (declare(self, *weight, init, inputs=1).astype(self.dtype) for weight in weights)
        if self.is_initializing():  # what follows declares nothing, and takes most of the time to trace
            return x_btd

        mesh_shape = ambient_mesh_shape()
        if mesh_shape is None:
            return run_experts(x_btd, experts_btk, weights_btk, gate, up, down)

        # Expert parallel: a device has the weights of its own experts (and its own slice of their width). It gets the
        # tokens of all devices that hold the other experts, and gives each back its tokens' sums.
        def spec(shape, axes, rules):
            return partition_spec(shape, axes, mesh_shape, rules)

        tokens = spec(x_btd.shape, (batch_axis(decode), "length", None), ACTIVATION_RULES)
        # The width is split as every one of the three weights can be: a quantized one between groups only.
        into_spec = spec((e, d, _splittable(down, f)), into, PARAM_RULES)
        of_expert, _, of_width = into_spec
        shards = mesh_shape["expert"] if of_expert else 1
        gathered = shards > 1 and "expert" in mesh_axes(tokens[0])
        summed = mesh_axes(of_width) + (("expert",) if shards > 1 and not gathered else ())

        @jax.named_scope("experts")  # shard_map begins names anew
        def local(x, experts, weights, *matrices):
            first = lax.axis_index("expert") * matrices[0].shape[0] if shards > 1 else 0
            if gathered:
                x, experts, weights = (_gathered(a) for a in (x, experts, weights))
                matrices = (_with_rows_of_all(matrix) for matrix in matrices)
            matrices = (_own_dropout(matrix, mesh_shape) for matrix in matrices)
            out = run_experts(x, experts, weights, *matrices, first, shards)
            if gathered:
                out = lax.psum_scatter(out, "expert", scatter_dimension=0, tiled=True)
            return lax.psum(out, summed) if summed else out

        over_shards = jax.shard_map(
            local,
            in_specs=(
                *(tokens, tokens, tokens),
                *(_specs(weight, (of_expert, None, of_width), tokens[0]) for weight in (gate, up)),
                _specs(down, (of_expert, of_width, None), tokens[0]),
            ),
            out_specs=PartitionSpec(*tokens),
            check_vma=False,
        )
        return over_shards(x_btd, experts_btk, weights_btk, gate, up, down)


def _gathered(x: jax.Array) -> jax.Array:
    return lax.all_gather(x, "expert", axis=0, tiled=True)


def _splittable(down_gfd: Weight, width: int) -> int:
    """Into how many equal parts an expert's width can be split at most: between groups of a quantized weight's inputs.

    Their number divides the width, so that gate and up, whose output it is, can be split alike.
    """
    base = down_gfd.base if isinstance(down_gfd, Adapted) else down_gfd
    return base.scale.shape[1] if isinstance(base, Quantized) and base.kind == "int4" else width


def _specs(weight: Weight, names: tuple[Any, ...], rows: Any) -> Any:
    """The PartitionSpecs of a weight's arrays, in a weight of the same form.

    Args:
      weight: [E, inputs, outputs]. names: the mesh axes of each of its axes. rows: those of the batch's rows.
    """
    expert, inputs, outputs = names
    if isinstance(weight, Quantized):
        # A scale has size 1 along the inputs, or an entry for each group of them.
        by_group = inputs if weight.scale.shape[1] > 1 else None
        specs = {"values": PartitionSpec(*names), "scale": PartitionSpec(expert, by_group, outputs)}
        return dataclasses.replace(weight, **specs)
    if not isinstance(weight, Adapted):
        return PartitionSpec(*names)
    optional = {
        "gain": (expert, outputs) if weight.owner is None else (None, expert, outputs),
        "owner": (None,),
        "rows": (rows,),
    }
    specs = {name: PartitionSpec(*spec) for name, spec in optional.items() if getattr(weight, name) is not None}
    dropout = None if weight.dropout is None else (PartitionSpec(), PartitionSpec())
    lora = {"lora_a": PartitionSpec(expert, inputs, None), "lora_b": PartitionSpec(expert, None, outputs)}
    return dataclasses.replace(weight, base=_specs(weight.base, names, rows), **lora, **specs, dropout=dropout)


def _with_rows_of_all(weight: Weight) -> Weight:
    """For the rows of all devices along ``expert``, whose tokens are gathered."""
    if isinstance(weight, Adapted) and weight.rows is not None:
        return dataclasses.replace(weight, rows=_gathered(weight.rows))
    return weight


def _own_dropout(weight: Weight, mesh_shape: dict[str, int]) -> Weight:
    """With a random key of the experts and tokens of this device; the devices along ``tensor`` share them."""
    for axis, size in mesh_shape.items():
        weight = own_dropout(weight, lax.axis_index(axis)) if size > 1 and axis != "tensor" else weight
    return weight


def run_experts(
    x_btd: jax.Array,
    experts_btk: jax.Array,
    weights_btk: jax.Array,
    gate_gdf: Weight,
    up_gdf: Weight,
    down_gfd: Weight,
    first_expert: int | jax.Array = 0,
    shards: int = 1,
) -> jax.Array:
    """The G experts from ``first_expert`` on, which are held here, applied to the tokens routed to them.

    Args:
      x_btd: [B, T, D].
      experts_btk: i32[B, T, K]; assignments to experts that are not held here count as zero.
      weights_btk: f32[B, T, K].
      gate_gdf, up_gdf: [G, D, F']. down_gfd: [G, F', D].
      first_expert: id of the first of the G experts.
      shards: E / G. Above 1, B·T·K / shards assignments are worked on at a time, until none is left: as many as an even
        routing gives, and whatever an uneven one does.

    Returns:
      [B, T, D], the weighted sum in float32, cast to the dtype of ``x_btd``.
    """
    b, t, d = x_btd.shape
    count, top_k = gate_gdf.shape[0], experts_btk.shape[-1]
    with jax.named_scope("dispatch"):
        local = experts_btk.reshape(-1) - first_expert
        is_held = (local >= 0) & (local < count)
        local = jnp.where(is_held, local, count)  # sorted last, in no group
        order = _sorted_by(local, count)
        group_sizes_g = (local[:, None] == jnp.arange(count)).sum(0, dtype=jnp.int32)
        x_td = x_btd.reshape(b * t, d)
    weights = gate_gdf, up_gdf, down_gfd
    if shards > 1:
        weights = (taken_rows(weight, jnp.arange(b * t) // t) for weight in weights)
        mixed = run_chunked(shards, x_td, weights_btk.reshape(-1), *weights, order, group_sizes_g)
        return mixed.reshape(b, t, d).astype(x_btd.dtype)

    with jax.named_scope("dispatch"):
        tokens = order // top_k
        rows_cd = x_td[tokens]  # C = B·T·K
        gate_gdf, up_gdf, down_gfd = (taken_rows(weight, tokens // t) for weight in weights)

    with jax.named_scope("mlp"):
        out_cd = grouped(grouped_gated(rows_cd, gate_gdf, up_gdf, group_sizes_g), down_gfd, group_sizes_g)
    with jax.named_scope("combine"):
        # The K choices lead, so that a register holds rows of tokens, and the sum over them is one pass.
        out_ktd = out_cd[_sorted_by(order, 0).reshape(-1, top_k).T].astype(jnp.float32)
        mixed_td = _mixed(out_ktd, weights_btk.reshape(-1, top_k).T)
        return mixed_td.reshape(b, t, d).astype(x_btd.dtype)


@jax.custom_vjp
def _mixed(out_ktd: jax.Array, weights_kt: jax.Array) -> jax.Array:
    """f32[T, D], the weighted sum over the K choices.

    XLA's compiler for CPUs writes out the weights at the size of what they weigh before it reduces; a choice after the
    other takes a fifth of the time.
    """

    def plain(out_ktd: jax.Array, weights_kt: jax.Array) -> jax.Array:
        return (out_ktd * weights_kt[..., None]).sum(0)

    def cpu(out_ktd: jax.Array, weights_kt: jax.Array) -> jax.Array:
        return functools.reduce(operator.add, (out_ktd[k] * weights_kt[k][:, None] for k in range(len(weights_kt))))

    return lax.platform_dependent(out_ktd, weights_kt, cpu=cpu, default=plain)


def _mixed_forward(out_ktd, weights_kt):
    return _mixed(out_ktd, weights_kt), (out_ktd, weights_kt)


def _mixed_backward(residuals, dmixed_td):
    out_ktd, weights_kt = residuals
    return dmixed_td * weights_kt[..., None], (out_ktd * dmixed_td).sum(-1)


_mixed.defvjp(_mixed_forward, _mixed_backward)


def _sorted_by(keys: jax.Array, most: int) -> jax.Array:
    """``jnp.argsort(keys, stable=True)`` of i32[N] from 0 to ``most``; ``most`` 0: of a permutation of N.

    One array of key and index is sorted instead of two: the TPU compiler takes a third of the time.
    """
    count = keys.shape[0]
    if (max(most, count) + 1) * count > jnp.iinfo(jnp.int32).max:
        return jnp.argsort(keys, stable=True)
    packed = lax.sort(keys * count + jnp.arange(count, dtype=keys.dtype), is_stable=False)
    return packed % count


class MoE(nn.Module):
    """Router, routed experts and shared experts of one layer."""

    config: LanguageConfig
    dtype: DTypeLike

    @nn.compact
    def __call__(
        self, x_btd: jax.Array, valid_bt: jax.Array | None, *, decode: bool = False
    ) -> tuple[jax.Array, Routing]:
        """Applies the layer.

        Args:
          x_btd: [B, T, D], normed.
          valid_bt: bool[B, T]; False marks padding, which visits no expert. None: all tokens are real.
          decode: static, True in a decode step: tokens then stay split over ``data`` alone.

        Returns:
          [B, T, D] and the router's decisions.
        """
        cfg = self.config
        routing = Router(cfg, name="router")(x_btd)
        experts = routing.experts
        if valid_bt is not None:
            experts = jnp.where(valid_bt[..., None], experts, cfg.n_routed_experts)
        out = RoutedExperts(cfg, self.dtype, name="experts")(x_btd, experts, routing.weights, decode=decode)
        if cfg.n_shared_experts:
            width = cfg.n_shared_experts * cfg.moe_intermediate_size
            out = out + GatedMLP(width, self.dtype, cfg.initializer_range, name="shared_experts")(x_btd, decode=decode)
        return out, routing
