"""Which mesh a job gets: how many bytes each leaves on a device, and how much work.

Tested in tests/apps/plan/test_planner.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from jax.sharding import PartitionSpec

from dsvl2_jax.apps.plan.job import ITEMSIZE, Job
from dsvl2_jax.apps.plan.training_step import check_batch, training_state_bytes
from dsvl2_jax.model.cache import cache_arrays
from dsvl2_jax.model.config import Config
from dsvl2_jax.model.parameter_paths import LeafPath
from dsvl2_jax.model.quantization import leaves_of, quantized_weights, stored_specs
from dsvl2_jax.runtime.hardware import Topology
from dsvl2_jax.sharding import ACTIVATION_RULES, MESH_AXES, batch_parts, mesh_axes, partition_spec

# Of a device's memory, what parameters and cache may take, so that there is room for a program to work.
MAX_MEMORY_FRACTION = 0.85


def resident_bytes(config: Config, job: Job, sizes: dict[str, int], itemsize: int = ITEMSIZE) -> float:
    """Bytes of a device that parameters and cache, or a training state with gradients, take: what must be there.

    Args:
      itemsize: of the numbers of inference that are not quantized.
    """
    if job.settings is not None:
        return training_state_bytes(config, job.settings, sizes, job.quantization)
    return sum(_weight_bytes(config, job, sizes, itemsize).values()) + _cache_bytes(config, job, sizes)


def _weight_bytes(config: Config, job: Job, sizes: dict[str, int], itemsize: int) -> dict[LeafPath, float]:
    """Of a device, by array of the parameters."""
    leaves = leaves_of(config, quantized_weights(config, job.quantization))
    specs = stored_specs(config, sizes, {path: shape for path, (shape, _) in leaves.items()})
    return {
        path: math.prod(shape) * (itemsize if dtype is None else dtype.itemsize) / _cut(specs[path], sizes)
        for path, (shape, dtype) in leaves.items()
    }


def _cache_bytes(config: Config, job: Job, sizes: dict[str, int]) -> float:
    total = 0.0
    if job.kind != "encode":
        for entry, axes, itemsize in cache_arrays(config.language, job.cache_dtype):
            shape = (job.batch, job.sequence, *entry)
            cut = pieces(shape, ("slots", "cache_length", *axes), sizes, ACTIVATION_RULES)
            total += config.language.num_hidden_layers * itemsize * math.prod(shape) / cut
    return total


def pieces(shape: tuple[int, ...], axes: tuple[str | None, ...], sizes: dict[str, int], rules: Any) -> int:
    """How many different pieces the mesh cuts an array into."""
    return _cut(partition_spec(shape, axes, sizes, rules), sizes)


def _cut(spec: PartitionSpec, sizes: dict[str, int]) -> int:
    return math.prod(sizes[name] for entry in spec for name in mesh_axes(entry))


def _device_load(config: Config, job: Job, sizes: dict[str, int]) -> float:
    """What a device has to do, to compare meshes by: bytes read in a decode step, the share of the products else."""
    cfg = config.language
    if job.kind == "encode":
        return 1 / pieces((job.batch,), ("tiles",), sizes, ACTIVATION_RULES)
    if job.kind != "decode":
        rows = job.batch if job.settings is None else job.settings.batch.microbatch_size * sizes["data"]
        heads = (rows, job.sequence, cfg.num_attention_heads, 1)
        return 1 / pieces(heads, ("batch", "length", "heads", "head_dim"), sizes, ACTIVATION_RULES)
    visited = min(1.0, job.batch * cfg.num_experts_per_tok / cfg.n_routed_experts) if cfg.n_routed_experts else 0.0
    read = _cache_bytes(config, job, sizes)
    for path, size in _weight_bytes(config, job, sizes, ITEMSIZE).items():
        if path[0] == "language" and path[1] != "embed_tokens":
            read += size * (visited if "experts" in path else 1.0)
    return read


def meshes(devices: int) -> Iterator[dict[str, int]]:
    """All meshes of a number of devices, those with the most data parallelism first."""
    for expert in (n for n in range(1, devices + 1) if devices % n == 0):
        for tensor in (n for n in range(1, devices // expert + 1) if devices // expert % n == 0):
            yield dict(zip(MESH_AXES, (devices // expert // tensor, tensor, expert), strict=True))


def choose_mesh(config: Config, job: Job, topology: Topology) -> tuple[dict[str, int], str]:
    """The mesh of the least work a device that holds what must be there, and why it was chosen.

    Of equals the one that splits matrices least: ``tensor`` costs two sums of activations a layer, ``expert`` one,
    ``data`` none.

    Raises:
      UsageError: a training step's sequences cannot be split over any mesh.
    """
    what = resident_parts(job)
    candidates = [
        (resident_bytes(config, job, sizes), sizes) for sizes in meshes(topology.devices) if _divides(job, sizes)
    ]
    if not candidates:
        check_batch(job.settings, dict.fromkeys(MESH_AXES, 1))
    fitting = [candidate for candidate in candidates if candidate[0] <= MAX_MEMORY_FRACTION * topology.memory]
    if not fitting:
        resident, sizes = min(candidates, key=lambda candidate: candidate[0])
        return sizes, f"no mesh leaves room: this one needs the least for {what} ({resident / 1e9:.1f} GB)"

    def cost(candidate: tuple[float, dict[str, int]]) -> tuple[float, int, int]:
        sizes = candidate[1]
        return _device_load(config, job, sizes), sizes["tensor"], sizes["expert"]

    resident, sizes = min(fitting, key=cost)
    least = "bytes to read" if job.kind == "decode" else "products"
    return sizes, f"the fewest {least} a device, with room beside {what} ({resident / 1e9:.1f} GB)"


def resident_parts(job: Job) -> str:
    """What `resident_bytes` counts, in words."""
    return "parameters and cache" if job.settings is None else "parameters, gradients and optimizer state"


def _divides(job: Job, sizes: dict[str, int]) -> bool:
    """Whether a training step's sequences can be split over a mesh; rows of inference are copied where they cannot."""
    if job.settings is None:
        return True
    batch = job.settings.batch
    return batch.sequences % (batch.microbatch_size * batch_parts(sizes)) == 0
