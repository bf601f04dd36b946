"""The browsable report of an evaluation: one HTML page that needs no network, and a folder of thumbnails beside it.

Tested in tests/infer/eval/test_evaluate.py.
"""

from __future__ import annotations

import hashlib
import html
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from PIL import Image

from dsvl2_jax.checkpoint.staging import replacing, write_text
from dsvl2_jax.errors import DataError
from dsvl2_jax.infer.eval.page import PAGE, POLICY
from dsvl2_jax.infer.eval.samples import Sample
from dsvl2_jax.inputs.image_sources import ImageStore, resolve_image
from dsvl2_jax.inputs.images import load_image

REPORT_NAME, THUMBNAILS_NAME = "report.html", "thumbnails"

_SIDE = 640  # pixels, the longest of a thumbnail
_QUALITY = 85  # of its JPEG
_LONGEST_TEXT = 20_000  # characters of an answer or question on the page


class Thumbnails:
    """Small copies of the images that the report shows: those of the first ``per_task`` samples of each task.

    An image that several questions ask about has one. Safe between threads.
    """

    def __init__(self, out: Path, samples: Sequence[Sample], per_task: int, as_seen: bool = False):
        self.directory = out / THUMBNAILS_NAME
        self.shown: list[Sample] = []
        self._as_seen = as_seen
        seen: Counter[str] = Counter()
        for sample in samples:
            seen[sample.task] += 1
            if seen[sample.task] <= per_task:
                self.shown.append(sample)
        self._lines = {sample.line for sample in self.shown}
        self.directory.mkdir(exist_ok=True)

    def make(self, sample: Sample, images: Sequence[Image.Image]) -> None:
        """Writes a sample's thumbnails, unless they are there or it is not shown."""
        if sample.line not in self._lines:
            return
        for reference, image in zip(sample.images, images, strict=True):
            file = self.directory / _file_name(reference)
            if file.exists():
                continue
            small = image.copy()
            small.thumbnail((_SIDE, _SIDE))
            with replacing(file) as new:
                small.save(new, "JPEG", quality=_QUALITY)

    def complete(self, store: ImageStore) -> None:
        """Makes those that are missing, for samples that an earlier run answered without showing them.

        Raises DataError, naming the image, when it cannot be read any more.
        """
        for sample in self.shown:
            if all((self.directory / _file_name(reference)).exists() for reference in sample.images):
                continue
            try:
                sources = [resolve_image(reference, store) for reference in sample.images]
                self.make(sample, [load_image(source, self._as_seen) for source in sources])
            except OSError as error:
                raise DataError(f"sample {sample.id}: {error}") from error

    def sources(self, sample: Sample) -> list[str]:
        """Addresses relative to the report."""
        return [f"{THUMBNAILS_NAME}/{_file_name(reference)}" for reference in sample.images]


def write_report(
    out: Path,
    name: str,
    samples: Sequence[Sample],
    results: Mapping[int, Mapping[str, Any]],
    summary: Mapping[str, Any],
    thumbnails: Thumbnails,
) -> Path:
    """Writes the page and returns it.

    Args:
      name: of what answered.
      results: one of every sample, by line.
    """
    shown = [_entry(sample, results[sample.line], thumbnails) for sample in thumbnails.shown]
    left_out = len(samples) - len(shown)
    note = f"{len(shown):,} samples"
    if left_out:
        note += f" of {len(samples):,}; the first of each task (--report-samples), all are in results.jsonl"
    parts = {
        "POLICY": POLICY,
        "TITLE": html.escape(f"{name} on {Path(summary['data']).name}"),
        "NOTE": html.escape(note),
        "ROWS": "\n".join(_row(task, entry) for task, entry in summary["tasks"].items()),
        # Inside a script element only "<" could end it.
        "DATA": json.dumps(shown, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c"),
    }
    page = re.sub("@@([A-Z]+)@@", lambda match: parts[match[1]], PAGE)
    file = out / REPORT_NAME
    write_text(file, page)
    return file


def _row(task: str, entry: Mapping[str, Any]) -> str:
    iou = f"{entry['mean_iou']:.3f}" if "mean_iou" in entry else ""
    cells = (
        f"{entry['samples']:,}",
        f"{100 * entry['score']:.1f} %",
        iou,
        *(str(entry.get(key, "")) for key in ("unanswered", "malformed_boxes")),
    )
    return (
        f'<tr><th scope="row">{html.escape(task)}</th><td>{html.escape(entry["metric"])}</td>'
        + "".join(f'<td class="number">{html.escape(cell)}</td>' for cell in cells)
        + "</tr>"
    )


def _entry(sample: Sample, result: Mapping[str, Any], thumbnails: Thumbnails) -> dict[str, Any]:
    """What the page knows of a sample; boxes as left, top, width and height in percent of the last image."""
    entry: dict[str, Any] = {
        "id": sample.id,
        "task": sample.task,
        "metric": sample.metric,
        "question": sample.question[:_LONGEST_TEXT],
        "references": [reference[:_LONGEST_TEXT] for reference in sample.references],
        "answer": result["answer"][:_LONGEST_TEXT],
        "score": result["score"],
        "images": [
            [quote(source), *size] for source, size in zip(thumbnails.sources(sample), sample.sizes, strict=True)
        ],
    }
    for key in ("iou", "error"):
        if key in result:
            entry[key] = result[key]
    if sample.sizes:
        size = sample.sizes[-1]
        entry["right"] = [_percent(box, size) for box in sample.boxes]
        entry["answered"] = [_percent(box, size) for box in result.get("boxes", [])]
    return entry


def _percent(box: Sequence[float], size: tuple[int, int]) -> list[float]:
    x1, x2 = sorted(min(max(100 * x / size[0], 0.0), 100.0) for x in (box[0], box[2]))
    y1, y2 = sorted(min(max(100 * y / size[1], 0.0), 100.0) for y in (box[1], box[3]))
    return [round(value, 3) for value in (x1, y1, x2 - x1, y2 - y1)]


def _file_name(reference: Any) -> str:
    key = json.dumps(reference, sort_keys=True)
    return f"{hashlib.sha256(key.encode()).hexdigest()[:24]}.jpg"
