"""Contrastive training of the vision encoder by SigLIP's sigmoid loss (arXiv 2303.15343): towers, loss and step.

A step compares all its images with all its captions. The image's side is the model's encoder with its attention
pooling head; the captions' side is a small transformer of its own, which is trained along and belongs to no model.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh
from jax.typing import ArrayLike, DTypeLike

from dsvl2_jax.model import deepseek_vl2 as model
from dsvl2_jax.model.config import Config, VisionConfig
from dsvl2_jax.model.deepseek_vl2 import Params
from dsvl2_jax.model.layers import Linear, declare
from dsvl2_jax.model.vision import INIT_STD, VisionBlock, layer_norm
from dsvl2_jax.runtime import processes
from dsvl2_jax.sharding import ambient_mesh_shape, batch_parts
from dsvl2_jax.train.data.batch import TrainBatch
from dsvl2_jax.train.flops import StepFlops, contrastive_flops
from dsvl2_jax.train.forward import compute_params, training_layers
from dsvl2_jax.train.objectives.base import Arrays, BaseTrainer, TrainState
from dsvl2_jax.train.settings.schema import ContrastiveSettings, ParameterRule, Settings

# Parameters besides the model's: the captions' tower below ``text/``, and the loss's two scalars.
TEXT, LOG_SCALE, BIAS = "text/", "log_scale", "bias"

_EPSILON = 1e-12  # under the root of a feature's squared length


class TextTower(nn.Module):
    """Captions to features: blocks like the image encoder's, then the mean over a caption's tokens, and a linear head.

    Padding is neither attended to nor averaged, so that a caption's feature does not depend on it. The mean, rather
    than SigLIP's last position, gives every token a short way to the loss: an encoder of few
    layers that starts from scratch learns words from it at once.
    """

    config: VisionConfig  # of the image encoder: width, heads and MLP
    settings: ContrastiveSettings
    vocab_size: int
    dtype: DTypeLike
    remat: bool

    @nn.compact
    def __call__(self, ids_bt: jax.Array, valid_bt: jax.Array) -> jax.Array:
        """i32[B, T] tokens, bool[B, T] False for padding at the right → [B, W]."""
        width = self.config.width

        def table(name: str, axis: str | None, rows: int) -> jax.Array:
            return declare(self, name, (rows, width), (axis, None), nn.initializers.normal(INIT_STD))

        tokens = table("embed_tokens", "vocab", self.vocab_size)
        x = jnp.take(tokens, ids_bt, axis=0) + table("pos_embed", None, self.settings.text_length)
        x = x.astype(self.dtype)
        # A row without a caption sees its padding, so that its softmax is finite; the loss passes it over.
        seen = valid_bt | ~valid_bt.any(-1, keepdims=True)
        block = nn.remat(VisionBlock) if self.remat else VisionBlock
        for i in range(self.settings.text_layers):
            x = block(self.config, self.dtype, name=f"blocks_{i}")(x, seen)
        x = layer_norm(self.dtype, "norm")(x)
        mean = jnp.where(seen[..., None], x, 0).sum(1) / seen.sum(-1, keepdims=True)
        axes = ("vision_embed", None)
        return Linear(width, axes, self.dtype, INIT_STD, bias=True, name="head")(mean.astype(self.dtype))


def text_tower(config: Config, settings: Settings) -> TextTower:
    compute = settings.compute
    vocabulary = config.language.vocab_size
    remat = compute.remat != "none"
    return TextTower(config.vision, settings.contrastive, vocabulary, jnp.dtype(compute.dtype), remat)


def init_auxiliary(config: Config, settings: Settings, rng: jax.Array) -> dict[str, Any]:
    """What is trained in addition to the model: path → f32 array in a box with its logical axes. Jittable."""
    ids = jnp.zeros((1, settings.contrastive.text_length), jnp.int32)
    tower = text_tower(config, settings).init(rng, ids, ids == 0)["params"]

    def is_box(_: Any, leaf: Any) -> bool:
        return isinstance(leaf, nn.LogicallyPartitioned)

    flat = flatten_dict(tower, sep="/", is_leaf=is_box)
    drawn = draw({path: box.value.shape for path, box in flat.items()}, None, rng)
    flat = {path: box.replace_boxed(drawn[path]) for path, box in flat.items()}
    return {TEXT + path: leaf for path, leaf in flat.items()} | scalars(settings)


def scalars(settings: Settings) -> dict[str, Any]:
    """The loss's own parameters, log t and b: f32[] in boxes."""
    values = {LOG_SCALE: math.log(settings.contrastive.initial_scale), BIAS: settings.contrastive.initial_bias}
    return {name: nn.LogicallyPartitioned(jnp.float32(value), ()) for name, value in values.items()}


def _waves(side: int, width: int) -> jax.Array:
    """f32[side², width] positions in a square grid: sines and cosines of row and column, of root mean square ½.

    Near positions are alike from the first step on, so that a patch can find its neighbours; drawn at random, positions
    are learnt long after colours are.
    """
    quarter = width // 4
    angles = jnp.arange(side, dtype=jnp.float32)[:, None] * (math.pi / 2) * jnp.geomspace(1.0, 1 / 16, quarter)
    one = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=1) * 0.5**0.5  # [side, width / 2]
    waves = jnp.concatenate([jnp.repeat(one, side, axis=0), jnp.tile(one, (side, 1))], axis=1)
    return jnp.pad(waves, ((0, 0), (0, width - 4 * quarter)))


def draw(shapes: Mapping[str, tuple[int, ...]], grid: int | None, rng: jax.Array) -> dict[str, jax.Array]:
    """Fresh parameters of a tower, f32: kernels of spread 1/√inputs, embeddings and positions of 1/√W.

    With ``grid``, the patches on a side of a tile, positions are waves instead (`_waves`).

    The models' own spread of 0.02 is for wide layers. At a width of 128 it makes every block all but invisible, and a
    tower trained from scratch takes three times as many steps to tell images apart (measured).
    """

    def one(path: str, shape: tuple[int, ...], rng: jax.Array) -> jax.Array:
        name = path.rpartition("/")[2]
        if name.endswith("kernel"):
            inputs = 2 if path.endswith("attn/proj/kernel") else 1  # dimensions: heads, and what they are made of
            return jax.random.normal(rng, shape) * math.prod(shape[:inputs]) ** -0.5
        if name == "pos_embed" and grid is not None:
            return _waves(grid, shape[1])
        if name in ("embed_tokens", "pos_embed"):
            return jax.random.normal(rng, shape) * shape[-1] ** -0.5
        if name == "latent":  # a query as strong as a normalised patch
            return jax.random.normal(rng, shape)
        return jnp.ones(shape) if name.endswith("scale") else jnp.zeros(shape)

    return {path: one(path, shapes[path], jax.random.fold_in(rng, i)) for i, path in enumerate(sorted(shapes))}


def image_features(
    params: Params, config: Config, batch: TrainBatch, mean: ArrayLike, std: ArrayLike, settings: Settings
) -> jax.Array:
    """f32[B, W] of length 1, of an accumulation step whose rows have one tile each."""
    params = compute_params(params, settings.compute.dtype)
    wrap = training_layers(config, settings.compute.remat)
    x = model.encode_tiles(params, config, batch.tiles, mean, std, wrap=wrap)
    return normalised(rows_of_tiles(model.pool_patches(params, config, x), batch.ids.shape[0]))


def rows_of_tiles(x: jax.Array, rows: int) -> jax.Array:
    """[N, …] of tiles → [B, …] of rows with one tile each, without the tiles that pad a data shard's to its devices."""
    shards = batch_parts(ambient_mesh_shape() or {})
    return x.reshape(shards, -1, *x.shape[1:])[:, : rows // shards].reshape(rows, *x.shape[1:])


def text_features(auxiliary: dict[str, jax.Array], config: Config, batch: TrainBatch, settings: Settings) -> jax.Array:
    """f32[B, W] of length 1. ``auxiliary``: of `init_auxiliary`, unboxed."""
    tower_leaves = {path.removeprefix(TEXT): leaf for path, leaf in auxiliary.items() if path.startswith(TEXT)}
    params = unflatten_dict(tower_leaves, sep="/")
    tower = text_tower(config, settings)
    return normalised(tower.apply({"params": params}, jnp.asarray(batch.ids), jnp.asarray(batch.segments) > 0))


def same_captions(ids_bt: jax.Array, valid_bt: jax.Array) -> jax.Array:
    """bool[B, B], True where two captions have the same tokens."""
    ids = jnp.where(valid_bt, ids_bt, -1)
    return (ids[:, None] == ids[None]).all(-1)


def sigmoid_loss(
    x_bw: jax.Array, y_bw: jax.Array, log_scale: jax.Array, bias: jax.Array, same_bb: jax.Array, valid_b: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """SigLIP's loss of a batch, and how many images find their caption.

    Args:
      x_bw, y_bw: f32[B, W], image and caption features of length 1.
      log_scale, bias: f32[], log t and b.
      same_bb: bool[B, B], equal captions. Off the diagonal such a pair is neither positive nor negative.
      valid_b: bool[B], False for rows that hold nothing.

    Returns:
      (f32[], f32[]): −Σ_ij log σ(z_ij (t·x_i·y_j + b)) over the images, with z = 1 on the diagonal and −1 elsewhere,
      in nats an image, and the share of images whose own caption is the nearest of the batch; nan without images.
    """
    diagonal = jnp.eye(x_bw.shape[0], dtype=bool)
    counted = valid_b[:, None] & valid_b[None] & (diagonal | ~same_bb)
    cosines = jnp.einsum("iw,jw->ij", x_bw, y_bw, precision=jax.lax.Precision.HIGHEST)
    logits = jnp.exp(log_scale) * cosines + bias
    losses = -nn.log_sigmoid(jnp.where(diagonal, logits, -logits))
    images = valid_b.sum()
    nearest = jnp.where(counted, cosines, -jnp.inf).argmax(-1)
    nearest_is_own = (nearest == jnp.arange(len(valid_b))) & valid_b
    return jnp.where(counted, losses, 0.0).sum() / images, nearest_is_own.sum() / images


def normalised(x: jax.Array) -> jax.Array:
    """f32, of length 1 along the last axis."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.square(x).sum(-1, keepdims=True) + _EPSILON)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ContrastiveMetrics:
    """What a step reports. Means are over the images, nan where there are none."""

    loss: jax.Array  # f32[], nats an image; it grows with the number of captions that an image is compared with
    accuracy: jax.Array  # f32[], share of the images whose own caption is the nearest of the batch
    images: jax.Array  # i32[]
    tokens: jax.Array  # i32[], of the captions
    scale: jax.Array  # f32[], t
    bias: jax.Array  # f32[], b
    gradient_norm: jax.Array  # f32[], before clipping, the caption tower's part included; nan in an evaluation

    @property
    def finite(self) -> bool:
        """False when training has diverged. On the host, as are the methods below."""
        return bool(np.isfinite(self.gradient_norm) and np.isfinite(self.loss))

    def logged(self) -> dict[str, Any]:
        """What a line of the log says of this objective."""
        fields = {name: float(getattr(self, name)) for name in ("loss", "accuracy", "scale", "bias")}
        return fields | {"images": int(self.images)}

    @staticmethod
    def average(parts: Sequence[ContrastiveMetrics]) -> dict[str, float]:
        """Loss and accuracy of several batches, over all their images, and the numbers of images and tokens."""
        images = np.array([int(part.images) for part in parts])

        def mean(name: str) -> float:
            values = np.array([float(getattr(part, name)) for part in parts])
            return float(values[images > 0] @ images[images > 0] / images.sum()) if images.any() else float("nan")

        tokens = sum(int(part.tokens) for part in parts)
        return {"loss": mean("loss"), "accuracy": mean("accuracy"), "images": int(images.sum()), "tokens": tokens}


class ContrastiveTrainer(BaseTrainer):
    """Training of the encoder on images and captions; see `BaseTrainer`.

    The caption tower and the loss's scalars are kept in the optimizer's state, ``{"auxiliary", "updates"}``, so that
    a run's checkpoint has them and its model does not.
    """

    metrics = ContrastiveMetrics
    init_auxiliary = staticmethod(init_auxiliary)  # what is trained in addition to the model

    def __init__(self, config: Config, settings: Settings, mean: ArrayLike, std: ArrayLike, mesh: Mesh | None = None):
        self._boxed = jax.eval_shape(lambda: self.init_auxiliary(config, settings, jax.random.key(0)))
        rules = {path: ParameterRule(".", decay=path.endswith(("/kernel", "/head"))) for path in self._boxed}
        super().__init__(config, settings, mean, std, mesh, rules)

    def flops(self) -> StepFlops:
        return contrastive_flops(self.config, self.parameter_rules, self.settings.contrastive)

    def begin(self, params: Params) -> Params:
        """Initialises the encoder anew if ``contrastive.fresh_encoder`` says so; the rest stays.

        The pooling head is drawn also where the checkpoint was made without one: from zeros, no gradient comes back.
        """
        old = flatten_dict(params["vision"], sep="/")
        if not self.settings.contrastive.fresh_encoder:
            if bool(jnp.any(old["attn_pool/norm_scale"])):
                return params
            old = {path: leaf for path, leaf in old.items() if path.startswith("attn_pool/")}
            if processes.is_first():
                print("the checkpoint has no pooling head (vision.attn_pool): it begins at random", file=sys.stderr)
        shapes = {path: leaf.shape for path, leaf in old.items()}
        shardings = {path: leaf.sharding for path, leaf in old.items()}
        fresh = jax.jit(functools.partial(draw, shapes, self.config.vision.grid), out_shardings=shardings)(self._key(2))
        return params | {"vision": params["vision"] | unflatten_dict(fresh, sep="/")}

    def _key(self, number: int) -> jax.Array:
        """Not the key of the model's own parameters, if these are random."""
        return jax.random.fold_in(jax.random.key(self.settings.run.seed), number)

    def _init_optimizer(self, trained: Arrays, shardings: Any) -> Any:
        rng = self._key(1)

        def init(rng: jax.Array) -> Arrays:
            return nn.unbox(self.init_auxiliary(self.config, self.settings, rng))

        auxiliary = jax.jit(init, out_shardings=shardings["auxiliary"])(rng)
        updates = super()._init_optimizer(trained | auxiliary, shardings["updates"])
        return {"auxiliary": auxiliary, "updates": updates}

    def _abstract_optimizer(self, trained: dict[str, jax.ShapeDtypeStruct]) -> Any:
        auxiliary = {
            path: jax.ShapeDtypeStruct(
                box.value.shape, box.value.dtype, sharding=self._sharding(box.value.shape, box.names, False)
            )
            for path, box in self._boxed.items()
        }
        return {"auxiliary": auxiliary, "updates": super()._abstract_optimizer(trained | auxiliary)}

    def _update(self, state: TrainState, batch: TrainBatch) -> tuple[TrainState, ContrastiveMetrics]:
        auxiliary = state.optimizer["auxiliary"]
        all_trained = state.trained | auxiliary
        gradient, metrics = jax.grad(self._loss, has_aux=True)(all_trained, state, batch.micro(0))
        updates, optimizer = self._optimizer.update(gradient, state.optimizer["updates"], all_trained)
        moved = optax.apply_updates(all_trained, updates)
        trained, auxiliary = ({path: moved[path] for path in part} for part in (state.trained, auxiliary))
        optimizer = {"auxiliary": auxiliary, "updates": optimizer}
        state = TrainState(state.step + 1, trained, state.biases, state.frozen, optimizer)
        return state, dataclasses.replace(metrics, gradient_norm=optax.tree.norm(gradient))

    def _measure(self, state: TrainState, batch: TrainBatch) -> ContrastiveMetrics:
        return self._loss(state.trained | state.optimizer["auxiliary"], state, batch.micro(0))[1]

    def _parts(self, trained: Arrays, state: TrainState) -> tuple[Params, Arrays]:
        """The model's parameters and the auxiliary ones. ``trained`` has both kinds."""
        everything = {**state.biases, **state.frozen, **{path: trained[path] for path in state.trained}}
        return unflatten_dict(everything, sep="/"), {path: trained[path] for path in state.optimizer["auxiliary"]}

    def _loss(self, trained: Arrays, state: TrainState, batch: TrainBatch) -> tuple[jax.Array, ContrastiveMetrics]:
        params, auxiliary = self._parts(trained, state)
        images = image_features(params, self.config, batch, *self._pixels, self.settings)
        captions = text_features(auxiliary, self.config, batch, self.settings)
        valid = jnp.asarray(batch.segments) > 0
        log_scale, bias = auxiliary[LOG_SCALE], auxiliary[BIAS]
        same, rows = same_captions(jnp.asarray(batch.ids), valid), valid.any(-1)
        loss, accuracy = sigmoid_loss(images, captions, log_scale, bias, same, rows)
        metrics = ContrastiveMetrics(
            loss=loss,
            accuracy=accuracy,
            images=rows.sum(),
            tokens=valid.sum(),
            scale=jnp.exp(log_scale),
            bias=bias,
            gradient_norm=jnp.float32(jnp.nan),
        )
        return loss, metrics
