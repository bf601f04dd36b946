"""Runs of equal layers, and the one loop over them that inference and training share.

Each layer has parameters of its own, or a run of two or more equal layers has one entry, ``layers_1_to_11``, whose
arrays have a leading axis of layers; such a run is a scan, whose body is compiled once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from dsvl2_jax.model.config import Config, LanguageConfig, VisionConfig

# (x, one layer's parameters, its state such as a cache) → (x, its new state, what it reports).
LayerFunction = Callable[[jax.Array, Any, Any], tuple[jax.Array, Any, Any]]


@dataclasses.dataclass(frozen=True)
class LayerRun:
    """Consecutive layers ``first … last`` of one kind, under ``part`` (vision or language) of the parameters."""

    part: str
    prefix: str  # of the layers' names: layers_ or blocks_
    first: int
    last: int

    @property
    def name(self) -> str:
        return f"{self.prefix}{self.first}" + (f"_to_{self.last}" if self.stacked else "")

    @property
    def stacked(self) -> bool:
        return self.last > self.first

    def members(self) -> list[str]:
        """The names of the separate layers."""
        return [f"{self.prefix}{i}" for i in range(self.first, self.last + 1)]


# Given a run, changes the function of its layers: rematerialises it, say.
LayerWrapper = Callable[[LayerRun, LayerFunction], LayerFunction]


def vision_runs(config: VisionConfig, *, stack: bool = True) -> list[LayerRun]:
    """The runs of the encoder's blocks; without ``stack``, of one block each."""
    return _runs("vision", "blocks_", [False] * config.layers, stack)


def language_runs(config: LanguageConfig, *, stack: bool = True) -> list[LayerRun]:
    """The runs of the decoder's layers; without ``stack``, of one layer each."""
    is_moe = [config.is_moe_layer(i) for i in range(config.num_hidden_layers)]
    return _runs("language", "layers_", is_moe, stack)


def layer_runs(config: Config, *, stack: bool = True) -> dict[str, list[LayerRun]]:
    """The runs of the encoder ("vision") and of the decoder ("language")."""
    return {
        "vision": vision_runs(config.vision, stack=stack),
        "language": language_runs(config.language, stack=stack),
    }


def _runs(part: str, prefix: str, kinds: Sequence[bool], stack: bool) -> list[LayerRun]:
    runs, first = [], 0
    for i in range(len(kinds)):
        if not stack or i + 1 == len(kinds) or kinds[i + 1] != kinds[i]:
            runs.append(LayerRun(part, prefix, first, i))
            first = i + 1
    return runs


def run_layers(
    run: LayerRun,
    params: dict[str, Any],
    layer: LayerFunction,
    x: jax.Array,
    *,
    states: Sequence[Any] | None = None,
    wrap: LayerWrapper | None = None,
) -> tuple[jax.Array, list[Any], Any]:
    """Applies the layers of a run, one after the other.

    Args:
      run: of `vision_runs` or `language_runs`.
      params: has the entry ``run.name`` of stacked layers, or one for each of ``run.members()``.
      layer: from (x, parameters of a layer, its state) to (x, its new state, what it reports).
      x: of any shape, which the layers keep.
      states: one for each layer; None: there are none. Stacked layers have none.
      wrap: changes ``layer``, knowing the run; None: it stays as it is.

    Returns:
      The last x, the layers' new states (empty for stacked ones), and what they report, stacked over the layers.
    """
    layer = layer if wrap is None else wrap(run, layer)
    if run.stacked and run.name in params:
        if states is not None:
            raise ValueError(f"{run.name}: stacked layers keep no states; give the layers' parameters one by one")

        def body(x: jax.Array, layer_params: Any) -> tuple[jax.Array, Any]:
            x, _, report = layer(x, layer_params, None)
            return x, report

        with jax.named_scope(run.name):
            x, reports = lax.scan(body, x, params[run.name])
        return x, [], reports
    new_states, reports = [], []
    for i, name in enumerate(run.members()):
        with jax.named_scope(name):
            x, state, report = layer(x, params[name], None if states is None else states[i])
        new_states.append(state)
        reports.append(report)
    return x, new_states, jax.tree.map(lambda *layers: jnp.stack(layers), *reports)
