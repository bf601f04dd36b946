"""The step of contrastive training: one batch, its encoder's and its caption tower's gradients, AdamW on both."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh
from jax.typing import ArrayLike

from dsvl2_jax.model.config import Config
from dsvl2_jax.model.deepseek_vl2 import Params
from dsvl2_jax.train.data.batch import TrainBatch
from dsvl2_jax.train.flops import StepFlops, contrastive_flops
from dsvl2_jax.train.objectives.contrastive import (
    BIAS,
    LOG_SCALE,
    draw,
    image_features,
    init_auxiliary,
    same_captions,
    sigmoid_loss,
    text_features,
)
from dsvl2_jax.train.objectives.trainer import Arrays, BaseTrainer, TrainState
from dsvl2_jax.train.settings.schema import ParameterRule, Settings


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
        """False when training has gone astray. On the host, as is all below."""
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
    init_auxiliary = staticmethod(init_auxiliary)  # what is trained beside the model

    def __init__(self, config: Config, settings: Settings, mean: ArrayLike, std: ArrayLike, mesh: Mesh | None = None):
        self._boxed = jax.eval_shape(lambda: self.init_auxiliary(config, settings, jax.random.key(0)))
        rules = {path: ParameterRule(".", decay=path.endswith(("/kernel", "/head"))) for path in self._boxed}
        super().__init__(config, settings, mean, std, mesh, rules)

    def flops(self) -> StepFlops:
        return contrastive_flops(self.config, self.parameter_rules, self.settings.contrastive)

    def begin(self, params: Params) -> Params:
        """Draws the encoder anew if ``contrastive.fresh_encoder`` says so; the rest stays."""
        if not self.settings.contrastive.fresh_encoder:
            return params
        old = flatten_dict(params["vision"], sep="/")
        shapes = {path: leaf.shape for path, leaf in old.items()}
        shardings = {path: leaf.sharding for path, leaf in old.items()}
        fresh = jax.jit(functools.partial(draw, shapes, self.config.vision.grid), out_shardings=shardings)(self._key(2))
        return params | {"vision": unflatten_dict(fresh, sep="/")}

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
