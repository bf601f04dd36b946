"""A mixture of experts for the few tokens of a decode step, on NVIDIA GPUs: three Pallas Triton kernels.

`choose_experts` takes scores to chosen experts; `gate_up` and `down` read the chosen experts' matrices where they lie.
A program finds the rows that visit its expert by itself, so that nothing is sorted, gathered or scattered back, and an
expert's weights are read once for all of its rows.

Tested in tests/model/test_gpu_decode.py and tests/kernels/test_gpu_decode.py; `dsvl2_jax.model.gpu_decode` calls them.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from dsvl2_jax.kernels.gpu_few_rows import (
    MIN_ROWS,
    both,
    column_block,
    column_mask,
    compiler_params,
    depth_step,
    load_tile,
    multiply,
    row_count,
    row_mask,
    stored_size,
    tile,
)
from dsvl2_jax.kernels.triton import cost_metadata
from dsvl2_jax.runtime.lazy import LazyModule

# Only what traces these kernels needs them.
pl = LazyModule("jax.experimental.pallas")
plgpu = LazyModule("jax.experimental.pallas.triton")

NONE = -1e30  # below every score


@functools.partial(jax.jit, static_argnames=("count", "scoring", "normalize", "factor", "interpret"))
def choose_experts(
    logits_me: jax.Array,
    bias_e: jax.Array | None,
    active_m: jax.Array,
    *,
    count: int,
    scoring: str,
    normalize: bool,
    factor: float,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """The experts of each token, as `dsvl2_jax.model.moe.choose_experts` without groups of experts.

    Args:
      logits_me: f32[M, E]. bias_e: f32[E], added to the scores for the choice alone; None: none is.
      active_m: i32[M], 0 for a token that visits no expert.
      count: K, how many are chosen, the highest score first, of equal ones the first expert.
      scoring: "softmax" or "sigmoid". normalize: weights are divided by their sum. factor: on the weights.

    Returns:
      i32[M, K], E for a token that visits none, and f32[M, K] weights.
    """
    m, e = logits_me.shape
    width, chosen = 1 << (e - 1).bit_length(), 1 << (count - 1).bit_length()

    def kernel(*refs):
        logits_ref, *refs = refs
        bias_ref, active_ref, experts_ref, weights_ref = refs if bias_e is not None else (None, *refs)
        row, index, place = pl.program_id(0), jnp.arange(width), jnp.arange(chosen)
        inside = index < e
        logits = plgpu.load(logits_ref.at[row, pl.ds(0, width)], mask=inside, other=NONE)
        if scoring == "softmax":
            scores = jnp.exp(logits - jnp.max(logits))
            scores = scores / jnp.sum(scores)
        else:
            scores = jax.nn.sigmoid(logits)
        choice = scores
        if bias_ref is not None:
            choice = scores + plgpu.load(bias_ref.at[pl.ds(0, width)], mask=inside, other=0)
        choice = jnp.where(inside, choice, NONE)
        experts, weights = jnp.full(chosen, e, jnp.int32), jnp.zeros(chosen, jnp.float32)
        for k in range(count):
            best = jnp.min(jnp.where(choice == jnp.max(choice), index, e))
            experts = jnp.where(place == k, best, experts)
            weights = jnp.where(place == k, jnp.sum(jnp.where(index == best, scores, 0)), weights)
            choice = jnp.where(index == best, 2 * NONE, choice)
        if normalize:
            weights = weights / (jnp.sum(weights) + 1e-20)
        experts = jnp.where(active_ref[row] != 0, experts, e)
        plgpu.store(experts_ref.at[row, pl.ds(0, chosen)], experts, mask=place < count)
        plgpu.store(weights_ref.at[row, pl.ds(0, chosen)], weights * factor, mask=place < count)

    arrays = [a for a in (logits_me, bias_e, active_m) if a is not None]
    shapes = [jax.ShapeDtypeStruct((m, count), dtype) for dtype in (jnp.int32, jnp.float32)]
    return pl.pallas_call(
        kernel,
        grid=(m,),
        out_shape=shapes,
        compiler_params=plgpu.CompilerParams(num_warps=1),
        interpret=interpret,
        metadata=cost_metadata(0.0, [*arrays, *shapes]),
        name="choose_experts",
    )(*arrays)


def _places(tokens: int, count: int, experts: int) -> tuple[int, bool]:
    """Programs along the experts: one for each expert, or for each assignment where these are fewer (True)."""
    return (tokens * count, True) if tokens * count < experts else (experts, False)


def _visits(experts_ref, place: jax.Array, by_assignment: bool, groups: int):
    """Of a program: its expert; how many tokens visit it, 0 if another program has the same expert; a function.

    The function takes a number of a block of `MIN_ROWS` visits to their tokens, i32[MIN_ROWS], the places of the expert
    among those that the tokens visit, i32[MIN_ROWS], and which of them are there, bool[MIN_ROWS]; the others' token is
    beyond the last.
    """
    tokens, count = experts_ref.shape
    rows, chosen = row_count(tokens), 1 << (count - 1).bit_length()
    row, column = jnp.arange(rows), jnp.arange(chosen)
    inside = (row < tokens)[:, None] & (column < count)[None, :]
    experts = plgpu.load(experts_ref.at[pl.ds(0, rows), pl.ds(0, chosen)], mask=inside, other=groups)
    expert = experts_ref[place // count, place % count] if by_assignment else place
    same = (experts == expert) & inside
    hit = jnp.max(same.astype(jnp.int32), axis=1)  # i32[rows], 1 for a token that visits the expert
    at = jnp.sum(jnp.where(same, column[None, :], 0), axis=1)
    visits = jnp.sum(hit) * (expert < groups)
    if by_assignment:
        earlier = same & (row[:, None] * count + column[None, :] < place)
        visits *= jnp.max(earlier.astype(jnp.int32)) == 0
    number = jnp.cumsum(hit) - 1

    def block(index: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        wanted = index * MIN_ROWS + jnp.arange(MIN_ROWS)
        mine = (number[None, :] == wanted[:, None]) & (hit != 0)[None, :]  # [MIN_ROWS, rows]
        of_token, of_place = (jnp.sum(jnp.where(mine, a[None, :], 0), axis=1) for a in (row, at))
        there = wanted < visits
        return jnp.where(there, of_token, tokens), of_place, there

    return jnp.minimum(expert, groups - 1), visits, block


def _wide(inside: jax.Array, width: int) -> jax.Array:
    return jnp.broadcast_to(inside[:, None], (inside.shape[0], width))


def _grid(rows: jax.Array, first: jax.Array, width: int) -> tuple[jax.Array, jax.Array]:
    """Index of columns ``first …`` of some rows."""
    columns = first + jnp.arange(width)
    return tuple(jnp.broadcast_arrays(rows[:, None], columns[None, :]))


def _expert_bytes(tokens: int, count: int, *weights: Any) -> float:
    """Of the experts that so many tokens visit at most."""
    groups = weights[0].shape[0]
    return min(tokens * count, groups) / groups * sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(weights))


@functools.partial(jax.jit, static_argnames=("eps", "interpret"))
def gate_up(
    x_md: jax.Array,
    scale_d: jax.Array,
    gate_gdf: Any,
    up_gdf: Any,
    experts_mk: jax.Array,
    *,
    eps: float,
    interpret: bool = False,
) -> jax.Array:
    """SiLU(x · gate) · (x · up) of each token and each of its experts, after an RMS norm.

    Args:
      x_md: [M, D], D a multiple of 16. scale_d: [D], the norm's weight. eps: its epsilon.
      gate_gdf, up_gdf: [G, D, F], plain or `Quantized` both.
      experts_mk: i32[M, K], different experts of a token; G for none.

    Returns:
      [M · K, F] in the dtype of ``x_md``, undefined where a token has no expert.
    """
    (m, d), count, (groups, _, f) = x_md.shape, experts_mk.shape[1], gate_gdf.shape
    places, by_assignment = _places(m, count, groups)
    block = column_block(places * f // 2)
    sizes = MIN_ROWS, 2 * block, stored_size(gate_gdf)
    step = depth_step(d, *sizes, gate_gdf)
    flat, form = jax.tree.flatten((gate_gdf, up_gdf))

    def kernel(x_ref, scale_ref, experts_ref, *refs):
        *w_refs, out_ref = refs
        weights = jax.tree.unflatten(form, w_refs)
        first = pl.program_id(0) * block
        expert, visits, visit = _visits(experts_ref, pl.program_id(1), by_assignment, groups)

        def body(i: jax.Array, _: None) -> None:
            tokens, places, inside = visit(i)

            def load_x(start: jax.Array) -> jax.Array:
                return load_tile(x_ref, _grid(tokens, start, step), _wide(inside, step))

            tiles = [tile(weight, first, block, step, (expert,)) for weight in weights]
            gate, up = multiply(load_x, tiles, d, step, (MIN_ROWS, block), norm=(scale_ref, eps))
            stored = both(_wide(inside, block), column_mask(first, block, f, MIN_ROWS))
            out = (gate * jax.nn.sigmoid(gate) * up).astype(out_ref.dtype)
            plgpu.store(out_ref.at[_grid(tokens * count + places, first, block)], out, mask=stored)

        lax.fori_loop(0, pl.cdiv(visits, MIN_ROWS), body, None)

    out = jax.ShapeDtypeStruct((m * count, f), x_md.dtype)
    moved = cost_metadata(
        4.0 * m * count * d * f, [x_md, scale_d, experts_mk, out], _expert_bytes(m, count, gate_gdf, up_gdf)
    )
    return pl.pallas_call(
        kernel,
        grid=(pl.cdiv(f, block), places),
        out_shape=out,
        compiler_params=compiler_params((step, *sizes)),
        interpret=interpret,
        metadata=moved,
        name="experts_gate_up",
    )(x_md, scale_d, experts_mk, *flat)


@functools.partial(jax.jit, static_argnames="interpret")
def down(
    hidden_cf: jax.Array,
    down_gfd: Any,
    experts_mk: jax.Array,
    weights_mk: jax.Array,
    shared_mf: jax.Array | None,
    shared_down_fd: Any,
    *,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array | None]:
    """The experts' outputs, and in the same launch those of the shared experts.

    Args:
      hidden_cf: [M · K, F] of `gate_up`. down_gfd: [G, F, D], plain or `Quantized`.
      experts_mk: i32[M, K]. weights_mk: f32[M, K].
      shared_mf: [M, n · F], hidden rows of n shared experts, and shared_down_fd: [n · F, D], as ``down_gfd``; None:
        there are none.

    Returns:
      f32[M, K, D], weighted, undefined where a token has no expert; f32[n, M, D], or None.
    """
    (m, count), (groups, f, d) = experts_mk.shape, down_gfd.shape
    shared = 0 if shared_mf is None else shared_mf.shape[1] // f
    places, by_assignment = _places(m, count, groups)
    rows = row_count(m)
    block = column_block((places + shared) * d // 2)
    # Of the shared experts' weight each takes as many inputs as an expert has, in as many groups.
    tiles = [(height, block, stored_size(down_gfd)) for height in (MIN_ROWS, rows)]
    step, shared_step = (depth_step(f, *sizes, down_gfd) for sizes in tiles)
    flat, form = jax.tree.flatten((down_gfd, shared_down_fd))

    def kernel(hidden_ref, experts_ref, weights_ref, *refs):
        down_ref, shared_down_ref = jax.tree.unflatten(form, refs[: len(flat)])
        shared_ref, out_ref, shared_out_ref = refs[len(flat) :] if shared else (None, *refs[len(flat) :], None)
        first, place = pl.program_id(0) * block, pl.program_id(1)

        @pl.when(place < places)
        def _():
            expert, visits, visit = _visits(experts_ref, place, by_assignment, groups)

            def body(i: jax.Array, _: None) -> None:
                tokens, at, inside = visit(i)

                def load_hidden(start: jax.Array) -> jax.Array:
                    return load_tile(hidden_ref, _grid(tokens * count + at, start, step), _wide(inside, step))

                of_expert = tile(down_ref, first, block, step, (expert,))
                (out,) = multiply(load_hidden, [of_expert], f, step, (MIN_ROWS, block))
                weights = plgpu.load(weights_ref.at[tokens, at], mask=inside, other=0)
                stored = both(_wide(inside, block), column_mask(first, block, d, MIN_ROWS))
                index = _wide(at, block), *_grid(tokens, first, block)
                plgpu.store(out_ref.at[index[1], index[0], index[2]], out * weights[:, None], mask=stored)

            lax.fori_loop(0, pl.cdiv(visits, MIN_ROWS), body, None)

        if not shared:
            return

        @pl.when(place >= places)
        def _():
            number = place - places

            def load_hidden(start: jax.Array) -> jax.Array:
                index = pl.ds(0, rows), pl.ds(number * f + start, shared_step)
                return load_tile(shared_ref, index, row_mask(m, rows, shared_step))

            of_shared = tile(shared_down_ref, first, block, shared_step, part=(number, shared))
            (out,) = multiply(load_hidden, [of_shared], f, shared_step, (rows, block))
            stored = both(row_mask(m, rows, block), column_mask(first, block, d, rows))
            plgpu.store(shared_out_ref.at[number, pl.ds(0, rows), pl.ds(first, block)], out, mask=stored)

    inputs = [hidden_cf, experts_mk, weights_mk] + ([shared_mf, *jax.tree.leaves(shared_down_fd)] if shared else [])
    outs = [jax.ShapeDtypeStruct((m, count, d), jnp.float32)]
    outs += [jax.ShapeDtypeStruct((shared, m, d), jnp.float32)] if shared else []
    out = pl.pallas_call(
        kernel,
        grid=(pl.cdiv(d, block), places + shared),
        out_shape=outs,
        compiler_params=compiler_params((step, *tiles[0]), (shared_step, *tiles[1])),
        interpret=interpret,
        metadata=cost_metadata(2.0 * m * (count + shared) * d * f, [*inputs, *outs], _expert_bytes(m, count, down_gfd)),
        name="experts_down",
    )(hidden_cf, experts_mk, weights_mk, *flat, *([shared_mf] if shared else []))
    return (out[0], out[1]) if shared else (out[0], None)
