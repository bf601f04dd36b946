"""Conversations about drawn pictures, seeded and without end: the data of the micro model.

    python -m dsvl2_jax.apps.micro.synthetic DIRECTORY

writes them as JSON Lines and PNG files, which `dsvl2 train` and `dsvl2 eval` read like any other data. Sample
number i of a seed depends on (stream, seed, i) alone, so any number of processes write the same files, and the
training and the held-out stream never share a seed. Needs the ``train`` extra, for its fonts.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import json
import multiprocessing
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dsvl2_jax.apps.micro import pictures
from dsvl2_jax.apps.micro.pictures import COLOURS, KINDS, WORDS, Bar, Boundaries, Picture
from dsvl2_jax.inputs.grounding import format_boxes
from dsvl2_jax.inputs.tokenizer import GROUNDING_TOKEN, IMAGE_TOKEN, REF_END_TOKEN, REF_TOKEN

TRAINING, HELD_OUT, DEMO = 0, 1, 2  # streams of random numbers
ORDINALS = ("first", "second", "third")
_APART = 0.15  # of a side: shapes whose middles are nearer are not asked to be compared
PLACES_IN_ORDER = tuple(place for row in pictures.PLACES for place in row)
_WHERE = {"centre": "in the centre", "left": "on the left", "right": "on the right"}


@dataclasses.dataclass(frozen=True)
class Question:
    """A question with its answer, and how an answer is scored (`dsvl2_jax.infer.eval.metrics`)."""

    task: str
    text: str
    answer: str
    metric: str = "exact"
    facts: tuple[str, ...] = ()  # of metric "facts"
    boxes: tuple[Boundaries, ...] = ()  # of metric "iou", in pixels


def article(name: str) -> str:
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def listed(items: Sequence[str]) -> str:
    """a, b and c."""
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"


def facts(picture: Picture) -> list[str]:
    """Everything a caption of a picture says, clause by clause, from left to right."""
    if picture.chart is not None:
        return ["a bar chart", *(f"{bar.colour} {bar.letter} is {bar.value}" for bar in picture.chart.bars)]
    found = []
    if picture.writing is not None:
        what = "number" if picture.writing.text.isdigit() else "word"
        found.append(f"the {what} {picture.writing.text} in {picture.writing.colour}")
    for shape in picture.shapes:
        found.append(f"{article(shape.name)} {_WHERE.get(shape.place, f'at the {shape.place}')}")
    return found


def caption(picture: Picture) -> str:
    said = facts(picture)
    return f"{said[0]}: {listed(said[1:])}" if picture.chart is not None else listed(said)


def short_caption(picture: Picture) -> str:
    """What only a close look tells, and no colour or place: kinds of shapes, what is printed, or a chart's values."""
    if picture.chart is not None:
        return listed([str(bar.value) for bar in picture.chart.bars])
    return listed(([picture.writing.text] if picture.writing else []) + [shape.kind for shape in picture.shapes])


def grounded_caption(picture: Picture) -> str:
    return listed([format_boxes(article(s.name), [s.box], picture.size) for s in picture.shapes])


def parts(picture: Picture) -> str:
    """What each ninth of a picture holds, row by row."""
    held = {place: [shape.name for shape in picture.shapes if shape.place == place] for place in PLACES_IN_ORDER}
    return ", ".join(f"{place} {listed(names) if names else 'nothing'}" for place, names in held.items())


def regions(picture: Picture) -> list[dict[str, Any]]:
    """What a picture holds, box by box: shapes, each printed letter or digit and the whole of it, bars.

    Each has its ``box`` in pixels and its attributes, all as text: kind, colour, place, its number from left to right
    among how many (``order``), its edges in twentieths (``left`` …) and in fiftieths (``x1`` …) of the picture's sides.
    """
    width, height = picture.size

    def edges(box: Boundaries) -> dict[str, str]:
        shares = [edge / side for edge, side in zip(box, (width, height) * 2, strict=True)]
        coarse = zip(("left", "top", "right", "bottom"), shares, strict=True)
        fine = zip(("x1", "y1", "x2", "y2"), shares, strict=True)
        return {name: str(round(20 * share)) for name, share in coarse} | {
            name: str(round(50 * share)) for name, share in fine
        }

    found: list[dict[str, Any]] = []
    if picture.chart is not None:
        for bar in picture.chart.bars:
            said = {"bar": bar.letter, "colour": bar.colour, "value": str(bar.value)}
            found.append({"box": list(bar.box), **said, **edges(bar.box)})
    if picture.writing is not None:
        ink = picture.writing
        what = "digit" if ink.text.isdigit() else "letter"
        for i, (sign, box) in enumerate(zip(ink.text, ink.letter_boxes(), strict=True)):
            found.append({"box": list(box), what: sign, "order": f"{i + 1} of {len(ink.text)}"})
        found.append({"box": list(ink.box), "colour": ink.colour, **edges(ink.box)})
    for i, shape in enumerate(picture.shapes):
        said = {"kind": shape.kind, "colour": shape.colour, "place": shape.place}
        order = {} if picture.writing else {"order": f"{i + 1} of {len(picture.shapes)}"}
        found.append({"box": list(shape.box), **said, **order, **edges(shape.box)})
    return found


def _pick(rng: np.random.Generator, items: Sequence[Any]) -> Any:
    return items[int(rng.integers(len(items)))]


def _unique(picture: Picture) -> list[tuple[str, pictures.Shape]]:
    """(name, shape) for every name that means one shape: "red circle", "circle", "red shape"."""
    names: dict[str, list[pictures.Shape]] = {}
    for shape in picture.shapes:
        for name in (shape.name, shape.kind, f"{shape.colour} shape"):
            names.setdefault(name, []).append(shape)
    return [(name, shapes[0]) for name, shapes in names.items() if len(shapes) == 1]


def _grounding(name: str, box: Boundaries, picture: Picture, rng: np.random.Generator) -> Question:
    ref = f"{REF_TOKEN}{name}{REF_END_TOKEN}"
    text = _pick(rng, (ref, f"Locate {ref} in the image."))
    return Question("grounding", text, format_boxes(name, [box], picture.size), "iou", boxes=(box,))


def shape_questions(picture: Picture, rng: np.random.Generator) -> Iterator[Question]:
    """Everything that can be asked about the shapes of a picture."""
    shapes, unique = picture.shapes, _unique(picture)
    kinds, colours = (Counter(getattr(s, field) for s in shapes) for field in ("kind", "colour"))
    for name, shape in unique:
        if name == shape.kind:
            text = _pick(rng, (f"What colour is the {name}?", f"What is the colour of the {name}?"))
            yield Question("colour and shape", text, shape.colour)
        elif name == f"{shape.colour} shape":
            yield Question("colour and shape", f"What is the {name}?", shape.kind)
        yield Question("position", f"Where is the {name}?", shape.place)
        yield _grounding(f"the {name}", shape.box, picture, rng)
    text = _pick(rng, ("How many shapes are there?", "Count the shapes."))
    yield Question("counting", text, str(len(shapes)))
    for kind in sorted({*kinds, str(rng.choice(list(KINDS)))}):
        text = f"How many {kind}{'es' if kind.endswith('s') else 's'} are there?"
        yield Question("counting", text, str(kinds[kind]))
    for colour in sorted({*colours, str(rng.choice(list(COLOURS)))}):
        yield Question("counting", f"How many {colour} shapes are there?", str(colours[colour]))
    for (a, first), (b, second) in itertools.permutations(unique, 2):
        if first is second or rng.random() < 0.5:
            continue
        for axis, (before, after) in enumerate((("left", "right"), ("above", "below"))):
            apart = _middle(first.box, axis) - _middle(second.box, axis)
            if abs(apart) >= _APART * picture.size[axis]:
                words = f"left or right of the {b}" if axis == 0 else f"above or below the {b}"
                yield Question("position", f"Is the {a} {words}?", after if apart > 0 else before)
    shape = _pick(rng, shapes)
    other = f"{rng.choice(list(COLOURS))} {rng.choice(list(KINDS))}"
    for name in (shape.name, other):
        found = any(name == s.name for s in shapes)
        yield Question("existence", f"Is there {article(name)}?", "yes" if found else "no")
    yield Question("grounded caption", f"{GROUNDING_TOKEN}Describe the image.", grounded_caption(picture))
    yield Question("parts", "What is in each part of the image?", parts(picture))


def _middle(box: Boundaries, axis: int) -> float:
    return (box[axis] + box[axis + 2]) / 2


def writing_questions(picture: Picture, rng: np.random.Generator) -> Iterator[Question]:
    """What is printed, in which colour, and where."""
    ink = picture.writing
    what = "number" if ink.text.isdigit() else "word"
    text = _pick(rng, (f"What {what} is written?", f"Read the {what}."))
    yield Question("digits" if what == "number" else "words", text, ink.text)
    yield Question("writing", f"What colour is the {what}?", ink.colour)
    if what == "number":
        last = len(ink.text) - 1
        for place, word in ((0, "first"), (1, "second"), (2, "third"), (last, "last")):
            if place <= last:
                yield Question("digit", f"What is the {word} digit?", ink.text[place])
        yield Question("digit", "How many digits are there?", str(len(ink.text)))
    yield dataclasses.replace(_grounding(f"the {what}", ink.box, picture, rng), task="writing")


def chart_questions(picture: Picture, rng: np.random.Generator) -> Iterator[Question]:
    """The values of a bar chart, its highest and lowest bar, and its colours."""
    bars = picture.chart.bars
    for bar in bars:
        yield Question("charts", f"What is the value of bar {bar.letter}?", str(bar.value))
        yield Question("charts", f"What is the value of the {bar.colour} bar?", str(bar.value))
        yield Question("chart colours", f"What colour is bar {bar.letter}?", bar.colour)
    for best, word in ((max, "highest"), (min, "lowest")):
        value = best(bar.value for bar in bars)
        found: list[Bar] = [bar for bar in bars if bar.value == value]
        if len(found) == 1:
            yield Question("charts", f"Which bar is the {word}?", found[0].letter)
    yield Question("chart colours", "How many bars are there?", str(len(bars)))
    bar = _pick(rng, bars)
    yield dataclasses.replace(_grounding(f"bar {bar.letter}", bar.box, picture, rng), task="chart colours")


def questions(picture: Picture, rng: np.random.Generator) -> list[Question]:
    """All questions about one picture, a caption first."""
    text = _pick(rng, ("Describe the image.", "What is in the image?"))
    found = [Question("caption", text, caption(picture), "facts", facts=tuple(facts(picture)))]
    if picture.chart is not None:
        return found + list(chart_questions(picture, rng))
    if picture.writing is not None:
        found += writing_questions(picture, rng)
        colour_only = (
            [q for q in shape_questions(picture, rng) if q.task == "colour and shape"] if picture.shapes else []
        )
        return found + colour_only
    return found + list(shape_questions(picture, rng))


def comparisons(group: Sequence[Picture], rng: np.random.Generator) -> list[Question]:
    """Questions about two or three pictures: shapes in all of them, or numbers in all of them."""
    task = "two images" if len(group) == 2 else "three images"
    ordinals = ORDINALS[: len(group)]
    found = [
        Question("captions", f"Describe the {ordinal} image.", caption(picture))
        for ordinal, picture in zip(ordinals, group, strict=True)
    ]

    def which(text: str, values: Sequence[float]) -> Iterator[Question]:
        """Asks for the picture whose value is the highest, when one is."""
        best = [i for i, value in enumerate(values) if value == max(values)]
        if len(best) == 1:
            yield Question(task, text, f"the {ordinals[best[0]]}")

    more, larger = ("more", "larger") if len(group) == 2 else ("the most", "largest")
    if all(picture.writing is not None for picture in group):
        numbers = [int(picture.writing.text) for picture in group]
        found += which(f"Which image has the {larger} number?", numbers)
        return found
    counts = [len(picture.shapes) for picture in group]
    found += which(f"Which image has {more} shapes?", counts)
    for ordinal, picture, count in zip(ordinals, group, counts, strict=True):
        found.append(Question("counting in images", f"How many shapes are in the {ordinal} image?", str(count)))
        for name, shape in _unique(picture):
            if name == shape.kind:
                text = f"What colour is the {name} in the {ordinal} image?"
                found.append(Question("colours in images", text, shape.colour))
    for field, form in (("kind", "{}"), ("colour", "{} shape")):
        held = [{getattr(shape, field) for shape in picture.shapes} for picture in group]
        for value in sorted(set.union(*held)):
            found += which(f"Which image has {article(form.format(value))}?", [value in values for values in held])
        if counts == [1, 1]:
            same = "yes" if held[0] == held[1] else "no"
            what = "of the same kind" if field == "kind" else "of the same colour"
            found.append(Question(task, f"Are both shapes {what}?", same))
    return found


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
    return (pictures.writing(rng, _pick(rng, WORDS), size=pictures.picture_size(rng, tiles)),)


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
        group, found = _drawn(rng, weights)
        found = [question for question in found if question.task == task]
        if found:
            return Sample(group, tuple(found[i] for i in rng.permutation(len(found))[:turns]))


def _drawn(rng: np.random.Generator, weights: dict[str, float]) -> tuple[tuple[Picture, ...], list[Question]]:
    """Pictures of one of some makers (name → probability), and all that can be asked about them."""
    group = MAKERS[str(rng.choice(list(weights), p=np.array(list(weights.values()))))](rng)
    return group, comparisons(group, rng) if len(group) > 1 else questions(group[0], rng)


# The share of a mixture's conversations with a question about a box.
BOXES = {"simple": 0.2, "full": 0.6}


def sample(rng: np.random.Generator, mixture: str, turns: int = 8, boxes: float | None = None) -> Sample:
    """A conversation of up to ``turns`` questions about what a mixture of `MIXTURES` holds.

    ``boxes``: the share of conversations that have a question about boxes, one each; None: as many as come. The digits
    of a box are many tokens, whose last ones nothing can foretell: they drown what the short answers teach.
    """
    group, found = _drawn(rng, MIXTURES[mixture])
    if boxes is not None:
        boxed = [question for question in found if REF_TOKEN in question.answer]
        found = [question for question in found if REF_TOKEN not in question.answer]
        if boxed and rng.random() < boxes:
            found.append(_pick(rng, boxed))
    # One question of each kind before the second of any.
    by_task: dict[str, list[Question]] = {}
    for question in found:
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
        group, found = _drawn(rng, TASKS[task])
        found = [q for q in found if q.task == task and q.answer != "0"]
        if task == "counting" and rng.random() < 0.5:
            found = [q for q in found if q.answer == str(len(group[0].shapes))]
        if found:
            return Sample(group, (_pick(rng, found),))


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
    """
    path, folder = directory / f"{name}.jsonl", directory / name
    if path.exists():
        return path
    folder.mkdir(parents=True, exist_ok=True)
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
    new = path.with_name(f"{path.name}.new")
    with new.open("w", encoding="utf-8") as file:
        if workers > 1:
            with multiprocessing.get_context("spawn").Pool(workers) as pool:
                for record in pool.imap(make, range(count), chunksize=64):
                    print(_line(record, name), file=file)
        else:
            for index in range(count):
                print(_line(make(index), name), file=file)
    os.replace(new, path)
    return path


def _line(record: dict[str, Any], folder: str) -> str:
    if "images" in record:
        record = record | {"images": [f"{folder}/{file}" for file in record["images"]]}
    return json.dumps(record, ensure_ascii=False)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m dsvl2_jax.apps.micro.synthetic", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("directory", type=Path)
    parser.add_argument("--name", default="samples")
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--held-out", action="store_true", help="draw from the stream that training never sees")
    forms = ("text", "captions", "regions")
    choices = [*MIXTURES, *FOCUS, *forms, "tasks", *(f"{form} {name}" for form in forms for name in MIXTURES)]
    parser.add_argument("--mixture", choices=choices, default="full", metavar="NAME", help=f"of {', '.join(choices)}")
    parser.add_argument("--turns", type=int, default=8, help="most questions of a conversation")
    parser.add_argument("--workers", type=int, default=1)
    args = parser.parse_args(argv)
    stream = HELD_OUT if args.held_out else TRAINING
    path = write(
        args.directory,
        args.name,
        args.count,
        seed=args.seed,
        stream=stream,
        mixture=args.mixture,
        turns=args.turns,
        workers=args.workers,
    )
    print(path)


if __name__ == "__main__":
    main()
