"""`dsvl2 bench model --against torch`: the other side, in a process of its own.

Before anything is timed, a model of two layers with the same weights in float32 gives the same outputs on both sides.
Then each side has random weights of its own: on CPUs the sides run in turns, and on a GPU, whose memory does not hold
both, one after the other.

Tested in tests/apps/bench/test_model.py.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import statistics
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict
from safetensors.numpy import save_file

from dsvl2_jax.apps.bench import model_jobs
from dsvl2_jax.apps.bench.ceilings import SERIES
from dsvl2_jax.apps.bench.measure import need_torch
from dsvl2_jax.apps.bench.model_jobs import Program
from dsvl2_jax.apps.bench.model_options import ModelOptions, with_layers
from dsvl2_jax.apps.bench.random_params import random_params, shapes_of
from dsvl2_jax.apps.bench.side import Side
from dsvl2_jax.apps.bench.train import KEEP_MEMORY
from dsvl2_jax.checkpoint import rules
from dsvl2_jax.errors import DSVL2Error, UsageError
from dsvl2_jax.model.config import Config
from dsvl2_jax.model.deepseek_vl2 import Params

CHECK_LAYERS = 2
CHECK_TOKENS = 64
CHECK_SLOTS = 2
TOLERANCE = 1e-3  # of the largest number, in float32
MOST_DIFFERENT = 0.25  # of a group's tokens: random weights leave near ties, which rounding decides


@dataclasses.dataclass(frozen=True)
class Timed:
    """What the other side took for a unit of time, in its quickest setting."""

    seconds: float
    setting: str
    series: list[float]


class TorchSide(contextlib.AbstractContextManager):
    """PyTorch. As a context manager, its process ends with the block."""

    def __init__(self, name: str, config: Config, options: ModelOptions, dtype: Any, parts: set[str], platform: str):
        """Raises UsageError where there is no PyTorch, or none for our device."""
        need_torch("bench model --against torch")
        if platform not in ("cpu", "gpu"):
            raise UsageError(
                f"--against torch: this is a {platform}; PyTorch is compared with on CPUs and NVIDIA GPUs."
            )
        self._config, self._options, self._parts = config, options, parts
        threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        job = {
            "model": name,
            "layers": options.layers,
            "parts": sorted(parts),
            "dtype": dtype.name,
            "device": "cuda" if platform == "gpu" else "cpu",
            "threads": threads,
        }
        environment = KEEP_MEMORY | {"OMP_NUM_THREADS": str(threads), "JAX_PLATFORMS": "cpu"}
        self._side = Side("dsvl2_jax.apps.bench.torch_side", job, "the PyTorch side", environment)
        self.release = self._side.answer()["torch"]

    def __exit__(self, *error: Any) -> None:
        self._side.__exit__(*error)

    def _ask(self, question: Mapping[str, Any]) -> dict[str, Any]:
        answer = self._side.ask(question)
        if "error" in answer:
            raise DSVL2Error(f"PyTorch: {answer['error']}")
        return answer

    def check(self) -> dict[str, float]:
        """How far the outputs of both sides are apart on shared weights.

        Raises:
          DSVL2Error: too far.
        """
        with tempfile.TemporaryDirectory(prefix="dsvl2-bench-") as name:
            folder = Path(name)
            _write_check(folder, self._config, self._options)
            distances = self._ask({"check": name})
        for output, distance in distances.items():
            most = MOST_DIFFERENT if output.endswith("tokens") else TOLERANCE
            if not distance <= most:
                raise DSVL2Error(
                    f"{output}: the two sides differ by {distance:.1e} on the same weights, expected at most {most}. "
                    "They do not compute the same, so nothing is timed."
                )
        return distances

    def start(self, program: Program) -> tuple[str, float]:
        """The quickest setting for a program, and about how long a run takes."""
        answer = self._ask({"job": program.job, "sizes": dict(program.sizes)})
        return answer["setting"], answer["seconds"]

    def series(self, program: Program, runs: int) -> float:
        """Seconds of a unit of time."""
        answer = self._ask({"job": program.job, "sizes": dict(program.sizes), "runs": runs})
        return answer["seconds"] / program.steps

    def measure(self, program: Program) -> Timed:
        """All series, one after the other."""
        setting, seconds = self.start(program)
        runs = program.runs_of(seconds)
        series = [self.series(program, runs) for _ in range(SERIES)]
        return Timed(statistics.median(series), setting, series)


def _write_check(folder: Path, config: Config, options: ModelOptions) -> None:
    """Weights under their released names, and what our programs give with them."""
    config = with_layers(config, CHECK_LAYERS)
    dtype = jnp.dtype(jnp.float32)
    parts = {"language"} if {"decode", "prefill", "chunk"} & set(options.jobs) else set()
    parts |= {"vision"} if "encode" in options.jobs else set()
    parts |= {"vision", "language"} if "train" in options.jobs else set()
    params = random_params(shapes_of(config, dtype, parts))
    save_file(_released(config, params), folder / "weights.safetensors")
    described = []

    def keep(program: Program, outputs: Mapping[str, np.ndarray]) -> None:
        np.savez(folder / f"{len(described)}.npz", **_first_step(program, outputs))
        described.append({"job": program.job, "sizes": dict(program.sizes), "layers": CHECK_LAYERS})

    tokens = min(CHECK_TOKENS, config.language.max_position_embeddings)
    filling = model_jobs.prefill(config, tokens, dtype)
    if "language" in parts and {"decode", "prefill", "chunk"} & set(options.jobs):
        prefilled = filling.start(filling.lower().compile(), params)
        keep(filling, prefilled.outputs())
        if "decode" in options.jobs:
            decoding = model_jobs.decode(config, CHECK_SLOTS, tokens, dtype, lambda: prefilled.row)
            keep(decoding, decoding.start(decoding.lower().compile(), params).outputs())
    if "encode" in options.jobs:
        encoding = model_jobs.encode(config, 1, dtype)
        keep(encoding, encoding.start(encoding.lower().compile(), params).outputs())
    del params
    if "train" in options.jobs:
        from dsvl2_jax.apps.bench import model_train

        length = min(config.tokens_per_tile + CHECK_TOKENS, config.language.max_position_embeddings)
        # The balance loss is no part of PyTorch's, and the update of the weights comes after both outputs.
        overrides = (*options.overrides, "stage.balance_loss_weight=0", "batch.sequences=1", "batch.microbatch_size=1")
        small = dataclasses.replace(options, tokens=(length,), tiles=(1,), overrides=overrides)
        settings = model_train.step_settings(config, small, dtype)
        training = model_train.train(config, settings, dtype)
        keep(training, training.start(training.lower().compile(), None).outputs())
    (folder / "programs.json").write_text(json.dumps(described))


def _first_step(program: Program, outputs: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
    """Of decoding, log-probabilities of the first step alone: later ones are of tokens that may differ."""
    return {**outputs, "logprobs": outputs["logprobs"][:, :1]} if program.job == "decode" else outputs


def _released(config: Config, params: Params) -> dict[str, np.ndarray]:
    """Released name → tensor, of the parameters that are there."""
    there, tensors = flatten_dict(params), {}
    for leaf in rules.expand(config):
        if leaf.path in there and len(leaf.path) > 1:
            for name, view in leaf.parts(np.asarray(jax.device_get(there[leaf.path]))):
                tensors[name] = np.ascontiguousarray(view)
    return tensors
