"""DeepSeekMoE: router, routed experts and shared experts (DeepSeekMoE §3, DeepSeek-V3 §2.1.2, FACTS §4).

Dropless: every token reaches each of its experts, whatever the balance; there is no capacity.
"""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike

from dsvl2_jax.config import LanguageConfig
from dsvl2_jax.grouped_matmul import grouped_matmul
from dsvl2_jax.layers import GatedMLP, partitioned
from dsvl2_jax.sharding import ACTIVATION_RULES, PARAM_RULES, ambient_mesh_shape, partition_spec

EXPERT_PRODUCT = "expert_product"  # the name of the experts' matrix products for rematerialisation policies


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Routing:
    """What the router decided for T tokens, and what the balance loss needs."""

    experts: jax.Array  # i32[B, T, K], chosen experts
    weights: jax.Array  # f32[B, T, K], factor on each expert's output
    scores: jax.Array  # f32[B, T, E], softmax or sigmoid of the router's logits, without bias


def choose_experts(logits: jax.Array, bias: jax.Array | None, config: LanguageConfig) -> Routing:
    """Turns router logits into chosen experts and their weights.

    Args:
      logits: f32[B, T, E].
      bias: f32[E] of ``noaux_tc``, added for the choice only; None for the other methods.
      config: names the scoring function and the method.
    """
    cfg = config
    scores = nn.softmax(logits, axis=-1) if cfg.scoring_func == "softmax" else nn.sigmoid(logits)
    choice = scores if bias is None else scores + bias
    if cfg.topk_method in ("group_limited_greedy", "noaux_tc") and cfg.n_group > 1:
        grouped = choice.reshape(*choice.shape[:-1], cfg.n_group, -1)
        if cfg.topk_method == "noaux_tc":
            best = min(2, grouped.shape[-1])
            group_scores = lax.top_k(grouped, best)[0].sum(-1)
        else:
            group_scores = grouped.max(-1)
        chosen_groups = lax.top_k(group_scores, cfg.topk_group)[1]
        inside = jax.nn.one_hot(chosen_groups, cfg.n_group, dtype=jnp.bool_).any(-2)
        # The official code fills with 0.0, so a negative biased score inside a group can lose to one outside.
        choice = jnp.where(inside[..., None], grouped, 0.0).reshape(choice.shape)
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
        cfg = self.config
        init = nn.initializers.normal(cfg.initializer_range)
        shape = (x_btd.shape[-1], cfg.n_routed_experts)
        kernel = self.param("kernel", partitioned(init, ("embed", "router_expert")), shape)
        bias = None
        if cfg.topk_method == "noaux_tc":
            bias = self.param("correction_bias", partitioned(nn.initializers.zeros, ("router_expert",)), shape[1:])
            bias = lax.stop_gradient(bias.astype(jnp.float32))
        logits = jnp.dot(x_btd.astype(jnp.float32), kernel.astype(jnp.float32), precision=lax.Precision.HIGHEST)
        return choose_experts(logits, bias, cfg)


class RoutedExperts(nn.Module):
    """The routed experts: E gated MLPs of width F, of which each token visits K."""

    config: LanguageConfig
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x_btd: jax.Array, experts_btk: jax.Array, weights_btk: jax.Array) -> jax.Array:
        """Returns the weighted sum of the chosen experts' outputs, [B, T, D].

        An expert id outside 0 … E−1 adds nothing: padding tokens carry E.
        """
        cfg = self.config
        d, e, f = x_btd.shape[-1], cfg.n_routed_experts, cfg.moe_intermediate_size
        into, back = ("expert", "embed", "expert_mlp"), ("expert", "expert_mlp", "embed")

        def weight(name: str, axes: tuple[str, ...], shape: tuple[int, ...]) -> jax.Array:
            init = partitioned(nn.initializers.normal(cfg.initializer_range), axes)
            return self.param(name, init, shape).astype(self.dtype)

        gate = weight("gate_proj", into, (e, d, f))
        up = weight("up_proj", into, (e, d, f))
        down = weight("down_proj", back, (e, f, d))

        mesh_shape = ambient_mesh_shape()
        if mesh_shape is None:
            return run_experts(x_btd, experts_btk, weights_btk, gate, up, down, 0)

        # Expert parallel: a device has the tokens of its data shard and the weights of its own experts (and its
        # own slice of their width); partial sums are added over both axes.
        def spec(shape, axes, rules):
            return partition_spec(shape, axes, mesh_shape, rules)

        tokens = spec(x_btd.shape, ("batch", "length", None), ACTIVATION_RULES)
        into_spec, back_spec = spec(gate.shape, into, PARAM_RULES), spec(down.shape, back, PARAM_RULES)
        summed = tuple(axis for axis in (into_spec[0], into_spec[2]) if axis is not None)

        def local(x, experts, weights, gate, up, down):
            first = lax.axis_index("expert") * gate.shape[0] if into_spec[0] is not None else 0
            out = run_experts(x, experts, weights, gate, up, down, first)
            return lax.psum(out, summed) if summed else out

        shards = jax.shard_map(
            local,
            in_specs=(tokens, tokens, tokens, into_spec, into_spec, back_spec),
            out_specs=PartitionSpec(*tokens),
            check_vma=False,
        )
        return shards(x_btd, experts_btk, weights_btk, gate, up, down)


def run_experts(
    x_btd: jax.Array,
    experts_btk: jax.Array,
    weights_btk: jax.Array,
    gate: jax.Array,
    up: jax.Array,
    down: jax.Array,
    first_expert: int | jax.Array,
) -> jax.Array:
    """The experts ``first_expert …`` held here, applied to the tokens routed to them.

    Args:
      x_btd: [B, T, D]. experts_btk: i32[B, T, K]. weights_btk: f32[B, T, K].
      gate, up: [E', D, F']. down: [E', F', D].
      first_expert: id of the first of the E' experts; assignments to others count as zero.

    Returns:
      [B, T, D], the weighted sum in float32, cast to the dtype of ``x_btd``.
    """
    b, t, d = x_btd.shape
    count, top_k = gate.shape[0], experts_btk.shape[-1]
    local = experts_btk.reshape(-1) - first_expert
    here = (local >= 0) & (local < count)
    local = jnp.where(here, local, count)  # sorted last, in no group
    order = jnp.argsort(local, stable=True)
    group_sizes = (local[:, None] == jnp.arange(count)).sum(0, dtype=jnp.int32)

    rows = x_btd.reshape(b * t, d)[order // top_k]  # [B·T·K, D]

    def product(rows: jax.Array, weights: jax.Array) -> jax.Array:
        return checkpoint_name(grouped_matmul(rows, weights, group_sizes), EXPERT_PRODUCT)

    out = product(nn.silu(product(rows, gate)) * product(rows, up), down)

    restored = out[jnp.argsort(order)].reshape(b, t, top_k, d)
    mixed = jnp.einsum("btkd,btk->btd", restored.astype(jnp.float32), weights_btk, precision=lax.Precision.HIGHEST)
    return mixed.astype(x_btd.dtype)


class MoE(nn.Module):
    """Router, routed experts and shared experts of one layer."""

    config: LanguageConfig
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x_btd: jax.Array, valid_bt: jax.Array | None) -> tuple[jax.Array, Routing]:
        """Applies the layer.

        Args:
          x_btd: [B, T, D], normed.
          valid_bt: bool[B, T]; False marks padding, which visits no expert. None: all tokens are real.

        Returns:
          [B, T, D] and the router's decisions.
        """
        cfg = self.config
        routing = Router(cfg, name="router")(x_btd)
        experts = routing.experts
        if valid_bt is not None:
            experts = jnp.where(valid_bt[..., None], experts, cfg.n_routed_experts)
        out = RoutedExperts(cfg, self.dtype, name="experts")(x_btd, experts, routing.weights)
        if cfg.n_shared_experts:
            width = cfg.n_shared_experts * cfg.moe_intermediate_size
            out = out + GatedMLP(width, self.dtype, cfg.initializer_range, name="shared_experts")(x_btd)
        return out, routing
