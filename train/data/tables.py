"""Arrow tables with random access by row: what Hugging Face's `datasets` saves, and what Parquet files become.

A Parquet file gives no row without a whole group of them, and its readers come in random order. So it is written once
as an Arrow file beside the unpacked copies (`unpacked`), and mapped into memory from there.

Tested in tests/train/data/test_tables.py.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from dsvl2_jax.errors import DataError
from dsvl2_jax.inputs.image_sources import FilePool
from dsvl2_jax.train.data.unpacked import UnpackedTooLarge, import_pyarrow, unpacked

if TYPE_CHECKING:
    import pyarrow

_ROWS = 64  # of a batch that is written: few, so that one row's reader touches little


@dataclasses.dataclass(frozen=True)
class TableFile:
    """The rows of an Arrow file, each a record by the names of its columns."""

    path: str  # as the user gave it
    digest: str  # SHA-256 of that file
    may_have_images: bool
    table: str  # the Arrow file, `path` itself or a copy
    ends: np.ndarray  # i64[batches], rows up to the end of each

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def name(self, index: int) -> str:
        return f"{self.path}:{index + 1}"

    def read(self, index: int, pool: FilePool) -> tuple[Mapping[str, Any], list[bytes]]:
        batch = int(np.searchsorted(self.ends, index, side="right"))
        row = index - (int(self.ends[batch - 1]) if batch else 0)
        return _batches(self.table, self.digest)[batch].slice(row, 1).to_pylist()[0], []


def open_table(path: str, suffix: str, digest: str) -> TableFile:
    """The rows of an ``.arrow`` or ``.parquet`` file of this SHA-256.

    Raises DataError when pyarrow is missing, or the file is damaged or no such table.
    """
    arrow = import_pyarrow(path)
    table = unpacked(path, f"{digest}.arrow", _write_parquet) if suffix == ".parquet" else path
    try:
        batches = _batches(table, digest)
    except (OSError, arrow.ArrowException) as error:
        raise _damaged(path, error) from None
    schema = str(batches[0].schema) if batches else ""
    images = "image" in schema or "video" in schema
    ends = np.cumsum([batch.num_rows for batch in batches], dtype=np.int64)
    return TableFile(path, digest, images, table, ends)


@functools.cache
def _batches(table: str, digest: str) -> list[pyarrow.RecordBatch]:
    """The batches of a file, in memory that is mapped to it; once in each process for each state of the file."""
    import pyarrow

    file = pyarrow.memory_map(table)
    if file.read_at(6, 0) == b"ARROW1":
        reader = pyarrow.ipc.open_file(file)
        return [reader.get_batch(number) for number in range(reader.num_record_batches)]
    with pyarrow.ipc.open_stream(file) as reader:
        return list(reader)


def _write_parquet(path: str, file: BinaryIO, most: int) -> None:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as source, pyarrow.ipc.new_stream(file, source.schema_arrow) as writer:
            for batch in source.iter_batches(batch_size=_ROWS):
                writer.write_batch(batch)
                if file.tell() > most:
                    raise UnpackedTooLarge
    except pyarrow.ArrowException as error:
        raise _damaged(path, error) from None


def _damaged(path: str, error: Exception) -> DataError:
    what = (str(error).splitlines() or [type(error).__name__])[0]
    return DataError(f"{path}: cannot be read as a table ({what[:200]}). Copy or download the file again.")
