"""What every objective's trainer shares: the state, where its arrays lie, and how it gets in and out of a model.

Parameters are a flat dict, ``{"language/layers_1_to_11/mlp/router/kernel": array}``, with stacked layers, in three
parts: trained ones (float32, with optimizer state), router biases (moved by the measured load), and frozen ones,
which keep their stored dtype and cost neither gradient nor optimizer memory.

Tested in tests/train/objectives/test_language.py.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import unflatten_dict
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import ArrayLike

from dsvl2_jax.checkpoint.locate import PARAMS_NAME
from dsvl2_jax.errors import SettingsError
from dsvl2_jax.inputs.processor import rebased
from dsvl2_jax.model.config import Config
from dsvl2_jax.model.deepseek_vl2 import Params, abstract_leaves
from dsvl2_jax.model.parameter_paths import LeafPath, path_name
from dsvl2_jax.sharding import ACTIVATION_RULES, PARAM_RULES, add_fsdp_axis, axes_of, partition_spec
from dsvl2_jax.train.data.batch import TrainBatch
from dsvl2_jax.train.flops import StepFlops
from dsvl2_jax.train.optimizer import make_optimizer
from dsvl2_jax.train.parameter_rules import assign
from dsvl2_jax.train.settings.schema import ParameterRule, Settings
from dsvl2_jax.train.stacked import stack_layers, stacked_paths, unstack_layers

Arrays = dict[str, jax.Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that a step changes or needs, besides the batch."""

    step: jax.Array  # i32[], updates done
    trained: Arrays  # float32
    biases: Arrays  # f32[E] or f32[L, E], correction biases of the routers
    frozen: Arrays  # in their stored dtypes
    optimizer: optax.OptState


class BaseTrainer:
    """The jitted functions of one run: a model, its settings and its mesh.

    An objective has its own `_update` and `_measure`. ``auxiliary`` are parameters that it trains besides the model's,
    with their rules: they live in the optimizer's state.
    """

    def __init__(
        self,
        config: Config,
        settings: Settings,
        mean: ArrayLike,
        std: ArrayLike,
        mesh: Mesh | None,
        auxiliary: Mapping[str, ParameterRule] | None = None,
    ):
        """Raises SettingsError when the stage's rules do not fit the model.

        ``mean``, ``std``: f32[3], of the processor's configuration. ``mesh`` of `dsvl2_jax.sharding.make_mesh`; None:
        one device.
        """
        self.config = config
        self.settings = settings
        self.mesh = mesh
        self._pixels = np.asarray(mean, np.float32), np.asarray(std, np.float32)
        self._leaves = self._all_leaves()
        self._members = stacked_paths(config, list(self._leaves), stack=settings.compute.scan_layers)
        self.parameter_rules = self._assigned_rules()  # by the paths of layers apart
        self.rules = self._stacked_rules()
        trained = {path: rule for path, rule in self.rules.items() if rule.train}
        self._optimizer = make_optimizer(settings, trained | dict(auxiliary or {}))
        shardings = jax.tree.map(lambda leaf: leaf.sharding, self.abstract_state())
        # Metrics are whole on every device, so that every process can look at them.
        self._step = jax.jit(self._update, donate_argnums=0, out_shardings=(shardings, self._whole()))
        self._evaluate = jax.jit(self._measure, out_shardings=self._whole())
        separate = {path: self._sharding(*leaf, False) for path, leaf in self._leaves.items()}
        self._separate = jax.jit(self._unstacked, out_shardings=separate)

    metrics: type  # what a step reports: has ``finite``, ``logged`` and ``average``

    def flops(self) -> StepFlops:
        """The work of a step."""
        raise NotImplementedError

    def _update(self, state: TrainState, batch: TrainBatch) -> tuple[TrainState, Any]:
        """One optimizer step: the next state, and its metrics. Jitted."""
        raise NotImplementedError

    def _measure(self, state: TrainState, batch: TrainBatch) -> Any:
        """The metrics of a batch. Jitted."""
        raise NotImplementedError

    def _all_leaves(self) -> Mapping[LeafPath, tuple[tuple[int, ...], tuple[str | None, ...]]]:
        """Path → (shape, logical axes) of all that the state's three parts hold, layers apart."""
        return abstract_leaves(self.config)

    def _assigned_rules(self) -> dict[str, ParameterRule]:
        """The rule of every parameter."""
        stage = self.settings.stage
        return assign(map(path_name, self._leaves), stage.parameters, stage.objective)

    def _stacked_rules(self) -> dict[str, ParameterRule]:
        """Stacked path → rule."""
        rules = {}
        for path, members in self._members.items():
            member_rules = {self.parameter_rules[path_name(member)] for member in members}
            if len(member_rules) > 1:
                raise SettingsError(
                    f"stage.parameters: {path_name(members[0])} … {path_name(members[-1])} follow different rules, but "
                    "these layers are trained as one stack: give them one rule, or set compute.scan_layers = false."
                )
            rules[path_name(path)] = member_rules.pop()
        return rules

    def begin(self, params: Params) -> Params:
        """The parameters that a run starts from, given those of its checkpoint."""
        return params

    def init(self, params: Params) -> TrainState:
        """The state before the first step.

        Args:
          params: nested, of `load_params` or `init_params`. They are taken out of
            the dict one by one, so that parameters are never in memory twice.
        """
        abstract = self.abstract_state()
        parts: dict[str, Arrays] = {"trained": {}, "biases": {}, "frozen": {}}
        for path, members in self._members.items():
            name = path_name(path)
            part = self._part(name)
            target = getattr(abstract, part)[name]
            leaves = {member: _take(params, member) for member in members}
            dtype = leaves[members[0]].dtype if part == "frozen" else target.dtype
            stack_and_put = jax.jit(
                functools.partial(self._stacked, dtype=dtype), out_shardings={path: target.sharding}
            )
            parts[part][name] = stack_and_put(leaves)[path]
        shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract.optimizer)
        optimizer = self._init_optimizer(parts["trained"], shardings)
        step = jax.device_put(np.int32(0), abstract.step.sharding)
        return TrainState(step=step, optimizer=optimizer, **parts)

    def abstract_state(self) -> TrainState:
        """The state's shapes, dtypes and shardings. Frozen parameters, whose dtype is the checkpoint's, say float32."""
        shapes: dict[str, dict[str, jax.ShapeDtypeStruct]] = {"trained": {}, "biases": {}, "frozen": {}}
        for path, members in self._members.items():
            shape, axes = self._leaves[members[0]]
            stacked = path != members[0]
            shape, axes = ((len(members), *shape), (None, *axes)) if stacked else (shape, axes)
            sharding = self._sharding(shape, axes, stacked)
            name = path_name(path)
            shapes[self._part(name)][name] = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding)
        step = jax.ShapeDtypeStruct((), jnp.int32, sharding=self._whole())
        return TrainState(step=step, optimizer=self._abstract_optimizer(shapes["trained"]), **shapes)

    def _init_optimizer(self, trained: Arrays, shardings: Any) -> Any:
        """The optimizer's state before the first step."""
        return jax.jit(self._optimizer.init, out_shardings=shardings)(trained)

    def _abstract_optimizer(self, trained: dict[str, jax.ShapeDtypeStruct]) -> Any:
        """Shapes, dtypes and shardings of `_init_optimizer`'s result."""
        whole = self._whole()
        return optax.tree_map_params(
            self._optimizer,
            lambda leaf, param: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=param.sharding),
            jax.eval_shape(self._optimizer.init, trained),
            trained,
            transform_non_params=lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=whole),
        )

    def params(self, state: TrainState) -> Params:
        """The parameters as a checkpoint holds them: nested, layers separate. They share no memory with the state."""
        return unflatten_dict(self._separate({**state.trained, **state.biases, **state.frozen}))

    def contents(self, state: TrainState) -> dict[str, Any]:
        """What a checkpoint has of the parameters, by name, for `orbax_io.Saving`."""
        return {PARAMS_NAME: self.params(state)}

    def step(self, state: TrainState, batch: TrainBatch) -> tuple[TrainState, Any]:
        """One optimizer step; the state given is consumed. ``batch``: numpy, the rows of this process."""
        with self._on_mesh():
            return self._step(state, self._place(batch))

    def lower(self, state: TrainState, batch: TrainBatch) -> jax.stages.Lowered:
        """The program of a step, of shapes alone: `abstract_state`, and a batch as `_place` would put it."""
        with self._on_mesh():
            return self._step.lower(state, batch)

    def evaluate(self, state: TrainState, batch: TrainBatch) -> Any:
        """The losses of a batch, nothing changed."""
        with self._on_mesh():
            return self._evaluate(state, self._place(batch))

    def _place(self, batch: TrainBatch) -> TrainBatch:
        """Puts this process's rows on its devices: rows over data shards, tiles evenly over all devices."""
        if self.mesh is None:
            return batch
        local_shards, shards = data_shards(self.mesh)
        devices = self.mesh.size // shards  # of a data shard
        rows = self.settings.batch.microbatch_size
        if batch.ids.shape[1] != rows * len(local_shards):
            raise ValueError(
                f"{batch.ids.shape[1]} rows given, {rows} for each of {len(local_shards)} data shards expected"
            )
        per_row = self.config.tokens_per_tile
        a, count = batch.tiles.shape[:2]
        given = count // len(local_shards)  # tiles of a data shard
        even = -(-given // devices) * devices
        tiles = batch.tiles.reshape(a, len(local_shards), given, *batch.tiles.shape[2:])
        if even > given:
            tiles = np.pad(tiles, ((0, 0), (0, 0), (0, even - given), (0, 0), (0, 0), (0, 0)))
        index = batch.image_index
        if count:
            tile = np.maximum(index, 0) // per_row
            moved = np.asarray(local_shards)[tile // given] * even + tile % given
            index = rebased(index, (moved - tile) * per_row)

        def put(x: np.ndarray, shard: int, spec: PartitionSpec) -> jax.Array:
            """``shard``: entries of a data shard along axis 1."""
            if not shard:
                return jax.device_put(x, NamedSharding(self.mesh, PartitionSpec()))
            shape = (x.shape[0], shard * shards, *x.shape[2:])

            def local(slices: tuple[slice, ...]) -> np.ndarray:
                start, stop, _ = slices[1].indices(shape[1])  # within one data shard
                first = local_shards.index(start // shard) * shard + start % shard
                return x[:, first : first + stop - start]

            return jax.make_array_from_callback(shape, NamedSharding(self.mesh, spec), local)

        batch = dataclasses.replace(batch, image_index=index, tiles=None)
        placed = jax.tree.map(lambda x: put(x, rows, PartitionSpec(None, axes_of("batch", self.mesh))), batch)
        tiles = put(tiles.reshape(a, -1, *tiles.shape[3:]), even, PartitionSpec(None, axes_of("tiles", self.mesh)))
        return dataclasses.replace(placed, tiles=tiles)

    def _stacked(self, leaves: dict[LeafPath, jax.Array], dtype: Any) -> dict[LeafPath, jax.Array]:
        stacked = stack_layers(leaves, self.config, stack=self.settings.compute.scan_layers)
        return {path: leaf.astype(dtype) for path, leaf in stacked.items()}

    def _unstacked(self, leaves: Arrays) -> dict[LeafPath, jax.Array]:
        separate = {path: leaves[path_name(path)] for path in self._members if path_name(path) in leaves}
        separate = unstack_layers(separate, self.config, stack=self.settings.compute.scan_layers)
        # A jitted function returns an argument that it does not change as it is, hence the copy.
        return {path: jnp.copy(leaf) for path, leaf in separate.items()}

    def _part(self, name: str) -> str:
        return "trained" if self.rules[name].train else "biases" if name.endswith("/correction_bias") else "frozen"

    def _sharding(self, shape: tuple[int, ...], axes: tuple[str | None, ...], stacked: bool) -> Any:
        if self.mesh is None:
            return self._whole()
        sizes = dict(self.mesh.shape)
        spec = partition_spec(shape, axes, sizes, PARAM_RULES)
        return NamedSharding(self.mesh, add_fsdp_axis(spec, shape, sizes, layers=stacked))

    def _whole(self) -> Any:
        if self.mesh is None:
            return jax.sharding.SingleDeviceSharding(jax.devices()[0])
        return NamedSharding(self.mesh, PartitionSpec())

    def _on_mesh(self) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext() if self.mesh is None else jax.set_mesh(self.mesh)


def data_shards(mesh: Mesh | None) -> tuple[list[int], int]:
    """(the data shards whose rows this process computes, ascending; the number of all).

    A data shard is what the rows of a batch are split over: the devices of one place along ``data`` and ``expert``.
    """
    if mesh is None:
        return [0], 1
    split = [axis in ACTIVATION_RULES["batch"] for axis in mesh.axis_names]
    sizes = [size for size, counts in zip(mesh.devices.shape, split, strict=True) if counts]
    local_shards = {
        int(np.ravel_multi_index([at for at, counts in zip(position, split, strict=True) if counts], sizes))
        for position, device in np.ndenumerate(mesh.devices)
        if device.process_index == jax.process_index()
    }
    return sorted(local_shards), math.prod(sizes)


def _take(tree: dict[str, Any], path: LeafPath) -> jax.Array:
    for key in path[:-1]:
        tree = tree[key]
    return tree.pop(path[-1])
