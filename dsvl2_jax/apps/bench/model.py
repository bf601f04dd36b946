"""`dsvl2 bench model`: the engine's programs and the training step, with random weights, on the device that is there.

Every program is compiled as the engine compiles it, its outputs are checked to be finite, and it is run in several
series, of which the median counts. Figures are printed as they come, so that a run that is cut off keeps what it has.

Tested in tests/apps/bench/test_model.py.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import math
import os
import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.stages import Compiled

from dsvl2_jax.apps.bench import model_jobs, model_plot
from dsvl2_jax.apps.bench.against import Timed, TorchSide
from dsvl2_jax.apps.bench.ceilings import LONG_SECONDS, SERIES, Speeds, ceilings
from dsvl2_jax.apps.bench.measure import machine, need_torch, own_bytes
from dsvl2_jax.apps.bench.model_jobs import Prefilling, Program, Running
from dsvl2_jax.apps.bench.model_options import Budget, ModelOptions, with_layers
from dsvl2_jax.apps.bench.model_report import Report
from dsvl2_jax.apps.bench.random_params import bytes_of, random_params, shapes_of
from dsvl2_jax.apps.bench.serve_plot import check_plot
from dsvl2_jax.apps.plan.command import config_of
from dsvl2_jax.apps.plan.hlo_walk import walk
from dsvl2_jax.apps.plan.launches import count_launches
from dsvl2_jax.apps.plan.planner import program_memory
from dsvl2_jax.apps.plan.scopes import scope_rows
from dsvl2_jax.errors import DSVL2Error, UsageError
from dsvl2_jax.messages import first_line
from dsvl2_jax.model.config import Config
from dsvl2_jax.model.quantization import quantization_of
from dsvl2_jax.runtime.hardware import peaks

MOST_MEMORY = 0.95  # of a device, for parameters and a program
FOR_PARAMETERS = 2 / 3  # of that memory, in what is advised; the rest is for caches and temporaries
COMPILING = 0.7  # of the budget
OTHERS = 0.4  # of the budget, for the other side where it runs before ours


def bench_model(name: str, options: ModelOptions) -> int:
    """Measures, and prints what it finds.

    Args:
      name: as `dsvl2_jax.apps.plan.command.config_of` takes it.

    Returns:
      The exit status: 1 where a program failed.

    Raises:
      CheckpointError, ConfigError: there is no such model.
      UsageError: it does not fit the device's memory, or its context is shorter than the prompts.
    """
    config = with_layers(config_of(name), options.layers)
    _check_lengths(config, options)
    if options.plot is not None:
        check_plot(options.plot)
    if options.against is not None:
        need_torch("bench model --against torch")
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # or a GPU's memory would be ours alone
    report, budget = Report(options.json), Budget(options.budget)
    device = jax.devices()[0]
    dtype = jnp.dtype(options.dtype or ("float32" if device.platform == "cpu" else "bfloat16"))
    bench = _Bench(name, config, options, dtype, report, budget)
    report.add(bench.about())
    return bench.run()


def _check_lengths(config: Config, options: ModelOptions) -> None:
    most = config.language.max_position_embeddings
    given = {"--context": [options.context] if "decode" in options.jobs else []}
    given["--tokens"] = options.tokens if {"prefill", "chunk", "train"} & set(options.jobs) else []
    for option, lengths in given.items():
        for length in lengths:
            if length > most:
                raise UsageError(
                    f"{option}: found {length}, expected at most the model's context, {most} tokens "
                    "(max_position_embeddings)."
                )


class _Bench:
    """One run."""

    def __init__(self, name: str, config: Config, options: ModelOptions, dtype: Any, report: Report, budget: Budget):
        self.name, self.config, self.options, self.dtype = name, config, options, dtype
        self.report, self.budget = report, budget
        self.quantization = quantization_of(options.quantize)
        self.device = jax.devices()[0]
        self.failed = False
        self.measured: list[Mapping[str, Any]] = []
        self.rows: dict[int, Prefilling] = {}  # tokens → a program that has filled a row with so many
        self.programs = self._programs()
        self.compiled: dict[str, tuple[Compiled, float]] = {}
        self.peaks = peaks(self.device.device_kind) if dtype == jnp.bfloat16 else None
        self.ceilings: Speeds | None = None
        self.other: TorchSide | None = None
        self.before: dict[str, Timed] = {}  # what the other side took, where it ran before ours

    def about(self) -> dict[str, Any]:
        language = self.config.language
        parts = self._parts()
        shapes = shapes_of(self.config, self.dtype, parts, self.quantization)
        plain = shapes_of(self.config, self.dtype, parts)
        count, size = sum(leaf.size for leaf in jax.tree.leaves(plain)), bytes_of(shapes)
        about = (
            f"{self.name}, {language.num_hidden_layers} layers of the language model and {self.config.vision.layers} "
            f"of the encoder, {self._kept()}, random weights: {count / 1e9:.2f} B parameters, {size / 1e9:.1f} GB\n"
            f"{self.device.device_kind}; {machine()}"
        )
        return {
            "about": about,
            "model": self.name,
            "layers": language.num_hidden_layers,
            "encoder_layers": self.config.vision.layers,
            "dtype": self.dtype.name,
            "quantize": self.options.quantize,
            "parameters": count,
            "parameter_bytes": size,
            "device": self.device.device_kind,
            "platform": self.device.platform,
            "jax": jax.__version__,
        }

    def _kept(self) -> str:
        """In which dtypes the weights are."""
        return self.dtype.name if self.quantization is None else f"{self.quantization.kind} and {self.dtype.name}"

    def run(self) -> int:
        if self.programs:
            self._check_memory()
        self.ceilings = ceilings(self.dtype)
        self.report.add(
            {
                "job": "ceilings",
                "product_flops": self.ceilings.flops,
                "copy_bandwidth": self.ceilings.bandwidth,
                "peak_flops": self.peaks and self.peaks[0],
                "peak_bandwidth": self.peaks and self.peaks[1],
            }
        )
        with contextlib.ExitStack() as stack:
            if self.options.against is not None:
                self._compare(stack)
            self._measure_all()
        if "kernels" in self.options.jobs:
            self._kernels()
        if self.options.plot is not None and self.measured:
            title = f"{self.name}, {self._kept()}, {self.device.device_kind}"
            model_plot.plot(self.measured, title, self.options.plot)
        return int(self.failed)

    def _measure_all(self) -> None:
        self._compile()
        self._measure([program for program in self.programs if program.job != "train"])
        self.rows.clear()
        self._measure([program for program in self.programs if program.job == "train"])

    def _compare(self, stack: contextlib.ExitStack) -> None:
        """Checks that the other side computes the same; on a GPU it is measured here, before ours takes the memory."""
        arguments = self.name, self.config, self.options, self.dtype, self._parts(), self.device.platform
        self.other = stack.enter_context(TorchSide(*arguments))
        distances = self.other.check()
        self.report.add({"job": "check", "sizes": {}, "torch": self.other.release, "distances": distances})
        if self.device.platform == "cpu":
            return
        for program in self.programs:
            if program.job == "chunk" or self.budget.spent > OTHERS * (self.options.budget or math.inf):
                continue
            try:
                timed = self.before[str(program)] = self.other.measure(program)
            except DSVL2Error as error:  # too little memory, say; ours is measured all the same
                self.report.add(
                    {"side": "torch", "job": program.job, "sizes": dict(program.sizes), "error": str(error)}
                )
                continue
            row = {"side": "torch", "job": program.job, "sizes": dict(program.sizes), "seconds": timed.seconds}
            made = {f"{program.unit}_per_second": program.made / timed.seconds, "setting": timed.setting}
            self.report.add(row | made)
        self.other = None
        stack.close()

    # ---- what is to be measured

    def _programs(self) -> list[Program]:
        options, config, dtype = self.options, self.config, self.dtype
        made: list[Program] = []
        for job in options.jobs:
            if job == "decode":
                context = options.context
                made += [
                    model_jobs.decode(config, slots, context, dtype, self._row_of, self.quantization)
                    for slots in options.slots
                ]
            elif job in ("prefill", "chunk"):
                make = getattr(model_jobs, job)
                made += [make(config, tokens, dtype, self.quantization) for tokens in options.tokens]
            elif job == "encode":
                made += [model_jobs.encode(config, tiles, dtype, self.quantization) for tiles in options.tiles]
            elif job == "train":
                from dsvl2_jax.apps.bench import model_train

                settings = model_train.step_settings(config, options, dtype)
                made.append(model_train.train(config, settings, dtype))
        return made

    def _row_of(self) -> Any:
        """The cache of one row that holds the prompt of the decode slots."""
        return self.rows[self.options.context].row

    def _helpers(self) -> list[Program]:
        """Programs that are run but not measured: the prompt of the decode slots."""
        names = {str(program) for program in self.programs}
        if "decode" not in self.options.jobs:
            return []
        filling = model_jobs.prefill(self.config, self.options.context, self.dtype, self.quantization)
        return [] if str(filling) in names else [filling]

    def _parts(self) -> set[str]:
        jobs = set(self.options.jobs)
        parts = {"language"} if jobs & {"decode", "prefill", "chunk", "train"} else set()
        return parts | ({"vision"} if jobs & {"encode", "train"} else set())

    # ---- memory

    def _memory(self) -> float:
        """Bytes of the device that are there for us."""
        stats = self.device.memory_stats() or {}
        if "bytes_limit" in stats:
            return stats["bytes_limit"]
        with open("/proc/meminfo", encoding="ascii") as lines:
            return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))

    def _check_memory(self) -> None:
        """Raises UsageError when the parameters do not fit the device."""

        def size(layers: int | None) -> int:
            return bytes_of(shapes_of(with_layers(self.config, layers), self.dtype, self._parts(), self.quantization))

        most, needed = MOST_MEMORY * self._memory(), size(None)
        if needed <= most:
            return
        two, three = size(2), size(3)
        fitting = 2 + int((most * FOR_PARAMETERS - two) // max(1, three - two))
        advice = f"try --layers {fitting}" if fitting >= 2 else "choose a smaller one"
        raise UsageError(
            f"{self.name} in {self._kept()} takes {needed / 1e9:.1f} GB, and the device has {most / 1e9:.1f} GB to "
            f"give; {advice}."
        )

    # ---- compiling

    def _compile(self) -> None:
        """Compiles all programs, several at a time, and says how long each took."""
        programs = {str(program): program for program in [*self.programs, *self._helpers()]}

        def compile_one(program: Program) -> tuple[Compiled, float]:
            lowered = program.lower()
            begun = time.monotonic()
            return lowered.compile(), time.monotonic() - begun

        pool = concurrent.futures.ThreadPoolExecutor(max(1, (os.cpu_count() or 1) // 2))
        running = {pool.submit(compile_one, program): name for name, program in programs.items()}
        timeout = None if self.options.budget is None else max(0.0, COMPILING * self.options.budget - self.budget.spent)
        try:
            for done in concurrent.futures.as_completed(running, timeout):
                name = running[done]
                try:
                    self.compiled[name] = done.result()
                except Exception as error:  # the compiler's own
                    self._fail(programs[name], error)
                else:
                    self.report.add({"job": "compiled", "program": name, "compile_seconds": self.compiled[name][1]})
        except concurrent.futures.TimeoutError:
            pass
        pool.shutdown(wait=False, cancel_futures=True)

    # ---- measuring

    def _measure(self, programs: Sequence[Program]) -> None:
        """Measures programs that share their parameters."""
        if not any(str(program) in self.compiled for program in programs):
            for program in programs:
                self._left_out(program)
            return
        params = None
        if any(program.job != "train" for program in programs):
            params = random_params(shapes_of(self.config, self.dtype, self._parts(), self.quantization))
            jax.block_until_ready(params)
        for program in programs:
            if str(program) not in self.compiled or self.budget.left <= 0:
                self._left_out(program)
                continue
            try:
                self._measure_one(program, params)
            except Exception as error:  # of the device: out of memory, say
                self._fail(program, error)

    def _measure_one(self, program: Program, params: Any) -> None:
        compiled, compile_seconds = self.compiled[str(program)]
        memory = program_memory(compiled, self.device.platform)
        if sum(memory.values()) > MOST_MEMORY * self._memory() and self.device.platform != "cpu":
            self._left_out(program, f"it takes {sum(memory.values()) / 1e9:.1f} GB, more than the device has")
            return
        if program.job == "decode":
            self._fill(params)
        running = program.start(compiled, params)
        series, theirs = self._series(program, running)
        row = self._row(program, statistics.median(series), theirs)
        row |= self._program(program, compiled) | {
            "compile_seconds": compile_seconds,
            "temporaries": memory["temporaries"],
            "arguments": memory["arguments"],
            "peak_bytes": self._peak(),
            "series": series,
        }
        self.report.add(row)
        self.measured.append(row)
        if program.job == self.options.profile:
            self._profile(program, compiled)

    def _profile(self, program: Program, compiled: Compiled) -> None:
        """How a program splits up: shares are of the time that FLOPs and bytes take at the measured ceilings."""
        rows = scope_rows(compiled.as_text(), self.ceilings.seconds)
        self.report.add({"job": program.job, "sizes": dict(program.sizes), "scopes": rows})

    def _fill(self, params: Any) -> None:
        """Prefills the prompt of the decode slots, unless that is done."""
        context = self.options.context
        if context not in self.rows:
            filling = model_jobs.prefill(self.config, context, self.dtype, self.quantization)
            if str(filling) not in self.compiled:
                raise DSVL2Error(f"{filling}: was not compiled, and nothing else fills the caches.")
            self.rows[context] = filling.start(self.compiled[str(filling)][0], params)

    def _series(self, program: Program, running: Running) -> tuple[list[float], Timed | None]:
        """Seconds of a unit of time (a decode step, else a run) in each series; and the other side's, in turns."""
        once = running.series(1)
        runs, long = program.runs_of(once), once >= LONG_SECONDS
        turns = self.other is not None and self.device.platform == "cpu" and program.job != "chunk"
        setting, theirs = "", []
        if turns:
            setting, their_once = self.other.start(program)
            their_runs, long = program.runs_of(their_once), long and their_once >= LONG_SECONDS
        ours = []
        while len(ours) < (3 if long else SERIES) and (not ours or self.budget.left > 0):
            ours.append(running.series(runs) / program.steps)
            if turns:
                theirs.append(self.other.series(program, their_runs))
        if turns:
            return ours, Timed(statistics.median(theirs), setting, theirs)
        return ours, self.before.get(str(program))

    def _row(self, program: Program, seconds: float, theirs: Timed | None) -> dict[str, Any]:
        least = program.least
        compared = {}
        if theirs is not None:
            compared = {
                "torch_seconds": theirs.seconds,
                "speedup": theirs.seconds / seconds,
                "torch_setting": theirs.setting,
                "torch_series": theirs.series,
            }
        return {
            "job": program.job,
            "sizes": dict(program.sizes),
            "seconds": seconds,
            f"{program.unit}_per_second": program.made / seconds,
            "least_flops": least.flops,
            "least_bytes": least.bytes,
            "roofline_share": self.peaks and Speeds(*self.peaks).seconds(least.flops, least.bytes) / seconds,
            "ceiling_share": self.ceilings.seconds(least.flops, least.bytes) / seconds,
            "bound": self._bound(program),
            **compared,
        }

    def _bound(self, program: Program) -> str:
        flops, moved = self.peaks or dataclasses.astuple(self.ceilings)
        return "compute" if program.least.flops / flops > program.least.bytes / moved else "memory"

    def _program(self, program: Program, compiled: Compiled) -> Mapping[str, Any]:
        """What the compiled program does in a unit of time, from its text."""
        text = compiled.as_text()
        cost, launches, least = walk(text), count_launches(text), program.least
        return {
            "program_flops": cost.flops,
            "program_bytes": cost.bytes,
            "flops_ratio": cost.flops / least.flops,
            "bytes_ratio": cost.bytes / least.bytes,
            "unknown_loops": len(cost.unknown_loops),
            "launches": launches.total,
            "sorts": launches.sorts,
            "captured": launches.captured,
            "host_transfers": launches.host_transfers,
        }

    def _peak(self) -> int:
        stats = self.device.memory_stats() or {}
        return stats["peak_bytes_in_use"] if "peak_bytes_in_use" in stats else own_bytes("VmHWM")

    # ---- kernels

    def _kernels(self) -> None:
        from dsvl2_jax.apps.bench.model_kernels import kernels, measured

        waiting = kernels(self.config, self.options, self.dtype)
        while True:
            if self.budget.left <= 0:
                self.report.add({"job": "kernels", "sizes": {}, "skipped": "no time was left"})
                return
            try:
                kernel = next(waiting, None)
                if kernel is None:
                    return
                self.report.add(measured(kernel))
            except Exception as error:  # of the compiler or the device; a generator that failed gives no more
                self.failed = True
                self.report.add(
                    {"job": "kernels", "sizes": {}, "error": f"{type(error).__name__}: {first_line(error)}"}
                )

    def _fail(self, program: Program, error: Exception) -> None:
        self.failed = True
        text = f"{type(error).__name__}: {first_line(error)}"
        self.report.add({"job": program.job, "sizes": dict(program.sizes), "error": text})

    def _left_out(self, program: Program, reason: str = "no time was left") -> None:
        self.report.add({"job": program.job, "sizes": dict(program.sizes), "skipped": reason})
