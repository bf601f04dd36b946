"""Training of the vision encoder on named regions: the patches in a box against what is said of it.

SigLIP's sigmoid loss (arXiv 2303.15343) on regions instead of whole images, as RegionCLIP (arXiv 2112.09106) has it: a
region's feature is the mean of its patches, and it is compared with the phrases of the same attribute of all images
of a step ("kind star", "digit 7"). Whatever a picture holds is learnt where it is, many things at once.
"""

from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from dsvl2_jax.model import deepseek_vl2 as model
from dsvl2_jax.model.config import Config
from dsvl2_jax.model.layers import partitioned
from dsvl2_jax.train.data.batch import TrainBatch
from dsvl2_jax.train.flops import StepFlops, region_flops
from dsvl2_jax.train.forward import compute_params, training_layers
from dsvl2_jax.train.objectives.base import Arrays, TrainState
from dsvl2_jax.train.objectives.contrastive import (
    BIAS,
    LOG_SCALE,
    ContrastiveMetrics,
    ContrastiveTrainer,
    normalised,
    rows_of_tiles,
    scalars,
)
from dsvl2_jax.train.settings.schema import Settings

# Parameters beside the model's: a phrase is the mean of its tokens' embeddings; the head is that of the regions.
TOKENS, HEAD = "text/embed_tokens", "region/head"

_NOTHING = np.uint32(2**32 - 1)  # the number of a phrase that is none


def init_auxiliary(config: Config, settings: Settings, rng: jax.Array) -> dict[str, Any]:
    """What is trained beside the model: path → f32 array in a box with its logical axes. Jittable."""
    width = config.vision.width

    def drawn(rows: int, axis: str, rng: jax.Array) -> Any:
        init = partitioned(nn.initializers.normal(width**-0.5), (axis, None))
        return init(rng, (rows, width), jnp.float32)

    tokens, head = jax.random.split(rng)
    own = {TOKENS: drawn(config.language.vocab_size, "vocab", tokens), HEAD: drawn(width, "vision_embed", head)}
    return own | scalars(settings)


def phrase_members(lengths_br: jax.Array, tokens: int) -> jax.Array:
    """f32[B, R, T], 1 where a token belongs to a phrase: phrases of these lengths follow each other in a row of T."""
    ends_br1 = jnp.cumsum(lengths_br, axis=1)[..., None]
    place_t = jnp.arange(tokens)
    return ((place_t >= ends_br1 - lengths_br[..., None]) & (place_t < ends_br1)).astype(jnp.float32)


def phrase_numbers(ids_bt: jax.Array, member_brt: jax.Array) -> jax.Array:
    """u32[B, R], equal for equal phrases; different ones differ but for one pair in four billions."""
    place = jnp.cumsum(member_brt, axis=-1) * member_brt  # from 1 within each phrase
    mixed = (ids_bt[:, None].astype(jnp.uint32) + 1) * jnp.uint32(2654435761)
    mixed = (mixed ^ (mixed >> 15)) * (2 * place.astype(jnp.uint32) + 1) * jnp.uint32(2246822519)
    mixed = (mixed ^ (mixed >> 13)) * jnp.uint32(3266489917)
    sums = jnp.where(member_brt > 0, mixed, 0).sum(-1, dtype=jnp.uint32)
    return jnp.where((member_brt > 0).any(-1), sums, _NOTHING)


def region_loss(
    x_nw: jax.Array,
    y_nw: jax.Array,
    number_n: jax.Array,
    attribute_n: jax.Array,
    log_scale: jax.Array,
    bias: jax.Array,
    most: int,
) -> tuple[jax.Array, jax.Array]:
    """The sigmoid loss of regions and phrases, and how many regions find their phrase.

    Args:
      x_nw, y_nw: f32[N, W], features of length 1 of a region and of the phrase that is said of it.
      number_n: u32[N], of the phrase (`phrase_numbers`).
      attribute_n: i32[N]; a region is compared with the phrases of the same attribute.
      log_scale, bias: f32[], log t and b.
      most: different phrases that are compared; when a step has more, chance leaves some out.

    Returns:
      (f32[], f32[]): −Σ_ij log σ(z_ij (t·x_i·y_j + b)) over regions i and different phrases j of the same attribute,
      with z = 1 where j is what is said of i and −1 elsewhere, in nats a region and attribute; and the share of them
      for which the right phrase is the nearest. nan without regions.
    """
    unique, first = jnp.unique(number_n, return_index=True, size=most, fill_value=_NOTHING)
    own = number_n[:, None] == unique[None]
    counted = (attribute_n[:, None] == attribute_n[first][None]) & (unique != _NOTHING)[None]
    counted &= (number_n != _NOTHING)[:, None]
    cosines = jnp.einsum("nw,uw->nu", x_nw, y_nw[first], precision=jax.lax.Precision.HIGHEST)
    logits = jnp.exp(log_scale) * cosines + bias
    losses = -nn.log_sigmoid(jnp.where(own, logits, -logits))
    nearest = jnp.where(counted, cosines, -jnp.inf).argmax(-1)
    count = (number_n != _NOTHING).sum()
    found = (unique[nearest] == number_n) & (number_n != _NOTHING)
    return jnp.where(counted, losses, 0.0).sum() / count, found.sum() / count


def region_features(x_bpw: jax.Array, boxes_br4: jax.Array, grid: int) -> jax.Array:
    """[B, P, W] patches → [B, R, W], the mean over each box's rectangle of them (`PhraseBatch`)."""
    left, top, right, bottom = jnp.split(boxes_br4, 4, axis=-1)
    place = jnp.arange(grid)
    columns, rows = (left <= place) & (place < right), (top <= place) & (place < bottom)  # [B, R, grid]
    inside = (rows[..., :, None] & columns[..., None, :]).reshape(*boxes_br4.shape[:2], grid * grid).astype(x_bpw.dtype)
    return jnp.einsum("brp,bpw->brw", inside, x_bpw) / jnp.maximum(inside.sum(-1, keepdims=True), 1)


class RegionTrainer(ContrastiveTrainer):
    """Training of the encoder on named regions; what is kept beside the model is as in `ContrastiveTrainer`."""

    init_auxiliary = staticmethod(init_auxiliary)

    def flops(self) -> StepFlops:
        return region_flops(self.config, self.parameter_rules)

    def _loss(self, trained: Arrays, state: TrainState, batch: TrainBatch) -> tuple[jax.Array, ContrastiveMetrics]:
        params, auxiliary = self._parts(trained, state)
        settings = self.settings.contrastive
        params = compute_params(params, self.settings.compute.dtype)
        wrap = training_layers(self.config, self.settings.compute.remat)
        x = model.encode_tiles(params, self.config, batch.tiles, *self._pixels, wrap=wrap)
        x = rows_of_tiles(x, batch.ids.shape[0])
        ids, phrases = jnp.asarray(batch.ids), jax.tree.map(jnp.asarray, batch.phrases)
        member = phrase_members(phrases.lengths, ids.shape[1])
        embedded = jnp.take(auxiliary[TOKENS], ids, axis=0)
        said = jnp.einsum("brt,btw->brw", member, embedded, precision=jax.lax.Precision.HIGHEST)
        seen = region_features(x, phrases.boxes, self.config.vision.grid)
        seen = jnp.einsum("brw,wv->brv", seen, auxiliary[HEAD].astype(seen.dtype))
        numbers = phrase_numbers(ids, member)
        log_scale, bias = auxiliary[LOG_SCALE], auxiliary[BIAS]
        flat = functools.partial(jnp.reshape, shape=(-1, self.config.vision.width))
        loss, accuracy = region_loss(
            normalised(flat(seen)),
            normalised(flat(said)),
            numbers.reshape(-1),
            phrases.attributes.reshape(-1),
            log_scale,
            bias,
            settings.different_phrases,
        )
        valid = jnp.asarray(batch.segments) > 0
        return loss, ContrastiveMetrics(
            loss=loss,
            accuracy=accuracy,
            images=valid.any(-1).sum(),
            tokens=valid.sum(),
            scale=jnp.exp(log_scale),
            bias=bias,
            gradient_norm=jnp.float32(jnp.nan),
        )
