"""A training step: its settings, the least that it costs, and the step lowered for devices that need not be here.

Tested in tests/apps/plan/test_planner.py and test_planner_tpu.py.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dsvl2_jax.apps.plan.least_work import Work
from dsvl2_jax.errors import UsageError
from dsvl2_jax.model.config import Config
from dsvl2_jax.model.deepseek_vl2 import abstract_leaves
from dsvl2_jax.model.parameter_paths import LeafPath, path_name, stays_float32
from dsvl2_jax.model.quantization import Quantization, leaves_of, quantized_weights
from dsvl2_jax.model.weights import is_quantized
from dsvl2_jax.sharding import PARAM_RULES, add_fsdp_axis, axes_of, batch_parts, mesh_axes, partition_spec
from dsvl2_jax.train.adapter import adapter_leaves
from dsvl2_jax.train.flops import StepFlops, step_flops
from dsvl2_jax.train.parameter_rules import assign
from dsvl2_jax.train.settings.load import load, presets
from dsvl2_jax.train.settings.schema import Settings

KINDS = ("align", "pretrain", "sft", "lora")
STORED_AS = {"int8": jnp.int8, "int4": jnp.uint8, "float8": jnp.float8_e4m3fn}  # a quantized weight's values
_STORED = 4  # bytes of an entry of a trained parameter, and of its gradient


def preset_settings(
    model: str, kind: str, *, sequences: int | None, length: int | None, micro: int | None, overrides: Sequence[str]
) -> Settings:
    """The preset of a stage for a model, with the sizes and the single settings asked for.

    Raises:
      UsageError: there is no preset for the model. SettingsError: the settings cannot be used.
    """
    name = f"{model}-{kind}"
    if name not in presets():
        known = sorted({preset.split("-")[0] for preset in presets() if preset.endswith(f"-{kind}")})
        raise UsageError(f"--job {kind}: there is no preset {name}; models that have one are {', '.join(known)}.")
    sizes = {
        "batch.sequences": sequences,
        "data.sequence_length": length,
        "batch.microbatch_size": micro,
        # The presets leave the data to the user; nothing is read of them here.
        "data.train.vl.path": "planned.jsonl",
        "data.train.text.path": "planned.jsonl" if kind == "pretrain" else None,
    }
    given = [f"{key}={value}" for key, value in sizes.items() if value is not None]
    return load(name, [*given, *overrides])


def check_batch(settings: Settings, sizes: dict[str, int]) -> None:
    """Raises UsageError when a step's sequences cannot be split evenly."""
    batch, shards = settings.batch, batch_parts(sizes)
    if batch.sequences % (batch.microbatch_size * shards):
        raise UsageError(
            f"a step of {batch.sequences} sequences is no multiple of {batch.microbatch_size} at a time on each of "
            f"{shards} data shards; change --batch, --micro or --mesh."
        )


def program_settings(settings: Settings) -> dict[str, Any]:
    """The settings that shape the program, as a JSON object."""
    stage = settings.adapter
    adapter = {"adapter": stage.kind, "rank": stage.rank, "targets": list(stage.targets)}
    return {
        "micro": settings.batch.microbatch_size,
        "tiles": settings.data.tiles_per_sequence,
        "remat": settings.compute.remat,
        "dtype": settings.compute.dtype,
        "optimizer_state": settings.optimizer.state_dtype,
        **(adapter if stage.kind != "none" else {}),
    }


@dataclasses.dataclass(frozen=True)
class _Stored:
    """An array of the training state's parameters, layers apart."""

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    trained: bool
    itemsize: int  # of an entry


def _stored_leaves(config: Config, settings: Settings, quantization: Quantization | None) -> dict[LeafPath, _Stored]:
    """All parameters of a stage. Frozen ones are bfloat16 where they are not quantized, the routers' float32."""
    leaves = leaves_of(config, quantized_weights(config, quantization))
    axes, found = abstract_leaves(config), {}
    if settings.adapter.kind == "none":
        rules = assign(map(path_name, leaves), settings.stage.parameters)
        trained = {path for path in leaves if rules[path_name(path)].train}
    else:
        trained = set()
        for path, leaf in adapter_leaves(config, settings.adapter).items():
            found[path] = _Stored(*leaf, trained=True, itemsize=_STORED)
    for path, (shape, dtype) in leaves.items():
        itemsize = _STORED if path in trained or stays_float32(path) else 2 if dtype is None else dtype.itemsize
        found[path] = _Stored(shape, axes[path if path in axes else path[:-1]][1], path in trained, itemsize)
    return found


def _step_flops(config: Config, settings: Settings, *, remat: bool) -> StepFlops:
    if settings.adapter.kind != "none":
        return step_flops(config, {}, remat=remat, adapter=adapter_leaves(config, settings.adapter))
    rules = assign(map(path_name, abstract_leaves(config)), settings.stage.parameters)
    return step_flops(config, rules, remat=remat)


def training_work(config: Config, settings: Settings, quantization: Quantization | None = None) -> Work:
    """The least that a step costs: forward, backward and the rematerialisation asked for.

    Every row is one sample, which is the most that attention can cost; all places for tiles are filled. Bytes: the
    state is read and written once, and every accumulation step reads the layers' weights once a pass.
    """
    full = settings.compute.remat == "full"
    sequences, length = settings.batch.sequences, settings.data.sequence_length
    tiles = sequences * settings.data.tiles_per_sequence
    flops = _step_flops(config, settings, remat=full).step(sequences * length, sequences, tiles)
    moments = 2 * jnp.dtype(settings.optimizer.state_dtype).itemsize
    width = jnp.dtype(settings.compute.dtype).itemsize
    state = weights = 0.0
    for leaf in _stored_leaves(config, settings, quantization).values():
        size = math.prod(leaf.shape)
        state += 2 * (_STORED + moments) * size if leaf.trained else 0
        weights += (width if leaf.trained else min(width, leaf.itemsize)) * size
    return Work(flops, state + (3 if full else 2) * weights)


def training_state_bytes(
    config: Config, settings: Settings, sizes: dict[str, int], quantization: Quantization | None = None
) -> float:
    """Bytes of a device that parameters, gradients and optimizer state take."""
    moments = 2 * jnp.dtype(settings.optimizer.state_dtype).itemsize
    total = 0.0
    for leaf in _stored_leaves(config, settings, quantization).values():
        spec = add_fsdp_axis(partition_spec(leaf.shape, leaf.axes, sizes, PARAM_RULES), leaf.shape, sizes)
        names = [name for entry in spec for name in mesh_axes(entry)]
        width = 2 * _STORED + moments if leaf.trained else leaf.itemsize
        total += width * math.prod(leaf.shape) / math.prod(sizes[name] for name in names)
    return total


def lower_training_step(
    config: Config, settings: Settings, mesh: Mesh, quantization: Quantization | None = None
) -> jax.stages.Lowered:
    """Lowers a step for a mesh. Frozen parameters are as released, in bfloat16, or quantized."""
    from dsvl2_jax.train.objectives.adapter import AdapterTrainer
    from dsvl2_jax.train.objectives.language import LanguageTrainer

    arguments = config, settings, (0.5,) * 3, (0.5,) * 3, mesh
    if settings.adapter.kind == "none":
        trainer = LanguageTrainer(*arguments)
    else:
        leaves = leaves_of(config, quantized_weights(config, quantization))
        trainer = AdapterTrainer(*arguments, {path: shape for path, (shape, _) in leaves.items()})
    state = trainer.abstract_state()
    nested = unflatten_dict(state.frozen, sep="/")
    frozen = flatten_dict(_as_stored((), nested), sep="/")
    return trainer.lower(dataclasses.replace(state, frozen=frozen), abstract_batch(config, settings, mesh))


def _as_stored(path: LeafPath, value: Any) -> Any:
    """Frozen parameters, nested, with the dtypes in which they are kept."""
    if is_quantized(value):
        return {name: _typed(leaf, STORED_AS.get(name, jnp.float32)) for name, leaf in value.items()}
    if isinstance(value, Mapping):
        return {name: _as_stored((*path, name), inner) for name, inner in value.items()}
    return _typed(value, jnp.float32 if stays_float32(path) else jnp.bfloat16)


def _typed(leaf: jax.ShapeDtypeStruct, dtype: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=leaf.sharding)


def abstract_batch(config: Config, settings: Settings, mesh: Mesh) -> Any:
    """A step's `TrainBatch` as the trainer puts it on its mesh: rows over the data shards, tiles over all devices."""
    from dsvl2_jax.train.data.batch import TrainBatch

    sizes, batch = dict(mesh.shape), settings.batch
    shards = batch_parts(sizes)
    steps = batch.sequences // (batch.microbatch_size * shards)
    rows = (steps, batch.microbatch_size * shards, settings.data.sequence_length)
    by_row = NamedSharding(mesh, PartitionSpec(None, axes_of("batch", mesh)))
    by_tile = NamedSharding(mesh, PartitionSpec(None, axes_of("tiles", mesh)))
    others = mesh.size // shards  # devices among which a data shard's tiles are dealt out
    tiles = -(-batch.microbatch_size * settings.data.tiles_per_sequence // others) * mesh.size
    side = config.vision.image_size
    whole = jax.ShapeDtypeStruct(rows, jnp.int32, sharding=by_row)
    return TrainBatch(
        ids=whole,
        labels=whole,
        image_index=whole,
        positions=whole,
        segments=whole,
        with_images=jax.ShapeDtypeStruct(rows, jnp.bool_, sharding=by_row),
        tiles=jax.ShapeDtypeStruct((steps, tiles, side, side, 3), jnp.uint8, sharding=by_tile),
    )
