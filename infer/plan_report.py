"""What `dsvl2 plan` prints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dsvl2_jax import checkpoint
from dsvl2_jax.config import Config
from dsvl2_jax.convert.sizes import released_config
from dsvl2_jax.infer.plan import parse_job, plan
from dsvl2_jax.infer.topologies import topology
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
        return Config.from_file(checkpoint.resolve(None))
    path = Path(model)
    return Config.from_file(path if path.suffix == ".json" else checkpoint.resolve(model))


def run(
    model: str,
    name: str,
    kind: str,
    *,
    batch: int | None,
    sequence: int | None,
    slots: int | None,
    mesh: str,
    as_json: bool,
) -> int:
    """Plans, prints, and returns the exit status: 1 when the job does not fit."""
    config, place, job = config_of(model), topology(name), parse_job(kind, batch, sequence, slots)
    found = {"model": model} | plan(config, job, place, None if mesh == "auto" else parse_mesh(mesh))
    print(json.dumps(found, indent=2) if as_json else "\n".join(lines(found)))
    return 0 if found["fits"] else 1


def lines(found: dict[str, Any]) -> list[str]:
    """A plan, for people."""
    job, mesh = found["job"], ", ".join(f"{axis}={size}" for axis, size in found["mesh"].items())
    what = {"prefill": "prompts of {} tokens", "decode": "slots × {} tokens", "encode": "tiles"}[job["kind"]]
    out = [
        f"{found['model']} on {found['topology']} ({found['devices']} devices): {job['kind']}, "
        f"{job['batch']} {what.format(job['sequence'])}",
        f"  mesh        {mesh}: {found['mesh_reason']}",
    ]
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
    unit = "tiles" if job["kind"] == "encode" else "tokens"
    speed = f"{found[f'{unit}_per_second']:,.0f} {unit}/s"
    out.append(f"  roofline    {found['roofline_seconds'] * 1e3:.2f} ms, bound by {found['bound']}: {speed} at most")
    if found["unknown_loops"]:
        out.append(f"  counted once, since their turns depend on data: {', '.join(found['unknown_loops'])}")
    return [*out, f"  compiled in {found['compile_seconds']:.0f} s"]
