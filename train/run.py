"""`train`: a run from its settings, or from its newest checkpoint, to its last checkpoint.

The device is always one step ahead of the host: while it computes a step, the host looks at the metrics of the
one before and makes the next batch. Whatever must not be wrong without notice, a checkpoint above all, waits until
the metrics of its own step have been looked at.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from dsvl2_jax.checkpoint.adapters import read_adapter
from dsvl2_jax.checkpoint.apply_adapter import base_digest, check_base
from dsvl2_jax.checkpoint.load import load_params, open_orbax
from dsvl2_jax.checkpoint.locate import kind, model_files, open_model, resolve
from dsvl2_jax.checkpoint.verify import tell
from dsvl2_jax.checkpoint.verify import verify as verify_files
from dsvl2_jax.errors import DSVL2Error, RunError, SettingsError, UsageError
from dsvl2_jax.inputs.processor import Processor
from dsvl2_jax.messages import first_line, listed
from dsvl2_jax.model.config import Config
from dsvl2_jax.model.deepseek_vl2 import Params, entry_axes, init_params
from dsvl2_jax.model.released import variant
from dsvl2_jax.model.weights import are_plain
from dsvl2_jax.runtime import processes
from dsvl2_jax.runtime.compile_cache import enable_compilation_cache
from dsvl2_jax.runtime.malloc import give_freed_memory_back, keep_freed_memory
from dsvl2_jax.sharding import make_mesh, parse_mesh
from dsvl2_jax.train.adapter import with_adapter
from dsvl2_jax.train.data.pipeline import (
    BatchShard,
    Pipeline,
    StepData,
    Validation,
    fingerprint,
    open_training,
    open_validation,
)
from dsvl2_jax.train.log.report import Report
from dsvl2_jax.train.objectives.adapter import AdapterTrainer
from dsvl2_jax.train.objectives.base import BaseTrainer, TrainState, data_shards
from dsvl2_jax.train.objectives.contrastive import ContrastiveMetrics, ContrastiveTrainer
from dsvl2_jax.train.objectives.language import LanguageMetrics, LanguageTrainer
from dsvl2_jax.train.objectives.regions import RegionTrainer
from dsvl2_jax.train.positions import with_positions
from dsvl2_jax.train.run_directory import Identity, RunDirectory, Saved, model_identity, opened
from dsvl2_jax.train.settings.load import load, to_toml
from dsvl2_jax.train.settings.schema import Settings

# Steps from a signal to the last one: a process may be two steps ahead of the one that got it.
_NOTICE = 3

_TRAINERS = {"language": LanguageTrainer, "contrastive": ContrastiveTrainer, "regions": RegionTrainer}


@dataclasses.dataclass(frozen=True)
class _Pending:
    """A step that has been given to the device."""

    step: int
    metrics: LanguageMetrics | ContrastiveMetrics
    data: StepData


def train(config: str | Path, overrides: Sequence[str] = (), *, verify: bool = False) -> None:
    """Trains as a CONFIG.toml says; resumes the run when its directory holds one.

    SIGTERM or Ctrl-C finish the step, write a checkpoint and return; a second Ctrl-C interrupts at once.

    Args:
      config: path, or the name of a preset.
      overrides: ``table.key=value``.
      verify: read every file of the checkpoint that is started or resumed from, and compare it with its digest.

    Raises:
      SettingsError: the settings make no sense, or do not fit the model or the devices.
      DataError: data files are missing, empty or too often broken.
      CheckpointError, ConfigError, TokenizerError: the model to start from cannot be used.
      RunError: the directory holds another run, the data has changed since, a loss is not finite, or a checkpoint
        cannot be written. The last complete checkpoint stays.
    """
    settings = load(config, overrides)
    enable_compilation_cache()
    keep_freed_memory()
    mesh = training_mesh(settings)
    shard = batch_shard(settings, mesh)
    with _Signals() as signals, opened(settings.run.directory) as run:
        started, steps = processes.from_first(lambda: (run.started, run.steps()))
        # A run that has a checkpoint of its own no longer needs the one that it started from, unless it trains an
        # adapter, whose model it does not keep.
        adapts = settings.adapter.kind != "none"
        source = run.model if steps and not adapts else resolve(settings.model.checkpoint)
        if verify:
            checkpoints = [run.checkpoint(step) for step in steps[-1:]]
            for checkpoint in [*checkpoints, source] if adapts or not steps else checkpoints:
                tell(checkpoint, verify_files(checkpoint))
        with tempfile.TemporaryDirectory() as folder:
            # What a run has written says already how its positions are.
            written = steps and not adapts
            files = model_files(source) if written else with_positions(settings.model, source, Path(folder))
            model, processor = _open_model(settings, files)
            identity = _identity(settings, files)
            _begin(settings, run, files, identity, started=started)
        if settings.data.sequence_length > model.language.longest_context:
            told = (
                f"rows of {settings.data.sequence_length} tokens are longer than the {model.language.longest_context} "
            )
            tell(source, [told + "positions of the model; model.context and model.rope_scaling change them."])
        trainer = _trainer(settings, model, processor, mesh, source)
        pipeline = open_training(settings, processor, model, shard)
        with contextlib.closing(pipeline):
            validation = open_validation(settings, processor, model, shard)
            state = _start(settings, trainer, run, steps, source, mesh, pipeline)
            flops = trainer.flops()
            with Report(run.logs, settings, devices=jax.device_count(), flops=flops, parts=pipeline.parts) as report:
                _Loop(settings, run, trainer, pipeline, validation, report, signals).run(state)


def _begin(settings: Settings, run: RunDirectory, files: Path, identity: Identity, *, started: bool) -> None:
    """Writes what identifies the run, or compares it with what began here."""
    if processes.is_first() and started:
        run.check(settings, identity)
        run.write_settings(settings)
    elif processes.is_first():
        run.begin(settings, files, identity)
    processes.gather("the run has begun")
    if not run.started:
        raise RunError(
            f"run.directory {run.path}: does not show what process 0 has written there. Choose a directory on storage "
            "that all processes share."
        )


def _identity(settings: Settings, files: Path) -> Identity:
    """What the run is of; the same in all processes, validation data included."""

    def data(train: bool) -> dict[str, str]:
        other = {"validation" if train else "train": {}}
        return fingerprint(dataclasses.replace(settings, data=dataclasses.replace(settings.data, **other)))

    identity = Identity(model_identity(files), data(train=True))
    if processes.joined():
        for what, content in (
            ("the settings", to_toml(settings)),
            ("the model", json.dumps(identity.model)),
            ("the data", json.dumps([identity.data, data(train=False)])),
        ):
            processes.same_everywhere(what, f"one with SHA-256 {hashlib.sha256(content.encode()).hexdigest()}")
    return identity


def training_mesh(settings: Settings) -> Mesh | None:
    """The mesh of ``compute.mesh``, all devices along ``data`` when that is empty; None for a single device.

    Raises:
      SettingsError: it does not fit the devices there are.
    """
    text, devices = settings.compute.mesh, jax.device_count()
    sizes = parse_mesh(text) if text else {"data": devices}
    if math.prod(sizes.values()) != devices:
        raise SettingsError(
            f"compute.mesh = {text!r} makes {math.prod(sizes.values())} devices, but there are {devices}; choose sizes "
            "whose product is the number of devices, or leave it empty for all of them along data."
        )
    return None if devices == 1 else make_mesh(**sizes)


def batch_shard(settings: Settings, mesh: Mesh | None) -> BatchShard:
    """Which rows of a step are this process's.

    Raises:
      SettingsError: the batch does not divide.
    """
    local_shards, shards = data_shards(mesh)
    batch = settings.batch
    at_once = batch.microbatch_size * shards
    if batch.sequences % at_once:
        raise SettingsError(
            f"batch.sequences = {batch.sequences} does not divide by batch.microbatch_size = {batch.microbatch_size} × "
            f"{shards} data shards = {at_once}. Choose a multiple of {at_once}, or another compute.mesh."
        )
    if settings.stage.objective != "language" and batch.sequences != at_once:
        raise SettingsError(
            f"batch.microbatch_size = {batch.microbatch_size} × {shards} data shards = {at_once}, but batch.sequences "
            f"= {batch.sequences}. This objective compares all images of a step, without accumulation: make "
            f"the two equal, as with batch.microbatch_size={batch.sequences // shards}."
        )
    return BatchShard(local_shards, shards, batch.microbatch_size, batch.sequences // at_once)


def _open_model(settings: Settings, source: Path) -> tuple[Config, Processor]:
    config, processor = open_model(source)
    wanted, size = settings.model.size, variant(config)
    if wanted not in ("any", size):
        what = f"has the shapes of the released {size} model" if size != "other" else "is of no released size"
        raise SettingsError(
            f"model.size = {wanted}, but model.checkpoint = {settings.model.checkpoint} {what}. Give a checkpoint of "
            f"{wanted}, or the configuration for {size if size != 'other' else 'it, or model.size=any'}."
        )
    data = settings.data
    processor.as_seen, processor.warns = data.as_seen, False  # the pipeline counts pictures
    try:
        processor.set_visuals(data.max_tiles or None, data.min_tiles or None, data.frames, data.frame_choice)
    except UsageError as error:
        raise SettingsError(f"data: {error}") from None
    return config, processor


def _trainer(settings: Settings, model: Config, processor: Processor, mesh: Mesh | None, source: Path) -> BaseTrainer:
    pixels = processor.config.image_mean, processor.config.image_std
    if settings.adapter.kind == "none":
        return _TRAINERS[settings.stage.objective](model, settings, *pixels, mesh)
    stored = None
    if kind(source) != "released":  # where all parameters are plain
        stored = {path: shape for path, (shape, _) in open_orbax(source, model)[1].items()}
    return AdapterTrainer(model, settings, *pixels, mesh, stored)


def _start(
    settings: Settings,
    trainer: BaseTrainer,
    run: RunDirectory,
    steps: list[int],
    source: Path,
    mesh: Mesh | None,
    pipeline: Pipeline,
) -> TrainState:
    """The state and the place in the data to continue from: the run's newest checkpoint, or its beginning."""
    if steps:
        params = _params(settings, trainer, run.checkpoint(steps[-1]), source, mesh)
        # The fresh optimizer state is let go of before the other is read.
        state = dataclasses.replace(trainer.init(params), optimizer=None)
        abstract = trainer.abstract_state()
        restored = run.restore(steps[-1], abstract.optimizer)
        pipeline.set_state(restored.iterator)
        step = jax.device_put(np.int32(steps[-1]), abstract.step.sharding)
        return dataclasses.replace(state, optimizer=restored.optimizer, step=step)
    if settings.model.random_init:
        params = init_params(trainer.config, jax.random.key(settings.run.seed), mesh)
    else:
        params = _base(settings, trainer, source, mesh)
    return trainer.init(trainer.begin(params))


def _params(settings: Settings, trainer: BaseTrainer, checkpoint: Path, source: Path, mesh: Mesh | None) -> Params:
    """The parameters of a checkpoint of the run."""
    if settings.adapter.kind == "none":
        return load_params(checkpoint, trainer.config, mesh=mesh, fsdp=True)
    adapter, described = read_adapter(checkpoint, trainer.config)
    base = _base(settings, trainer, source, mesh)
    check_base(described, trainer.base_digest, f"{checkpoint}, from which the run resumes")
    return with_adapter(base, adapter)


def _base(settings: Settings, trainer: BaseTrainer, source: Path, mesh: Mesh | None) -> Params:
    """The parameters of the checkpoint that the run begins with."""
    dtype = None if settings.adapter.base == "stored" else settings.adapter.base
    params = load_params(source, trainer.config, dtype, mesh, fsdp=True)
    if isinstance(trainer, AdapterTrainer):
        trainer.base_digest = base_digest(params)
    elif not are_plain(params):
        raise SettingsError(
            f"model.checkpoint = {source}: its weights are quantized, and training changes plain ones. Give the "
            "checkpoint that it was made from, or train an adapter beside it (adapter.kind=lora)."
        )
    return params


class _Loop:
    """The steps of a run, with what happens between them."""

    def __init__(
        self,
        settings: Settings,
        run: RunDirectory,
        trainer: BaseTrainer,
        pipeline: Pipeline,
        validation: Validation | None,
        report: Report,
        signals: _Signals,
    ):
        self.settings = settings.run
        self.base = settings.model.checkpoint if settings.adapter.kind != "none" else None  # of an adapter
        self.directory = run
        self.trainer = trainer
        self.pipeline = pipeline
        self.validation = validation
        self.report = report
        self.signals = signals
        self.step = 0  # the last one given to the device
        self._settled = 0  # the last one whose metrics have been seen
        self._saved = 0  # the last one that a checkpoint is of
        self._stopped: str | None = None  # the signal that has stopped the run
        self._entries = entry_axes(trainer.config)
        self._clock = time.monotonic()

    def run(self, state: TrainState) -> None:
        """Steps until the last one, or a signal. Raises what stops the run before."""
        self.step = self._settled = self._saved = int(state.step)
        self.report.event("resume" if self.step else "start", self.step)
        try:
            self._finish(self._steps(state))
        except DSVL2Error as error:
            self.report.event("stop", self._settled, reason=first_line(error))
            raise

    def _steps(self, state: TrainState) -> TrainState:
        settings = self.settings
        pending: _Pending | None = None
        self._clock = time.monotonic()
        first = self.step + 1
        with _Profile(settings.profile, self.directory.logs / "profile") as profile:
            while self.step < settings.steps and not self._stops():
                samples = next(self.pipeline)
                self.step += 1
                profile.before(self.step)
                state, metrics = self.trainer.step(state, samples.batch)
                if self.step == first:
                    give_freed_memory_back(always=True)  # the compiler's
                profile.after(self.step, metrics)
                self._settle(pending)
                pending = _Pending(self.step, metrics, samples)
                validate = self.validation is not None and self.step % settings.validate_every == 0
                save = self.step % settings.checkpoint_every == 0
                if validate or save:
                    self._settle(pending)
                    pending = None
                    loss = self._validate(state) if validate else None
                    if save:
                        self._save(state, loss)
                    self._clock = time.monotonic()
                self._note(self.directory.poll())
        self._settle(pending)
        return state

    def _stops(self) -> bool:
        """True when a signal stops the run here: in all processes after the same step, whichever of them got it."""
        if not processes.joined():
            self._stopped = self.signals.received
            return self._stopped is not None
        wanted = self.signals.received and f"{self.signals.received} {self.step + _NOTICE}"
        name, _, step = (processes.decide("stop", wanted) or "").partition(" ")
        self._stopped = name if name and self.step >= int(step) else None
        return self._stopped is not None

    def _settle(self, pending: _Pending | None) -> None:
        """Waits for a step's metrics, and reports them.

        Raises:
          RunError: loss or gradient is not finite.
        """
        if pending is None:
            return
        metrics = jax.device_get(pending.metrics)
        now = time.monotonic()
        seconds, self._clock = now - self._clock, now
        self.report.step(pending.step, metrics, pending.data.stats, seconds)
        self._settled = pending.step
        if not metrics.finite:
            with contextlib.suppress(RunError):  # a checkpoint from before may still be on its way
                self._note(self.directory.wait())
            steps = self.directory.steps()
            left = (
                f"The last checkpoint, of step {steps[-1]}, is from before it."
                if steps
                else "There is no checkpoint from before it."
            )
            raise RunError(
                f"step {pending.step}: the loss is {metrics.loss} and the gradient norm {metrics.gradient_norm}, so "
                f"training stops. {left} Look at this step's samples, or lower optimizer.learning_rate:\n"
                + listed(pending.data.sources, limit=64)
            )

    def _validate(self, state: TrainState) -> float:
        """The loss of the held-out samples."""
        batches = zip(range(self.settings.validation_steps), self.validation, strict=False)
        parts = jax.device_get([self.trainer.evaluate(state, samples.batch) for _, samples in batches])
        values = self.trainer.metrics.average(parts)
        self.report.validation(self.step, **values)
        return values["loss"]

    def _save(self, state: TrainState, validation_loss: float | None) -> None:
        self._note(self.directory.wait())
        self._saved = self.step
        self.directory.save(
            self.step,
            self.trainer.contents(state),
            state.optimizer,
            self.pipeline.get_state(),
            validation_loss=validation_loss,
            entries=self._entries,
        )

    def _note(self, saved: Saved | None) -> None:
        """Reports a checkpoint that has become complete, and deletes the ones that it makes superfluous."""
        if saved is not None:
            self.report.event("checkpoint", saved.step, seconds=saved.seconds)
            if processes.is_first():
                self.directory.prune(self.settings.keep_last)

    def _finish(self, state: TrainState) -> None:
        """The last checkpoint, and what the user can do next."""
        step = self.step
        self._note(self.directory.wait())
        received = self._stopped
        if step > self._saved:
            validate = self.validation is not None and not received and step % self.settings.validate_every
            self._save(state, self._validate(state) if validate else None)
            self._note(self.directory.wait())
        done = step >= self.settings.steps
        self.report.event("stop", step, reason="done" if done else received)
        path = self.directory.path
        if done and self.base is not None:
            text = (
                f"done: {step} steps. `dsvl2 generate {self.base} --adapter {path}` uses the newest adapter, and "
                f"`dsvl2 merge {self.base} {path} OUT` makes one model of both."
            )
        elif done:
            text = (
                f"done: {step} steps. `dsvl2 generate {path}` and `dsvl2 export {path} OUT` use the newest checkpoint; "
                "the next stage starts from it with model.checkpoint."
            )
        else:
            kept = f"a checkpoint of step {step} is written" if step else "there is nothing to save yet"
            text = f"stopped by {received}: {kept}. The same command resumes from there."
        if processes.is_first():
            print(f"{path}: {text}", file=sys.stderr)


class _Signals(contextlib.AbstractContextManager):
    """Remembers SIGTERM and the first Ctrl-C, while the block lasts; a second Ctrl-C raises KeyboardInterrupt."""

    def __init__(self) -> None:
        self.received: str | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> _Signals:
        for number in (signal.SIGTERM, signal.SIGINT):
            self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exc_info: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = signal.Signals(number).name
        if processes.is_first():  # not print: the main thread may be inside it
            os.write(2, f"\n{self.received}: finishing the step, then writing a checkpoint.\n".encode())


class _Profile(contextlib.AbstractContextManager):
    """A trace of some steps, FIRST to LAST, written when the last of them has been computed."""

    def __init__(self, steps: str, directory: Path):
        self._first, self._last = map(int, steps.split(":")) if steps else (0, 0)
        self._directory = directory
        self._running = False

    def before(self, step: int) -> None:
        if self._first <= step <= self._last and not self._running:
            jax.profiler.start_trace(self._directory)
            self._running = True

    def after(self, step: int, metrics: Any) -> None:
        if self._running and step >= self._last:
            jax.block_until_ready(metrics)
            self._stop()

    def __exit__(self, *exc_info: object) -> None:
        if self._running:
            self._stop()

    def _stop(self) -> None:
        self._running = False
        jax.profiler.stop_trace()
        if processes.is_first():
            print(f"{self._directory}: the trace of steps {self._first} to {self._last}", file=sys.stderr)
