"""What `dsvl2 eval` reads: a question with its reference per JSON line (docs/evaluation.md), and how it is scored.

Tested in tests/infer/eval/test_evaluate.py.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dsvl2_jax.errors import DataError, DSVL2Error, UsageError
from dsvl2_jax.infer.eval import metrics
from dsvl2_jax.inputs.grounding import parse_boxes
from dsvl2_jax.inputs.image_sources import ImageStore, resolve_image
from dsvl2_jax.inputs.images import image_size
from dsvl2_jax.inputs.records import parse_record, place
from dsvl2_jax.inputs.tile_budget import BUDGET_KEYS, NO_BUDGET, TileBudget
from dsvl2_jax.inputs.tokenizer import IMAGE_TOKEN
from dsvl2_jax.inputs.visuals import Picture, Video, read_visual
from dsvl2_jax.json_files import parse_json, read_lines

METRICS = ("exact", "contains", "anls", "relaxed", "vqa", "choice", "iou", "facts")
CHOICE_TEMPLATE = "{question}\n{choices}\nAnswer with the option's letter from the given choices directly."
TEMPLATE = "{question}"

_TAG_LINES = re.compile(rf"\s*(?:{re.escape(IMAGE_TOKEN)}\s*)*")
# A box may reach this many pixels beyond its image: published ones are rounded.
_OVERHANG = 2.0


@dataclasses.dataclass(frozen=True)
class Sample:
    """One question. Of the references, those that `metric` reads are there; images are references, in order."""

    line: int  # of the data file, from 1; what the results are kept under
    id: str
    task: str
    metric: str
    conversation: tuple[Mapping[str, str], ...]  # {"role", "content"}, ending in the user's turn
    images: tuple[Any, ...]
    sizes: tuple[tuple[int, int], ...]  # (width, height) of the images
    answers: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()
    boxes: tuple[tuple[float, ...], ...] = ()  # x1, y1, x2, y2 in pixels of the last image
    facts: tuple[str, ...] = ()
    budgets: tuple[TileBudget, ...] = ()  # the images' own
    budget: TileBudget = NO_BUDGET  # of images that have none
    group: str | None = None  # samples of one group count as one, with the lowest of their scores

    @property
    def question(self) -> str:
        """The last user turn without the tags of images in front of it."""
        content = self.conversation[-1]["content"]
        return content[_TAG_LINES.match(content).end() :]

    @property
    def references(self) -> tuple[str, ...]:
        """The right answers as text, for people."""
        if self.metric == "iou":
            return tuple(", ".join(f"{x:g}" for x in box) for box in self.boxes)
        return self.facts if self.metric == "facts" else self.answers


@dataclasses.dataclass(frozen=True)
class Score:
    """`value` from 0 to 1; `iou` only for the metric of that name, whose value is 1 at an IoU of 0.5 or more."""

    value: float
    iou: float | None = None


def score(sample: Sample, answer: str, boxes: Sequence[Sequence[float]]) -> Score:
    """The score of an answer; ``boxes`` are those in it, x1, y1, x2, y2 in pixels of the last image."""
    if sample.metric == "iou":
        mean_iou = metrics.boxes_iou(boxes, sample.boxes)
        return Score(float(mean_iou >= metrics.IOU_THRESHOLD), mean_iou)
    if sample.metric == "choice":
        return Score(max(metrics.choice(answer, sample.choices, reference) for reference in sample.answers))
    return Score(getattr(metrics, sample.metric)(answer, sample.facts if sample.metric == "facts" else sample.answers))


def read_samples(
    path: Path,
    store: ImageStore,
    *,
    metric: str | None,
    template: str | None,
    limit: int | None,
    as_seen: bool = False,
) -> list[Sample]:
    """Reads a data file and the headers of its images.

    Args:
      path: JSON Lines.
      store: where image names are looked up.
      metric: for records without their own.
      template: the prompt, with ``{question}`` and ``{choices}`` (and ``\\n`` for a new line); None: `TEMPLATE`, with
        choices `CHOICE_TEMPLATE`.
      limit: read at most this many samples.
      as_seen: sizes, and so boxes, are those of images as `read_image` turns them.

    Raises:
      UsageError: the metric or template is no such thing.
      DataError: the file cannot be read, or one of its lines is not a sample; the message says which and why.
    """
    if metric is not None and metric not in METRICS:
        raise UsageError(f"--metric: found {metric!r}, expected one of {', '.join(METRICS)}.")
    if template is not None and "{question}" not in template:
        raise UsageError(f"--prompt-template: found {template!r}, expected a text with {{question}} in it.")
    samples: list[Sample] = []
    reader = _Reader(store, metric, template, path.stem, as_seen)
    for number, line in read_lines(path, DataError, "Expected JSON Lines."):
        if not line.strip():
            continue
        if limit is not None and len(samples) >= limit:
            break
        try:
            samples.append(reader.sample(number, line))
        except (DSVL2Error, OSError) as error:
            raise DataError(f"{path}:{number}: {error}") from error
    if not samples:
        raise DataError(f"{path}: has no samples. Expected one JSON object a line (docs/evaluation.md).")
    return samples


class _Reader:
    """From lines to samples. Errors do not name the file and line yet."""

    def __init__(self, store: ImageStore, metric: str | None, template: str | None, task: str, as_seen: bool):
        self.store, self.metric, self.task, self.as_seen = store, metric, task, as_seen
        self.template = None if template is None else template.replace("\\n", "\n")
        self._sizes: dict[str, tuple[int, int]] = {}

    def sample(self, number: int, line: str) -> Sample:
        try:
            record = parse_json(line)
        except ValueError as error:
            raise DataError(f"not JSON ({error}). Expected one object a line.") from None
        if not isinstance(record, Mapping):
            raise DataError(f"expected a JSON object, found {type(record).__name__}.")
        metric = record.get("metric") or self.metric
        if metric is None:
            raise DataError('has no "metric", and --metric gives none. Known are ' + ", ".join(METRICS) + ".")
        if metric not in METRICS:
            raise DataError(f'"metric" is {metric!r}, expected one of {", ".join(METRICS)}.')
        conversation, visuals, budget, last_answer = self._conversation(record)
        images = tuple(visual.source for visual in visuals)
        sizes = tuple(map(self._size, images))
        answers = _texts(record, "answers", "answer") or ([last_answer] if last_answer else [])
        choices = _texts(record, "choices")
        sample = Sample(
            line=number,
            id=str(record.get("id", number)),
            task=str(record.get("task") or self.task),
            metric=metric,
            conversation=self._templated(conversation, choices),
            images=images,
            sizes=sizes,
            budgets=tuple(visual.budget for visual in visuals),
            budget=budget,
            answers=tuple(answers),
            choices=tuple(choices),
            boxes=_boxes(record, answers, sizes) if metric == "iou" else (),
            facts=tuple(_texts(record, "facts")),
            group=None if record.get("group") is None else str(record["group"]),
        )
        _check_references(sample, "facts" in record)
        return sample

    def _conversation(self, record: Mapping[str, Any]) -> tuple[list[dict[str, str]], list[Picture], TileBudget, str]:
        """(turns up to the last user's, images, budget, the assistant's answer to it or "")."""
        if "question" in record:
            if not isinstance(record["question"], str) or not record["question"].strip():
                raise DataError(f'"question" is {record["question"]!r:.60}, expected a text.')
            turns = [{"role": "user", "content": record["question"]}]
            kept = ("image", "images", "video", "videos", *BUDGET_KEYS)
            record = {key: record[key] for key in kept if key in record} | {"messages": turns}
        elif "messages" not in record and "conversations" not in record:
            raise DataError(f'expected "question" or "messages"; found {", ".join(sorted(map(str, record)))}.')
        parsed = parse_record(record)
        visuals = list(map(read_visual, parsed.images))
        if any(isinstance(visual, Video) for visual in visuals):
            raise DataError("has a video, and questions are about images. Give frames of it as images.")
        if parsed.objects is not None:
            parsed, _ = place(parsed, [self._size(visual.source) for visual in visuals])
        turns = [dict(turn) for turn in parsed.conversation]
        answer = turns.pop()["content"].strip() if turns[-1]["role"] == "assistant" else ""
        if not turns or turns[-1]["role"] != "user":
            raise DataError("has no turn of the user to answer.")
        tags = sum(turn["content"].count(IMAGE_TOKEN) for turn in turns if turn["role"] == "user")
        if tags != len(parsed.images):
            raise DataError(f"has {tags} {IMAGE_TOKEN} tag(s) and {len(parsed.images)} image(s); put one tag for each.")
        return turns, visuals, parsed.budget, answer

    def _templated(self, turns: list[dict[str, str]], choices: list[str]) -> tuple[dict[str, str], ...]:
        """The turns with the last one's text in the template, behind its image tags."""
        template = self.template or (CHOICE_TEMPLATE if choices else TEMPLATE)
        content = turns[-1]["content"]
        start = _TAG_LINES.match(content).end()
        lines = "\n".join(f"{letter}. {text}" for letter, text in zip(metrics.LETTERS, choices, strict=False))
        # One pass, so that a question's own text is never taken for a field of the template.
        filled = re.sub(
            r"\{(question|choices)\}", lambda match: content[start:] if match[1] == "question" else lines, template
        )
        return (*turns[:-1], {"role": "user", "content": content[:start] + filled})

    def _size(self, reference: Any) -> tuple[int, int]:
        name = reference if isinstance(reference, str) else None
        if name not in self._sizes:
            size = image_size(resolve_image(reference, self.store), self.as_seen)
            if name is None:
                return size
            self._sizes[name] = size
        return self._sizes[name]


def _texts(record: Mapping[str, Any], *keys: str) -> list[str]:
    """The texts under the first key that the record has: a text, a number, or a list of them; [] without any."""
    for key in keys:
        value = record.get(key)
        if value is None:
            continue
        texts = [
            str(item) if isinstance(item, str | int | float) and not isinstance(item, bool) else None
            for item in (value if isinstance(value, list) else [value])
        ]
        if None in texts or not all(text.strip() for text in texts):
            raise DataError(f'"{key}" is {json.dumps(value)[:60]}, expected a list of texts that are not empty.')
        return texts
    return []


def _boxes(
    record: Mapping[str, Any], answers: Sequence[str], sizes: Sequence[tuple[int, int]]
) -> tuple[tuple[float, ...], ...]:
    if not sizes:
        raise DataError("the metric iou needs an image; found none.")
    if "boxes" not in record:
        written = [parse_boxes(answer, sizes) for answer in answers[:1]]
        return tuple((float(b.x1), float(b.y1), float(b.x2), float(b.y2)) for boxes in written for b in boxes)
    boxes, (width, height) = record["boxes"], sizes[-1]
    well_formed = isinstance(boxes, list) and all(
        isinstance(box, list) and len(box) == 4 and all(type(x) in (int, float) for x in box) for box in boxes
    )
    if not well_formed:
        raise DataError(f'"boxes" is {json.dumps(boxes)[:60]}, expected a list of [x1, y1, x2, y2] in pixels.')
    for x1, y1, x2, y2 in boxes:
        inside = min(x1, y1) >= -_OVERHANG and x2 <= width + _OVERHANG and y2 <= height + _OVERHANG
        if not (x1 < x2 and y1 < y2 and inside):
            raise DataError(
                f'"boxes" has {[x1, y1, x2, y2]}, expected x1, y1, x2, y2 in pixels of the last image, which is '
                f"{width}×{height} (neither x, y, width, height nor coordinates from 0 to 999)."
            )
    return tuple(tuple(map(float, box)) for box in boxes)


def _check_references(sample: Sample, has_facts: bool) -> None:
    """Raises DataError when the metric misses what it compares with."""
    if sample.metric == "iou":
        if not sample.boxes:
            raise DataError('the metric iou needs "boxes": [[x1, y1, x2, y2]] in pixels of the last image; found none.')
        return
    if sample.metric == "facts":
        if not has_facts:
            raise DataError('the metric facts needs "facts": a list of texts; found none.')
        return
    if not sample.answers:
        raise DataError(f'the metric {sample.metric} needs "answers": a list of texts; found none.')
    if sample.metric == "vqa" and len(sample.answers) < 2:
        raise DataError(f'the metric vqa needs the "answers" of several annotators; found {len(sample.answers)}.')
    if sample.metric == "choice":
        if not 2 <= len(sample.choices) <= len(metrics.LETTERS):
            raise DataError(f'the metric choice needs 2 to 26 "choices"; found {len(sample.choices)}.')
        for answer in sample.answers:
            try:
                metrics.choice("", sample.choices, answer)
            except ValueError as error:
                raise DataError(f'"answers": {error}.') from None
