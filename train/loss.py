"""The training forward: cross-entropy on the supervised tokens, and the routers' balance loss.

`loss_fn` maps parameters and one accumulation step of a `TrainBatch` to what is differentiated and what is
reported. It is pure; under `jax.set_mesh` its sums run over the batch of all devices. Both losses are divided by
what the *whole* optimizer step holds (`step_totals`), so that accumulation steps simply add up.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from dsvl2_jax.kernels.precision import matmul_precision
from dsvl2_jax.model import deepseek_vl2 as model
from dsvl2_jax.model.config import IGNORED_LABEL, Config, LanguageConfig
from dsvl2_jax.model.decoder import hidden_states
from dsvl2_jax.model.deepseek_vl2 import Params
from dsvl2_jax.model.moe import Routing
from dsvl2_jax.model.weights import is_quantized, weight_of
from dsvl2_jax.sharding import constrain, split_over
from dsvl2_jax.train.data.batch import TrainBatch
from dsvl2_jax.train.forward import compute_params, training_layers


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
      f32[] to differentiate: the cross-entropy plus the balance losses (whose gradient enters with factor 1, since
      aux_loss_alpha is inside, as in the reference's ``AddAuxiliaryLoss``); and what is reported.
    """
    params = compute_params(params, options.dtype)
    wrap = training_layers(config, options.remat)
    if batch.tiles.shape[0]:
        features = model.adapt_tiles(params, config, batch.tiles, mean, std, wrap=wrap)
    else:
        features = jnp.zeros((0, config.tokens_per_tile, config.language.hidden_size))
    embeddings_btd = model.merge(params, config, batch.ids, batch.image_index, features)

    def layer_statistics(routing: Routing) -> tuple[jax.Array, jax.Array]:
        balance = balance_loss(routing, batch.segments, options.max_segments, config.language)
        load = jnp.einsum("bte,bt->e", chosen_experts(routing), (batch.segments > 0).astype(jnp.float32))
        return balance / totals[1], load

    language = params["language"], config.language
    hidden_btd, _, reports = hidden_states(
        *language, embeddings_btd, batch.positions, batch.segments > 0, report=layer_statistics, wrap=wrap
    )
    balance, load = _of_all_layers(reports, config.language)
    targets_bt = targets(batch)
    supervised_bt = targets_bt >= 0
    weights_bt = jnp.where(supervised_bt, 1.0 / totals[0], 0.0)
    head = params["language"]["lm_head"]["kernel"]
    if is_quantized(head):
        head = weight_of(head, packed_axis=-2).dequantized(hidden_btd.dtype)
    loss, losses_bt = cross_entropy(hidden_btd, head, targets_bt, weights_bt, options.chunk)
    image_bt = supervised_bt & batch.with_images
    sums = Sums(
        losses_bt.sum(),
        jnp.where(image_bt, losses_bt, 0.0).sum(),
        supervised_bt.sum(dtype=jnp.int32),
        image_bt.sum(dtype=jnp.int32),
        (batch.segments > 0).sum(dtype=jnp.int32),
        balance,
        load,
    )
    return loss + balance.sum(), sums


def _of_all_layers(reports: list[tuple[jax.Array, jax.Array]], config: LanguageConfig) -> tuple[jax.Array, jax.Array]:
    """f32[L] balance losses and f32[L, E] loads of the L MoE layers, from those of each run of layers."""
    if not reports:
        return jnp.zeros(0), jnp.zeros((0, config.n_routed_experts or 0))
    losses, loads = zip(*reports, strict=True)
    return jnp.concatenate(losses), jnp.concatenate(loads)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def cross_entropy(
    hidden_btd: jax.Array, kernel_dv: jax.Array, targets_bt: jax.Array, weights_bt: jax.Array, chunk: int
) -> tuple[jax.Array, jax.Array]:
    """Weighted cross-entropy of the output head, for ``chunk`` tokens of each row at a time.

    [B, T, V] logits are never held. Differentiating makes the gradients in the forward pass, where a chunk's logits
    are at hand, so nothing is computed twice; the kernel's is made where the kernel is trained.

    Args:
      hidden_btd: [B, T, D]. kernel_dv: [D, V].
      targets_bt: i32[B, T], the id that each position should predict; negative: none.
      weights_bt: f32[B, T], factor on each token's loss; taken as constant.

    Returns:
      f32[] the weighted sum, and f32[B, T] each token's loss in nats (not differentiable; 0 where there is no target).
    """
    total, losses_bt, _ = _head(hidden_btd, kernel_dv, targets_bt, weights_bt, chunk, gradients=())
    return total, losses_bt


def _head(
    hidden_btd: jax.Array,
    kernel_dv: jax.Array,
    targets_bt: jax.Array,
    weights_bt: jax.Array,
    chunk: int,
    *,
    gradients: Sequence[str],
) -> tuple[jax.Array, jax.Array, tuple[jax.Array | None, jax.Array | None]]:
    """(the sum, the losses, the gradients of ``hidden_btd`` and ``kernel_dv``, each if it is among ``gradients``)."""
    b, t, _ = hidden_btd.shape
    # Where rows are split along their length, each part gives its share of a chunk.
    cuts = split_over(hidden_btd.shape, ("logits_batch", "length", "embed"), 1)[1]
    t, chunk = t // cuts, min(-(-chunk // cuts), t // cuts)
    product = functools.partial(jnp.einsum, precision=matmul_precision(hidden_btd.dtype))
    # The vocabulary stays split over `tensor` and `expert`, and tokens come to it: [D, V] is larger than they are.
    axes = "logits_batch", "length", "embed"
    hidden_btd, kernel_dv = constrain(hidden_btd, *axes), constrain(kernel_dv, "embed", "vocab")

    def split(x: jax.Array, fill: float = 0) -> jax.Array:
        x = x.reshape(b, cuts, t, *x.shape[2:])
        x = jnp.pad(x, ((0, 0), (0, 0), (0, -t % chunk)) + ((0, 0),) * (x.ndim - 3), constant_values=fill)
        x = jnp.moveaxis(x.reshape(b, cuts, -1, chunk, *x.shape[3:]), 2, 0)
        return x.reshape(-1, b, cuts * chunk, *x.shape[4:])

    def join(x: jax.Array) -> jax.Array:
        x = jnp.moveaxis(x.reshape(-1, b, cuts, chunk, *x.shape[3:]), 0, 2)
        return x.reshape(b, cuts, -1, *x.shape[4:])[:, :, :t].reshape(b, cuts * t, *x.shape[4:])

    def body(dkernel_dv: jax.Array | None, part: tuple[jax.Array, ...]) -> tuple[jax.Array | None, tuple]:
        x_btd, target_bt, weight_bt = part  # of a chunk's tokens
        logits_btv = product("btd,dv->btv", x_btd, kernel_dv, preferred_element_type=jnp.float32)
        logits_btv = constrain(logits_btv, "logits_batch", "length", "vocab")
        # A masked sum, not a gather: it stays local when the vocabulary is sharded.
        is_target = jnp.arange(logits_btv.shape[-1]) == target_bt[..., None]
        lse_bt = jax.nn.logsumexp(logits_btv, axis=-1)
        losses_bt = jnp.where(target_bt >= 0, lse_bt - jnp.where(is_target, logits_btv, 0.0).sum(-1), 0.0)
        if not gradients:
            return None, (losses_bt, None)
        dlogits_btv = (jnp.exp(logits_btv - lse_bt[..., None]) - is_target) * weight_bt[..., None]
        dlogits_btv = dlogits_btv.astype(x_btd.dtype)
        dx_btd = constrain(product("btv,dv->btd", dlogits_btv, kernel_dv), *axes)
        if dkernel_dv is not None:
            dkernel_dv += product("btd,btv->dv", x_btd, dlogits_btv, preferred_element_type=jnp.float32)
        return dkernel_dv, (losses_bt, dx_btd)

    with jax.named_scope("lm_head"):
        is_trained = "kernel" in gradients
        start = constrain(jnp.zeros(kernel_dv.shape, jnp.float32), "embed", "vocab") if is_trained else None
        parts = (split(hidden_btd), split(targets_bt, IGNORED_LABEL), split(weights_bt))
        dkernel_dv, (losses_bt, dhidden_btd) = lax.scan(body, start, parts)
        losses_bt = join(losses_bt)
        total = (losses_bt * weights_bt).sum()
        dhidden_btd = join(dhidden_btd) if gradients else None
        return total, losses_bt, (dhidden_btd, dkernel_dv.astype(kernel_dv.dtype) if is_trained else None)


def _forward(hidden_btd, kernel_dv, targets_bt, weights_bt, chunk):
    arrays = (x.value for x in (hidden_btd, kernel_dv, targets_bt, weights_bt))
    wanted = ("hidden", "kernel") if kernel_dv.perturbed else ("hidden",)
    total, losses_bt, gradients = _head(*arrays, chunk, gradients=wanted)
    return (total, losses_bt), gradients


def _backward(chunk, gradients, cotangent):
    del chunk
    return *(None if g is None else g * cotangent[0].astype(g.dtype) for g in gradients), None, None


cross_entropy.defvjp(_forward, _backward, symbolic_zeros=True)


def chosen_experts(routing: Routing) -> jax.Array:
    """f32[B, T, E], 1 where a token has chosen an expert. Without a gradient."""
    return jax.nn.one_hot(routing.experts, routing.scores.shape[-1]).sum(2)


def balance_loss(routing: Routing, segments_bt: jax.Array, max_segments: int, config: LanguageConfig) -> jax.Array:
    """What keeps experts equally busy: α · Σ_e load_e · share_e, α when both are even (DeepSeek-V2,
    arXiv 2405.04434, §2.2).

    load_e is expert e's count of chosen tokens over its even share of them, share_e its mean score. With
    ``seq_aux`` they are taken per segment and added up; without, over all tokens given, times the number of
    segments, so that dividing by that number gives the mean in both cases. Sigmoid scores are first divided by
    their sum, as in DeepSeek-V3 §2.1.2. The gradient reaches the scores only.

    Args:
      routing: of one layer.
      segments_bt: i32[B, T] from 1 to ``max_segments``; 0 for padding, which counts nowhere.

    Returns:
      f32[].
    """
    scores = routing.scores
    if config.scoring_func == "sigmoid":
        scores = scores / (scores.sum(-1, keepdims=True) + 1e-20)
    member_btm = jax.nn.one_hot(segments_bt - 1, max_segments)  # m: segments of a row; all zero for padding
    per_segment = functools.partial(jnp.einsum, "btm,bte->bme", member_btm, precision=lax.Precision.HIGHEST)
    counts, shares = per_segment(chosen_experts(routing)), per_segment(scores)
    tokens = member_btm.sum(1)[..., None]  # [B, max_segments, 1]
    present = (tokens > 0).sum()
    if not config.seq_aux:
        counts, shares, tokens = (x.sum((0, 1)) for x in (counts, shares, tokens))
    divisor = jnp.maximum(tokens, 1.0)
    load = counts * config.n_routed_experts / (config.num_experts_per_tok * divisor)
    loss = config.aux_loss_alpha * (load * shares / divisor).sum()
    return loss if config.seq_aux else loss * present
