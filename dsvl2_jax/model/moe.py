"""DeepSeekMoE: router, routed experts and shared experts (DeepSeekMoE §3, DeepSeek-V3 §2.1.2, FACTS §4).

Dropless: every token reaches each of its experts, whatever the balance; there is no capacity.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike

from dsvl2_jax.kernels.grouped_matmul import grouped_matmul, grouped_outer, grouped_transposed
from dsvl2_jax.model.config import LanguageConfig
from dsvl2_jax.model.layers import GatedMLP, partitioned
from dsvl2_jax.sharding import ACTIVATION_RULES, PARAM_RULES, ambient_mesh_shape, batch_axis, mesh_axes, partition_spec

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
    def __call__(
        self, x_btd: jax.Array, experts_btk: jax.Array, weights_btk: jax.Array, *, decode: bool = False
    ) -> jax.Array:
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
            return run_experts(x_btd, experts_btk, weights_btk, gate, up, down)

        # Expert parallel: a device has the weights of its own experts (and its own slice of their width). It gets the
        # tokens of all devices that hold the other experts, and gives each back its tokens' sums.
        def spec(shape, axes, rules):
            return partition_spec(shape, axes, mesh_shape, rules)

        tokens = spec(x_btd.shape, (batch_axis(decode), "length", None), ACTIVATION_RULES)
        into_spec, back_spec = spec(gate.shape, into, PARAM_RULES), spec(down.shape, back, PARAM_RULES)
        shards = mesh_shape["expert"] if into_spec[0] else 1
        gathered = shards > 1 and "expert" in mesh_axes(tokens[0])
        summed = mesh_axes(into_spec[2]) + (("expert",) if shards > 1 and not gathered else ())

        def local(x, experts, weights, gate, up, down):
            first = lax.axis_index("expert") * gate.shape[0] if shards > 1 else 0
            if gathered:
                given = x, experts, weights
                x, experts, weights = (lax.all_gather(a, "expert", axis=0, tiled=True) for a in given)
            out = run_experts(x, experts, weights, gate, up, down, first, shards)
            if gathered:
                out = lax.psum_scatter(out, "expert", scatter_dimension=0, tiled=True)
            return lax.psum(out, summed) if summed else out

        over_shards = jax.shard_map(
            local,
            in_specs=(tokens, tokens, tokens, into_spec, into_spec, back_spec),
            out_specs=PartitionSpec(*tokens),
            check_vma=False,
        )
        return over_shards(x_btd, experts_btk, weights_btk, gate, up, down)


def run_experts(
    x_btd: jax.Array,
    experts_btk: jax.Array,
    weights_btk: jax.Array,
    gate: jax.Array,
    up: jax.Array,
    down: jax.Array,
    first_expert: int | jax.Array = 0,
    shards: int = 1,
) -> jax.Array:
    """The experts ``first_expert …`` held here, applied to the tokens routed to them.

    Args:
      x_btd: [B, T, D]. experts_btk: i32[B, T, K]. weights_btk: f32[B, T, K].
      gate, up: [E', D, F']. down: [E', F', D].
      first_expert: id of the first of the E' experts; assignments to others count as zero.
      shards: E / E'. Above 1, B·T·K / shards assignments are worked on at a time, until none is left: as many
        as an even routing gives, and whatever an uneven one does.

    Returns:
      [B, T, D], the weighted sum in float32, cast to the dtype of ``x_btd``.
    """
    b, t, d = x_btd.shape
    count, top_k = gate.shape[0], experts_btk.shape[-1]
    local = experts_btk.reshape(-1) - first_expert
    here = (local >= 0) & (local < count)
    local = jnp.where(here, local, count)  # sorted last, in no group
    order = _sorted_by(local, count)
    group_sizes = (local[:, None] == jnp.arange(count)).sum(0, dtype=jnp.int32)
    flat = x_btd.reshape(b * t, d)
    if shards > 1:
        mixed = _run_chunked(shards, flat, weights_btk.reshape(-1), gate, up, down, order, group_sizes)
        return mixed.reshape(b, t, d).astype(x_btd.dtype)

    rows = flat[order // top_k]  # [B·T·K, D]

    def product(rows: jax.Array, weights: jax.Array) -> jax.Array:
        return checkpoint_name(grouped_matmul(rows, weights, group_sizes), EXPERT_PRODUCT)

    out = product(nn.silu(product(rows, gate)) * product(rows, up), down)

    restored = out[_sorted_by(order, 0)].reshape(b, t, top_k, d)
    mixed = jnp.einsum("btkd,btk->btd", restored.astype(jnp.float32), weights_btk, precision=lax.Precision.HIGHEST)
    return mixed.astype(x_btd.dtype)


def _sorted_by(keys: jax.Array, most: int) -> jax.Array:
    """``jnp.argsort(keys, stable=True)`` of i32[N] from 0 to ``most``; ``most`` 0: of a permutation of N.

    One array of key and index is sorted instead of two: the TPU compiler takes a third of the time.
    """
    count = keys.shape[0]
    if (max(most, count) + 1) * count > jnp.iinfo(jnp.int32).max:
        return jnp.argsort(keys, stable=True)
    packed = lax.sort(keys * count + jnp.arange(count, dtype=keys.dtype), is_stable=False)
    return packed % count


@dataclasses.dataclass(frozen=True)
class _Chunk:
    """Some consecutive rows of the assignments sorted by expert."""

    assignments: jax.Array  # i32[C], of B·T·K
    tokens: jax.Array  # i32[C]
    inside: jax.Array  # bool[C], False beyond the last group
    weights: jax.Array  # f32[C, 1], zero beyond the last group
    group_sizes: jax.Array  # i32[E']


def _chunks(
    shards: int, weights: jax.Array, order: jax.Array, group_sizes: jax.Array, tokens: int
) -> tuple[Callable[[jax.Array], _Chunk], jax.Array]:
    """(a function from the index of a chunk to the chunk, how many chunks there are)."""
    total = order.shape[0]
    size = -(-total // shards)
    padded = jnp.pad(order, (0, size))
    ends = jnp.cumsum(group_sizes)

    def chunk(i: jax.Array) -> _Chunk:
        start = i * size
        assignments = lax.dynamic_slice_in_dim(padded, start, size)
        inside = start + jnp.arange(size) < ends[-1]
        own = jnp.clip(ends - start, 0, size)
        return _Chunk(
            assignments,
            assignments // (total // tokens),
            inside,
            jnp.where(inside, weights[assignments], 0.0)[:, None],
            jnp.diff(own, prepend=0),
        )

    return chunk, -(-ends[-1] // size)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _run_chunked(
    shards: int,
    x: jax.Array,
    weights: jax.Array,
    gate: jax.Array,
    up: jax.Array,
    down: jax.Array,
    order: jax.Array,
    group_sizes: jax.Array,
) -> jax.Array:
    """The weighted sums of `run_experts`, f32[tokens, D], a chunk of the assignments at a time.

    Args:
      x: [tokens, D]. weights: f32[tokens · K].
      order: i32[tokens · K], the assignments sorted by expert. group_sizes: i32[E'], of the experts held here.
    """
    chunk_at, count = _chunks(shards, weights, order, group_sizes, x.shape[0])

    def body(i: jax.Array, out: jax.Array) -> jax.Array:
        chunk = chunk_at(i)
        rows = x[chunk.tokens]
        hidden = nn.silu(grouped_matmul(rows, gate, chunk.group_sizes)) * grouped_matmul(rows, up, chunk.group_sizes)
        made = grouped_matmul(hidden, down, chunk.group_sizes)
        return out.at[chunk.tokens].add(made.astype(jnp.float32) * chunk.weights)

    return lax.fori_loop(0, count, body, jnp.zeros(x.shape, jnp.float32))


def _run_chunked_forward(shards: int, *given: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    return _run_chunked(shards, *given), given


def _run_chunked_backward(shards: int, given: tuple[jax.Array, ...], cotangent: jax.Array) -> tuple[Any, ...]:
    """Works out the experts' hidden rows again; their output is not needed."""
    x, weights, gate, up, down, order, group_sizes = given
    chunk_at, count = _chunks(shards, weights, order, group_sizes, x.shape[0])
    cotangent = cotangent.astype(x.dtype)  # which it had before the sum

    def body(i: jax.Array, bars: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        x_bar, weights_bar, gate_bar, up_bar, down_bar = bars
        chunk = chunk_at(i)

        def back(rows: jax.Array, matrices: jax.Array) -> jax.Array:
            return grouped_transposed(rows, matrices, chunk.group_sizes)

        def outer(total: jax.Array, rows: jax.Array, rows_bar: jax.Array) -> jax.Array:
            return grouped_outer(rows, rows_bar, chunk.group_sizes, total)

        rows = x[chunk.tokens]
        gated, lifted = (grouped_matmul(rows, matrices, chunk.group_sizes) for matrices in (gate, up))
        hidden, pull = jax.vjp(lambda a, b: nn.silu(a) * b, gated, lifted)
        made_bar = cotangent[chunk.tokens]
        unweighted = back(made_bar, down)  # times the weight: the hidden rows' cotangent
        weight_bar = (hidden.astype(jnp.float32) * unweighted.astype(jnp.float32)).sum(-1)
        weight_bar = jnp.where(chunk.inside, weight_bar, 0.0)
        gated_bar, lifted_bar = pull((unweighted * chunk.weights).astype(hidden.dtype))
        rows_bar = back(gated_bar, gate) + back(lifted_bar, up)
        return (
            x_bar.at[chunk.tokens].add(rows_bar.astype(jnp.float32)),
            weights_bar.at[chunk.assignments].add(weight_bar),
            outer(gate_bar, rows, gated_bar),
            outer(up_bar, rows, lifted_bar),
            outer(down_bar, hidden, (made_bar * chunk.weights).astype(x.dtype)),
        )

    # Few experts are in two chunks, so their gradients may be added in the dtype in which they are handed on.
    dtypes = jnp.float32, jnp.float32, gate.dtype, up.dtype, down.dtype
    zeros = tuple(jnp.zeros(a.shape, dtype) for a, dtype in zip(given, dtypes, strict=False))
    bars = lax.fori_loop(0, count, body, zeros)
    return *(bar.astype(a.dtype) for bar, a in zip(bars, given, strict=False)), None, None


_run_chunked.defvjp(_run_chunked_forward, _run_chunked_backward)


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
