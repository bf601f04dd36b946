"""AdamW with a rule per parameter: learning-rate factor and weight decay; moments in float32 or bfloat16."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike, DTypeLike

from dsvl2_jax.train.settings.schema import OptimizerSettings, ParameterRule, Settings


def make_optimizer(settings: Settings, groups: Mapping[str, ParameterRule]) -> optax.GradientTransformation:
    """The stage's optimizer, equal to ``torch.optim.AdamW`` after clipping by the global norm.

    In order: clip the gradient of all trained parameters together; Adam; add ``weight_decay`` · parameter where the
    rule says so; multiply by the rule's ``lr_multiplier``; multiply by −`learning_rate` of the number of earlier
    updates.

    Args:
      settings: of the run; ``optimizer`` and ``run.steps`` are read.
      groups: {path: rule} of the trained parameters. Gradients and parameters are flat dicts f32 with the same keys.

    Raises:
      ValueError: a rule in ``groups`` does not train.
    """
    frozen = sorted(path for path, rule in groups.items() if not rule.train)
    if frozen:
        raise ValueError(f"frozen parameters have no place in the optimizer: {', '.join(frozen)}")
    cfg = settings.optimizer
    adam = optax.scale_by_adam(cfg.beta1, cfg.beta2, cfg.epsilon)
    return optax.chain(
        optax.clip_by_global_norm(cfg.clip_norm) if cfg.clip_norm else optax.identity(),
        keep_state_in(adam, jnp.bfloat16) if cfg.state_dtype == "bfloat16" else adam,
        _decay_and_rate(cfg.weight_decay, groups),
        optax.scale_by_learning_rate(learning_rate(cfg, settings.run.steps)),
    )


def learning_rate(settings: OptimizerSettings, steps: int) -> optax.Schedule:
    """The learning rate of multiplier 1 as a function of the number of earlier updates (0 for the first one).

    Warm-up is linear and reaches the full rate with update number ``warmup_steps``. Then ``constant`` stays;
    ``step`` is divided by √10 from 50 % of ``steps`` on and once more from 75 % on; ``cosine`` falls from the end of
    the warm-up to ``final_rate`` · ``learning_rate`` at ``steps``. (The paper states neither warm-up nor final rate.)
    A plain number gives a numpy float, so that asking for the rate does not wait for the device.

    Raises:
      ValueError: the schedule's name is unknown.
    """
    warmup = settings.warmup_steps

    def step(count: ArrayLike, xp: Any) -> ArrayLike:
        drops = (2 * count >= steps).astype(xp.float32) + (4 * count >= 3 * steps).astype(xp.float32)
        return math.sqrt(10) ** -drops

    def cosine(count: ArrayLike, xp: Any) -> ArrayLike:
        done = xp.clip((count - warmup) / max(steps - warmup, 1), 0.0, 1.0)
        return settings.final_rate + (1 - settings.final_rate) * 0.5 * (1 + xp.cos(xp.pi * done))

    shapes = {"constant": lambda count, xp: xp.float32(1.0), "step": step, "cosine": cosine}
    if settings.schedule not in shapes:
        raise ValueError(f"schedule {settings.schedule!r} is unknown; expected one of {', '.join(shapes)}")
    shape = shapes[settings.schedule]

    def schedule(count: ArrayLike) -> ArrayLike:
        xp = jnp if isinstance(count, jax.Array) else np
        count = xp.asarray(count, xp.int32)
        rise = xp.minimum((count + 1) / max(warmup, 1), 1.0)
        return settings.learning_rate * rise * shape(count, xp)

    return schedule


def keep_state_in(inner: optax.GradientTransformation, dtype: DTypeLike) -> optax.GradientTransformation:
    """``inner``, its floating state stored in ``dtype`` between updates and float32 during them; integers stay."""

    def cast(state: optax.OptState, to: DTypeLike) -> optax.OptState:
        return jax.tree.map(lambda x: x.astype(to) if jnp.issubdtype(x.dtype, jnp.floating) else x, state)

    def init(params: optax.Params) -> optax.OptState:
        return cast(inner.init(params), dtype)

    def update(
        updates: optax.Updates, state: optax.OptState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.OptState]:
        updates, state = inner.update(updates, cast(state, jnp.float32), params)
        return updates, cast(state, dtype)

    return optax.GradientTransformation(init, update)


def _decay_and_rate(weight_decay: float, groups: Mapping[str, ParameterRule]) -> optax.GradientTransformation:
    def update(updates: optax.Updates, params: optax.Params) -> optax.Updates:
        def one(path: str) -> jax.Array:
            rule = groups[path]
            decay = weight_decay * params[path] if rule.decay else 0.0
            return rule.lr_multiplier * (updates[path] + decay)

        return {path: one(path) for path in updates}

    return optax.stateless(update)
