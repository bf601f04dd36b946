"""`dsvl2 bench tune`: which kernel, with which block sizes, is fastest on the GPU that is here, for each operation.

It measures every candidate of `dsvl2_jax.apps.bench.tune_cases`, after its result has been compared with float32, and
writes the table that `dsvl2_jax.kernels.tuning` reads. Tested in tests/apps/bench/test_tune.py.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import json
import os
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from dsvl2_jax.apps.bench.measure import machine
from dsvl2_jax.apps.bench.tune_cases import Case, Work, candidates, prepare, released_cases
from dsvl2_jax.errors import DSVL2Error, UsageError
from dsvl2_jax.kernels import tuning
from dsvl2_jax.kernels.block_sizes import SHARED_MEMORY, Blocks, kernel_of
from dsvl2_jax.messages import first_line

SIZES = ("tiny", "small", "base")
CALLS, RUNS = 20, 5  # calls of a program, and runs of it, whose median counts
TOLERANCE = 0.01  # of the norm: bfloat16's rounding gives 0.003

Program = Callable[[], Any]  # makes `CALLS` calls, and returns what the last one gave
Measure = Callable[[Program], float]  # seconds of a call


@dataclasses.dataclass(frozen=True)
class Trial:
    """What became of one candidate.

    Attributes:
      seconds: of a call; None: it did not run, or was wrong.
      problem: why.
    """

    blocks: Blocks
    seconds: float | None
    problem: str = ""


def bench_tune(
    sizes: Iterable[str] | None = None, *, as_json: bool = False, out: Path | None = None
) -> list[dict[str, Any]]:
    """Measures the operations of released sizes, prints what was fastest, and writes the table.

    Args:
      sizes: None: all three.
      out: the table's file; None: where the kernels look for it.

    Returns:
      An object for each case: operation, shape, kernel, blocks, seconds, and seconds of the default blocks.

    Raises:
      UsageError: no GPU is here, or different ones. DSVL2Error: no kernel is right, or the table cannot be written.
    """
    gpu = tuning.this_gpu()
    if gpu is None:
        found = ", ".join(sorted({device.device_kind for device in jax.local_devices()}))
        raise UsageError(
            f"bench tune measures kernels on an NVIDIA GPU, and found: {found}. Run it where the GPU is (several must "
            "be of one kind), with jax's compiler for it: pip install -e '.[cuda]'."
        )
    path = tuning.table_path(gpu) if out is None else out
    cases = {case.name: case for size in sizes or SIZES for case in released_cases(size)}
    shared_memory = getattr(jax.local_devices()[0], "shared_memory_per_block_optin", SHARED_MEMORY)
    if not as_json:
        print(f"{gpu.kind}, {machine()}")
    results = []
    for case in cases.values():
        results.append(tune(case, candidates(case, gpu.capability, shared_memory)))
        if not as_json:
            print(_line(case, results[-1]), flush=True)
        _write(path, gpu, results)  # what is measured is kept, whatever comes
    if as_json:
        print(json.dumps(results, indent=1))
    else:
        print(f"written to {path}")
    return results


def _write(path: Path, gpu: tuning.Gpu, results: list[dict[str, Any]]) -> None:
    try:
        tuning.write_table(path, gpu, results)
    except OSError as error:
        raise DSVL2Error(f"{path}: cannot be written ({error.strerror}); --out names another file.") from error


def tune(
    case: Case, blocks: Iterable[Blocks], *, measure: Measure | None = None, interpret: bool = False
) -> dict[str, Any]:
    """Tries the candidates, of which the first is the default, and returns the fastest one that is right.

    Args:
      measure: `seconds_of_a_call` without it.
      interpret: run the kernels on the CPU, for tests.

    Raises:
      DSVL2Error: none is right.
    """
    work, tried = prepare(case, interpret=interpret), list(dict.fromkeys(blocks))
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:  # compilers use one core each
        programs = [pool.submit(calls, work.run(candidate), work.arrays) for candidate in tried]
    trials = [_try(work, candidate, program, measure) for candidate, program in zip(tried, programs, strict=True)]
    right = [trial for trial in trials if trial.seconds is not None]
    if not right:
        raise DSVL2Error(f"{case.name}: no kernel gave the right result. The first one: {trials[0].problem}")
    best = min(right, key=lambda trial: trial.seconds)
    wrong = [
        {"kernel": kernel_of(case.operation, t.blocks), "blocks": dataclasses.asdict(t.blocks), "problem": t.problem}
        for t in trials
        if t.seconds is None
    ]
    fastest: dict[str, float] = {}
    for trial in right:
        kernel = kernel_of(case.operation, trial.blocks)
        fastest[kernel] = min(trial.seconds, fastest.get(kernel, trial.seconds))
    return tuning.entry_json(case.operation, case.shape, best.blocks, best.seconds) | {
        "tflops": case.flops / best.seconds / 1e12,
        "default_seconds": trials[0].seconds,
        "fastest": fastest,
        "tried": len(trials),
        "failed": wrong,
    }


def _try(work: Work, blocks: Blocks, compiled: concurrent.futures.Future[Program], measure: Measure | None) -> Trial:
    try:
        program = compiled.result()
        for mine, right in zip(work.compared(program()), work.expected, strict=True):
            error = float(jnp.linalg.norm(mine.astype(jnp.float32) - right) / jnp.linalg.norm(right))
            if not error <= TOLERANCE:  # nan is wrong too
                return Trial(blocks, None, f"differs from float32 by {error:.2g} of its norm")
        return Trial(blocks, (measure or seconds_of_a_call)(program))
    except Exception as error:  # a compiler that cannot, a launch that is refused
        return Trial(blocks, None, f"{type(error).__name__}: {first_line(error)}")


def calls(function: Callable[..., Any], arrays: tuple[jax.Array, ...]) -> Program:
    """Compiles a program that calls a function over and over, so that launching from here costs nothing.

    Each call needs the result of the one before, through its first argument, which is of whole numbers.
    """

    def program(*arrays: jax.Array) -> Any:
        def call(_: jax.Array, carry: tuple[jax.Array, Any]) -> tuple[jax.Array, Any]:
            numbers, result = carry
            first = jax.tree.leaves(result)[0]
            numbers = numbers + jnp.isnan(first[(0,) * first.ndim]).astype(numbers.dtype)
            return numbers, function(numbers, *arrays[1:])

        shapes = jax.eval_shape(function, *arrays)
        nothing = jax.tree.map(lambda shape: jnp.zeros(shape.shape, shape.dtype), shapes)
        return lax.fori_loop(0, CALLS, call, (arrays[0], nothing))[1]

    compiled = jax.jit(program).lower(*arrays).compile()
    return lambda: jax.block_until_ready(compiled(*arrays))


def seconds_of_a_call(program: Program) -> float:
    """The median of some runs."""
    times = []
    for _ in range(RUNS):
        start = time.perf_counter()
        program()
        times.append((time.perf_counter() - start) / CALLS)
    return statistics.median(times)


def _line(case: Case, result: Mapping[str, Any]) -> str:
    default = result["default_seconds"]
    gain = "the default fails" if default is None else f"{default / result['seconds']:.2f} × the default's speed"
    blocks = ", ".join(f"{name} {size}" for name, size in result["blocks"].items())
    failed = f"; {len(result['failed'])} of {result['tried']} failed" if result["failed"] else ""
    speed = f"{result['seconds'] * 1e6:.1f} µs, {result['tflops']:.0f} TFLOP/s, {gain}"
    return f"{case.name}: {result['kernel']} ({blocks}), {speed}{failed}"
