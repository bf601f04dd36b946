"""The training step of an adapter: that of the language model, with gradients and optimizer state of the adapter alone.

The state's frozen part is the whole model, plain or quantized; its trained part is the adapter.

Tested in tests/train/objectives/test_adapter.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from flax.traverse_util import unflatten_dict
from jax.sharding import Mesh
from jax.typing import ArrayLike

from dsvl2_jax.checkpoint.adapters import AdapterSettings, write_adapter
from dsvl2_jax.checkpoint.locate import ADAPTER_NAME
from dsvl2_jax.checkpoint.orbax_io import Files
from dsvl2_jax.errors import SettingsError
from dsvl2_jax.model.config import Config
from dsvl2_jax.model.deepseek_vl2 import Params
from dsvl2_jax.model.parameter_paths import LeafPath, path_name
from dsvl2_jax.train.adapter import (
    LEAVES,
    adapter_leaves,
    base_leaves,
    init_adapter,
    joined,
    with_adapter,
)
from dsvl2_jax.train.flops import StepFlops, step_flops
from dsvl2_jax.train.objectives.base import TrainState
from dsvl2_jax.train.objectives.language import LanguageTrainer
from dsvl2_jax.train.settings.schema import ParameterRule, Settings


class AdapterTrainer(LanguageTrainer):
    """Training of an adapter on the next token; see `BaseTrainer`.

    `init` takes the model's parameters with an adapter's in their places (`begin`, or `with_adapter`).
    """

    def __init__(
        self,
        config: Config,
        settings: Settings,
        mean: ArrayLike,
        std: ArrayLike,
        mesh: Mesh | None = None,
        stored: Mapping[LeafPath, tuple[int, ...]] | None = None,
    ):
        """Raises SettingsError when a target fits nothing, or some layers of a stack only.

        Args:
          stored: shapes of the checkpoint's leaves, where some are quantized; None: all are plain.
        """
        self._stored = stored
        self.base_digest: str | None = None  # of the checkpoint, for the adapter's files
        super().__init__(config, settings, mean, std, mesh)
        # Whole on every device, so that one process can write all of it.
        whole = {path: self._whole() for path in adapter_leaves(config, settings.adapter)}
        self._separate_adapter = jax.jit(self._unstacked, out_shardings=whole)

    def _all_leaves(self) -> Mapping[LeafPath, tuple[tuple[int, ...], tuple[str | None, ...]]]:
        stage = self.settings.adapter
        return base_leaves(self.config, stage, self._stored) | adapter_leaves(self.config, stage)

    def _assigned_rules(self) -> dict[str, ParameterRule]:
        # Weight decay is of matrices alone, as everywhere.
        trained = {name: ParameterRule(".", decay=name != "magnitude") for name in LEAVES}
        frozen = ParameterRule(".", train=False)
        return {path_name(path): trained.get(path[-1], frozen) for path in self._leaves}

    def _stacked_rules(self) -> dict[str, ParameterRule]:
        runs: dict[tuple[str, ...], int] = {}
        for path, members in self._members.items():
            if runs.setdefault(path[:2], len(members)) != len(members):
                raise SettingsError(
                    f"adapter.targets: only some of the layers of {path_name(path[:2])} have an adapter, but these "
                    "layers are trained as one stack: let the targets match all of them, or set "
                    "compute.scan_layers = false."
                )
        return super()._stacked_rules()

    def _part(self, name: str) -> str:
        return "trained" if self.rules[name].train else "frozen"

    def flops(self) -> StepFlops:
        return step_flops(self.config, {}, adapter=adapter_leaves(self.config, self.settings.adapter))

    def begin(self, params: Params) -> Params:
        """The model's parameters with a fresh adapter."""
        stage = self.settings.adapter
        return with_adapter(params, init_adapter(params, self.config, stage, self.settings.run.seed))

    def adapter(self, state: TrainState) -> Params:
        """The adapter as a file holds it: nested, layers apart, without its factor; shares no memory with the state."""
        return unflatten_dict(self._separate_adapter(state.trained))

    def contents(self, state: TrainState) -> dict[str, Any]:
        adapter = jax.device_get(self.adapter(state))
        stage = self.settings.adapter
        described = AdapterSettings(
            kind=stage.kind,
            rank=stage.rank,
            alpha=stage.alpha,
            dropout=stage.dropout,
            targets="|".join(f"({target})" for target in stage.targets),
            rslora=stage.rslora,
            base=self.settings.model.checkpoint,
            base_digest=self.base_digest,
        )

        def write(directory: Path) -> None:
            write_adapter(directory, self.config, adapter, described)

        return {ADAPTER_NAME: Files(write, sum(leaf.nbytes for leaf in jax.tree.leaves(adapter)))}

    def _joined(self, params: Mapping[str, jax.Array], turn: tuple[ArrayLike, ArrayLike] | None = None) -> Params:
        key = None
        if turn is not None:
            key = jax.random.key(self.settings.run.seed)
            for number in turn:
                key = jax.random.fold_in(key, number)
        return joined(unflatten_dict(params, sep="/"), self.settings.adapter, key)
