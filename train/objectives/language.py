"""The training step of the language model: gradient accumulation, AdamW on the trained parameters, the routers' bias
update."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import unflatten_dict
from jax import lax
from jax.sharding import Mesh
from jax.typing import ArrayLike

from dsvl2_jax.model.config import Config
from dsvl2_jax.model.deepseek_vl2 import Params
from dsvl2_jax.model.parameter_paths import path_name
from dsvl2_jax.train.data.batch import TrainBatch
from dsvl2_jax.train.flops import StepFlops, step_flops
from dsvl2_jax.train.loss import LossOptions, Sums, loss_fn, step_totals
from dsvl2_jax.train.objectives.base import Arrays, BaseTrainer, TrainState
from dsvl2_jax.train.settings.schema import Settings


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LanguageMetrics:
    """What a step reports. Losses are means in nats over supervised tokens, nan where there are none."""

    loss: jax.Array  # f32[]; the balance losses are no part of it
    text_loss: jax.Array  # f32[], of samples without images
    image_loss: jax.Array  # f32[], of samples with images
    supervised_tokens: jax.Array  # i32[]
    image_supervised_tokens: jax.Array  # i32[]
    tokens: jax.Array  # i32[], all but padding
    balance_losses: jax.Array  # f32[L] of the MoE layers, weight included
    load: jax.Array  # f32[L, E], tokens of the step that chose each expert
    gradient_norm: jax.Array  # f32[], before clipping; nan in an evaluation

    @property
    def finite(self) -> bool:
        """False when training has diverged. On the host, as are the methods below."""
        return bool(np.isfinite(self.gradient_norm) and (np.isfinite(self.loss) or not self.supervised_tokens))

    def logged(self) -> dict[str, Any]:
        """What a line of the log says of this objective."""
        load = np.asarray(self.load, np.float64)
        mean = load.mean(-1) if load.size else np.zeros(0)
        busiest = load.max(-1) if load.size else mean
        balance = np.divide(busiest, mean, out=np.full_like(mean, np.nan), where=mean > 0)
        return {
            "loss": float(self.loss),
            "text_loss": float(self.text_loss),
            "image_loss": float(self.image_loss),
            "balance_loss": float(np.sum(self.balance_losses)),
            "load_max_over_mean": [round(float(layer), 4) for layer in balance],
            "supervised_tokens": int(self.supervised_tokens),
        }

    @staticmethod
    def average(parts: Sequence[LanguageMetrics]) -> dict[str, float]:
        """The losses of several batches, per supervised token, and ``tokens``, the number of these."""
        totals = np.zeros((3, 2))  # all, text, image: sum of losses, supervised tokens
        for part in parts:
            image = int(part.image_supervised_tokens)
            counts = (int(part.supervised_tokens), int(part.supervised_tokens) - image, image)
            for total, loss, count in zip(totals, (part.loss, part.text_loss, part.image_loss), counts, strict=True):
                if count:
                    total += float(loss) * count, count
        loss, text_loss, image_loss = (float(total / count) if count else math.nan for total, count in totals)
        return {"loss": loss, "text_loss": text_loss, "image_loss": image_loss, "tokens": int(totals[0, 1])}


class LanguageTrainer(BaseTrainer):
    """Training on the next token; see `BaseTrainer`."""

    metrics = LanguageMetrics

    def __init__(self, config: Config, settings: Settings, mean: ArrayLike, std: ArrayLike, mesh: Mesh | None = None):
        language = dataclasses.replace(config.language, aux_loss_alpha=settings.stage.balance_loss_weight)
        self._options = LossOptions(
            settings.data.max_segments, settings.compute.loss_chunk, settings.compute.dtype, settings.compute.remat
        )
        super().__init__(dataclasses.replace(config, language=language), settings, mean, std, mesh)

    def flops(self) -> StepFlops:
        return step_flops(self.config, self.parameter_rules)

    def _update(self, state: TrainState, batch: TrainBatch) -> tuple[TrainState, LanguageMetrics]:
        others = {**state.frozen, **state.biases}
        totals = step_totals(batch)

        def loss(trained: Arrays, micro: TrainBatch, number: ArrayLike) -> tuple[jax.Array, Sums]:
            params = self._joined({**trained, **others}, (state.step, number))
            return self._loss(params, micro, totals)

        gradient_of = jax.grad(loss, has_aux=True)
        count = batch.ids.shape[0]
        if count == 1:
            gradient, sums = gradient_of(state.trained, batch.micro(0), 0)
        else:

            def add(total: Any, micro: tuple[TrainBatch, jax.Array]) -> tuple[Any, None]:
                return jax.tree.map(jnp.add, total, gradient_of(state.trained, *micro)), None

            shapes = jax.eval_shape(gradient_of, state.trained, batch.micro(0), 0)
            zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
            (gradient, sums), _ = lax.scan(add, zeros, (batch, jnp.arange(count)))
        updates, optimizer = self._optimizer.update(gradient, state.optimizer, state.trained)
        trained = optax.apply_updates(state.trained, updates)
        biases = self._moved_biases(state.biases, sums.load)
        state = TrainState(state.step + 1, trained, biases, state.frozen, optimizer)
        return state, _metrics(sums, optax.tree.norm(gradient))

    def _measure(self, state: TrainState, batch: TrainBatch) -> LanguageMetrics:
        params = self._joined({**state.trained, **state.biases, **state.frozen})
        totals = step_totals(batch)
        parts = lax.map(lambda micro: self._loss(params, micro, totals)[1], batch)
        return _metrics(jax.tree.map(lambda part: part.sum(0), parts), jnp.float32(jnp.nan))

    def _joined(self, params: Mapping[str, jax.Array], turn: tuple[ArrayLike, ArrayLike] | None = None) -> Params:
        """The nested parameters that the loss takes. ``turn``: number of step and accumulation step, in training."""
        del turn
        return unflatten_dict(params, sep="/")

    def _loss(self, params: Params, micro: TrainBatch, totals: Any) -> tuple[jax.Array, Sums]:
        return loss_fn(params, self.config, micro, totals, *self._pixels, self._options)

    def _moved_biases(self, biases: Arrays, load: jax.Array) -> Arrays:
        """Bias update of ``noaux_tc``: up by the speed where the load was below its layer's mean, down where above."""
        speed = self.settings.stage.bias_update_speed
        if not speed:
            return biases
        moves = speed * jnp.sign(load.mean(-1, keepdims=True) - load)  # [L, E], in order of layers
        moved, first = {}, 0
        for path in self._members:  # in order of layers
            name = path_name(path)
            if name in biases:
                count = len(self._members[path])
                moved[name] = biases[name] + moves[first : first + count].reshape(biases[name].shape)
                first += count
        return moved


def _metrics(sums: Sums, gradient_norm: jax.Array) -> LanguageMetrics:
    text_tokens = sums.supervised_tokens - sums.image_supervised_tokens
    return LanguageMetrics(
        loss=sums.loss / sums.supervised_tokens,
        text_loss=(sums.loss - sums.image_loss) / text_tokens,
        image_loss=sums.image_loss / sums.image_supervised_tokens,
        supervised_tokens=sums.supervised_tokens,
        image_supervised_tokens=sums.image_supervised_tokens,
        tokens=sums.tokens,
        balance_losses=sums.balance_losses,
        load=sums.load,
        gradient_norm=gradient_norm,
    )
