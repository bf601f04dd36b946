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
from dsvl2_jax.apps.bench.serve_requests import Requests
from dsvl2_jax.apps.bench.serve_soak import Known, Soak
from dsvl2_jax.checkpoint.locate import open_model, resolve
from dsvl2_jax.errors import UsageError
from dsvl2_jax.model.released import released_config

Size = Literal["tiny", "small", "base"]

_READY = 10.0  # seconds from a second start until the bundled model answers
_CACHE = "JAX_COMPILATION_CACHE_DIR"
# The soak's requests are made before the server is asked how its words are cut: English in a small vocabulary.
_WORDS_PER_TOKEN = 0.6

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
    findings = Findings()
    with tempfile.TemporaryDirectory(prefix="dsvl2-bench-", dir=directory) as folder:
        work = Path(folder)
        say(machine())
        if size is not None:
            ckpt = str(work / "random")
            random_checkpoint(Path(ckpt), _cut(released_config(size), layers))
        _, processor = open_model(resolve(ckpt))
        arguments = [*([] if ckpt is None else [ckpt]), "--slots", str(options.slots), "--dtype", dtype]
        arguments += [] if mesh is None else ["--mesh", mesh]
        say(f"dsvl2 serve {' '.join(arguments)}\n{HEADING}")
        soak = None
        if "soak" in options.parts:
            soak = _soak_requests(ckpt, options, processor.config.tile_size, dtype, mesh, work)
        with _server(ckpt, arguments, options, findings, say, work) as server:
            if set(options.parts) - {"start"}:
                asyncio.run(_measure(server, options, findings, processor.config.tile_size, soak, say))
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
    findings: Findings,
    tile: int,
    soak: dict[str, Any] | None,
    say: Callable[[str], None],
) -> None:
    async with Client(server.address) as client:
        load = Load(server, client, options, findings, tile)
        await load.begin(say)
        for part in options.parts:
            if part in _PARTS:
                await _PARTS[part](load)
            elif part == "soak":
                await Soak(load, **soak).run()
        compiled = (await client.metrics())["compilations_total"] - load.compiled
        what = "compilations after the server was ready"
        load.found(options.parts[-1], what, compiled, "", aim=0)
        if findings.wrong:
            say(f"what went wrong first: {json.dumps(findings.wrong[0], ensure_ascii=False)[:2000]}")


@contextlib.contextmanager
def _server(
    ckpt: str | None,
    arguments: list[str],
    options: ServeLoad,
    findings: Findings,
    say: Callable[[str], None],
    work: Path,
) -> Iterator[ServerProcess]:
    """The server that is measured; where its start is to be measured too, the second one with a cache of their own."""
    if "start" not in options.parts:
        with running(arguments, work / "server.log") as server:
            yield server
        return
    environment = {_CACHE: str(work / "xla"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1"}
    load = Load(None, None, options, findings, 0)
    load.say = say
    with running(arguments, work / "first.log", environment) as server:
        first = server.seconds_to_ready
    load.found("start", "start to ready, first start (everything is compiled)", first, "s")
    with running(arguments, work / "server.log", environment) as server:
        aim = _READY if ckpt is None else None
        load.found("start", "start to ready, second start", server.seconds_to_ready, "s", aim=aim)
        yield server


def _soak_requests(
    ckpt: str | None, options: ServeLoad, tile: int, dtype: str, mesh: str | None, work: Path
) -> dict[str, Any]:
    """The soak's requests, and the right answers to the good ones."""
    config, _ = open_model(resolve(ckpt))
    context = config.language.max_position_embeddings
    requests = Requests(options.seed, tile, _WORDS_PER_TOKEN)
    good = good_requests(requests, options.soak_distinct, context)
    flat = [(kind, body) for kind, bodies in good.items() for body in bodies]
    answers = expected_answers(ckpt, [body for _, body in flat], slots=options.slots, dtype=dtype, mesh=mesh, work=work)
    known: dict[str, list[Known]] = {}
    for (kind, body), answer in zip(flat, answers, strict=True):
        known.setdefault(kind, []).append(Known(kind, body, answer))
    return {"good": known, "bad": bad_requests(requests, context)}


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
