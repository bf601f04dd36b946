"""Questions about drawn pictures with their answers, captions, and what a picture holds box by box.

The random numbers choose wordings and what is asked; an answer follows from the picture's fields alone.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import numpy as np

from dsvl2_jax.apps.micro import pictures
from dsvl2_jax.apps.micro.pictures import COLOURS, KINDS, Bar, Boundaries, Picture
from dsvl2_jax.inputs.grounding import format_boxes
from dsvl2_jax.inputs.tokenizer import GROUNDING_TOKEN, REF_END_TOKEN, REF_TOKEN

T = TypeVar("T")

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
    clauses = []
    if picture.writing is not None:
        what = "number" if picture.writing.text.isdigit() else "word"
        clauses.append(f"the {what} {picture.writing.text} in {picture.writing.colour}")
    for shape in picture.shapes:
        clauses.append(f"{article(shape.name)} {_WHERE.get(shape.place, f'at the {shape.place}')}")
    return clauses


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

    held: list[dict[str, Any]] = []
    if picture.chart is not None:
        for bar in picture.chart.bars:
            said = {"bar": bar.letter, "colour": bar.colour, "value": str(bar.value)}
            held.append({"box": list(bar.box), **said, **edges(bar.box)})
    if picture.writing is not None:
        ink = picture.writing
        what = "digit" if ink.text.isdigit() else "letter"
        for i, (sign, box) in enumerate(zip(ink.text, ink.letter_boxes(), strict=True)):
            held.append({"box": list(box), what: sign, "order": f"{i + 1} of {len(ink.text)}"})
        held.append({"box": list(ink.box), "colour": ink.colour, **edges(ink.box)})
    for i, shape in enumerate(picture.shapes):
        said = {"kind": shape.kind, "colour": shape.colour, "place": shape.place}
        order = {} if picture.writing else {"order": f"{i + 1} of {len(picture.shapes)}"}
        held.append({"box": list(shape.box), **said, **order, **edges(shape.box)})
    return held


def pick(rng: np.random.Generator, items: Sequence[T]) -> T:
    """One of the items, each equally likely."""
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
    text = pick(rng, (ref, f"Locate {ref} in the image."))
    return Question("grounding", text, format_boxes(name, [box], picture.size), "iou", boxes=(box,))


def shape_questions(picture: Picture, rng: np.random.Generator) -> Iterator[Question]:
    """Everything that can be asked about the shapes of a picture."""
    shapes, unique = picture.shapes, _unique(picture)
    kinds, colours = (Counter(getattr(s, field) for s in shapes) for field in ("kind", "colour"))
    for name, shape in unique:
        if name == shape.kind:
            text = pick(rng, (f"What colour is the {name}?", f"What is the colour of the {name}?"))
            yield Question("colour and shape", text, shape.colour)
        elif name == f"{shape.colour} shape":
            yield Question("colour and shape", f"What is the {name}?", shape.kind)
        yield Question("position", f"Where is the {name}?", shape.place)
        yield _grounding(f"the {name}", shape.box, picture, rng)
    text = pick(rng, ("How many shapes are there?", "Count the shapes."))
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
    shape = pick(rng, shapes)
    other = f"{rng.choice(list(COLOURS))} {rng.choice(list(KINDS))}"
    for name in (shape.name, other):
        is_there = any(name == s.name for s in shapes)
        yield Question("existence", f"Is there {article(name)}?", "yes" if is_there else "no")
    yield Question("grounded caption", f"{GROUNDING_TOKEN}Describe the image.", grounded_caption(picture))
    yield Question("parts", "What is in each part of the image?", parts(picture))


def _middle(box: Boundaries, axis: int) -> float:
    return (box[axis] + box[axis + 2]) / 2


def writing_questions(picture: Picture, rng: np.random.Generator) -> Iterator[Question]:
    """What is printed, in which colour, and where."""
    ink = picture.writing
    what = "number" if ink.text.isdigit() else "word"
    text = pick(rng, (f"What {what} is written?", f"Read the {what}."))
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
        extreme_bars: list[Bar] = [bar for bar in bars if bar.value == value]
        if len(extreme_bars) == 1:
            yield Question("charts", f"Which bar is the {word}?", extreme_bars[0].letter)
    yield Question("chart colours", "How many bars are there?", str(len(bars)))
    bar = pick(rng, bars)
    yield dataclasses.replace(_grounding(f"bar {bar.letter}", bar.box, picture, rng), task="chart colours")


def questions_about(picture: Picture, rng: np.random.Generator) -> list[Question]:
    """All questions about one picture, a caption first."""
    text = pick(rng, ("Describe the image.", "What is in the image?"))
    asked = [Question("caption", text, caption(picture), "facts", facts=tuple(facts(picture)))]
    if picture.chart is not None:
        return asked + list(chart_questions(picture, rng))
    if picture.writing is not None:
        asked += writing_questions(picture, rng)
        colour_only = (
            [q for q in shape_questions(picture, rng) if q.task == "colour and shape"] if picture.shapes else []
        )
        return asked + colour_only
    return asked + list(shape_questions(picture, rng))


def comparisons(group: Sequence[Picture], rng: np.random.Generator) -> list[Question]:
    """Questions about two or three pictures: shapes in all of them, or numbers in all of them."""
    task = "two images" if len(group) == 2 else "three images"
    ordinals = ORDINALS[: len(group)]
    asked = [
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
        asked += which(f"Which image has the {larger} number?", numbers)
        return asked
    counts = [len(picture.shapes) for picture in group]
    asked += which(f"Which image has {more} shapes?", counts)
    for ordinal, picture, count in zip(ordinals, group, counts, strict=True):
        asked.append(Question("counting in images", f"How many shapes are in the {ordinal} image?", str(count)))
        for name, shape in _unique(picture):
            if name == shape.kind:
                text = f"What colour is the {name} in the {ordinal} image?"
                asked.append(Question("colours in images", text, shape.colour))
    for field, form in (("kind", "{}"), ("colour", "{} shape")):
        held = [{getattr(shape, field) for shape in picture.shapes} for picture in group]
        for value in sorted(set.union(*held)):
            asked += which(f"Which image has {article(form.format(value))}?", [value in values for values in held])
        if counts == [1, 1]:
            same = "yes" if held[0] == held[1] else "no"
            what = "of the same kind" if field == "kind" else "of the same colour"
            asked.append(Question(task, f"Are both shapes {what}?", same))
    return asked
