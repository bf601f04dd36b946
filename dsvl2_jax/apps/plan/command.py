"""What `dsvl2 plan` does: one plan, or a table over many topologies, for each of its models.

Tested in tests/apps/plan/test_planner.py.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax

from dsvl2_jax.apps.plan.job import Job, parse_job
from dsvl2_jax.apps.plan.report import plan_lines
from dsvl2_jax.apps.plan.saved_plans import saved_plan
from dsvl2_jax.apps.plan.table import HEADER, csv_row, table_line, table_rows, update_csv
from dsvl2_jax.checkpoint.locate import quantization_in, resolve
from dsvl2_jax.errors import UsageError
from dsvl2_jax.model.config import Config
from dsvl2_jax.model.quantization import Quantization
from dsvl2_jax.model.released import SIZES, released_config
from dsvl2_jax.runtime.console import PrintableConsole
from dsvl2_jax.runtime.hardware import topology
from dsvl2_jax.sharding import SEQUENCE, parse_mesh


def config_of(model: str) -> Config:
    """The configuration that a name, a checkpoint or a config.json means.

    Raises:
      CheckpointError, ConfigError: there is none.
    """
    if model in SIZES:
        return Config.from_dict(released_config(model), model)
    if model == "micro":
        return Config.from_file(resolve(None))
    path = Path(model)
    return Config.from_file(path if path.suffix == ".json" else resolve(model))


def quantization_of_model(model: str) -> Quantization | None:
    """How the weights of a checkpoint are kept; None for anything else."""
    if model in (*SIZES, "micro") or Path(model).suffix == ".json":
        return None
    return quantization_in(resolve(model))


def run_plan(
    models: Sequence[str],
    topology_name: str | None,
    kind: str | None,
    *,
    batch: int | None,
    sequence: int | None,
    slots: int | None,
    micro: int | None,
    overrides: Sequence[str],
    quantization: Quantization | None,
    cache_dtype: str | None,
    mesh: str,
    csv: Path | None,
    cache: bool,
    profile: bool,
    as_json: bool,
) -> int:
    """Plans, prints, and returns the exit status: 1 when a job does not fit the topology that was named.

    Args:
      topology_name: None: the table over all of `dsvl2_jax.apps.plan.table.TABLE_TOPOLOGIES`.
      kind: of a job; None: decode, in the table prefill as well.
      quantization: of the weights; None: as the checkpoint keeps them.
      csv: where rows of the table are kept.
      profile: print how the program of a topology splits up by named scope.

    Raises:
      UsageError: options that contradict each other, or that a job does not have.
    """
    # Nothing runs here, and a compiler for a device is no reason to look for one.
    if "JAX_PLATFORMS" not in os.environ:
        jax.config.update("jax_platforms", "cpu")
    if topology_name is None and mesh != "auto":
        raise UsageError(f"--mesh {mesh} is of one topology; name it with --topology.")
    if topology_name is None and profile:
        raise UsageError("--profile is of one topology; name it with --topology.")
    kinds = [kind] if kind is not None else ["decode"] if topology_name is not None else ["prefill", "decode"]
    work: list[tuple[str, Config, list[Job]]] = []
    for model in models:
        config, stored = config_of(model), quantization_of_model(model)
        if stored is not None and quantization is not None:
            raise UsageError(f"--quantize {quantization.kind}: {model} is quantized already, as {stored.kind}.")
        rounding = quantization or stored
        options = {"model": model, "micro": micro, "overrides": overrides, "quantization": rounding}
        options["cache_dtype"] = cache_dtype
        jobs = [parse_job(name, batch, sequence, slots, **options) for name in kinds]
        work.append((model if quantization is None else f"{model}-{quantization.kind}", config, jobs))
    if csv is not None:
        _check_csv(csv, topology_name, kind, cache_dtype)
    if topology_name is None:
        results = [_table(model, config, jobs, csv, cache, as_json) for model, config, jobs in work]
        fits = True
    else:
        shown = {"cache": cache, "profile": profile, "as_json": as_json}
        results = [_single(model, config, job, topology_name, mesh, **shown) for model, config, (job,) in work]
        fits = all(plan["fits"] for plan in results)
    if as_json:
        print(json.dumps(results if len(results) > 1 else results[0], indent=2))
    return 0 if fits else 1


def _check_csv(csv: Path, topology_name: str | None, kind: str | None, cache_dtype: str | None) -> None:
    if cache_dtype is not None:
        raise UsageError(f"--csv {csv} has rows of bfloat16 caches alone; leave out --cache-dtype {cache_dtype}.")
    if topology_name is not None:
        raise UsageError(f"--csv {csv} is of the table over all topologies; leave out --topology {topology_name}.")
    if kind in ("align", "pretrain", "sft"):
        raise UsageError(f"--csv {csv} has rows of prefill, decode and encode; leave it out for --job {kind}.")
    if not csv.parent.is_dir():
        raise UsageError(f"--csv {csv}: the directory {csv.parent} does not exist; make it first.")
    update_csv(csv, [])  # what is wrong with the file is said before anything is compiled


def _single(
    model: str, config: Config, job: Job, topology_name: str, mesh: str, *, cache: bool, profile: bool, as_json: bool
) -> dict[str, Any]:
    place = topology(topology_name)
    with _progress() as say:
        sizes = None if mesh == "auto" else parse_mesh(mesh)
        if sizes and SEQUENCE in sizes and job.settings is None:
            raise UsageError(f"--mesh {mesh}: {SEQUENCE} splits rows in training alone; --job {job.kind} has none.")
        plan = saved_plan(
            config, job, place, sizes, lambda doing: say(f"{job.kind} on {topology_name}: {doing}"), cache=cache
        )
    plan = {"model": model} | plan
    if not as_json:
        print("\n".join(plan_lines(plan, profile=profile)))
    return plan


def _table(model: str, config: Config, jobs: list[Job], csv: Path | None, cache: bool, as_json: bool) -> dict[str, Any]:
    plans = []
    if not as_json:
        sizes = (f"{job.kind} of {job.batch} × {job.sequence}" if job.sequence else job.kind for job in jobs)
        print(f"{model}: {', '.join(sizes)}\n{HEADER}", flush=True)
    with _progress() as say:
        for plan in table_rows(config, jobs, say, cache=cache):
            plans.append(plan)
            if csv is not None:
                update_csv(csv, [csv_row(model, plan)])
            if not as_json:
                print(table_line(plan), flush=True)
    problems = {plan["not_compiled"].partition(": ")[2] for plan in plans if not plan["compiled"]}
    for problem in sorted(problems) if not as_json else ():
        print(f"not compiled: {problem}")
    return {"model": model, "rows": plans}


@contextlib.contextmanager
def _progress() -> Iterator[Callable[[str], None]]:
    """Says on stderr what is being done: one line that changes on a terminal, else a line each time."""
    console = PrintableConsole(stderr=True)
    if not console.is_terminal:
        yield lambda text: print(text, file=sys.stderr, flush=True)
        return
    with console.status("") as status:
        yield status.update
