"""Published benchmarks, as files that `dsvl2 eval` reads: `dsvl2 data import`.

Two forms are known: the tables of VLMEvalKit (a .tsv with the images inside, base64), and the download of
jxu124/refcoco-benchmark (Parquet shards with images, expressions and boxes).
"""

from __future__ import annotations

import ast
import base64
import binascii
import csv
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from dsvl2_jax.checkpoint.staging import scratch
from dsvl2_jax.errors import DataError, UsageError

# Beginning of a table's name → metric; tables of other names are multiple choice.
METRICS = {"DocVQA": "anls", "InfoVQA": "anls", "ChartQA": "relaxed", "TextVQA": "vqa", "OCRBench": "contains"}
_SHORTEST_IMAGE = 64  # characters; a shorter cell is the index of the row whose images it shares
_ROTATION = 1_000_000  # MMBench: the indices of the rotations of a question's choices differ by multiples of it
_CHOICES = "ABCDEFGHI"

Save = Callable[[str, bytes], None]  # writes an image: file name, content


def import_benchmark(source: Path) -> Path:
    """Writes a benchmark as JSON Lines with a folder of images beside it; returns the file.

    ``NAME.tsv`` becomes ``NAME.jsonl`` and ``NAME/``; a folder with ``data/refcoco_unc_val-*.parquet`` gets
    ``val.jsonl`` and ``images/``. Both are written under temporary names and replace older ones when complete.

    Raises:
      UsageError: the source is neither, or a library to read it is not installed.
      DataError: the source cannot be read; the message names file and line.
    """
    if source.suffix == ".tsv" and source.is_file():
        return _write(source.with_suffix(".jsonl"), source.with_suffix(""), lambda save: table_records(source, save))
    if source.is_dir():
        return _write(source / "val.jsonl", source / "images", lambda save: refcoco_records(source, save))
    raise UsageError(
        f"data import: {source} is neither a table of VLMEvalKit (a file NAME.tsv) nor the folder of a download of "
        "jxu124/refcoco-benchmark."
    )


def table_records(source: Path, save: Save) -> Iterator[dict[str, Any]]:
    """The questions of a VLMEvalKit table, in the form of `dsvl2_jax.infer.eval.samples`; saves each image on its way.

    Raises:
      DataError: a column is missing, or a cell cannot be read.
    """
    name = source.stem
    metric = next((metric for prefix, metric in METRICS.items() if name.startswith(prefix)), "choice")
    files: dict[str, list[str]] = {}  # of the images of each row: another row may refer to them by its index
    csv.field_size_limit(sys.maxsize)
    try:
        with source.open(encoding="utf-8", newline="") as table:
            rows = csv.DictReader(table, delimiter="\t")
            for cells in rows:
                row = _Row(cells, f"{source}:{rows.line_num}")
                files[row["index"]] = _row_images(row, name, files, save)
                if name.startswith("MMMU") and row.get("split") == "dev":
                    continue
                yield _table_record(row, name, metric, files[row["index"]])
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{source}: cannot be read ({error}).") from None


class _Row:
    """A row of a table, whose cells are asked for by column."""

    def __init__(self, cells: dict[str, Any], where: str):
        self._cells = cells
        self.where = where

    def __getitem__(self, column: str) -> str:
        if column not in self._cells:
            known = ", ".join(name for name in self._cells if name)
            raise DataError(f"{self.where}: the table has no column {column!r}; found {known}.")
        if self._cells[column] is None:
            raise DataError(f"{self.where}: the row ends before column {column!r}.")
        return self._cells[column]

    def get(self, column: str) -> str:
        """As `[]`, and "" where there is no such column."""
        return self._cells.get(column) or ""

    def listed(self, column: str) -> list[str]:
        """The texts of a cell, which is a list as Python writes it, or one text."""
        text = self[column]
        if not text.startswith("["):
            return [text]
        try:
            return [str(item) for item in ast.literal_eval(text)]
        except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):  # the last two: brackets, signs, sums
            raise DataError(
                f"{self.where}: column {column!r} begins with a bracket and is no list of texts: {text[:60]!r}."
            ) from None


def _row_images(row: _Row, name: str, files: dict[str, list[str]], save: Save) -> list[str]:
    """The paths of a row's images below the table's folder, each saved unless an earlier row has it."""
    images = row.listed("image")
    if not images:
        raise DataError(f"{row.where}: column 'image' has no image.")
    if len(images[0]) < _SHORTEST_IMAGE:
        if images[0] not in files:
            raise DataError(f"{row.where}: column 'image' is {images[0]!r}, which is the index of no row before it.")
        return files[images[0]]
    paths = []
    for number, image in enumerate(images):
        try:
            content = base64.b64decode("".join(image.split()), validate=True)
        except (binascii.Error, ValueError) as error:
            raise DataError(f"{row.where}: column 'image': image {number + 1} is not base64 ({error}).") from None
        # The suffix means nothing: what an image is shows in its bytes.
        file = _plain_name(f"{row['index']}-{number}.jpg", f"{row.where}: index {row['index']!r}")
        save(file, content)
        paths.append(f"{name}/{file}")
    return paths


def _table_record(row: _Row, name: str, metric: str, images: list[str]) -> dict[str, Any]:
    record: dict[str, Any] = {"id": row["index"], "metric": metric, "images": images, "question": row["question"]}
    record["answers"] = row.listed("answer")
    if metric == "choice":
        record["choices"] = [row.get(letter) for letter in _CHOICES if row.get(letter)]
        if row.get("hint"):
            record["question"] = f"{row['hint']}\n{row['question']}"
    if name.startswith("ChartQA"):
        record["task"] = row.get("split") or "ChartQA"
    if name.startswith("MMBench"):
        if not re.fullmatch("[0-9]{1,18}", row["index"]):
            raise DataError(f"{row.where}: index {row['index']!r}, expected a whole number.")
        record["group"] = int(row["index"]) % _ROTATION
    if name.startswith("MathVista"):
        record["choices"] = row.listed("choices") if row["question_type"] == "multi_choice" else []
        record["metric"] = "choice" if record["choices"] else "exact"
    return record


def refcoco_records(folder: Path, save: Save) -> Iterator[dict[str, Any]]:
    """An expression and its box from each sentence of the validation shards; saves each image on its way.

    Raises:
      UsageError: pyarrow is not installed.
      DataError: there is no shard, or one cannot be read.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ModuleNotFoundError:
        raise UsageError("RefCOCO's files need pyarrow, which is not installed: pip install pyarrow") from None
    shards = sorted((folder / "data").glob("refcoco_unc_val-*.parquet"))
    if not shards:
        raise DataError(f"{folder}: has no data/refcoco_unc_val-*.parquet, the shards of jxu124/refcoco-benchmark.")
    for shard in shards:
        try:
            for batch in pyarrow.parquet.ParquetFile(shard).iter_batches(batch_size=32):
                for row in batch.to_pylist():
                    yield from refcoco_row_records(row, str(shard), save)
        except (OSError, pyarrow.ArrowException) as error:
            raise DataError(f"{shard}: cannot be read ({error}).") from None


def refcoco_row_records(row: dict[str, Any], where: str, save: Save) -> Iterator[dict[str, Any]]:
    """The records of one image: boxes are x, y, width, height in the source, and corners here."""
    try:
        file = _plain_name(row["image_info"]["file_name"], where)
        save(file, row["image"]["bytes"])
        for reference in row["ref_list"]:
            x, y, width, height = reference["ann_info"]["bbox"]
            for sentence in reference["ref_info"]["sentences"]:
                box = [x, y, x + width, y + height]
                yield {"question": sentence["sent"], "image": f"images/{file}", "boxes": [box]}
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"{where}: a row is not in the form of jxu124/refcoco-benchmark ({type(error).__name__}: {error})."
        ) from None


def _plain_name(name: str, where: str) -> str:
    """The name, when it stays in its folder."""
    if name in ("", ".", "..") or "/" in name or "\\" in name or "\0" in name:
        raise DataError(f"{where}: the file name {name!r} would lie outside of the folder of the images.")
    return name


def _write(file: Path, folder: Path, records: Callable[[Save], Iterator[dict[str, Any]]]) -> Path:
    """Writes records and their images, and gives both their names when all of them are there."""
    images: set[str] = set()
    questions = 0
    with scratch(file) as work:
        new_file, new_folder = work / "records", work / "images"
        new_folder.mkdir()

        def save(name: str, content: bytes) -> None:
            (new_folder / name).write_bytes(content)
            images.add(name)

        with new_file.open("w", encoding="utf-8") as out:
            for record in records(save):
                print(json.dumps(record), file=out)
                questions += 1
        if not questions:
            raise DataError(f"{file}: would have no question; the source is empty.")
        if folder.exists():
            shutil.move(folder, work / "before")
        os.replace(new_folder, folder)
        os.replace(new_file, file)
    print(f"{questions} questions, {len(images)} images", file=sys.stderr)
    return file
