"""`dsvl2 plan`: what a job takes on devices that need not be here, from the program that their compiler makes."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from dsvl2_jax.apps.plan import jobs as plan_jobs
from dsvl2_jax.apps.plan import training as plan_train
from dsvl2_jax.apps.plan import work as plan_work
from dsvl2_jax.apps.plan.hlo import Cost, walk
from dsvl2_jax.errors import UsageError
from dsvl2_jax.messages import first_line
from dsvl2_jax.model.cache import cache_layout
from dsvl2_jax.model.config import Config
from dsvl2_jax.model.deepseek_vl2 import abstract_leaves
from dsvl2_jax.model.parameter_paths import LeafPath
from dsvl2_jax.runtime.hardware import Topology
from dsvl2_jax.sharding import (
    ACTIVATION_RULES,
    MESH_AXES,
    PARAM_RULES,
    batch_parts,
    check_mesh,
    mesh_axes,
    partition_spec,
)
from dsvl2_jax.train.settings.schema import Settings

JOBS = ("prefill", "decode", "encode", "align", "pretrain", "sft")
ITEMSIZE = 2  # of bfloat16, in which everything is planned
ROOM = 0.85  # most of a device's memory that parameters and cache may take, so that a program can work


@dataclasses.dataclass(frozen=True)
class Job:
    """What is to be planned.

    Attributes:
      kind: of `JOBS`.
      batch: prompts, decode slots, tiles, or sequences of a training step.
      sequence: tokens of a prompt or training sequence, or that the cache has room for; encoding has none.
      settings: of a training step, which holds batch and sequence too; None: for inference.
    """

    kind: str
    batch: int
    sequence: int
    settings: Settings | None = None

    @property
    def unit(self) -> tuple[str, int]:
        """What one run makes, and how much of it."""
        if self.kind == "encode":
            return "tiles", self.batch
        return "tokens", self.batch * (1 if self.kind == "decode" else self.sequence)

    def described(self) -> dict[str, Any]:
        """A JSON object of all that shapes the job's program."""
        found = {"kind": self.kind, "batch": self.batch, "sequence": self.sequence}
        return found if self.settings is None else found | plan_train.described(self.settings)


def work(config: Config, job: Job) -> plan_work.Work:
    """The least that a job costs on all devices together."""
    if job.settings is not None:
        return plan_train.train_work(config, job.settings)
    if job.kind == "encode":
        return plan_work.encode_work(config, job.batch, ITEMSIZE)
    of = plan_work.prefill_work if job.kind == "prefill" else plan_work.decode_work
    return of(config, job.batch, job.sequence, ITEMSIZE)


def resident_bytes(config: Config, job: Job, sizes: dict[str, int]) -> float:
    """Bytes of a device that parameters and cache, or a training state with gradients, take: what must be there."""
    if job.settings is not None:
        return plan_train.resident_bytes(config, job.settings, sizes)
    return sum(_weight_bytes(config, sizes).values()) + _cache_bytes(config, job, sizes)


def _weight_bytes(config: Config, sizes: dict[str, int]) -> dict[LeafPath, float]:
    """Of a device, by parameter."""
    return {
        path: ITEMSIZE * math.prod(shape) / _parts(shape, axes, sizes, PARAM_RULES)
        for path, (shape, axes) in abstract_leaves(config).items()
    }


def _cache_bytes(config: Config, job: Job, sizes: dict[str, int]) -> float:
    total = 0.0
    if job.kind != "encode":
        for entry, axes in cache_layout(config.language).values():
            shape = (job.batch, job.sequence, *entry)
            parts = _parts(shape, ("slots", "cache_length", *axes), sizes, ACTIVATION_RULES)
            total += config.language.num_hidden_layers * ITEMSIZE * math.prod(shape) / parts
    return total


def _parts(shape: tuple[int, ...], axes: tuple[str | None, ...], sizes: dict[str, int], rules: Any) -> int:
    """Into how many different pieces the mesh cuts an array."""
    spec = partition_spec(shape, axes, sizes, rules)
    return math.prod(sizes[name] for entry in spec for name in mesh_axes(entry))


def _load(config: Config, job: Job, sizes: dict[str, int]) -> float:
    """What a device has to do, to compare meshes by: bytes read in a decode step, the share of the products else."""
    cfg = config.language
    if job.kind == "encode":
        return 1 / _parts((job.batch,), ("tiles",), sizes, ACTIVATION_RULES)
    if job.kind != "decode":
        rows = job.batch if job.settings is None else job.settings.batch.microbatch_size * sizes["data"]
        heads = (rows, job.sequence, cfg.num_attention_heads, 1)
        return 1 / _parts(heads, ("batch", "length", "heads", "head_dim"), sizes, ACTIVATION_RULES)
    visited = min(1.0, job.batch * cfg.num_experts_per_tok / cfg.n_routed_experts) if cfg.n_routed_experts else 0.0
    read = _cache_bytes(config, job, sizes)
    for path, held in _weight_bytes(config, sizes).items():
        if path[0] == "language" and path[1] != "embed_tokens":
            read += held * (visited if "experts" in path else 1.0)
    return read


def meshes(devices: int) -> Iterator[dict[str, int]]:
    """All meshes of so many devices, those with the most data parallelism first."""
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
    what = "parameters and cache" if job.settings is None else "parameters, gradients and optimizer state"
    found = [(resident_bytes(config, job, sizes), sizes) for sizes in meshes(topology.devices) if _divides(job, sizes)]
    if not found:
        plan_train.check_batch(job.settings, dict.fromkeys(MESH_AXES, 1))
    fitting = [entry for entry in found if entry[0] <= ROOM * topology.memory]
    if fitting:
        loads = {tuple(sizes.values()): _load(config, job, sizes) for _, sizes in fitting}

        def cost(entry: tuple[float, dict[str, int]]) -> tuple[float, int, int]:
            sizes = entry[1]
            return loads[tuple(sizes.values())], sizes["tensor"], sizes["expert"]

        held, sizes = min(fitting, key=cost)
        least = "bytes to read" if job.kind == "decode" else "products"
        return sizes, f"the fewest {least} a device, with room beside {what} ({held / 1e9:.1f} GB)"
    held, sizes = min(found, key=lambda entry: entry[0])
    return sizes, f"no mesh leaves room: this one needs the least for {what} ({held / 1e9:.1f} GB)"


def _divides(job: Job, sizes: dict[str, int]) -> bool:
    """Whether a training step's sequences can be split over a mesh; rows of inference are copied where they cannot."""
    if job.settings is None:
        return True
    batch = job.settings.batch
    return batch.sequences % (batch.microbatch_size * batch_parts(sizes)) == 0


def plan(
    config: Config,
    job: Job,
    topology: Topology,
    sizes: dict[str, int] | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Compiles a job for a topology and says what it takes.

    Where the topology's compiler is missing, ``compiled`` is False and all that arithmetic can say is there: bytes of
    what must be in memory, the least work, and the roofline of that.

    Args:
      sizes: of the mesh's axes; None: of `choose_mesh`.
      say: told what is being done.

    Returns:
      A JSON object. Bytes and FLOPs are of one device, ``flops_ratio`` and ``bytes_ratio`` compare all devices
      together with the least that the job costs (`dsvl2_jax.apps.plan.work`).

    Raises:
      UsageError: the mesh does not have the topology's devices, or does not divide a training step's sequences.
    """
    reason = "as asked"
    if sizes is None:
        sizes, reason = choose_mesh(config, job, topology)
    check_mesh(sizes, topology.devices)
    if job.settings is not None:
        plan_train.check_batch(job.settings, sizes)
    least = work(config, job)
    report: dict[str, Any] = {
        "topology": topology.name,
        "devices": topology.devices,
        "job": job.described(),
        "mesh": sizes,
        "mesh_reason": reason,
        "memory": topology.memory,
        "resident_bytes": resident_bytes(config, job, sizes),
        "least_flops": least.flops,
        "least_bytes": least.bytes,
    }
    try:
        mesh = plan_jobs.mesh_of(topology, sizes)
    except plan_jobs.CompilerMissing as error:
        return report | _uncompiled(str(error), report, config, job, topology)
    begun = time.monotonic()
    compiled, problem = None, None
    say("tracing")
    if job.settings is None:
        lowered = plan_jobs.lower(job.kind, config, mesh, batch=job.batch, sequence=job.sequence)
    else:
        lowered = plan_train.lower(config, job.settings, mesh)
    traced = time.monotonic()
    say("compiling")
    try:
        compiled = lowered.compile()
    except Exception as error:  # the compiler's own
        if "RESOURCE_EXHAUSTED" not in str(error) and "memory" not in str(error):
            raise
        problem = first_line(error)
    report |= {
        "compiled": True,
        "trace_seconds": round(traced - begun, 1),
        "compile_seconds": round(time.monotonic() - traced, 1),
    }
    if compiled is None:
        return report | {"fits": False, "problem": problem, "would_fit": _advice(config, job, topology)}
    say("counting")
    taken = plan_jobs.memory(compiled, topology.platform)
    text = compiled.as_text()
    cost, mean = walk(text), walk(text, mean_turns(config, job, sizes))
    fits = sum(taken.values()) <= topology.memory
    report |= {"fits": fits, "bytes_per_device": taken} | _costs(cost, mean, least, job, topology)
    return report if fits else report | {"would_fit": _advice(config, job, topology)}


def _uncompiled(problem: str, report: dict[str, Any], config: Config, job: Job, topology: Topology) -> dict[str, Any]:
    """What arithmetic alone can say: each copy of the parameters does its share of the job with its own devices."""
    copies = topology.devices if job.kind == "encode" else batch_parts(report["mesh"])
    own = job if job.settings is not None else dataclasses.replace(job, batch=-(-job.batch // copies))
    least = work(config, own)
    compute, memory = least.flops / topology.flops, least.bytes / topology.bandwidth
    seconds = max(compute, memory) * (copies if own is not job else 1) / topology.devices
    unit, made = job.unit
    fits = report["resident_bytes"] <= ROOM * topology.memory
    advice = {} if fits else {"would_fit": _advice(config, job, topology)}
    return advice | {
        "compiled": False,
        "not_compiled": problem,
        "fits": fits,
        "roofline_seconds": seconds,
        "bound": "compute" if compute > memory else "memory",
        f"{unit}_per_second": made / seconds,
    }


def mean_turns(config: Config, job: Job, sizes: dict[str, int]) -> float:
    """Of the loop over shares of the experts' work (`dsvl2_jax.model.moe`), on the mean device, when routing is even.

    The busiest takes one; but of a step with fewer assignments than devices, some have none.
    """
    if job.kind != "decode" or not config.language.n_routed_experts:
        return 1.0
    shards = _parts((config.language.n_routed_experts,), ("expert",), sizes, PARAM_RULES)
    rows = job.batch / _parts((job.batch,), ("decode_batch",), sizes, ACTIVATION_RULES)
    assignments = rows * config.language.num_experts_per_tok
    return assignments / (shards * -(-assignments // shards))


def _costs(cost: Cost, mean: Cost, least: plan_work.Work, job: Job, topology: Topology) -> dict[str, Any]:
    """``cost``: of the busiest device, for the time; ``mean``: of the mean one, for what all do together."""
    seconds = max(cost.flops / topology.flops, cost.bytes / topology.bandwidth)
    unit, made = job.unit
    return {
        "flops": cost.flops,
        "bytes": cost.bytes,
        "flops_ratio": mean.flops * topology.devices / least.flops,
        "bytes_ratio": mean.bytes * topology.devices / least.bytes,
        "collectives": {kind: dataclasses.asdict(found) for kind, found in sorted(cost.collectives.items())},
        "unknown_loops": list(cost.unknown_loops),
        "roofline_seconds": seconds,
        "bound": "compute" if cost.flops / topology.flops > cost.bytes / topology.bandwidth else "memory",
        f"{unit}_per_second": made / seconds,
    }


def _advice(config: Config, job: Job, topology: Topology) -> str:
    """What would make a job fit."""
    held = min(resident_bytes(config, job, sizes) for sizes in meshes(topology.devices))
    what = "parameters and cache" if job.settings is None else "parameters, gradients and optimizer state"
    if held > topology.memory:
        return f"more devices: {what} alone need {held / 1e9:.1f} GB of each"
    word = {"prefill": "fewer or shorter prompts at a time", "decode": "fewer slots", "encode": "fewer tiles at a time"}
    return word.get(job.kind, "fewer or shorter sequences at a time (--micro, --sequence)")


def parse_job(
    kind: str,
    batch: int | None,
    sequence: int | None,
    slots: int | None,
    *,
    model: str = "",
    micro: int | None = None,
    overrides: Sequence[str] = (),
) -> Job:
    """The job of the command's flags, with the sizes that are usual where none are given.

    Args:
      model, micro, overrides: of a training job, see `dsvl2_jax.apps.plan.training.settings_of`.

    Raises:
      UsageError: an unknown job, a size that is not positive, or a flag of another job.
    """
    if kind not in JOBS:
        raise UsageError(f"--job {kind!r}: expected one of {', '.join(JOBS)}.")
    for name, value in (("--batch", batch), ("--sequence", sequence), ("--slots", slots), ("--micro", micro)):
        if value is not None and value < 1:
            raise UsageError(f"{name}: found {value}, expected a positive whole number.")
    usual = {"prefill": (8, 4096), "decode": (64, 4096), "encode": (32, 0)}
    if kind not in usual:
        settings = plan_train.settings_of(
            model, kind, sequences=batch, length=sequence, micro=micro, overrides=overrides
        )
        return Job(kind, settings.batch.sequences, settings.data.sequence_length, settings)
    if micro is not None or overrides:
        raise UsageError(f"--micro and --set belong to training; --job {kind} has neither.")
    rows = (slots if kind == "decode" and slots is not None else batch) or usual[kind][0]
    return Job(kind, rows, usual[kind][1] if sequence is None or kind == "encode" else sequence)
