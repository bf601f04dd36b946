"""Samples of a data set by number: read, tokenised, tiled and fitted to a row, or the reason why not.

Tested in tests/train/data/test_pipeline.py.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from dsvl2_jax.errors import DataError, SampleError
from dsvl2_jax.inputs.grounding import Box
from dsvl2_jax.inputs.image_sources import FilePool, ImageStore, expand_paths, index_tar, open_images
from dsvl2_jax.inputs.processor import Processor
from dsvl2_jax.inputs.record_boxes import AUTO
from dsvl2_jax.inputs.records import Record, learnt_boxes, parse_record, process, resolve
from dsvl2_jax.train.data import notes, packing
from dsvl2_jax.train.data.encoder_samples import Pairs, parse_regions, process_pair, process_regions
from dsvl2_jax.train.data.files import DataFile, data_paths, open_data_file
from dsvl2_jax.train.data.function import FunctionRecords, NoNames, open_function
from dsvl2_jax.train.data.packing import RowShape
from dsvl2_jax.train.settings.schema import DataSettings, Settings, SourceSettings

UNREADABLE, UNEXPECTED = "file unreadable", "unexpected error"


@dataclasses.dataclass(frozen=True)
class SkippedSample:
    """A sample that is left out, on its way from a worker."""

    name: str
    reason: str
    message: str


class SampleSource:
    """The samples of one `SourceSettings` by number, tokenised and tiled. Pickles into worker processes."""

    def __init__(
        self,
        label: str,
        source: SourceSettings,
        processor: Processor,
        data: DataSettings,
        shape: RowShape | None = None,
        pairs: Pairs | None = None,
    ):
        """Finds and indexes the files, or imports the function.

        Raises DataError, naming `label`, if there is no file, no sample or no such function.

        `shape` is the rows' to which samples are fitted; None: they stay as they are. With `pairs` every sample becomes
        one image and its text.
        """
        self.label = label
        self.files = open_files(label, source)
        self._ends = np.cumsum([len(file) for file in self.files])
        if not len(self):
            raise DataError(f"{source.path}: no samples ({label}). The file is empty, or the archive has no texts.")
        self._source, self._processor, self._data, self.shape = source, processor, data, shape
        self._pairs, self._boxes = pairs, None if source.boxes == AUTO else source.boxes
        self._stores: dict[str, ImageStore] = {}
        for file in self.files:
            self._store(file)
        self._pool = FilePool()

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __repr__(self) -> str:
        return f"SampleSource({self.label}, {len(self)} samples)"

    @property
    def may_have_images(self) -> bool:
        return any(file.may_have_images for file in self.files)

    def __getitem__(self, index: int) -> dict[str, Any] | SkippedSample:
        """`packing.element` with ``image_traits`` and what `Notes` counts, or why there is none; of regions with
        ``attributes``, the names by their ids.

        Raises nothing: a bad sample must not end a worker.
        """
        file, number = self._locate(int(index))
        name = file.name(number)
        try:
            record, own_images = file.read(number, self._pool)
            if self._pairs is not None and self._pairs.phrases:
                return self._read_regions(name, record, own_images, self._store(file))
            return self._read_text(name, parse_record(record, own_images), self._store(file))
        except SampleError as error:
            return SkippedSample(name, error.reason, str(error))
        except OSError as error:
            return SkippedSample(name, UNREADABLE, str(error))
        except Exception as error:  # whatever unknown data make the libraries that read it raise
            return SkippedSample(name, UNEXPECTED, f"{type(error).__name__}: {error}")

    def _read_text(self, name: str, record: Record, store: ImageStore) -> dict[str, Any]:
        """A sample for the language model, or an image and its caption."""
        if self._pairs is not None and record.objects is None:
            record = dataclasses.replace(record, images=record.images[:1])  # the others are not looked for
        resolved = resolve(record, self._processor, store, self._boxes)
        if self._pairs is not None:
            inputs, truncated = process_pair(resolved, self._processor, self._pairs.tokens)
        else:
            inputs, truncated = process(resolved, self._processor, self._data.mask_prompt), False
            if self.shape is not None:
                side = self._processor.config.tokens_per_side
                inputs, truncated = packing.fit(inputs, self.shape, self._data.too_long, side)
        said = record.objects is not None and (record.objects.kind or self._boxes)
        return packing.element(inputs, name, truncated=truncated) | {
            "image_traits": inputs.image_traits,
            notes.UNUSED: record.unused,
            notes.BOXES: resolved.kind or "",
            notes.GUESSED: resolved.kind is not None and not said,
        }

    def _read_regions(self, name: str, record: Any, own_images: Sequence[Any], store: ImageStore) -> dict[str, Any]:
        regions = parse_regions(record, own_images)
        inputs, phrases, attributes, truncated = process_regions(regions, self._processor, store, self._pairs)
        element = packing.element(inputs, name, truncated=truncated, phrases=phrases)
        return element | {"image_traits": inputs.image_traits, "attributes": attributes}

    def name(self, index: int) -> str:
        """A sample's, as "file:line", or "data.train.drawn[7]" of a function's."""
        file, number = self._locate(index)
        return file.name(number)

    def with_boxes(self, index: int) -> list[tuple[Image.Image, list[Box]]]:
        """The images of a usable sample, each with the boxes that training sees in it."""
        file, number = self._locate(index)
        record = parse_record(*file.read(number, self._pool))
        resolved = resolve(record, self._processor, self._store(file), self._boxes)
        pictures = [picture for visual in resolved.images for picture in self._processor.pictures(visual)]
        images = [self._processor.read_image(picture.source)[0] for picture in pictures]
        boxes = learnt_boxes(record, [image.size for image in images], resolved.kind)
        return [(image, [box for box in boxes if box.image == place]) for place, image in enumerate(images)]

    def _locate(self, index: int) -> tuple[DataFile, int]:
        number = int(np.searchsorted(self._ends, index, side="right"))
        return self.files[number], index - (int(self._ends[number - 1]) if number else 0)

    def _store(self, file: DataFile) -> ImageStore:
        if isinstance(file, FunctionRecords):
            return NoNames()
        folder = "" if self._source.images else os.path.dirname(file.path)
        if folder not in self._stores:
            self._stores[folder] = open_images(self._source.images, file.path, self._source.follow_links)
        return self._stores[folder]


def open_files(label: str, source: SourceSettings) -> list[DataFile]:
    """The files of a source, or the records of its function. Raises DataError as these do."""
    if source.function:
        return [open_function(label, source.function, source.arguments, source.count)]
    return [open_data_file(path) for path in data_paths(source.path, label)]


def open_sources(
    label: str,
    sources: Mapping[str, SourceSettings],
    processor: Processor,
    data: DataSettings,
    pairs: Pairs | None = None,
) -> list[SampleSource]:
    """The sources of ``[data.train]`` or ``[data.validation]``, fitted to rows of one shape.

    Rows have room for tiles only if some source may have images. `pairs` is `SampleSource`'s. Raises DataError as
    `SampleSource` does, and when there is no source.
    """
    if not sources:
        raise DataError(f"{label}: no data set to read. Add a table [{label}.NAME] with a path, and a weight above 0.")
    opened = [SampleSource(f"{label}.{name}", source, processor, data, pairs=pairs) for name, source in sources.items()]
    tiles = data.tiles_per_sequence if any(source.may_have_images for source in opened) else 0
    for source in opened:
        segments = data.max_segments if data.packing else 1
        source.shape = RowShape(data.sequence_length, tiles, segments, pairs.phrases if pairs is not None else 0)
    return opened


def fingerprint(settings: Settings) -> dict[str, str]:
    """Path → hash of every data file of training and validation; the name of a function's source → that of its records.

    JSON and text files are hashed whole; tar shards by their members' names, places and sizes; images in folders
    are not looked at; of a function's records three are made. Raises DataError as `open_training` does, and for a
    function that makes the same record otherwise the second time.
    """
    digests: dict[str, str] = {}
    for label, sources in (("data.train", settings.data.train), ("data.validation", settings.data.validation)):
        for name, source in sources.items():
            if label == "data.train" and source.weight <= 0:
                continue
            digests |= {file.path: file.digest for file in open_files(f"{label}.{name}", source)}
            if source.images.endswith(".tar"):
                digests |= {path: index_tar(path).digest for path in expand_paths(source.images, "image shards")}
    return digests
