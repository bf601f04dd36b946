"""The training forward: cross-entropy on the supervised tokens, and the routers' balance loss.

`loss_fn` maps parameters and a `Batch` to what is differentiated and what is reported. It is pure; under
`jax.set_mesh` the sums run over the batch of all devices.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from dsvl2_jax import model
from dsvl2_jax.batch import IGNORED_LABEL, Batch
from dsvl2_jax.config import Config, LanguageConfig
from dsvl2_jax.model import Params
from dsvl2_jax.moe import Routing
from dsvl2_jax.sharding import constrain


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Metrics:
    """What a step reports. The balance loss is no part of `loss`, only of the gradient."""

    loss: jax.Array  # f32[], mean cross-entropy in nats over the supervised tokens
    balance_losses: jax.Array  # f32[MoE layers], aux_loss_alpha included
    supervised_tokens: jax.Array  # i32[]


def loss_fn(params: Params, config: Config, batch: Batch, mean: ArrayLike, std: ArrayLike) -> tuple[jax.Array, Metrics]:
    """The loss of a batch, for ``jax.value_and_grad(..., has_aux=True)``.

    Args:
      batch: of `dsvl2_jax.batch.collate`.
      mean, std: f32[3], of the processor's configuration.

    Returns:
      f32[] to differentiate: the cross-entropy plus the balance losses (FACTS §4: the balance loss's gradient
      enters with factor 1, aux_loss_alpha being inside); and the two apart.
    """
    if batch.tiles.shape[0]:
        features = model.adapt_tiles(params, config, batch.tiles, mean, std)
    else:
        features = jnp.zeros((0, config.tokens_per_tile, config.language.hidden_size))
    embeddings = model.merge(params, config, batch.ids, batch.image_index, features)
    valid = jnp.arange(embeddings.shape[1]) < batch.lengths[:, None]
    hidden, routings = model.forward(params, config, embeddings, valid)
    logits = constrain(model.output_logits(params, config, hidden), "batch", "length", "vocab")
    loss, supervised = cross_entropy(logits, batch.labels)
    terms = [balance_loss(routing, valid, config.language) for routing in routings if routing is not None]
    balance = jnp.stack(terms) if terms else jnp.zeros(0)
    return loss + balance.sum(), Metrics(loss, balance, supervised)


def cross_entropy(logits: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Next-token cross-entropy.

    Args:
      logits: f32[B, T, V]; those at t are for the label at t + 1.
      labels: i32[B, T], negative where there is no loss.

    Returns:
      f32[] mean over the supervised tokens of the whole batch (0 when there is none), and i32[] their number.
    """
    targets = jnp.pad(labels[:, 1:], ((0, 0), (0, 1)), constant_values=IGNORED_LABEL)
    supervised = targets >= 0
    # A masked sum, not a gather: it stays local when the vocabulary is sharded, and so does its gradient.
    of_target = jnp.where(jnp.arange(logits.shape[-1]) == targets[..., None], logits, 0.0).sum(-1)
    losses = jnp.where(supervised, jax.nn.logsumexp(logits, axis=-1) - of_target, 0.0)
    count = supervised.sum(dtype=jnp.int32)
    return losses.sum() / jnp.maximum(count, 1), count


def balance_loss(routing: Routing, valid: jax.Array, config: LanguageConfig) -> jax.Array:
    """What keeps experts equally busy: α · Σ_e load_e · share_e, α when both are even (DeepSeek-V2 §2.2, FACTS §4).

    load_e is expert e's count of chosen tokens over its even share of them, share_e its mean score. With
    ``seq_aux`` they are taken per sequence and the loss is the mean over sequences, else over the whole batch.
    Sigmoid scores are first divided by their sum, as in DeepSeek-V3 §2.1.2. The gradient reaches the scores only.

    Args:
      routing: of one layer.
      valid: bool[B, T], False for padding, which counts nowhere.

    Returns:
      f32[].
    """
    scores, counted = routing.scores, valid[..., None].astype(jnp.float32)
    if config.scoring_func == "sigmoid":
        scores = scores / (scores.sum(-1, keepdims=True) + 1e-20)
    chosen = jax.nn.one_hot(routing.experts, config.n_routed_experts).sum(2)  # [B, T, E]
    over = 1 if config.seq_aux else (0, 1)
    tokens = counted.sum(over)  # [B, 1], or [1] for the whole batch
    some = jnp.maximum(tokens, 1.0)
    load = (chosen * counted).sum(over) * config.n_routed_experts / (config.num_experts_per_tok * some)
    share = (scores * counted).sum(over) / some
    sequences = (tokens > 0).sum()
    return config.aux_loss_alpha * (load * share).sum() / jnp.maximum(sequences, 1)
