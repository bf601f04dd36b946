"""The programs that `dsvl2 bench model` measures: the engine's own, on random prompts and pictures.

Tested in tests/apps/bench/test_model.py.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.stages import Compiled, Lowered

from dsvl2_jax.apps.bench.ceilings import LONG_SECONDS, runs_of
from dsvl2_jax.apps.bench.model_options import GROUPS
from dsvl2_jax.apps.bench.random_params import shapes_of
from dsvl2_jax.apps.plan.least_work import Work, decode_work, encode_work, prefill_work
from dsvl2_jax.errors import DSVL2Error
from dsvl2_jax.infer import executor
from dsvl2_jax.infer.buckets import cache_bucket
from dsvl2_jax.infer.slots import GROUP, PAGE
from dsvl2_jax.model.config import TEXT_POSITION, Config
from dsvl2_jax.model.deepseek_vl2 import Params
from dsvl2_jax.model.quantization import Quantization

HALF = np.full(3, 0.5, np.float32)  # mean and standard deviation of the released models' pixels
NO_EOS = -1  # no token ends an answer


class Running(Protocol):
    """A program with its arguments in memory."""

    def series(self, runs: int) -> float:
        """Seconds of one run, of several after each other."""

    def outputs(self) -> dict[str, np.ndarray]:
        """What the first run gave, as float32, to be checked and compared."""


@dataclasses.dataclass(frozen=True)
class Program:
    """Something to measure.

    Attributes:
      job: of `dsvl2_jax.apps.bench.model_options.JOBS`.
      sizes: what tells it from others of its job, as {"slots": 16, "context": 1024}.
      least: the least work of a unit of time: a whole run, or a decode step.
      unit, made: what a unit of time makes, and how much of it.
      lower: the program, from shapes alone.
      start: from the compiled program and the parameters; for training ``None``, as it makes its own.
      steps: units of time in a run.
      runs: runs of a series; 0: as many as take long enough.
    """

    job: str
    sizes: Mapping[str, int]
    least: Work
    unit: str
    made: int
    lower: Callable[[], Lowered]
    start: Callable[[Compiled, Params], Running]
    steps: int = 1
    runs: int = 0

    def runs_of(self, seconds: float) -> int:
        """Runs of a series, where one takes so long."""
        if not self.runs:
            return runs_of(seconds)
        return self.runs if seconds < LONG_SECONDS else 1

    def __str__(self) -> str:
        return " ".join([self.job, *(f"{name} {size}" for name, size in self.sizes.items())])


class Repeated:
    """`Running` of a function that can be called again and again."""

    def __init__(self, call: Callable[[], Any], check: Callable[[Any], dict[str, Any]]):
        self._call = call
        self._outputs = _numbers(check(call()))

    def series(self, runs: int) -> float:
        begun = time.perf_counter()
        for _ in range(runs):
            out = self._call()
        jax.block_until_ready(out)
        return (time.perf_counter() - begun) / runs

    def outputs(self) -> dict[str, np.ndarray]:
        return self._outputs


class Prefilling(Repeated):
    """`Running` of a program that fills a row. ``row`` is what it has filled."""

    def __init__(self, fill: Callable[[Any], tuple[jax.Array, Any]], row: Any):
        self.row = row

        def call() -> jax.Array:
            logits_bv, self.row = fill(self.row)
            return logits_bv

        super().__init__(call, lambda logits_bv: {"logits": logits_bv})


def _numbers(arrays: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """As numpy.

    Raises:
      DSVL2Error: an entry is no finite number.
    """
    found = {}
    for name, array in arrays.items():
        found[name] = np.asarray(array).astype(np.float32)
        if not np.isfinite(found[name]).all():
            raise DSVL2Error(
                f"{name}: {(~np.isfinite(found[name])).sum()} of {found[name].size} numbers are not finite."
            )
    return found


def random_ids(config: Config, shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """i32, tokens."""
    return np.random.default_rng(seed).integers(0, config.language.vocab_size, shape).astype(np.int32)


def random_tiles(config: Config, count: int) -> np.ndarray:
    """u8[count, side, side, 3]."""
    side = config.vision.image_size
    return np.random.default_rng(0).integers(0, 256, (count, side, side, 3)).astype(np.uint8)


def encode(config: Config, tiles: int, dtype: Any, quantization: Quantization | None = None) -> Program:
    """Encoder and adaptor on some tiles."""
    arrays = {"tiles": random_tiles(config, tiles), "mean": HALF, "std": HALF}

    def lower() -> Lowered:
        params = shapes_of(config, dtype, ("vision",), quantization)
        return executor.adapt_tiles.lower(params=params, config=config, **arrays)

    def start(compiled: Compiled, params: Params) -> Running:
        part = _of_shapes(params, shapes_of(config, dtype, ("vision",), quantization))
        return Repeated(lambda: compiled(params=part, **arrays), lambda out: {"features": out})

    least = encode_work(config, tiles, dtype.itemsize, quantization=quantization)
    return Program("encode", {"tiles": tiles}, least, "tiles", tiles, lower, start)


def prefill(config: Config, tokens: int, dtype: Any, quantization: Quantization | None = None) -> Program:
    """A whole prompt into an empty cache."""
    least = prefill_work(config, 1, tokens, dtype.itemsize, cache_dtype=dtype.name, quantization=quantization)
    lower, start = _chunk(config, tokens, 0, dtype, quantization)
    return Program("prefill", {"tokens": tokens}, least, "tokens", tokens, lower, start)


def chunk(config: Config, tokens: int, dtype: Any, quantization: Quantization | None = None) -> Program:
    """The last chunk of a prompt, as the engine prefills it: it attends to the tokens before it in the cache."""
    size = min(PAGE, tokens)
    first = tokens - size
    kept = {"cache_dtype": dtype.name, "quantization": quantization}
    least = prefill_work(config, 1, size, dtype.itemsize, before=first, **kept)
    lower, start = _chunk(config, size, first, dtype, quantization)
    return Program("chunk", {"tokens": size, "before": first}, least, "tokens", size, lower, start)


def _chunk(
    config: Config, size: int, first: int, dtype: Any, quantization: Quantization | None
) -> tuple[Callable, Callable]:
    """How a chunk of ``size`` tokens after ``first`` others is lowered and started."""
    length = cache_bucket(first + size, PAGE, max(config.language.max_position_embeddings, first + size))
    static = {"config": config, "read_length": None if first == 0 else length}
    row = jax.eval_shape(lambda: executor.init_row(config=config, slots=1, cache_length=length, dtype=dtype))
    features = jax.ShapeDtypeStruct((1, config.tokens_per_tile, config.language.hidden_size), dtype)
    arrays = {
        "ids_bt": random_ids(config, (1, first + size))[:, first:],
        "image_index_bt": np.full((1, size), TEXT_POSITION, np.int32),
        "length": np.int32(size),
        "start": np.int32(first),
        "total": np.int32(first + size),
    }

    def lower() -> Lowered:
        params = shapes_of(config, dtype, ("language",), quantization)
        return executor.prefill_chunk.lower(params=params, features=features, row=row, **static, **arrays)

    def start(compiled: Compiled, params: Params) -> Running:
        part = _of_shapes(params, shapes_of(config, dtype, ("language",), quantization))
        table = jnp.zeros(features.shape, dtype)
        kept = executor.init_row(config=config, slots=1, cache_length=length, dtype=dtype)
        return Prefilling(lambda row: compiled(params=part, features=table, row=row, **arrays), kept)

    return lower, start


class _Decoding:
    """`Running` of decode groups. All slots have the same prompt in their caches, and continue differently."""

    def __init__(self, compiled: Compiled, params: Params, state: Any, config: Config, slots: int, context: int):
        self._compiled, self._params, self._state = compiled, params, state
        self._slots, self._context = slots, context
        self._tokens = random_ids(config, (slots,), seed=1)
        self._budget = np.full(slots, GROUP, np.int32)
        self._begin()
        steps = self._group()
        if not (np.asarray(steps.counts) == GROUP).all() or np.asarray(steps.failed).any():
            raise DSVL2Error(f"decode: rows took {np.asarray(steps.counts).tolist()} steps, expected {GROUP} each.")
        self._outputs = _numbers({"tokens": steps.tokens, "logprobs": steps.logprobs})

    def _begin(self) -> None:
        """Back to the first token of a series."""
        slots = self._slots
        self._state = dataclasses.replace(
            self._state,
            tokens=self._tokens,
            positions=np.full(slots, self._context - GROUPS * GROUP, np.int32),
            limits=np.full(slots, np.iinfo(np.int32).max, np.int32),
            finished=np.zeros(slots, np.bool_),
        )

    def _group(self) -> Any:
        self._state, steps = self._compiled(
            params=self._params, state=self._state, budget_b=self._budget, allowed_bv=None
        )
        return steps

    def series(self, runs: int) -> float:
        self._begin()
        begun = time.perf_counter()
        for _ in range(runs):
            steps = self._group()
        jax.block_until_ready(steps)
        return (time.perf_counter() - begun) / runs

    def outputs(self) -> dict[str, np.ndarray]:
        return self._outputs


def decode(
    config: Config,
    slots: int,
    context: int,
    dtype: Any,
    row: Callable[[], Any],
    quantization: Quantization | None = None,
) -> Program:
    """Groups of decode steps.

    Args:
      context: tokens in each cache at the end of a series.
      row: gives a cache of one row that holds a prompt of ``context`` tokens.
    """
    length = cache_bucket(context, PAGE, max(config.language.max_position_embeddings, context))
    # On GPUs a group that draws no tokens has a program of its own.
    greedy = jax.devices()[0].platform == "gpu"
    static = {"config": config, "eos": NO_EOS, "cache_length": length, "top": False, "greedy": greedy}

    def init() -> Any:
        return executor.init_slots(config=config, slots=slots, cache_length=length, dtype=dtype)

    def lower() -> Lowered:
        params = shapes_of(config, dtype, ("language",), quantization)
        budget = jax.ShapeDtypeStruct((slots,), jnp.int32)
        return executor.decode_group.lower(
            params=params, state=jax.eval_shape(init), budget_b=budget, allowed_bv=None, **static
        )

    def start(compiled: Compiled, params: Params) -> Running:
        part = _of_shapes(params, shapes_of(config, dtype, ("language",), quantization))
        repeat = jax.jit(lambda cache: jax.tree.map(lambda x: jnp.repeat(x, slots, axis=0), cache))
        state = dataclasses.replace(init(), cache=None)
        state = dataclasses.replace(state, cache=repeat(row()))
        return _Decoding(compiled, part, state, config, slots, context)

    steps = GROUPS * GROUP
    kept = {"cache_dtype": dtype.name, "quantization": quantization}
    least = decode_work(config, slots, context - steps // 2, dtype.itemsize, **kept)
    sizes = {"slots": slots, "context": context}
    return Program("decode", sizes, least, "tokens", slots, lower, start, steps=GROUP, runs=GROUPS)


def _of_shapes(params: Params, shapes: Params) -> Params:
    """The part of some parameters that a program takes."""
    return {
        name: _of_shapes(params[name], part) if isinstance(part, dict) else params[name]
        for name, part in shapes.items()
    }
