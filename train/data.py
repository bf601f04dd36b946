"""The data pipeline: files to packed steps, with exact continuation (issue: mixture, shuffling, workers, sharding).

    files ─ shuffle each epoch ─ shard ─ mix ─► read, tokenise, tile (workers) ─► drop unusable ─► pack ─► TrainBatch

Everything up to the workers is random access, so that where a run stands is one number: samples read. It does not
depend on the number of workers, which may change between a run's start and its continuation.
"""

from __future__ import annotations

import copy
import dataclasses
import logging
import multiprocessing
import os
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import absl.flags
import grain
import numpy as np
from grain.experimental import DatasetOptions, ThreadPrefetchDatasetIterator, WithOptionsIterDataset

from dsvl2_jax.config import Config
from dsvl2_jax.errors import DataError
from dsvl2_jax.processor import Processor
from dsvl2_jax.train import packing
from dsvl2_jax.train.batch import TrainBatch
from dsvl2_jax.train.packing import TOO_LONG, RowShape
from dsvl2_jax.train.records import NO_ATTRIBUTE, NO_IMAGE, Pairs
from dsvl2_jax.train.samples import Unusable, fingerprint, open_sources
from dsvl2_jax.train.settings import DataSettings, Settings

__all__ = ["DataStats", "Pipeline", "StepData", "Validation", "fingerprint", "open_training", "open_validation"]

_LOG = logging.getLogger(__name__)

# The share of broken samples is that of whole spans of this many (or of the set, if smaller): of fewer it says little.
_SPAN = 1000
# A run of this many samples (or twice the set) without a usable one will not get better.
_MOST_USELESS = 10_000
# Reasons for which samples are left out that are not broken.
_WHOLE = TOO_LONG | {NO_IMAGE, NO_ATTRIBUTE}
_LAST_PROBLEMS = 5  # shown when the run stops
_BUFFER = 4  # samples that a worker or thread holds ready
_SHARED_MEMORY_FROM = 1 << 16  # bytes; smaller arrays are cheaper to copy through the pipe


@dataclasses.dataclass(frozen=True)
class DataStats:
    """Counts since the start of the run (or of the validation), of this process."""

    samples: int = 0  # in the rows given out
    skipped: Mapping[str, int] = dataclasses.field(default_factory=dict)  # reason → samples left out
    truncated: int = 0
    tokens: int = 0  # padding not counted
    padding_tokens: int = 0
    tiles: int = 0  # padding not counted
    padding_tiles: int = 0

    @property
    def skipped_samples(self) -> int:
        return sum(self.skipped.values())

    @property
    def padding_share(self) -> float:
        """Of all token positions."""
        return self.padding_tokens / max(self.tokens + self.padding_tokens, 1)

    @property
    def tile_padding_share(self) -> float:
        """Of all tile places."""
        return self.padding_tiles / max(self.tiles + self.padding_tiles, 1)


@dataclasses.dataclass(frozen=True)
class StepData:
    """One step's batch, the samples in it (``file:line``), and the counts up to and including it."""

    batch: TrainBatch
    sources: list[str]
    stats: DataStats


def open_training(
    settings: Settings,
    processor: Processor,
    config: Config,
    *,
    shard: tuple[int, int],
    rows: int,
    accumulation: int,
) -> Pipeline:
    """The endless training data of one process.

    Args:
      shard: (index, count) of the processes that load data; each reads its own samples of every epoch.
      rows: B, rows of an accumulation step in this process.
      accumulation: A, accumulation steps.

    Raises:
      DataError: there is no source, or one has no file, no sample or no folder of images.
    """
    data, pairs = _reading(settings)
    sources = {name: source for name, source in data.train.items() if source.weight > 0}
    opened = open_sources("data.train", sources, processor, data, pairs)
    epochs = []
    for number, source in enumerate(opened):
        samples = grain.MapDataset.source(source)
        if data.shuffle:
            samples = samples.shuffle(seed=(settings.run.seed * 1_000_003 + number) % 2**32)
        epochs.append(samples.repeat()[shard[0] :: shard[1]])
    mixed = grain.MapDataset.mix(epochs, weights=[source.weight for source in sources.values()])
    total = -(-sum(map(len, opened)) // shard[1])
    usable = _Usable(mixed, data, total, workers=data.workers)
    seed = settings.run.seed if data.shuffle else None
    steps = _Steps(usable, opened[0].shape, seed, processor, config, rows=rows, accumulation=accumulation, ahead=True)
    return Pipeline(steps, shard)


def open_validation(
    settings: Settings,
    processor: Processor,
    config: Config,
    *,
    shard: tuple[int, int],
    rows: int,
    accumulation: int,
) -> Validation | None:
    """The held-out samples of all validation files, in order, each once; None when the settings name no file.

    Every process reads all of them and keeps its share of each step's rows, so that all have equally many steps
    and the result is the same for any number of processes. Arguments and errors are those of `open_training`.
    """
    if not settings.data.validation:
        return None
    data, pairs = _reading(settings)
    opened = open_sources("data.validation", data.validation, processor, data, pairs)
    samples = grain.MapDataset.concatenate([grain.MapDataset.source(source) for source in opened])
    usable = _Usable(samples, data, len(samples), threads=data.workers)
    sizes = {"rows": rows, "accumulation": accumulation, "shard": shard}
    return Validation(lambda: _Steps(usable, opened[0].shape, None, processor, config, **sizes))


def _reading(settings: Settings) -> tuple[DataSettings, Pairs | None]:
    """How the objective reads samples: the settings of the rows, and what is read of an image if it reads pairs.

    A row is then one image, in one tile, and its caption or the phrases of its regions.
    """
    objective, contrastive = settings.stage.objective, settings.contrastive
    if objective == "language":
        return settings.data, None
    attributes = frozenset(filter(None, map(str.strip, contrastive.attributes.split(","))))
    pairs = Pairs(contrastive.text_length, contrastive.phrases if objective == "regions" else 0, attributes)
    rows = dataclasses.replace(settings.data, sequence_length=pairs.tokens, tiles_per_sequence=1, packing=False)
    return rows, pairs


class Pipeline(Iterator[StepData]):
    """An endless iterator of `StepData` whose state, taken between two steps, continues bit-identically.

    Threads pack the next rows and make the next step meanwhile. Raises DataError from ``next`` when too many samples
    are broken.
    """

    def __init__(self, steps: _Steps, shard: tuple[int, int]):
        self._steps, self._shard = steps, shard
        self._ahead = ThreadPrefetchDatasetIterator(steps, 1)

    def __next__(self) -> StepData:
        return next(self._ahead)

    def get_state(self) -> dict[str, Any]:
        """Where the run stands, for JSON."""
        return {"shard": list(self._shard), **copy.deepcopy(self._ahead.get_state())}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Continues from `get_state`'s result. Raises DataError for a state of another number of processes."""
        if tuple(state["shard"]) != tuple(self._shard):
            raise DataError(
                f"the saved place in the data is that of process {state['shard'][0]} of {state['shard'][1]}, this is "
                f"{self._shard[0]} of {self._shard[1]}. Continue with as many processes as the run was started with."
            )
        self._ahead.set_state({key: copy.deepcopy(state[key]) for key in ("rows", "stats")})

    def close(self) -> None:
        """Ends the threads and the worker processes."""
        self._steps.interrupt()
        self._ahead.close()
        self._steps.close()


class Validation:
    """A pass over the held-out samples each time it is iterated; see `open_validation`."""

    def __init__(self, make_steps: Callable[[], _Steps]):
        self._make_steps = make_steps

    def __iter__(self) -> Iterator[StepData]:
        steps = self._make_steps()
        try:
            yield from steps
        finally:
            steps.close()


class _Usable(grain.IterDataset):
    """The usable `packing.element`s among a map dataset's `SampleSource` items.

    Unusable ones are logged, and their reasons go along with the next usable one, so that a continued run counts
    them in the same step. `total` is the number of samples of an epoch.
    """

    def __init__(self, samples: grain.MapDataset, data: DataSettings, total: int, workers: int = 0, threads: int = 0):
        super().__init__()
        _set_up_grain()
        self.samples, self.data, self.total = samples, data, total
        self.workers, self.threads = workers, threads
        self.interrupted = False  # set to end reading soon, from another thread
        self.left_over: list[str] = []  # reasons of unusable samples after the last usable one, once that is known

    def __iter__(self) -> _UsableIterator:
        self.left_over = []
        return _UsableIterator(self)

    def read_from(self, start: int) -> grain.DatasetIterator:
        options = grain.ReadOptions(self.threads, self.threads * _BUFFER)
        rest = (self.samples[start:] if start else self.samples).to_iter_dataset(options)
        if not self.workers:
            return iter(rest)
        rest = WithOptionsIterDataset(rest, DatasetOptions(min_shm_size=_SHARED_MEMORY_FROM))
        workers = grain.MultiprocessingOptions(self.workers, _BUFFER)
        return iter(rest.mp_prefetch(workers, worker_init_fn=_start_worker))


class _UsableIterator(grain.DatasetIterator):
    """Its state is the number of samples read, whatever the workers have read ahead, and two counts."""

    def __init__(self, dataset: _Usable):
        super().__init__()
        self._dataset = dataset
        self._inner: grain.DatasetIterator | None = None
        self._state = {"read": 0, "broken": 0, "useless": 0}  # useless: since the last usable one
        self._problems: list[str] = []

    def __next__(self) -> dict[str, Any]:
        if self._inner is None:
            self._inner = self._dataset.read_from(self._state["read"])
        skipped: list[str] = []
        while not self._dataset.interrupted:
            try:
                item = next(self._inner)
            except StopIteration:
                self._dataset.left_over = skipped
                raise
            self._state["read"] += 1
            if isinstance(item, Unusable):
                skipped.append(item.reason)
                self._leave_out(item)
            self._check()
            if not isinstance(item, Unusable):
                self._state["useless"] = 0
                if type(item["tiles"]) is not np.ndarray:
                    # Shared memory is given back at once: a packer's worth of tiles would fill a container's.
                    item["tiles"] = np.array(item["tiles"], subok=False)
                return item | {"skipped": skipped}
        raise StopIteration

    def _leave_out(self, item: Unusable) -> None:
        _LOG.warning("%s: left out (%s): %s", item.name, item.reason, item.message)
        self._problems = [*self._problems[1 - _LAST_PROBLEMS :], f"{item.name}: {item.message}"]
        self._state["useless"] += 1
        self._state["broken"] += item.reason not in _WHOLE

    def _check(self) -> None:
        """Raises DataError once too many samples are broken, or none fits."""
        state, data, total = self._state, self._dataset.data, self._dataset.total
        shown = "\n  ".join(self._problems)
        span = min(_SPAN, total)
        if state["broken"] > data.max_broken_share * span * -(-state["read"] // span):
            raise DataError(
                f"{state['broken']} of the first {state['read']} samples are broken, more than data.max_broken_share "
                f"({data.max_broken_share} of every {span}) allows. `dsvl2 data check FILE` lists all; the last ones:"
                f"\n  {shown}"
            )
        if state["useless"] >= min(2 * total, _MOST_USELESS):
            raise DataError(
                f"none of the last {state['useless']} samples can be used. If they are too long, make "
                "data.sequence_length or data.tiles_per_sequence larger, or set data.too_long to truncate. "
                f"The last ones:\n  {shown}"
            )

    def get_state(self) -> dict[str, int]:
        return dict(self._state)

    def set_state(self, state: Mapping[str, int]) -> None:
        self._stop()
        self._state = dict(state)

    def close(self) -> None:
        super().close()
        self._stop()

    def _stop(self) -> None:
        if self._inner is not None:
            self._inner.close()
            self._inner = None


def _set_up_grain() -> None:
    """Errors of ours pass through grain as they are; its workers read flags, which only absl programs parse."""
    grain.config.update("py_traceback_filtering", "off")
    if not absl.flags.FLAGS.is_parsed():
        absl.flags.FLAGS.mark_as_parsed()


def _start_worker(index: int, count: int) -> None:
    """In a worker: leave signals to the main process, and end when it has gone, even if it was killed."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    parent = multiprocessing.parent_process()

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


class _Steps(Iterator[StepData]):
    """Packs samples into rows, and rows into steps; this process's share of each step's rows is `shard`."""

    def __init__(
        self,
        samples: _Usable,
        shape: RowShape,
        seed: int | None,
        processor: Processor,
        config: Config,
        *,
        rows: int,
        accumulation: int,
        shard: tuple[int, int] = (0, 1),
        ahead: bool = False,
    ):
        bins = samples.data.packing_bins if samples.data.packing else 1
        self._samples = samples
        self._packed = iter(packing.pack(samples, shape, bins, seed))
        if ahead:
            # The packer gives out its bins all at once: the next ones are filled while these are trained on.
            self._packed = ThreadPrefetchDatasetIterator(self._packed, bins)
        self._shape, self._shard = shape, shard
        self._rows, self._accumulation = rows, accumulation
        self._tile_size, self._tokens_per_tile = processor.config.tile_size, config.tokens_per_tile
        self._stats = DataStats()

    def __next__(self) -> StepData:
        index, count = self._shard
        rows: list[packing.Row | None] = []
        mine: list[packing.Row | None] = []
        while len(rows) < self._accumulation * count * self._rows:
            try:
                rows.append(next(self._packed))
            except StopIteration:
                if not any(row is not None for row in rows):
                    raise
                rows.append(None)
        for start in range(index * self._rows, len(rows), count * self._rows):
            mine += rows[start : start + self._rows]
        batch = packing.assemble(
            mine,
            self._shape,
            accumulation=self._accumulation,
            tile_size=self._tile_size,
            tokens_per_tile=self._tokens_per_tile,
        )
        self._stats = self._counted(mine)
        return StepData(batch, [name for row in mine if row for name in row["name"]], self._stats)

    def _counted(self, rows: Sequence[packing.Row | None]) -> DataStats:
        before, full = self._stats, [row for row in rows if row is not None]
        skipped = Counter(before.skipped)
        if self._samples.left_over and self._shard[0] == 0:
            skipped.update(self._samples.left_over)
            self._samples.left_over = []
        for row in full:
            skipped.update(reason for reasons in row["skipped"] for reason in reasons)
        tokens = sum(int((row["tokens_segment_ids"] > 0).sum()) for row in full)
        tiles = sum(len(sample_tiles) for row in full for sample_tiles in row["tiles"])
        return DataStats(
            samples=before.samples + sum(len(row["name"]) for row in full),
            skipped=dict(sorted(skipped.items())),
            truncated=before.truncated + sum(map(sum, (row["truncated"] for row in full))),
            tokens=before.tokens + tokens,
            padding_tokens=before.padding_tokens + len(rows) * self._shape.tokens - tokens,
            tiles=before.tiles + tiles,
            padding_tiles=before.padding_tiles + len(rows) * self._shape.tiles - tiles,
        )

    def get_state(self) -> dict[str, Any]:
        return {"rows": self._packed.get_state(), "stats": dataclasses.asdict(self._stats)}

    def set_state(self, state: Mapping[str, Any]) -> None:
        self._packed.set_state(state["rows"])
        self._stats = DataStats(**state["stats"])

    def interrupt(self) -> None:
        self._samples.interrupted = True

    def close(self) -> None:
        self._packed.close()
