"""The experts held by one device, applied to a chunk of the assignments at a time: memory as an even routing needs it.

Tested in tests/model/test_moe.py, and with adapters in tests/train/objectives/test_adapter.py.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Callable, Iterable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from dsvl2_jax.kernels.grouped_matmul import grouped_transposed, grouped_weighted, tgmm
from dsvl2_jax.model.layers import grouped, grouped_gated
from dsvl2_jax.model.weights import Weight, own_dropout, taken_rows


@dataclasses.dataclass(frozen=True)
class _Chunk:
    """C consecutive ones of the assignments sorted by expert."""

    assignments: jax.Array  # i32[C], of tokens · K
    tokens: jax.Array  # i32[C]
    inside: jax.Array  # bool[C], False beyond the last group
    weights: jax.Array  # f32[C, 1], zero beyond the last group
    group_sizes: jax.Array  # i32[G]


def _chunks(
    shards: int, weights: jax.Array, order: jax.Array, group_sizes_g: jax.Array, tokens: int
) -> tuple[Callable[[jax.Array], _Chunk], jax.Array]:
    """(a function from the index of a chunk to the chunk, how many chunks there are)."""
    total = order.shape[0]
    size = -(-total // shards)
    padded = jnp.pad(order, (0, size))
    ends_g = jnp.cumsum(group_sizes_g)

    def chunk(i: jax.Array) -> _Chunk:
        start = i * size
        assignments = lax.dynamic_slice_in_dim(padded, start, size)
        inside = start + jnp.arange(size) < ends_g[-1]
        ends_in_chunk = jnp.clip(ends_g - start, 0, size)
        return _Chunk(
            assignments,
            assignments // (total // tokens),
            inside,
            jnp.where(inside, weights[assignments], 0.0)[:, None],
            jnp.diff(ends_in_chunk, prepend=0),
        )

    return chunk, -(-ends_g[-1] // size)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def run_chunked(
    shards: int,
    x_td: jax.Array,
    weights: jax.Array,
    gate_gdf: Weight,
    up_gdf: Weight,
    down_gfd: Weight,
    order: jax.Array,
    group_sizes_g: jax.Array,
) -> jax.Array:
    """The weighted sums of `dsvl2_jax.model.moe.run_experts`, f32[tokens, D], a chunk of the assignments at a time.

    Of the weights, those arrays alone have gradients that are differentiated: of an adapter, and of no frozen base.

    Args:
      x_td: [tokens, D]. weights: f32[tokens · K].
      gate_gdf, up_gdf, down_gfd: of the G experts held here; where rows want adapters of their own, ``rows`` are those
        of the tokens.
      order: i32[tokens · K], the assignments sorted by expert. group_sizes_g: i32[G].
    """
    chunk_at, count = _chunks(shards, weights, order, group_sizes_g, x_td.shape[0])

    def body(i: jax.Array, sums_td: jax.Array) -> jax.Array:
        with jax.named_scope("dispatch"):
            chunk = chunk_at(i)
            rows_cd = x_td[chunk.tokens]
            gate, up, down = (_of_chunk(weight, i, chunk) for weight in (gate_gdf, up_gdf, down_gfd))
        with jax.named_scope("mlp"):
            hidden_cf = grouped_gated(rows_cd, gate, up, chunk.group_sizes)
            if isinstance(down, jax.Array):
                out_cd = grouped_weighted(hidden_cf, down, chunk.group_sizes, chunk.weights[:, 0])
            else:
                out_cd = grouped(hidden_cf, down, chunk.group_sizes).astype(jnp.float32) * chunk.weights
        with jax.named_scope("combine"):
            return sums_td.at[chunk.tokens].add(out_cd)

    return lax.fori_loop(0, count, body, jnp.zeros(x_td.shape, jnp.float32))


def _of_chunk(weight: Weight, number: jax.Array, chunk: _Chunk) -> Weight:
    return own_dropout(taken_rows(weight, chunk.tokens), number)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class _Trained:
    """Of each array of gate, up and down, in their order, whether it is differentiated."""

    arrays: tuple[bool, ...]


def _forward(shards: int, *arguments: Any) -> tuple[jax.Array, tuple[Any, ...]]:
    """``arguments``: those of `run_chunked`, whose every array says whether it is differentiated."""
    values, trained = (jax.tree.map(operator.attrgetter(name), arguments) for name in ("value", "perturbed"))
    return run_chunked(shards, *values), (values, _Trained(tuple(jax.tree.leaves(trained[2:5]))))


def _backward(shards: int, residuals: tuple[Any, ...], cotangent_td: jax.Array) -> tuple[Any, ...]:
    arguments, trained = residuals
    cotangent_td = cotangent_td.astype(arguments[0].dtype)  # which it had before the sum
    whole = all(isinstance(weight, jax.Array) for weight in arguments[2:5]) and all(trained.arrays)
    backward = _whole_backward if whole else functools.partial(_partial_backward, trained.arrays)
    return *backward(shards, *arguments, cotangent_td), None, None


def _partial_backward(
    trained: tuple[bool, ...],
    shards: int,
    x_td: jax.Array,
    weights: jax.Array,
    gate_gdf: Weight,
    up_gdf: Weight,
    down_gfd: Weight,
    order: jax.Array,
    group_sizes_g: jax.Array,
    cotangent_td: jax.Array,
) -> tuple[Any, ...]:
    """The gradients where of the weights some arrays are trained, or none: an adapter's, which are small.

    Args:
      trained: see `_Trained`.
    """
    chunk_at, count = _chunks(shards, weights, order, group_sizes_g, x_td.shape[0])
    arrays, structure = jax.tree.flatten((gate_gdf, up_gdf, down_gfd))

    def spread(chosen: Iterable[Any], others: Iterable[Any]) -> Any:
        """The three weights, of their arrays that are trained and of the others."""
        chosen = iter(chosen)
        return structure.unflatten(next(chosen) if own else other for own, other in zip(trained, others, strict=True))

    def body(i: jax.Array, gradients: tuple[Any, ...]) -> tuple[Any, ...]:
        dx_td, dweights, dchosen = gradients
        chunk = chunk_at(i)

        def run(rows_cd: jax.Array, weights_c1: jax.Array, chosen: list[jax.Array]) -> jax.Array:
            gate, up, down = (_of_chunk(weight, i, chunk) for weight in spread(chosen, arrays))
            hidden_cf = grouped_gated(rows_cd, gate, up, chunk.group_sizes)
            # The assignment's weight comes first, so that its gradient needs no output.
            return grouped((hidden_cf * weights_c1).astype(hidden_cf.dtype), down, chunk.group_sizes)

        chosen = [array for array, own in zip(arrays, trained, strict=True) if own]
        _, pullback = jax.vjp(run, x_td[chunk.tokens], chunk.weights, chosen)
        drows_cd, dweights_c1, dchosen_here = pullback(cotangent_td[chunk.tokens])
        return (
            dx_td.at[chunk.tokens].add(drows_cd.astype(jnp.float32)),
            dweights.at[chunk.assignments].add(jnp.where(chunk.inside, dweights_c1[:, 0], 0.0)),
            [total + d.astype(jnp.float32) for total, d in zip(dchosen, dchosen_here, strict=True)],
        )

    differentiated = (x_td, weights, [array for array, own in zip(arrays, trained, strict=True) if own])
    zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, jnp.float32), differentiated)
    gradients = lax.fori_loop(0, count, body, zeros)
    dx_td, dweights, dchosen = jax.tree.map(lambda g, a: g.astype(a.dtype), gradients, differentiated)
    return dx_td, dweights, *spread(dchosen, [None] * len(arrays))


def _whole_backward(
    shards: int,
    x_td: jax.Array,
    weights: jax.Array,
    gate_gdf: jax.Array,
    up_gdf: jax.Array,
    down_gfd: jax.Array,
    order: jax.Array,
    group_sizes_g: jax.Array,
    cotangent_td: jax.Array,
) -> tuple[jax.Array, ...]:
    """The gradients where plain weights are trained.

    Computes the experts' hidden rows again; their output is not needed.
    """
    chunk_at, count = _chunks(shards, weights, order, group_sizes_g, x_td.shape[0])

    def body(i: jax.Array, gradients: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        dx_td, dweights, dgate_gdf, dup_gdf, ddown_gfd = gradients
        chunk = chunk_at(i)

        def back(rows: jax.Array, weights: jax.Array) -> jax.Array:
            return grouped_transposed(rows, weights, chunk.group_sizes)

        def outer(total: jax.Array, rows: jax.Array, drows: jax.Array) -> jax.Array:
            return tgmm(rows, drows, chunk.group_sizes, total)

        rows_cd = x_td[chunk.tokens]
        gate_cf, up_cf = (grouped(rows_cd, weight, chunk.group_sizes) for weight in (gate_gdf, up_gdf))
        hidden_cf, pullback = jax.vjp(lambda gate, up: nn.silu(gate) * up, gate_cf, up_cf)
        dout_cd = cotangent_td[chunk.tokens]
        dhidden_cf = back(dout_cd, down_gfd)  # without the assignment's weight, whose gradient it gives
        dweight_c = (hidden_cf.astype(jnp.float32) * dhidden_cf.astype(jnp.float32)).sum(-1)
        dweight_c = jnp.where(chunk.inside, dweight_c, 0.0)
        dgate_cf, dup_cf = pullback((dhidden_cf * chunk.weights).astype(hidden_cf.dtype))
        drows_cd = back(dgate_cf, gate_gdf) + back(dup_cf, up_gdf)
        return (
            dx_td.at[chunk.tokens].add(drows_cd.astype(jnp.float32)),
            dweights.at[chunk.assignments].add(dweight_c),
            outer(dgate_gdf, rows_cd, dgate_cf),
            outer(dup_gdf, rows_cd, dup_cf),
            outer(ddown_gfd, hidden_cf, (dout_cd * chunk.weights).astype(x_td.dtype)),
        )

    # Few experts are in two chunks, so their gradients may be added in the dtype in which they are returned.
    differentiated = x_td, weights, gate_gdf, up_gdf, down_gfd
    dtypes = jnp.float32, jnp.float32, gate_gdf.dtype, up_gdf.dtype, down_gfd.dtype
    zeros = tuple(jnp.zeros(a.shape, dtype) for a, dtype in zip(differentiated, dtypes, strict=True))
    gradients = lax.fori_loop(0, count, body, zeros)
    return tuple(g.astype(a.dtype) for g, a in zip(gradients, differentiated, strict=True))


run_chunked.defvjp(_forward, _backward, symbolic_zeros=True)
