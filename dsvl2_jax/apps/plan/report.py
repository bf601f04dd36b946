"""A plan in words: what `dsvl2 plan MODEL --topology T` prints.

Tested in tests/apps/plan/test_planner.py.
"""

from __future__ import annotations

from typing import Any

from dsvl2_jax.apps.plan.scopes import scope_lines


def plan_lines(plan: dict[str, Any], *, profile: bool = False) -> list[str]:
    """A plan (`dsvl2_jax.apps.plan.planner.plan`, with its model's name) for people.

    ``profile``: how the program splits up, too.
    """
    job, mesh = plan["job"], ", ".join(f"{axis}={size}" for axis, size in plan["mesh"].items())
    what = {"prefill": "prompts of {} tokens", "decode": "slots × {} tokens", "encode": "tiles"}
    size = what.get(job["kind"], "sequences of {} tokens").format(job["sequence"])
    out = [
        f"{plan['model']} on {plan['topology']} ({plan['devices']} devices): {job['kind']}, {job['batch']} {size}",
        f"  mesh        {mesh}: {plan['mesh_reason']}",
    ]
    if "remat" in job:
        text = "{micro} at a time a data shard, {tiles} tiles each; {dtype}, remat {remat}, {optimizer_state} moments"
        out.append(f"  step        {text.format(**job)}")
    if not plan["compiled"]:
        resident = f"{plan['resident_bytes'] / 1e9:.2f} of {plan['memory'] / 1e9:.1f} GB a device"
        out.append(f"  fits        {'yes' if plan['fits'] else 'no'}, by arithmetic, without temporaries: {resident}")
        if not plan["fits"]:
            out.append(f"  would fit   {plan['would_fit']}")
        return [*out, _roofline(plan), f"  not compiled: {plan['not_compiled']}"]
    if "bytes_per_device" not in plan:
        return [*out, f"  fits        no: {plan['problem']}", f"  would fit   {plan['would_fit']}"]
    memory = plan["bytes_per_device"]
    parts = " + ".join(f"{name} {size / 1e9:.2f}" for name, size in memory.items())
    total = f"{sum(memory.values()) / 1e9:.2f} of {plan['memory'] / 1e9:.1f} GB a device: {parts}"
    out.append(f"  fits        {'yes' if plan['fits'] else 'no'}, {total}")
    if not plan["fits"]:
        out.append(f"  would fit   {plan['would_fit']}")
    for name, unit in (("flops", "TFLOP"), ("bytes", "GB")):
        scale = 1e12 if name == "flops" else 1e9
        ratio = f"{plan[f'{name}_ratio']:.2f} × the least, all devices together"
        out.append(f"  {name:<11} {plan[name] / scale:.3f} {unit} a device, {ratio}")
    for kind, moved in plan["collectives"].items():
        out.append(f"  {kind:<20} {moved['count']:.0f} times, {moved['bytes'] / 1e6:.2f} MB")
    out.append(_roofline(plan))
    if plan["unknown_loops"]:
        names = ", ".join(plan["unknown_loops"])
        out.append(f"  trip counts depend on data, and are counted as even routing would have them: {names}")
    kept = ", saved by an earlier call (--no-cache compiles again)" if plan.get("from_cache") else ""
    if profile:
        out += [f"  {line}" for line in scope_lines("a device's work", plan["scopes"])]
    return [*out, f"  traced in {plan['trace_seconds']:.0f} s, compiled in {plan['compile_seconds']:.0f} s{kept}"]


def _roofline(plan: dict[str, Any]) -> str:
    unit = "tiles" if plan["job"]["kind"] == "encode" else "tokens"
    speed = f"{plan[f'{unit}_per_second']:,.0f} {unit}/s"
    return f"  roofline    {plan['roofline_seconds'] * 1e3:.2f} ms, bound by {plan['bound']}: {speed} at most"
