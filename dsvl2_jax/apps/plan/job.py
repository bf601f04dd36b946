"""The jobs that can be planned, and the least that each of them costs.

Tested in tests/apps/plan/test_planner.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from dsvl2_jax.apps.plan.least_work import Work, decode_work, encode_work, prefill_work
from dsvl2_jax.apps.plan.training_step import preset_settings, program_settings, training_work
from dsvl2_jax.errors import UsageError
from dsvl2_jax.infer.slots import PAGE
from dsvl2_jax.model.config import Config
from dsvl2_jax.model.quantization import Quantization
from dsvl2_jax.train.settings.schema import Settings

JOBS = ("prefill", "chunk", "decode", "encode", "align", "pretrain", "sft", "lora")
ITEMSIZE = 2  # of bfloat16, in which everything is planned


@dataclasses.dataclass(frozen=True)
class Job:
    """What is to be planned.

    Attributes:
      kind: of `JOBS`.
      batch: prompts (of "chunk" one, whose last `PAGE` tokens it is), decode slots, tiles, or sequences of a step.
      sequence: tokens of a prompt or training sequence, or positions of the cache; encoding has none.
      settings: of a training step, which hold batch and sequence too; None: for inference.
      quantization: of the weights, in inference and beside an adapter that is trained; None: all are in bfloat16.
      cache_dtype: of the decode cache.
    """

    kind: str
    batch: int
    sequence: int
    settings: Settings | None = None
    quantization: Quantization | None = None
    cache_dtype: str = "bfloat16"

    @property
    def unit(self) -> tuple[str, int]:
        """What one run makes, and how much of it."""
        if self.kind == "encode":
            return "tiles", self.batch
        rows = {"decode": 1, "chunk": min(PAGE, self.sequence)}
        return "tokens", self.batch * rows.get(self.kind, self.sequence)

    def described(self) -> dict[str, Any]:
        """A JSON object of all that shapes the job's program."""
        sizes: dict[str, Any] = {"kind": self.kind, "batch": self.batch, "sequence": self.sequence}
        if self.quantization is not None:
            sizes |= {"quantize": self.quantization.described()}
        sizes |= {} if self.cache_dtype == "bfloat16" else {"cache_dtype": self.cache_dtype}
        return sizes if self.settings is None else sizes | program_settings(self.settings)


def least_work(config: Config, job: Job) -> Work:
    """The least that a job costs on all devices together."""
    if job.settings is not None:
        return training_work(config, job.settings, job.quantization)
    if job.kind == "encode":
        return encode_work(config, job.batch, ITEMSIZE, quantization=job.quantization)
    options = {"quantization": job.quantization, "cache_dtype": job.cache_dtype}
    if job.kind == "chunk":
        tokens = min(PAGE, job.sequence)
        return prefill_work(config, 1, tokens, ITEMSIZE, before=job.sequence - tokens, **options)
    inference_work = prefill_work if job.kind == "prefill" else decode_work
    return inference_work(config, job.batch, job.sequence, ITEMSIZE, **options)


def parse_job(
    kind: str,
    batch: int | None,
    sequence: int | None,
    slots: int | None,
    *,
    model: str = "",
    micro: int | None = None,
    overrides: Sequence[str] = (),
    quantization: Quantization | None = None,
    cache_dtype: str | None = None,
) -> Job:
    """The job of the command's flags, with the sizes that are usual where none are given.

    Args:
      model, micro, overrides: of a training job, see `preset_settings`.
      quantization: of an inference job, or of the frozen model of an adapter.
      cache_dtype: of prefill and decode; None: bfloat16.

    Raises:
      UsageError: an unknown job, a size that is not positive, or a flag of another job.
    """
    if kind not in JOBS:
        raise UsageError(f"--job {kind!r}: expected one of {', '.join(JOBS)}.")
    for name, value in (("--batch", batch), ("--sequence", sequence), ("--slots", slots), ("--micro", micro)):
        if value is not None and value < 1:
            raise UsageError(f"{name}: found {value}, expected a positive whole number.")
    if cache_dtype is not None and kind not in ("prefill", "chunk", "decode"):
        raise UsageError(f"--cache-dtype belongs to prefill, chunk and decode; --job {kind} has no cache.")
    if kind == "chunk" and batch not in (None, 1):
        raise UsageError(f"--batch {batch}: a chunk is of one prompt, as the engine prefills it.")
    usual = {"prefill": (8, 4096), "chunk": (1, 4096), "decode": (64, 4096), "encode": (32, 0)}
    if kind not in usual:
        settings = preset_settings(model, kind, sequences=batch, length=sequence, micro=micro, overrides=overrides)
        if quantization is not None and settings.adapter.kind == "none":
            raise UsageError(
                f"--quantize {quantization.kind}: belongs to inference and to --job lora; --job {kind} trains the "
                "weights."
            )
        return Job(kind, settings.batch.sequences, settings.data.sequence_length, settings, quantization)
    if micro is not None or overrides:
        raise UsageError(f"--micro and --set belong to training; --job {kind} has neither.")
    rows = (slots if kind == "decode" and slots is not None else batch) or usual[kind][0]
    length = usual[kind][1] if sequence is None or kind == "encode" else sequence
    return Job(kind, rows, length, quantization=quantization, cache_dtype=cache_dtype or "bfloat16")
