"""Conversations about drawn pictures, as many as are asked for, each from its seed: the data of the micro model.

`dsvl2 micro draw DIRECTORY` writes them as JSON Lines and PNG files, which `dsvl2 train` and `dsvl2 eval` read like any
other data. Sample number i of a seed depends on (stream, seed, i) alone, so any number of processes write the same
files, and the training and the held-out stream never share a seed. Needs the fonts of the ``demo`` or ``train`` extra.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import multiprocessing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dsvl2_jax.apps.micro import pictures
from dsvl2_jax.apps.micro.pictures import KINDS, WORDS, Picture
from dsvl2_jax.apps.micro.questions import (
    ORDINALS,
    Question,
    caption,
    comparisons,
    grounded_caption,
    pick,
    questions_about,
    regions,
    short_caption,
)
from dsvl2_jax.checkpoint.staging import locked, replacing
from dsvl2_jax.errors import UsageError
from dsvl2_jax.inputs.tokenizer import IMAGE_TOKEN, REF_TOKEN

TRAINING, HELD_OUT, DEMO = 0, 1, 2  # streams of random numbers


@dataclasses.dataclass(frozen=True)
class Sample:
    """Some pictures and what is asked about them."""

    pictures: tuple[Picture, ...]
    questions: tuple[Question, ...]

    def conversation(self) -> list[dict[str, str]]:
        """The turns; the first has an ``<image>`` for each picture."""
        tags = f"{IMAGE_TOKEN}\n" * len(self.pictures)
        turns = []
        for question in self.questions:
            turns.append({"role": "user", "content": (tags if not turns else "") + question.text})
            turns.append({"role": "assistant", "content": question.answer})
        return turns


def number(rng: np.random.Generator, most_places: int = 4) -> str:
    """A number of 1 to 4 digits, each length equally often."""
    places = int(rng.integers(1, most_places + 1))
    return str(int(rng.integers(10 ** (places - 1) if places > 1 else 0, 10**places)))


def _shapes(rng: np.random.Generator, most: int = 5, tiles: int = 9, least: int = 1) -> tuple[Picture, ...]:
    return (pictures.scene(rng, int(rng.integers(least, most + 1)), size=pictures.picture_size(rng, tiles)),)


def _number(rng: np.random.Generator, most_places: int = 4, tiles: int = 9) -> tuple[Picture, ...]:
    return (pictures.writing(rng, number(rng, most_places), size=pictures.picture_size(rng, tiles)),)


def _word(rng: np.random.Generator, tiles: int = 9) -> tuple[Picture, ...]:
    return (pictures.writing(rng, pick(rng, WORDS), size=pictures.picture_size(rng, tiles)),)


def _chart(rng: np.random.Generator, most: int = 5) -> tuple[Picture, ...]:
    return (pictures.chart(rng, int(rng.integers(2, most + 1))),)


def _group(rng: np.random.Generator, count: int) -> tuple[Picture, ...]:
    """Pictures to compare; three are not cut into tiles, so they are small."""
    sizes = [pictures.picture_size(rng, 3 if count == 2 else 1) for _ in range(count)]
    kind = rng.random()
    if kind < 0.15:
        return tuple(pictures.writing(rng, number(rng, 2), size=size) for size in sizes)
    most = 1 if kind < 0.4 else 5
    kinds = list(rng.choice(list(KINDS), 2, replace=False)) if most == 1 else list(KINDS)  # often the same
    return tuple(pictures.scene(rng, int(rng.integers(1, most + 1)), size=size, kinds=kinds) for size in sizes)


# What a picture, or a group of pictures, is of. "simple" ones come first in training.
MAKERS: dict[str, Callable[[np.random.Generator], tuple[Picture, ...]]] = {
    "shapes": _shapes,
    "number": _number,
    "word": _word,
    "chart": _chart,
    "pair": functools.partial(_group, count=2),
    "triple": functools.partial(_group, count=3),
    "one shape": functools.partial(_shapes, most=1, tiles=2),
    "large digit": functools.partial(_number, most_places=1, tiles=1),
    "some shapes": functools.partial(_shapes, tiles=2),
    "two shapes": functools.partial(_shapes, least=2, most=2, tiles=1),
    "few shapes": functools.partial(_shapes, most=3, tiles=2),
    "some number": functools.partial(_number, tiles=2),
    "short number": functools.partial(_number, most_places=2, tiles=2),
    "small word": functools.partial(_word, tiles=2),
    "short chart": functools.partial(_chart, most=3),
}
MIXTURES: dict[str, dict[str, float]] = {
    "digit": {"large digit": 1.0},
    "numbers": {"large digit": 0.25, "some number": 0.75},
    "simple": {"one shape": 0.36, "few shapes": 0.24, "short number": 0.2, "small word": 0.06, "short chart": 0.14},
    "parts": {"some shapes": 0.47, "some number": 0.3, "small word": 0.05, "chart": 0.18},
    "full": {"shapes": 0.4, "number": 0.2, "word": 0.05, "chart": 0.16, "pair": 0.15, "triple": 0.04},
}


# One kind of question, over and over, in easy and in full pictures: what pictures are of, the task, most questions.
# What comes up once in a conversation of everything is drowned by the rest, and learnt last.
FOCUS: dict[str, tuple[dict[str, float], str, int]] = {
    "numbers alone": ({"short number": 0.5, "number": 0.5}, "digits", 1),
    "charts alone": ({"short chart": 0.5, "chart": 0.5}, "charts", 4),
    "boxes alone": ({"one shape": 0.4, "few shapes": 0.3, "shapes": 0.3}, "grounding", 1),
    "many boxes alone": ({"few shapes": 0.3, "shapes": 0.7}, "grounding", 4),
    "two places alone": ({"two shapes": 0.6, "few shapes": 0.4}, "position", 4),
    "two boxes alone": ({"two shapes": 0.6, "few shapes": 0.4}, "grounding", 3),
    "pairs alone": ({"pair": 1.0}, "two images", 4),
    "places alone": ({"few shapes": 0.5, "shapes": 0.5}, "position", 2),
}


def focused(rng: np.random.Generator, name: str) -> Sample:
    """A conversation of one of `FOCUS`."""
    weights, task, turns = FOCUS[name]
    while True:
        group, asked = _drawn(rng, weights)
        asked = [question for question in asked if question.task == task]
        if asked:
            return Sample(group, tuple(asked[i] for i in rng.permutation(len(asked))[:turns]))


def _drawn(rng: np.random.Generator, weights: dict[str, float]) -> tuple[tuple[Picture, ...], list[Question]]:
    """Pictures of one of some makers (name → probability), and all that can be asked about them."""
    group = MAKERS[str(rng.choice(list(weights), p=np.array(list(weights.values()))))](rng)
    return group, comparisons(group, rng) if len(group) > 1 else questions_about(group[0], rng)


# The share of a mixture's conversations with a question about a box.
BOXES = {"simple": 0.2, "full": 0.6}


def sample(rng: np.random.Generator, mixture: str, turns: int = 8, boxes: float | None = None) -> Sample:
    """A conversation of up to ``turns`` questions about what a mixture of `MIXTURES` holds.

    ``boxes``: the share of conversations that have a question about boxes, one each; None: as many as come. The digits
    of a box are many tokens, the last of which are noise: they drown what the short answers teach.
    """
    group, asked = _drawn(rng, MIXTURES[mixture])
    if boxes is not None:
        boxed = [question for question in asked if REF_TOKEN in question.answer]
        asked = [question for question in asked if REF_TOKEN not in question.answer]
        if boxed and rng.random() < boxes:
            asked.append(pick(rng, boxed))
    # One question of each kind before the second of any.
    by_task: dict[str, list[Question]] = {}
    for question in asked:
        by_task.setdefault(question.task, []).append(question)
    for same in by_task.values():
        rng.shuffle(same)  # type: ignore[arg-type]
    rounds = itertools.zip_longest(*(by_task[task] for task in sorted(by_task)))
    chosen: list[Question] = []
    for round_ in rounds:
        some = [question for question in round_ if question is not None]
        chosen += [some[i] for i in rng.permutation(len(some))]
    chosen = chosen[:turns]
    return Sample(group, tuple(chosen[i] for i in rng.permutation(len(chosen))))


def text_sample(rng: np.random.Generator, mixture: str = "full", turns: int = 8) -> list[dict[str, str]]:
    """A conversation without images, in which the first turn says in words what the pictures show."""
    made = sample(rng, mixture, turns)
    grounded = len(made.pictures) == 1 and made.pictures[0].shapes and made.pictures[0].writing is None
    if len(made.pictures) > 1:
        pairs = zip(ORDINALS, made.pictures, strict=False)
        said = "\n".join(f"{ordinal.capitalize()} image: {caption(picture)}." for ordinal, picture in pairs)
    elif grounded and rng.random() < 0.5:
        said = f"Image: {grounded_caption(made.pictures[0])}."
    else:
        said, grounded = f"Image: {caption(made.pictures[0])}.", False
    asked = [q for q in made.questions if grounded or (not q.boxes and q.task != "grounded caption")]
    conversation = Sample((), tuple(asked or made.questions)).conversation()
    conversation[0]["content"] = f"{said}\n{conversation[0]['content']}"
    return conversation


# Task of the evaluation → the mixture that its pictures are drawn from.
TASKS: dict[str, dict[str, float]] = {
    "colour and shape": {"shapes": 1},
    "counting": {"shapes": 1},
    "position": {"shapes": 1},
    "two images": {"pair": 1},
    "digits": {"number": 1},
    "charts": {"chart": 1},
    "grounding": {"shapes": 1},
    "caption": {"shapes": 0.6, "number": 0.2, "chart": 0.2},
    "words": {"word": 1},
    "three images": {"triple": 1},
    "existence": {"shapes": 1},
}


def task_sample(rng: np.random.Generator, task: str) -> Sample:
    """One question of a task. Counting asks for numbers from 1 to 5, totals equally often."""
    while True:
        group, asked = _drawn(rng, TASKS[task])
        asked = [q for q in asked if q.task == task and q.answer != "0"]
        if task == "counting" and rng.random() < 0.5:
            asked = [q for q in asked if q.answer == str(len(group[0].shapes))]
        if asked:
            return Sample(group, (pick(rng, asked),))


def rng_of(stream: int, seed: int, index: int) -> np.random.Generator:
    """The random numbers of one sample."""
    return np.random.default_rng((stream, seed, index))


def _record(index: int, stem: str, seed: int, stream: int, mixture: str, turns: int, folder: Path) -> dict[str, Any]:
    rng = rng_of(stream, seed, index)
    made = focused(rng, mixture) if mixture in FOCUS else sample(rng, mixture, turns, BOXES.get(mixture, 1.0))
    return {"images": _save(made.pictures, f"{stem}-{index:06d}", folder), "messages": made.conversation()}


def _text_record(index: int, seed: int, stream: int, mixture: str, turns: int) -> dict[str, Any]:
    return {"messages": text_sample(rng_of(stream, seed, index), mixture, turns)}


def _caption_record(index: int, stem: str, seed: int, stream: int, mixture: str, folder: Path) -> dict[str, Any]:
    """The first picture of a sample with its caption, for an encoder's contrastive stage.

    Half of the captions are short ones: colours and places alone tell most full captions of a batch apart.
    """
    rng = rng_of(stream, seed, index)
    picture = sample(rng, mixture, 1).pictures[0]
    said = short_caption(picture) if rng.random() < 0.5 else caption(picture)
    return {"images": _save((picture,), f"{stem}-{index:06d}", folder), "text": f"{IMAGE_TOKEN}\n{said}"}


def _regions_record(index: int, stem: str, seed: int, stream: int, mixture: str, folder: Path) -> dict[str, Any]:
    """The first picture of a sample with its `regions`, for the encoder's stages."""
    picture = sample(rng_of(stream, seed, index), mixture, 1).pictures[0]
    return {"images": _save((picture,), f"{stem}-{index:06d}", folder), "regions": regions(picture)}


def _task_record(index: int, stem: str, seed: int, folder: Path) -> dict[str, Any]:
    task = list(TASKS)[index % len(TASKS)]
    made = task_sample(rng_of(HELD_OUT, seed, index), task)
    question = made.questions[0]
    record: dict[str, Any] = {
        "id": f"{stem}-{index:06d}",
        "task": task,
        "metric": question.metric,
        "question": question.text,
        "images": _save(made.pictures, f"{stem}-{index:06d}", folder),
    }
    if question.metric == "iou":
        return record | {"boxes": [list(box) for box in question.boxes]}
    return record | ({"facts": list(question.facts)} if question.metric == "facts" else {"answers": [question.answer]})


def _save(group: Sequence[Picture], name: str, folder: Path) -> list[str]:
    names = [f"{name}-{i}.png" if len(group) > 1 else f"{name}.png" for i in range(len(group))]
    for picture, file in zip(group, names, strict=True):
        picture.draw().save(folder / file, compress_level=1)
    return names


def mixture_names() -> list[str]:
    """All that `write` takes for its mixture."""
    forms = ("text", "captions", "regions")
    return [*MIXTURES, *FOCUS, *forms, "tasks", *(f"{form} {name}" for form in forms for name in MIXTURES)]


def write(
    directory: Path,
    name: str,
    count: int,
    *,
    seed: int = 0,
    stream: int = TRAINING,
    mixture: str = "full",
    turns: int = 8,
    workers: int = 1,
) -> Path:
    """Writes ``count`` samples as ``NAME.jsonl``, with their pictures in the folder ``NAME``; returns the file.

    Args:
      mixture: of `MIXTURES` or `FOCUS`; "text" or "text NAME" for conversations without images about that mixture
        (default: full); "captions" or "captions NAME" for single pictures, each with its caption, in full or short;
        "regions" or "regions NAME" for single pictures, each with its `regions`; "tasks" for the evaluation: held-out
        questions, one task after the other.
      turns: most questions of a conversation; those of `FOCUS` have their own.
      workers: processes; the files do not depend on it.

    A file that is there is complete, and is kept as it is.

    Raises:
      UsageError: there is no such mixture.
    """
    if mixture not in (known := mixture_names()):
        raise UsageError(f"mixture {mixture!r}: expected one of {', '.join(map(repr, known))}.")
    path, folder = directory / f"{name}.jsonl", directory / name
    if path.exists():
        return path
    directory.mkdir(parents=True, exist_ok=True)
    form, _, of = mixture.partition(" ")
    arguments: dict[str, Any] = {"stem": name, "seed": seed, "folder": folder}
    if form == "tasks":
        make = functools.partial(_task_record, **arguments)
    elif form == "captions":
        make = functools.partial(_caption_record, **arguments, stream=stream, mixture=of or "full")
    elif form == "regions":
        make = functools.partial(_regions_record, **arguments, stream=stream, mixture=of or "full")
    elif form == "text":
        make = functools.partial(_text_record, seed=seed, stream=stream, mixture=of or "full", turns=turns)
    else:
        make = functools.partial(_record, **arguments, stream=stream, mixture=mixture, turns=turns)
    busy = f"{path}: another process is writing it. Wait for it, or choose another name."
    with locked(folder, busy), replacing(path) as new, new.open("w", encoding="utf-8") as file:
        if workers > 1:
            with multiprocessing.get_context("spawn").Pool(workers) as pool:
                for record in pool.imap(make, range(count), chunksize=64):
                    print(_line(record, name), file=file)
        else:
            for index in range(count):
                print(_line(make(index), name), file=file)
    return path


def _line(record: dict[str, Any], folder: str) -> str:
    if "images" in record:
        record = record | {"images": [f"{folder}/{file}" for file in record["images"]]}
    return json.dumps(record, ensure_ascii=False)
