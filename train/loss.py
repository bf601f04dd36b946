"""The training forward: cross-entropy on the supervised tokens, and the routers' balance loss.

`loss_fn` maps parameters and one accumulation step of a `TrainBatch` to what is differentiated and what is
reported. It is pure; under `jax.set_mesh` its sums run over the batch of all devices. Both losses are divided by
what the *whole* optimizer step holds (`step_totals`), so that accumulation steps simply add up (DESIGN §5).
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from dsvl2_jax.inputs.batch import IGNORED_LABEL
from dsvl2_jax.kernels.precision import matmul_precision
from dsvl2_jax.model import deepseek_vl2 as model
from dsvl2_jax.model.config import Config, LanguageConfig
from dsvl2_jax.model.deepseek_vl2 import Params
from dsvl2_jax.model.moe import Routing
from dsvl2_jax.sharding import constrain
from dsvl2_jax.train import forward
from dsvl2_jax.train.data.batch import TrainBatch


@dataclasses.dataclass(frozen=True)
class LossOptions:
    """What a loss program is compiled for. Hashable, a static argument."""

    max_segments: int = 64  # of a row
    chunk: int = 1024  # tokens of a row whose logits are held at a time
    dtype: str | None = None  # in which the model computes; None: that of the embeddings
    remat: str = "none"  # see `dsvl2_jax.train.forward.REMAT`


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sums:
    """What accumulation steps add up. Losses are in nats; L is the number of MoE layers."""

    loss: jax.Array  # f32[], cross-entropy summed over the supervised tokens
    image_loss: jax.Array  # f32[], the part of it from samples with images
    supervised_tokens: jax.Array  # i32[]
    image_supervised_tokens: jax.Array  # i32[]
    tokens: jax.Array  # i32[], all but padding
    balance_losses: jax.Array  # f32[L], aux_loss_alpha included, already divided by the step's segments
    load: jax.Array  # f32[L, E], tokens that chose each expert


def targets(batch: TrainBatch) -> jax.Array:
    """i32[..., T] the label that each position predicts: the next one's, within its own segment."""
    following = jnp.where(batch.positions > 0, batch.labels, IGNORED_LABEL)[..., 1:]
    return jnp.concatenate([following, jnp.full_like(following[..., :1], IGNORED_LABEL)], axis=-1)


def step_totals(batch: TrainBatch) -> tuple[jax.Array, jax.Array]:
    """(supervised tokens, segments) of the whole step, f32[] each and at least 1: the losses' divisors."""
    supervised = (targets(batch) >= 0).sum(dtype=jnp.float32)
    segments = ((batch.segments > 0) & (batch.positions == 0)).sum(dtype=jnp.float32)
    return jnp.maximum(supervised, 1.0), jnp.maximum(segments, 1.0)


def loss_fn(
    params: Params,
    config: Config,
    batch: TrainBatch,
    totals: tuple[jax.Array, jax.Array],
    mean: ArrayLike,
    std: ArrayLike,
    options: LossOptions,
) -> tuple[jax.Array, Sums]:
    """One accumulation step's part of the loss, for ``jax.value_and_grad(..., has_aux=True)``.

    Args:
      params: nested, with layers separate or stacked (`dsvl2_jax.train.stacked`).
      batch: without the leading axis (`TrainBatch.micro`).
      totals: of `step_totals` over the whole step.
      mean, std: f32[3], of the processor's configuration.

    Returns:
      f32[] to differentiate: the cross-entropy plus the balance losses (FACTS §4: the balance loss's gradient
      enters with factor 1, aux_loss_alpha being inside); and what is reported.
    """
    params, dtype = forward.compute_params(params, options.dtype)
    if batch.tiles.shape[0]:
        features = forward.adapt_tiles(params, config, batch.tiles, mean, std, dtype, options.remat)
    else:
        features = jnp.zeros((0, config.tokens_per_tile, config.language.hidden_size))
    embeddings = model.merge(params, config, batch.ids, batch.image_index, features)

    def layer_statistics(routing: Routing) -> tuple[jax.Array, jax.Array]:
        balance = balance_loss(routing, batch.segments, options.max_segments, config.language)
        load = jnp.einsum("bte,bt->e", chosen_experts(routing), (batch.segments > 0).astype(jnp.float32))
        return balance / totals[1], load

    hidden, balance, load = forward.hidden_states(
        params, config, embeddings, batch.positions, batch.segments > 0, layer_statistics, dtype, options.remat
    )
    wanted = targets(batch)
    weights = jnp.where(wanted >= 0, 1.0 / totals[0], 0.0)
    head = params["language"]["lm_head"]["kernel"]
    loss, token_losses = cross_entropy(hidden, head, wanted, weights, options.chunk)
    supervised, image = wanted >= 0, (wanted >= 0) & batch.with_images
    sums = Sums(
        token_losses.sum(),
        jnp.where(image, token_losses, 0.0).sum(),
        supervised.sum(dtype=jnp.int32),
        image.sum(dtype=jnp.int32),
        (batch.segments > 0).sum(dtype=jnp.int32),
        balance,
        load,
    )
    return loss + balance.sum(), sums


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def cross_entropy(
    hidden: jax.Array, kernel: jax.Array, wanted: jax.Array, weights: jax.Array, chunk: int
) -> tuple[jax.Array, jax.Array]:
    """Weighted cross-entropy of the output head, for ``chunk`` tokens of each row at a time.

    [B, T, V] logits are never held. Differentiating makes the gradients in the forward pass, where a chunk's logits
    are at hand, so nothing is computed twice.

    Args:
      hidden: [B, T, D]. kernel: [D, V].
      wanted: i32[B, T], the id that each position should predict; negative: none.
      weights: f32[B, T], factor on each token's loss; taken as constant.

    Returns:
      f32[] the weighted sum, and f32[B, T] each token's loss in nats (not differentiable; 0 where none is wanted).
    """
    total, losses, _ = _head(hidden, kernel, wanted, weights, chunk, gradient=False)
    return total, losses


def _head(
    hidden: jax.Array, kernel: jax.Array, wanted: jax.Array, weights: jax.Array, chunk: int, *, gradient: bool
) -> tuple[jax.Array, jax.Array, tuple[jax.Array, jax.Array] | None]:
    b, t, _ = hidden.shape
    chunk = min(chunk, t)
    exact = matmul_precision(hidden.dtype)
    # The vocabulary stays split over `tensor` and `expert`, and rows come to it: [D, V] is larger than they are.
    rows = "decode_batch", "length", "embed"
    hidden, kernel = constrain(hidden, *rows), constrain(kernel, "embed", "vocab")

    def split(x: jax.Array, fill: float = 0) -> jax.Array:
        x = jnp.pad(x, ((0, 0), (0, -t % chunk)) + ((0, 0),) * (x.ndim - 2), constant_values=fill)
        return jnp.moveaxis(x.reshape(b, -1, chunk, *x.shape[2:]), 1, 0)

    def join(x: jax.Array) -> jax.Array:
        return jnp.moveaxis(x, 0, 1).reshape(b, -1, *x.shape[3:])[:, :t]

    def body(kernel_bar, part):
        h, target, weight = part  # [B, chunk, D], [B, chunk], [B, chunk]
        logits = jnp.einsum("btd,dv->btv", h, kernel, precision=exact, preferred_element_type=jnp.float32)
        logits = constrain(logits, "decode_batch", "length", "vocab")
        # A masked sum, not a gather: it stays local when the vocabulary is sharded.
        is_target = jnp.arange(logits.shape[-1]) == target[..., None]
        of_all = jax.nn.logsumexp(logits, axis=-1)
        losses = jnp.where(target >= 0, of_all - jnp.where(is_target, logits, 0.0).sum(-1), 0.0)
        if not gradient:
            return None, (losses, None)
        logits_bar = (jnp.exp(logits - of_all[..., None]) - is_target) * weight[..., None]
        logits_bar = logits_bar.astype(h.dtype)
        hidden_bar = constrain(jnp.einsum("btv,dv->btd", logits_bar, kernel, precision=exact), *rows)
        kernel_bar += jnp.einsum("btd,btv->dv", h, logits_bar, precision=exact, preferred_element_type=jnp.float32)
        return kernel_bar, (losses, hidden_bar)

    start = constrain(jnp.zeros(kernel.shape, jnp.float32), "embed", "vocab") if gradient else None
    parts = (split(hidden), split(wanted, IGNORED_LABEL), split(weights))
    kernel_bar, (losses, hidden_bar) = lax.scan(body, start, parts)
    losses = join(losses)
    total = (losses * weights).sum()
    return total, losses, (join(hidden_bar), kernel_bar.astype(kernel.dtype)) if gradient else None


def _forward(hidden, kernel, wanted, weights, chunk):
    total, losses, gradients = _head(hidden, kernel, wanted, weights, chunk, gradient=True)
    return (total, losses), gradients


def _backward(chunk, gradients, cotangent):
    del chunk
    hidden_bar, kernel_bar = (g * cotangent[0].astype(g.dtype) for g in gradients)
    return hidden_bar, kernel_bar, None, None


cross_entropy.defvjp(_forward, _backward)


def chosen_experts(routing: Routing) -> jax.Array:
    """f32[B, T, E], 1 where a token has chosen an expert. Without a gradient."""
    return jax.nn.one_hot(routing.experts, routing.scores.shape[-1]).sum(2)


def balance_loss(routing: Routing, segments: jax.Array, max_segments: int, config: LanguageConfig) -> jax.Array:
    """What keeps experts equally busy: α · Σ_e load_e · share_e, α when both are even (DeepSeek-V2 §2.2, FACTS §4).

    load_e is expert e's count of chosen tokens over its even share of them, share_e its mean score. With
    ``seq_aux`` they are taken per segment and added up; without, over all tokens given, times the number of
    segments, so that dividing by that number gives the mean in both cases. Sigmoid scores are first divided by
    their sum, as in DeepSeek-V3 §2.1.2. The gradient reaches the scores only.

    Args:
      routing: of one layer.
      segments: i32[B, T] from 1 to ``max_segments``; 0 for padding, which counts nowhere.

    Returns:
      f32[].
    """
    scores = routing.scores
    if config.scoring_func == "sigmoid":
        scores = scores / (scores.sum(-1, keepdims=True) + 1e-20)
    member = jax.nn.one_hot(segments - 1, max_segments)  # [B, T, M]; all zero for padding
    per_segment = functools.partial(jnp.einsum, "btm,bte->bme", member, precision=lax.Precision.HIGHEST)
    counts, shares = per_segment(chosen_experts(routing)), per_segment(scores)
    tokens = member.sum(1)[..., None]  # [B, M, 1]
    present = (tokens > 0).sum()
    if not config.seq_aux:
        counts, shares, tokens = (x.sum((0, 1)) for x in (counts, shares, tokens))
    some = jnp.maximum(tokens, 1.0)
    load = counts * config.n_routed_experts / (config.num_experts_per_tok * some)
    loss = config.aux_loss_alpha * (load * shares / some).sum()
    return loss if config.seq_aux else loss * present
