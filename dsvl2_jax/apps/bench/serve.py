"""`dsvl2 bench serve`: what a server's users get, under load, against the aims of docs/serving.md.

The server is `dsvl2 serve` in a process of its own, so that the load's Python does not share its interpreter; both
share the machine. Everything is measured at the client's side of the connection; only what a prompt takes alone, the
event loop's stalls and the compilations are the server's own figures, from /metrics.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

from dsvl2_jax.apps.bench.measure import machine
from dsvl2_jax.apps.bench.random_checkpoint import random_checkpoint
from dsvl2_jax.apps.bench.serve_cases import bad_requests, good_requests
from dsvl2_jax.apps.bench.serve_client import Client
from dsvl2_jax.apps.bench.serve_expected import expected_answers
from dsvl2_jax.apps.bench.serve_figures import HEADING, Findings
from dsvl2_jax.apps.bench.serve_load import Load
from dsvl2_jax.apps.bench.serve_options import ServeLoad
from dsvl2_jax.apps.bench.serve_parts import gaps, half_load, loop_stall, second_turn, throughput
from dsvl2_jax.apps.bench.serve_process import ServerProcess, running
from dsvl2_jax.apps.bench.serve_requests import Body, Requests
from dsvl2_jax.apps.bench.serve_soak import Known, Soak
from dsvl2_jax.checkpoint.locate import open_model, resolve
from dsvl2_jax.errors import UsageError
from dsvl2_jax.model.released import released_config

Size = Literal["tiny", "small", "base"]

_READY = 10.0  # seconds from a second start until the bundled model answers
_CACHE = "JAX_COMPILATION_CACHE_DIR"

_PARTS = {
    "throughput": throughput,
    "half-load": half_load,
    "gaps": gaps,
    "second-turn": second_turn,
    "loop": loop_stall,
}


def bench_serve(
    ckpt: str | None = None,
    *,
    size: Size | None = None,
    layers: int | None = None,
    directory: Path | None = None,
    dtype: str = "float32",
    mesh: str | None = None,
    options: ServeLoad = ServeLoad(),  # noqa: B008 (frozen)
) -> Findings:
    """Starts a server, measures the parts that are asked for, prints them, and stops it.

    Args:
      ckpt: what to serve; None: the bundled model, or with ``size`` a random checkpoint of a released size.
      layers: of the random checkpoint's language model and encoder each, fewer than the released one's.
      directory: where to make it (tiny: 7 GB); None: the system's temporary directory. It is removed again.
      dtype, mesh: of the server.

    Raises:
      UsageError: options exclude each other, or the checkpoint's context is too short for long prompts.
      DSVL2Error: the server failed, or a request that must be answered was not.
    """
    if size is not None and ckpt is not None:
        raise UsageError("--size: makes a random checkpoint, but one is given; leave one of them out.")
    if layers is not None and (size is None or layers < 2):
        raise UsageError(f"--layers: found {layers}, expected at least 2, beside --size.")
    if options.plot is not None:
        from dsvl2_jax.apps.bench.serve_plot import check_plot

        check_plot(options.plot)
    say = _say(sys.stderr if options.json else sys.stdout)
    findings = Findings(say)
    with tempfile.TemporaryDirectory(prefix="dsvl2-bench-", dir=directory) as folder:
        work = Path(folder)
        say(machine())
        if size is not None:
            ckpt = str(work / "random")
            random_checkpoint(Path(ckpt), _cut(released_config(size), layers))
        config, processor = open_model(resolve(ckpt))
        context = config.language.max_position_embeddings
        requests = Requests(options.seed, processor)
        arguments = [*([] if ckpt is None else [ckpt]), "--slots", str(options.slots), "--dtype", dtype]
        arguments += [] if mesh is None else ["--mesh", mesh]
        say(f"dsvl2 serve {' '.join(arguments)}\n{HEADING}")
        good: dict[str, list[Known]] = {}
        if "soak" in options.parts:
            bodies = good_requests(requests, options.soak_distinct, context)
            good = _with_answers(bodies, ckpt, options.slots, dtype, mesh, work)
        with _server(arguments, "start" in options.parts, _READY if ckpt is None else None, findings, work) as server:
            asyncio.run(_measure(server, options, requests, context, good, findings))
    if options.plot is not None:
        from dsvl2_jax.apps.bench.serve_plot import plot

        plot(findings, options.plot)
    if options.json:
        told = {"machine": machine(), "serve": arguments, "options": _options(options), **findings.as_json()}
        print(json.dumps(_finite(told), ensure_ascii=False))
    return findings


async def _measure(
    server: ServerProcess,
    options: ServeLoad,
    requests: Requests,
    context: int,
    good: dict[str, list[Known]],
    findings: Findings,
) -> None:
    """Everything that a running server is asked for."""
    async with Client(server.address) as client:
        load = Load(server, client, options, requests, context, findings)
        await load.begin()
        for part in options.parts:
            if part in _PARTS:
                await _PARTS[part](load)
            elif part == "soak":
                await Soak(load, good, bad_requests(requests, context)).run()
        compiled = (await client.metrics())["compilations_total"] - load.compiled
        findings.add(options.parts[-1], "compilations after the server was ready", compiled, "", aim=0)
    if findings.wrong:
        findings.say(f"what went wrong first: {json.dumps(findings.wrong[0], ensure_ascii=False)[:2000]}")


@contextlib.contextmanager
def _server(
    arguments: list[str], starts: bool, aim: float | None, findings: Findings, work: Path
) -> Iterator[ServerProcess]:
    """The server that is measured.

    Args:
      starts: whether its start is measured too, first with nothing compiled; aim: seconds of the second one.
    """
    environment = {}
    if starts:
        environment = {_CACHE: str(work / "xla"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1"}
        with running(arguments, work / "first.log", environment) as server:
            first = server.seconds_to_ready
        findings.add("start", "start to ready, first start (everything is compiled)", first, "s")
    with running(arguments, work / "server.log", environment) as server:
        if starts:
            findings.add("start", "start to ready, second start", server.seconds_to_ready, "s", aim=aim)
        yield server


def _with_answers(
    bodies: dict[str, list[Body]], ckpt: str | None, slots: int, dtype: str, mesh: str | None, work: Path
) -> dict[str, list[Known]]:
    """Good requests with the right answers."""
    flat = [(kind, body) for kind, some in bodies.items() for body in some]
    answers = expected_answers(ckpt, [body for _, body in flat], slots=slots, dtype=dtype, mesh=mesh, work=work)
    known: dict[str, list[Known]] = {kind: [] for kind in bodies}
    for (kind, body), answer in zip(flat, answers, strict=True):
        known[kind].append(Known(kind, body, answer))
    return known


def _cut(config: dict[str, Any], layers: int | None) -> dict[str, Any]:
    """A released configuration with fewer layers."""
    if layers is None:
        return config
    language = config["language_config"] | {"num_hidden_layers": layers}
    return config | {"language_config": language, "vision_config": config["vision_config"] | {"layers": layers}}


def _say(file: Any) -> Callable[[str], None]:
    return lambda text: print(text, file=file, flush=True)


def _options(options: ServeLoad) -> dict[str, Any]:
    return {name: str(value) if isinstance(value, os.PathLike) else value for name, value in vars(options).items()}


def _finite(value: Any) -> Any:
    """The value with null for what is no number, which JSON does not have."""
    if isinstance(value, dict):
        return {name: _finite(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
