"""What the two sources of answers share, a loaded model (`loaded`) and a server (`client`): questions and results.

Tested in tests/infer/eval/test_evaluate.py and test_client.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from PIL import Image

from dsvl2_jax.errors import DataError, DSVL2Error
from dsvl2_jax.infer.eval.report import Thumbnails
from dsvl2_jax.infer.eval.samples import Sample, score
from dsvl2_jax.inputs.grounding import Box, count_malformed_boxes
from dsvl2_jax.inputs.image_sources import ImageStore, resolve_image
from dsvl2_jax.inputs.images import ImageSource, read_image

Result = dict[str, Any]  # a line of results.jsonl


class Asked(NamedTuple):
    """An image as it is stored, in RGB, and its `TRAITS`."""

    source: ImageSource
    image: Image.Image
    traits: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Questions:
    """The samples that a run still has to ask, and where their images and results go."""

    samples: Sequence[Sample]
    data: Path
    store: ImageStore
    thumbnails: Thumbnails
    keep: Callable[[Sequence[Result]], None]  # writes results to the disk; for the main thread alone
    as_seen: bool = False  # how images are read: see `read_image`
    traits: list[str] = dataclasses.field(default_factory=list)  # of the images read so far

    def images(self, sample: Sample) -> list[Asked]:
        """A sample's images; makes their thumbnails. Safe between threads.

        Raises DataError, naming the file and line, when one cannot be read.
        """
        try:
            sources = [resolve_image(reference, self.store) for reference in sample.images]
            images = [Asked(source, *read_image(source, self.as_seen)) for source in sources]
            self.thumbnails.make(sample, [image.image for image in images])
        except (DSVL2Error, OSError) as error:
            raise self.unusable(sample, error) from error
        self.traits.extend(trait for image in images for trait in image.traits)
        return images

    def unusable(self, sample: Sample, error: Exception) -> DataError:
        """An error about a sample, with its file and line in front."""
        return DataError(f"{self.data}:{sample.line}: {error}")


class Source(Protocol):
    """What answers the questions."""

    name: str  # for people, and for the folder of the results

    def identity(self) -> dict[str, Any]:
        """What tells this source from another one whose answers must not be mixed with its own."""

    def summary(self) -> dict[str, Any]:
        """What the summary says about it."""

    def start(self, *, needed: bool) -> None:
        """Makes it ready to answer, unless there is nothing to ask. Called once."""

    def answer(self, questions: Questions) -> None:
        """Asks all questions, in any order, and keeps a result of each as soon as it is there."""


def answered(sample: Sample, text: str, boxes: Iterable[Box], details: Mapping[str, Any]) -> Result:
    """The result of a sample that has an answer.

    Args:
      text: the answer.
      boxes: those in it, in pixels of the last image.
      details: finish_reason, prompt_tokens, image_tokens and answer_tokens, as far as they are known.
    """
    answer = text.strip()
    corners = [[box.x1, box.y1, box.x2, box.y2] for box in boxes]
    scored = score(sample, answer, corners)
    result = _question(sample) | {"answer": answer, "score": scored.value}
    if scored.iou is not None:
        result["iou"] = round(scored.iou, 6)
    if corners or sample.metric == "iou":
        result["boxes"] = corners
    if malformed := count_malformed_boxes(answer):
        result["malformed_boxes"] = malformed
    return result | details


def unanswered(sample: Sample, error: str, *, again: bool = False) -> Result:
    """The result of a sample that has no answer, which counts as wrong.

    Args:
      error: why there is none.
      again: a later run asks again, since the sample is not to blame.
    """
    result = _question(sample) | {"answer": "", "score": 0.0, "error": error}
    if sample.metric == "iou":
        result |= {"iou": 0.0, "boxes": []}
    return result | ({"again": True} if again else {})


def is_final(result: Result | None) -> bool:
    """Whether a sample needs no further asking."""
    return result is not None and not result.get("again", False)


def _question(sample: Sample) -> Result:
    result: Result = {
        "line": sample.line,
        "id": sample.id,
        "task": sample.task,
        "metric": sample.metric,
        "question": sample.question,
        "images": [reference if _is_name(reference) else "(inline)" for reference in sample.images],
        "references": list(sample.references),
    }
    if sample.group is not None:
        result["group"] = sample.group
    if sample.choices:
        result["choices"] = list(sample.choices)
    return result


def _is_name(reference: Any) -> bool:
    return isinstance(reference, str) and len(reference) < 300 and not reference.startswith("data:")
