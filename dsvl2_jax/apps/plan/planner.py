"""What a job takes on devices that need not be here, from the program that their compiler makes."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from typing import Any

from jax.sharding import Mesh
from jax.stages import Compiled

from dsvl2_jax.apps.plan.hlo_walk import Cost, walk
from dsvl2_jax.apps.plan.inference_step import lower_inference
from dsvl2_jax.apps.plan.job import Job, least_work
from dsvl2_jax.apps.plan.least_work import Work
from dsvl2_jax.apps.plan.mesh_choice import (
    MAX_MEMORY_FRACTION,
    choose_mesh,
    meshes,
    pieces,
    resident_bytes,
    resident_parts,
)
from dsvl2_jax.apps.plan.scopes import scope_rows
from dsvl2_jax.apps.plan.training_step import check_batch, lower_training_step
from dsvl2_jax.kernels.span_attention import SPAN
from dsvl2_jax.messages import first_line
from dsvl2_jax.model.config import Config
from dsvl2_jax.runtime.hardware import CompilerMissing, Topology, compile_devices
from dsvl2_jax.sharding import ACTIVATION_RULES, PARAM_RULES, batch_parts, check_mesh, make_mesh


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
      together with the least that the job costs (`dsvl2_jax.apps.plan.least_work`).

    Raises:
      UsageError: the mesh does not have the topology's devices, or does not divide a training step's sequences.
    """
    reason = "as asked"
    if sizes is None:
        sizes, reason = choose_mesh(config, job, topology)
    check_mesh(sizes, topology.devices)
    if job.settings is not None:
        check_batch(job.settings, sizes)
    least = least_work(config, job)
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
        mesh = make_mesh(**sizes, devices=compile_devices(topology))
    except CompilerMissing as error:
        return report | _uncompiled(str(error), report, config, job, topology)
    compiled, outcome = _compile(config, job, mesh, say)
    report |= outcome
    if compiled is None:
        return report | {"fits": False, "would_fit": _advice(config, job, topology)}
    say("counting")
    memory = program_memory(compiled, topology.platform)
    text = compiled.as_text()
    # The last chunk attends to the whole cache.
    spans = {"attend_in_spans": job.sequence / math.gcd(job.sequence, SPAN)} if job.kind == "chunk" else {}
    cost, mean = walk(text, named=spans), walk(text, mean_trip_count(config, job, sizes), spans)
    fits = sum(memory.values()) <= topology.memory
    report |= {"fits": fits, "bytes_per_device": memory} | _costs(cost, mean, least, job, topology)
    report["scopes"] = scope_rows(text, topology.seconds)
    return report if fits else report | {"would_fit": _advice(config, job, topology)}


def _compile(
    config: Config, job: Job, mesh: Mesh, say: Callable[[str], None]
) -> tuple[Compiled | None, dict[str, Any]]:
    """The program, and what a report says of its making; no program where the compiler finds too little memory."""
    begun = time.monotonic()
    say("tracing")
    if job.settings is None:
        sizes = {"batch": job.batch, "sequence": job.sequence}
        options = {"quantization": job.quantization, "cache_dtype": job.cache_dtype}
        lowered = lower_inference(job.kind, config, mesh, **sizes, **options)
    else:
        lowered = lower_training_step(config, job.settings, mesh, job.quantization)
    traced = time.monotonic()
    say("compiling")
    compiled, problem = None, {}
    try:
        compiled = lowered.compile()
    except Exception as error:  # the compiler's own
        if "RESOURCE_EXHAUSTED" not in str(error) and "memory" not in str(error):
            raise
        problem = {"problem": first_line(error)}
    return compiled, {
        "compiled": True,
        "trace_seconds": round(traced - begun, 1),
        "compile_seconds": round(time.monotonic() - traced, 1),
        **problem,
    }


def program_memory(compiled: Compiled, platform: str) -> dict[str, int]:
    """Bytes that a program takes on each device: arguments, temporaries, and output that is in no argument's place.

    The TPU compiler's limit is on its peak; ``temp_size_in_bytes`` counts some buffers twice there.
    """
    analysis = compiled.memory_analysis()
    arguments = analysis.argument_size_in_bytes
    output = analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    temporaries = analysis.temp_size_in_bytes
    if platform == "tpu":
        temporaries = max(0, analysis.peak_memory_in_bytes - arguments - output)
    return {"arguments": arguments, "temporaries": temporaries, "output": output}


def _uncompiled(problem: str, report: dict[str, Any], config: Config, job: Job, topology: Topology) -> dict[str, Any]:
    """What arithmetic alone can say: each copy of the parameters does its share of the job with its own devices."""
    copies = topology.devices if job.kind == "encode" else batch_parts(report["mesh"])
    job_of_a_copy = job if job.settings is not None else dataclasses.replace(job, batch=-(-job.batch // copies))
    least = least_work(config, job_of_a_copy)
    compute, memory = least.flops / topology.flops, least.bytes / topology.bandwidth
    seconds = max(compute, memory) * (copies if job_of_a_copy is not job else 1) / topology.devices
    unit, made = job.unit
    fits = report["resident_bytes"] <= MAX_MEMORY_FRACTION * topology.memory
    advice = {} if fits else {"would_fit": _advice(config, job, topology)}
    return advice | {
        "compiled": False,
        "not_compiled": problem,
        "fits": fits,
        "roofline_seconds": seconds,
        "bound": "compute" if compute > memory else "memory",
        f"{unit}_per_second": made / seconds,
    }


def mean_trip_count(config: Config, job: Job, sizes: dict[str, int]) -> float:
    """Of the loop over chunks of the experts' work (`dsvl2_jax.model.moe`), on the mean device, when routing is even.

    The busiest takes one; but of a step with fewer assignments than devices, some have none.
    """
    if job.kind != "decode" or not config.language.n_routed_experts:
        return 1.0
    shards = pieces((config.language.n_routed_experts,), ("expert",), sizes, PARAM_RULES)
    copies = pieces((job.batch,), ("decode_batch",), sizes, ACTIVATION_RULES)
    assignments = job.batch * config.language.num_experts_per_tok / copies
    return assignments / (shards * -(-assignments // shards))


def _costs(cost: Cost, mean: Cost, least: Work, job: Job, topology: Topology) -> dict[str, Any]:
    """``cost``: of the busiest device, for the time; ``mean``: of the mean one, for what all do together."""
    seconds = topology.seconds(cost.flops, cost.bytes)
    unit, made = job.unit
    return {
        "flops": cost.flops,
        "bytes": cost.bytes,
        "flops_ratio": mean.flops * topology.devices / least.flops,
        "bytes_ratio": mean.bytes * topology.devices / least.bytes,
        "collectives": {kind: dataclasses.asdict(moved) for kind, moved in sorted(cost.collectives.items())},
        "unknown_loops": list(cost.unknown_loops),
        "roofline_seconds": seconds,
        "bound": "compute" if cost.flops / topology.flops > cost.bytes / topology.bandwidth else "memory",
        f"{unit}_per_second": made / seconds,
    }


def _advice(config: Config, job: Job, topology: Topology) -> str:
    """What would make a job fit."""
    least = min(resident_bytes(config, job, sizes) for sizes in meshes(topology.devices))
    if least > topology.memory:
        return f"more devices: {resident_parts(job)} alone need {least / 1e9:.1f} GB of each"
    word = {"prefill": "fewer or shorter prompts at a time", "decode": "fewer slots", "encode": "fewer tiles at a time"}
    return word.get(job.kind, "fewer or shorter sequences at a time (--micro, --sequence)")
