"""What `dsvl2 bench model` measures. Tested in tests/apps/bench/test_model.py."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path

from dsvl2_jax.apps.bench.measure import need_at_least
from dsvl2_jax.errors import UsageError
from dsvl2_jax.messages import did_you_mean
from dsvl2_jax.model.config import Config

# In the order in which they are measured: what a cut-off run should have comes first.
JOBS = ("decode", "prefill", "encode", "train", "chunk", "kernels")
GROUPS = 2  # decode groups of a series


@dataclasses.dataclass(frozen=True)
class ModelOptions:
    """Options of `dsvl2 bench model`.

    Attributes:
      layers: of the language model and of the encoder; None: all.
      jobs: of `JOBS`.
      slots: for decode, rows. context: tokens in each cache at the end of a series.
      tokens: for prefill and chunk, of a prompt; training takes the largest number.
      tiles: for encode; training takes the largest number.
      overrides: for train, settings of the preset.
      dtype: None: bfloat16, float32 on a CPU.
      quantize: the weights, as `dsvl2 convert --quantize`; None: they are of ``dtype``.
      against: "torch" or None.
      profile: a job whose programs are split up by named scope, or None.
      budget: seconds after which nothing is begun; None: no limit.
      json: print JSON lines.
      plot: PNG to draw the shares to, or None.
    """

    layers: int | None = None
    jobs: tuple[str, ...] = ("decode", "prefill", "encode")
    slots: tuple[int, ...] = (1, 16, 64)
    context: int = 1024
    tokens: tuple[int, ...] = (1024, 4096)
    tiles: tuple[int, ...] = (10,)
    overrides: tuple[str, ...] = ()
    dtype: str | None = None
    quantize: str | None = None
    against: str | None = None
    profile: str | None = None
    budget: float | None = None
    json: bool = False
    plot: Path | None = None

    @classmethod
    def parse(cls, *, jobs: str, slots: str, tokens: str, tiles: str, **others: object) -> ModelOptions:
        """From the command line, where lists are words and numbers with commas between them.

        Raises:
          UsageError: a job that is none, a number that is too small, or options that contradict each other.
        """
        named = tuple(dict.fromkeys(word.strip() for word in jobs.split(",")))
        for job in named:
            _known_job("--jobs", job)
        options = cls(
            jobs=tuple(job for job in JOBS if job in named),
            slots=_numbers("--slots", slots, 1),
            tokens=_numbers("--tokens", tokens, 1),
            tiles=_numbers("--tiles", tiles, 1),
            **others,
        )
        options._check()
        return options

    def _check(self) -> None:
        if self.layers is not None:
            # The language model's first layer is dense, and the others have experts.
            need_at_least("--layers", self.layers, 1)
        from dsvl2_jax.infer.slots import GROUP

        need_at_least("--context", self.context, GROUPS * GROUP + 1)
        if self.plot is not None and self.plot.suffix.lower() != ".png":
            raise UsageError(f"--plot: found {self.plot}, expected a name that ends in .png.")
        if self.budget is not None and self.budget <= 0:
            raise UsageError(f"--budget: found {self.budget}, expected a positive number of seconds.")
        if self.profile is not None:
            _known_job("--profile", self.profile)
            if self.profile not in self.jobs or self.profile == "kernels":
                measured = ", ".join(job for job in self.jobs if job != "kernels") or "none"
                raise UsageError(
                    f"--profile {self.profile}: expected one of the programs that are measured ({measured}); name it "
                    "with --jobs too."
                )
        if self.overrides and "train" not in self.jobs:
            raise UsageError("--set is of the training step; add train to --jobs, or leave --set out.")
        if self.quantize is not None:
            unquantized = [job for job in ("train", "kernels") if job in self.jobs]
            if unquantized or self.against is not None:
                what = f"--jobs {unquantized[0]}" if unquantized else "--against torch"
                raise UsageError(f"--quantize {self.quantize}: {what} takes weights as they are; leave one out.")
        if self.against is not None and self.jobs == ("kernels",):
            raise UsageError("--against torch compares programs; --jobs kernels has none.")


def _known_job(option: str, job: str) -> None:
    if job not in JOBS:
        raise UsageError(f"{option}: {job!r} is none of {', '.join(JOBS)}{did_you_mean(job, JOBS)}")


def _numbers(option: str, text: str, least: int) -> tuple[int, ...]:
    numbers = []
    for word in text.split(","):
        try:
            numbers.append(int(word))
        except ValueError:
            raise UsageError(f"{option}: found {text!r}, expected whole numbers with commas, as 1,16,64.") from None
        need_at_least(option, numbers[-1], least)
    return tuple(dict.fromkeys(numbers))


class Budget:
    """Seconds that a run may take, from its start."""

    def __init__(self, seconds: float | None):
        self._seconds = seconds
        self._begun = time.monotonic()

    @property
    def spent(self) -> float:
        return time.monotonic() - self._begun

    @property
    def left(self) -> float:
        return float("inf") if self._seconds is None else self._seconds - self.spent


def with_layers(config: Config, layers: int | None) -> Config:
    """The same model with so many layers, at most, in its language model and in its encoder; None: all."""
    if layers is None:
        return config
    language, vision = config.language, config.vision
    language = dataclasses.replace(language, num_hidden_layers=min(layers, language.num_hidden_layers))
    return dataclasses.replace(
        config, language=language, vision=dataclasses.replace(vision, layers=min(layers, vision.layers))
    )
