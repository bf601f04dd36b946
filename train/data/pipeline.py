"""The data pipeline: sources to packed steps, in a mixture, shuffled, read by workers, and resumed exactly.

    source ─ shuffle each epoch ─ streams ─ mix ─► read, tokenise, tile (workers) ─► drop unusable ─► pack ─► TrainBatch

Everything up to the workers is random access, so that where a run stands is one number: samples read. It does not
depend on the number of workers, processes or devices, which may change when a run resumes.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
import logging
import multiprocessing
import operator
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

from dsvl2_jax.errors import DataError
from dsvl2_jax.inputs.images import trait_notes
from dsvl2_jax.inputs.processor import Processor
from dsvl2_jax.inputs.records import NO_LOSS
from dsvl2_jax.model.config import Config
from dsvl2_jax.train.data import packing
from dsvl2_jax.train.data.batch import TrainBatch
from dsvl2_jax.train.data.encoder_samples import NO_ATTRIBUTE, NO_IMAGE, AttributeIds, Pairs
from dsvl2_jax.train.data.notes import Notes
from dsvl2_jax.train.data.packing import TOO_LONG, RowShape
from dsvl2_jax.train.data.samples import SkippedSample, fingerprint, open_sources
from dsvl2_jax.train.settings.schema import DataSettings, Settings

__all__ = [
    "BatchShard",
    "DataStats",
    "Pipeline",
    "StepData",
    "Validation",
    "fingerprint",
    "open_training",
    "open_validation",
]

_LOG = logging.getLogger(__name__)

# The share of broken samples is that of whole spans of this many (or of the set, if smaller): of fewer it says little.
_SPAN = 1000
# A run of this many samples (or twice the set) without a usable one will not get better.
_MOST_USELESS = 10_000
# Reasons for which samples are left out that are not broken.
_WHOLE = TOO_LONG | {NO_IMAGE, NO_ATTRIBUTE, NO_LOSS}
_LAST_PROBLEMS = 5  # shown when the run stops
AS_SEEN = "data.as_seen = true"  # what a note about pictures names
_BUFFER = 4  # samples that a worker or thread holds ready
_SHARED_MEMORY_FROM = 1 << 19  # bytes; smaller arrays are cheaper to copy through the pipe, by half at 100 kB


@dataclasses.dataclass(frozen=True)
class DataStats:
    """Counts since the start of the run (or of the validation), of the streams that this process reads."""

    samples: int = 0  # in the rows of these streams
    skipped: Mapping[str, int] = dataclasses.field(default_factory=dict)  # reason → samples left out
    truncated: int = 0
    tokens: int = 0  # padding not counted
    padding_tokens: int = 0
    tiles: int = 0  # padding not counted
    padding_tiles: int = 0

    def __add__(self, other: DataStats) -> DataStats:
        counts = {f.name: getattr(self, f.name) + getattr(other, f.name) for f in dataclasses.fields(self)[2:]}
        skipped = dict(sorted((Counter(self.skipped) + Counter(other.skipped)).items()))
        return DataStats(self.samples + other.samples, skipped, **counts)

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
    """This process's part of a step's batch, the step's samples that it has read by name, and the counts.

    A name is ``file:line``, or ``data.train.NAME[number]`` where a function makes the records.
    """

    batch: TrainBatch
    sources: list[str]
    stats: DataStats


@dataclasses.dataclass(frozen=True)
class BatchShard:
    """How a step's rows are split, and which of them this process computes. The step's rows do not depend on it."""

    data_shards: Sequence[int] = (0,)  # of this process, ascending
    total_shards: int = 1  # of all processes
    rows: int = 1  # of a data shard in an accumulation step
    accumulation: int = 1  # A

    def stream_rows(self, streams: int) -> list[tuple[int, int]]:
        """(stream, row of its part of the step) of each row of this process's batch, accumulation step by step.

        A stream's rows are those of neighbouring data shards, if the numbers allow it, so that few processes read it.
        """
        at_once = self.total_shards * self.rows
        step = [(row * streams // at_once, a, row) for a in range(self.accumulation) for row in range(at_once)]
        number = {(a, row): divmod(n, len(step) // streams) for n, (_, a, row) in enumerate(sorted(step))}
        local = [shard * self.rows + row for shard in self.data_shards for row in range(self.rows)]
        return [number[a, row] for a in range(self.accumulation) for row in local]


def open_training(settings: Settings, processor: Processor, config: Config, shard: BatchShard) -> Pipeline:
    """The endless training data of one process: its part of every step's rows.

    ``data.streams`` streams, each with its own samples of every epoch, give equally many rows to a step. A process
    reads the streams that its rows are of.

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
        epochs.append(samples.repeat())
    weights = [source.weight for source in sources.values()]
    total = -(-sum(map(len, opened)) // data.streams)
    streams = {}
    for stream in sorted({stream for stream, _ in shard.stream_rows(data.streams)}):
        mixed = grain.MapDataset.mix([epoch[stream :: data.streams] for epoch in epochs], weights=weights)
        streams[stream] = _UsableSamples(mixed, data, total, workers=data.workers)
    seed = settings.run.seed if data.shuffle else None
    return Pipeline(_Steps(streams, data.streams, shard, opened[0].shape, seed, processor, config, ahead=True))


def open_validation(settings: Settings, processor: Processor, config: Config, shard: BatchShard) -> Validation | None:
    """The held-out samples of all validation files, in order, each once; None when the settings name no file.

    They are one stream, so that every process has equally many steps. Arguments and errors are those of
    `open_training`.
    """
    if not settings.data.validation:
        return None
    data, pairs = _reading(settings)
    opened = open_sources("data.validation", data.validation, processor, data, pairs)
    samples = grain.MapDataset.concatenate([grain.MapDataset.source(source) for source in opened])
    usable = _UsableSamples(samples, data, len(samples), threads=data.workers)
    return Validation(lambda: _Steps({0: usable}, 1, shard, opened[0].shape, None, processor, config))


def _reading(settings: Settings) -> tuple[DataSettings, Pairs | None]:
    """How the objective reads samples: the settings of the rows, and what is read of an image if it reads pairs.

    A row is then one image, in one tile, and its caption or the phrases of its regions.
    """
    objective, contrastive = settings.stage.objective, settings.contrastive
    if objective == "language":
        return settings.data, None
    attributes = tuple(dict.fromkeys(filter(None, map(str.strip, contrastive.attributes.split(",")))))
    pairs = Pairs(contrastive.text_length, contrastive.phrases if objective == "regions" else 0, attributes)
    rows = dataclasses.replace(settings.data, sequence_length=pairs.tokens, tiles_per_sequence=1, packing=False)
    return rows, pairs


class Pipeline(Iterator[StepData]):
    """An endless iterator of `StepData` whose state, taken between two steps, continues bit-identically.

    Threads pack the next rows and make the next step meanwhile. Raises DataError from ``next`` when too many samples
    are broken.
    """

    def __init__(self, steps: _Steps):
        self._steps = steps
        self._ahead = ThreadPrefetchDatasetIterator(steps, 1)
        self.parts = steps.parts  # streams in all, for each one that this process reads

    def __next__(self) -> StepData:
        return next(self._ahead)

    def get_state(self) -> dict[str, Any]:
        """Where the run stands, for JSON: ``streams`` has the place in each stream that this process reads."""
        return copy.deepcopy(self._ahead.get_state())

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Continues from the result of `get_state`; of several processes' results, from their ``streams`` together.

        Raises:
          DataError: the place in a stream is not known.
        """
        if "rows" in state:  # of a run from before there were streams
            state = {"streams": {"0": {key: state[key] for key in ("rows", "stats")}}}
        if missing := [name for name in self._steps.names if name not in state["streams"]]:
            raise DataError(
                f"the saved place in the data lacks stream {', '.join(missing)} of data.streams; it has "
                f"{', '.join(state['streams'])}. Resume from another checkpoint."
            )
        self._ahead.set_state({"streams": {name: copy.deepcopy(state["streams"][name]) for name in self._steps.names}})

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


class _UsableSamples(grain.IterDataset):
    """The usable `packing.element`s among a map dataset's `SampleSource` items.

    SkippedSample ones are logged, and their reasons go along with the next usable one, so that a continued run counts
    them in the same step. `total` is the number of samples of an epoch.
    """

    def __init__(self, samples: grain.MapDataset, data: DataSettings, total: int, workers: int = 0, threads: int = 0):
        super().__init__()
        _set_up_grain()
        self.samples, self.data, self.total = samples, data, total
        self.workers, self.threads = workers, threads
        self.interrupted = False  # set to end reading soon, from another thread
        self.left_over: list[str] = []  # reasons of unusable samples after the last usable one, once that is known

    def __iter__(self) -> _UsableSamplesIterator:
        self.left_over = []
        return _UsableSamplesIterator(self)

    def read_from(self, start: int) -> grain.DatasetIterator:
        options = grain.ReadOptions(self.threads, self.threads * _BUFFER)
        rest = (self.samples[start:] if start else self.samples).to_iter_dataset(options)
        if not self.workers:
            return iter(rest)
        rest = WithOptionsIterDataset(rest, DatasetOptions(min_shm_size=_SHARED_MEMORY_FROM))
        workers = grain.MultiprocessingOptions(self.workers, _BUFFER)
        return iter(rest.mp_prefetch(workers, worker_init_fn=_start_worker))


class _UsableSamplesIterator(grain.DatasetIterator):
    """Its state is the number of samples read, whatever the workers have read ahead, and two counts."""

    def __init__(self, dataset: _UsableSamples):
        super().__init__()
        self._dataset = dataset
        self._inner: grain.DatasetIterator | None = None
        self._state = {"read": 0, "broken": 0, "useless": 0}  # useless: since the last usable one
        self._problems: list[str] = []
        self._attributes = AttributeIds()
        self._traits: Counter[str] = Counter()  # of pictures
        self._notes = Notes()

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
            if isinstance(item, SkippedSample):
                skipped.append(item.reason)
                self._leave_out(item)
            self._check()
            if not isinstance(item, SkippedSample):
                self._state["useless"] = 0
                self._attributes.add(item.pop("attributes", {}))
                self._note(item["name"], item.pop("image_traits", ()))
                for note in self._notes.take(item):
                    _LOG.warning("%s: %s", item["name"], note)
                if type(item["tiles"]) is not np.ndarray:
                    # Shared memory is given back at once: a packer's worth of tiles would fill a container's.
                    item["tiles"] = np.array(item["tiles"], subok=False)
                return item | {"skipped": skipped}
        raise StopIteration

    def _note(self, name: str, traits: Sequence[str]) -> None:
        """Warns of the first pictures that the official reading shows otherwise than a viewer, and counts all."""
        if not self._dataset.data.as_seen:
            for note in trait_notes((trait for trait in traits if trait not in self._traits), AS_SEEN):
                _LOG.warning("%s, and perhaps later samples: %s", name, note)
            self._traits.update(traits)

    def _leave_out(self, item: SkippedSample) -> None:
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
        for note in trait_notes(self._traits.elements(), AS_SEEN):
            _LOG.warning("in all: %s", note)
        for note in self._notes.totals():
            _LOG.warning("in all: %s", note)
        self._traits.clear()
        self._notes = Notes()


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
    """Packs each stream's samples into rows, and rows into this process's part of the steps."""

    def __init__(
        self,
        streams: Mapping[int, _UsableSamples],
        count: int,
        shard: BatchShard,
        shape: RowShape,
        seed: int | None,
        processor: Processor,
        config: Config,
        *,
        ahead: bool = False,
    ):
        """``streams``: those that the shard needs, of ``count``."""
        self._streams, self._shard, self._shape = streams, shard, shape
        self._stream_rows = shard.stream_rows(count)
        self._rows = shard.total_shards * shard.rows * shard.accumulation // count  # of a stream in a step
        self.names = list(map(str, streams))
        self.parts = count / len(streams)
        self._packed = {}
        for number, samples in streams.items():
            bins = samples.data.packing_bins if samples.data.packing else 1
            packed = iter(packing.pack(samples, shape, bins, seed))
            # The packer gives out its bins all at once: the next ones are filled while these are trained on.
            self._packed[number] = ThreadPrefetchDatasetIterator(packed, bins) if ahead else packed
        self._tile_size, self._tokens_per_tile = processor.config.tile_size, config.tokens_per_tile
        self._stats = dict.fromkeys(streams, DataStats())

    def __next__(self) -> StepData:
        rows: dict[int, list[packing.Row | None]] = {}
        for number, packed in self._packed.items():
            rows[number] = list(itertools.islice(packed, self._rows))
        if not any(rows.values()):
            raise StopIteration
        for number, stream_rows in rows.items():
            stream_rows += [None] * (self._rows - len(stream_rows))
            self._stats[number] += self._counted(stream_rows, self._streams[number])
        batch = packing.assemble(
            [rows[stream][row] for stream, row in self._stream_rows],
            self._shape,
            accumulation=self._shard.accumulation,
            tile_size=self._tile_size,
            tokens_per_tile=self._tokens_per_tile,
        )
        names = [name for stream_rows in rows.values() for row in stream_rows if row for name in row["name"]]
        return StepData(batch, names, functools.reduce(operator.add, self._stats.values()))

    def _counted(self, rows: Sequence[packing.Row | None], samples: _UsableSamples) -> DataStats:
        full = [row for row in rows if row is not None]
        skipped = Counter(samples.left_over)
        samples.left_over = []
        for row in full:
            skipped.update(reason for reasons in row["skipped"] for reason in reasons)
        tokens = sum(int((row["tokens_segment_ids"] > 0).sum()) for row in full)
        tiles = sum(len(sample_tiles) for row in full for sample_tiles in row["tiles"])
        return DataStats(
            samples=sum(len(row["name"]) for row in full),
            skipped=skipped,
            truncated=sum(map(sum, (row["truncated"] for row in full))),
            tokens=tokens,
            padding_tokens=len(rows) * self._shape.tokens - tokens,
            tiles=tiles,
            padding_tiles=len(rows) * self._shape.tiles - tiles,
        )

    def get_state(self) -> dict[str, Any]:
        return {
            "streams": {
                str(number): {"rows": packed.get_state(), "stats": dataclasses.asdict(self._stats[number])}
                for number, packed in self._packed.items()
            }
        }

    def set_state(self, state: Mapping[str, Any]) -> None:
        for number, packed in self._packed.items():
            packed.set_state(state["streams"][str(number)]["rows"])
            self._stats[number] = DataStats(**state["streams"][str(number)]["stats"])

    def interrupt(self) -> None:
        for samples in self._streams.values():
            samples.interrupted = True

    def close(self) -> None:
        for packed in self._packed.values():
            packed.close()
