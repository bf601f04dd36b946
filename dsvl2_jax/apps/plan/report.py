"""What `dsvl2 plan` prints."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

from dsvl2_jax.apps.plan import table as plan_table
from dsvl2_jax.apps.plan.cache import planned
from dsvl2_jax.apps.plan.planner import Job, parse_job
from dsvl2_jax.checkpoint.locate import resolve
from dsvl2_jax.errors import UsageError
from dsvl2_jax.model.config import Config
from dsvl2_jax.model.released import released_config
from dsvl2_jax.runtime.hardware import topology
from dsvl2_jax.sharding import parse_mesh

SIZES = ("tiny", "small", "base")


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


def run(
    model: str,
    name: str | None,
    kind: str | None,
    *,
    batch: int | None,
    sequence: int | None,
    slots: int | None,
    micro: int | None,
    overrides: Sequence[str],
    mesh: str,
    cache: bool,
    as_json: bool,
) -> int:
    """Plans, prints, and returns the exit status: 1 when a job does not fit the topology that was named.

    Args:
      name: of a topology; None: the table over all of `dsvl2_jax.apps.plan.table`.
      kind: of a job; None: decode, in the table prefill as well.
    """
    # Nothing runs here, and a compiler for a device is no reason to look for one.
    if "JAX_PLATFORMS" not in os.environ:
        jax.config.update("jax_platforms", "cpu")
    config = config_of(model)

    def job(kind: str) -> Job:
        return parse_job(kind, batch, sequence, slots, model=model, micro=micro, overrides=overrides)

    if name is None:
        if mesh != "auto":
            raise UsageError(f"--mesh {mesh} is of one topology; name it with --topology.")
        return _table(
            model, config, [job(kind) for kind in ([kind] if kind else ["prefill", "decode"])], cache, as_json
        )
    place, one = topology(name), job(kind or "decode")
    with _progress() as say:
        sizes = None if mesh == "auto" else parse_mesh(mesh)
        found = planned(config, one, place, sizes, lambda doing: say(f"{one.kind} on {name}: {doing}"), cache=cache)
    found = {"model": model} | found
    print(json.dumps(found, indent=2) if as_json else "\n".join(lines(found)))
    return 0 if found["fits"] else 1


def _table(model: str, config: Config, jobs: list[Job], cache: bool, as_json: bool) -> int:
    found = []
    if not as_json:
        sizes = (f"{job.kind} of {job.batch} × {job.sequence}" if job.sequence else job.kind for job in jobs)
        print(f"{model}: {', '.join(sizes)}\n{plan_table.HEADER}", flush=True)
    with _progress() as say:
        for row in plan_table.rows(config, jobs, say, cache=cache):
            found.append(row)
            if not as_json:
                print(plan_table.line(row), flush=True)
    missing = {row["not_compiled"].partition(": ")[2] for row in found if not row["compiled"]}
    if as_json:
        print(json.dumps({"model": model, "rows": found}, indent=2))
    for problem in sorted(missing) if not as_json else ():
        print(f"not compiled: {problem}")
    return 0


@contextlib.contextmanager
def _progress() -> Iterator[Callable[[str], None]]:
    """Says on stderr what is being done: one line that changes on a terminal, else a line each time."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda text: print(text, file=sys.stderr, flush=True)
        return
    with console.status("") as status:
        yield status.update


def lines(found: dict[str, Any]) -> list[str]:
    """A plan, for people."""
    job, mesh = found["job"], ", ".join(f"{axis}={size}" for axis, size in found["mesh"].items())
    what = {"prefill": "prompts of {} tokens", "decode": "slots × {} tokens", "encode": "tiles"}
    size = what.get(job["kind"], "sequences of {} tokens").format(job["sequence"])
    out = [
        f"{found['model']} on {found['topology']} ({found['devices']} devices): {job['kind']}, {job['batch']} {size}",
        f"  mesh        {mesh}: {found['mesh_reason']}",
    ]
    if "remat" in job:
        text = "{micro} at a time a data shard, {tiles} tiles each; {dtype}, remat {remat}, {optimizer_state} moments"
        out.append(f"  step        {text.format(**job)}")
    if not found["compiled"]:
        held = f"{found['resident_bytes'] / 1e9:.2f} of {found['memory'] / 1e9:.1f} GB a device"
        out.append(f"  fits        {'yes' if found['fits'] else 'no'}, by arithmetic, without temporaries: {held}")
        if not found["fits"]:
            out.append(f"  would fit   {found['would_fit']}")
        return [*out, _roofline(found), f"  not compiled: {found['not_compiled']}"]
    if "bytes_per_device" not in found:
        return [*out, f"  fits        no: {found['problem']}", f"  would fit   {found['would_fit']}"]
    taken = found["bytes_per_device"]
    parts = " + ".join(f"{name} {size / 1e9:.2f}" for name, size in taken.items())
    total = f"{sum(taken.values()) / 1e9:.2f} of {found['memory'] / 1e9:.1f} GB a device: {parts}"
    out.append(f"  fits        {'yes' if found['fits'] else 'no'}, {total}")
    if not found["fits"]:
        out.append(f"  would fit   {found['would_fit']}")
    for name, unit in (("flops", "TFLOP"), ("bytes", "GB")):
        scale = 1e12 if name == "flops" else 1e9
        ratio = f"{found[f'{name}_ratio']:.2f} × the least, all devices together"
        out.append(f"  {name:<11} {found[name] / scale:.3f} {unit} a device, {ratio}")
    for kind, moved in found["collectives"].items():
        out.append(f"  {kind:<20} {moved['count']:.0f} times, {moved['bytes'] / 1e6:.2f} MB")
    out.append(_roofline(found))
    if found["unknown_loops"]:
        names = ", ".join(found["unknown_loops"])
        out.append(f"  turns depend on data, and are counted as even routing would have them: {names}")
    kept = ", kept from an earlier call (--no-cache compiles anew)" if found.get("from_cache") else ""
    return [*out, f"  traced in {found['trace_seconds']:.0f} s, compiled in {found['compile_seconds']:.0f} s{kept}"]


def _roofline(found: dict[str, Any]) -> str:
    unit = "tiles" if found["job"]["kind"] == "encode" else "tokens"
    speed = f"{found[f'{unit}_per_second']:,.0f} {unit}/s"
    return f"  roofline    {found['roofline_seconds'] * 1e3:.2f} ms, bound by {found['bound']}: {speed} at most"
