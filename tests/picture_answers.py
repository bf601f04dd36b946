"""What the right answer to a question about drawn pictures is, worked out from the pictures' fields alone."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

import numpy as np
from hypothesis import strategies as st

from dsvl2_jax.apps.micro.pictures import KINDS, Bar, Picture, Shape
from dsvl2_jax.apps.micro.questions import Question, comparisons, questions_about
from dsvl2_jax.apps.micro.synthetic import MAKERS
from dsvl2_jax.infer.eval import metrics
from dsvl2_jax.inputs.grounding import Box, parse_boxes

NUMBERS = ("first", "second", "third")

seeds = st.integers(0, 2**31 - 1)
groups = st.builds(lambda seed, maker: MAKERS[maker](np.random.default_rng(seed)), seeds, st.sampled_from(list(MAKERS)))


def asked(group: Sequence[Picture], seed: int) -> list[Question]:
    rng = np.random.default_rng(seed)
    return questions_about(group[0], rng) if len(group) == 1 else comparisons(group, rng)


def the(name: str, picture: Picture) -> Shape:
    """The only shape that a name without its article means."""
    colour, _, kind = name.rpartition(" ")
    found = [s for s in picture.shapes if kind in (s.kind, "shape") and colour in (s.colour, "")]
    assert len(found) == 1, f"{name!r} means {len(found)} shapes"
    return found[0]


def the_bar(name: str, picture: Picture) -> Bar:
    """The only bar of a letter ("bar A") or colour ("the red bar")."""
    word = re.fullmatch(r"(?:the (\w+) bar|bar ([A-E]))", name)
    (found,) = (b for b in picture.chart.bars if word[1] == b.colour or word[2] == b.letter)
    return found


def the_box(name: str, picture: Picture) -> tuple[int, int, int, int]:
    if name in ("the number", "the word"):
        return picture.writing.box
    return the_bar(name, picture).box if picture.chart else the(name.removeprefix("the "), picture).box


def kind_of(plural: str) -> str:
    (found,) = (kind for kind in KINDS if plural in (f"{kind}s", f"{kind}es"))
    return found


def side(name: str, other: str, axis: int, picture: Picture) -> str:
    first, second = (the(n, picture).box for n in (name, other))
    apart = first[axis] + first[axis + 2] - second[axis] - second[axis + 2]
    assert abs(apart) / 2 >= 0.148 * picture.size[axis], "too near to each other to ask"
    return ("left", "right") if apart < 0 and axis == 0 else ("above",) if apart < 0 else ("right", "below")[axis]


def described(picture: Picture) -> Counter:
    """What a caption has to say, as (what, its properties)."""
    if picture.chart:
        return Counter([("chart",), *(("bar", b.colour, b.letter, b.value) for b in picture.chart.bars)])
    said = Counter(("shape", s.colour, s.kind, s.place) for s in picture.shapes)
    if picture.writing:
        what = "number" if picture.writing.text.isdigit() else "word"
        said[what, picture.writing.text, picture.writing.colour] += 1
    return said


CLAUSES = (
    (r"a bar chart", lambda m: ("chart",)),
    (r"(\w+) ([A-E]) is (\d+)", lambda m: ("bar", m[1], m[2], int(m[3]))),
    (r"the (number|word) (\w+) in (\w+)", lambda m: (m[1], m[2], m[3])),
    (r"an? (\w+) (\w+) (?:in the|on the|at the) (.+)", lambda m: ("shape", m[1], m[2], m[3])),
)


def read(caption: str) -> list[tuple]:
    """What a caption says, clause by clause, in the form of `described`."""
    found = []
    for clause in re.split(r": |, | and ", caption):
        ((match, form),) = ((m, form) for pattern, form in CLAUSES if (m := re.fullmatch(pattern, clause)))
        found.append(form(match))
    return found


# Question → its answer, from the match and the picture. Boxes and captions are compared otherwise.
SINGLE = (
    (r"What colour is the (number|word)\?", lambda m, p: p.writing.colour),
    (r"What colour is (bar [A-E])\?", lambda m, p: the_bar(m[1], p).colour),
    (r"What (?:colour is|is the colour of) the (\w+)\?", lambda m, p: the(m[1], p).colour),
    (r"What is the (\w+ shape)\?", lambda m, p: the(m[1], p).kind),
    (r"What is the value of (.+)\?", lambda m, p: str(the_bar(m[1], p).value)),
    (r"Where is the (.+)\?", lambda m, p: the(m[1], p).place),
    (r"(How many shapes are there\?|Count the shapes\.)", lambda m, p: str(len(p.shapes))),
    (r"How many digits are there\?", lambda m, p: str(len(p.writing.text))),
    (r"How many bars are there\?", lambda m, p: str(len(p.chart.bars))),
    (r"How many (\w+) shapes are there\?", lambda m, p: str(sum(s.colour == m[1] for s in p.shapes))),
    (r"How many (\w+) are there\?", lambda m, p: str(sum(s.kind == kind_of(m[1]) for s in p.shapes))),
    (r"Is the (.+) left or right of the (.+)\?", lambda m, p: side(m[1], m[2], 0, p)),
    (r"Is the (.+) above or below the (.+)\?", lambda m, p: side(m[1], m[2], 1, p)),
    (r"Is there an? (\w+ \w+)\?", lambda m, p: "yes" if m[1] in [f"{s.colour} {s.kind}" for s in p.shapes] else "no"),
    (r"(What (number|word) is written\?|Read the (number|word)\.)", lambda m, p: p.writing.text),
    (r"Which bar is the (highest|lowest)\?", lambda m, p: extreme_bar(m[1], p)),
    (r"What is in each part of the image\?", lambda m, p: by_part(p)),
    (r"What is the (first|second|third|last) digit\?", lambda m, p: digit(m[1], p.writing.text)),
)


def by_part(picture: Picture) -> str:
    places = ("top left", "top", "top right", "left", "centre", "right", "bottom left", "bottom", "bottom right")
    held = {place: [f"{s.colour} {s.kind}" for s in picture.shapes if s.place == place] for place in places}
    assert sum(map(len, held.values())) == len(picture.shapes)
    said = {place: re.sub(", (?=[^,]*$)", " and ", ", ".join(names)) or "nothing" for place, names in held.items()}
    return ", ".join(f"{place} {names}" for place, names in said.items())


def digit(word: str, text: str) -> str:
    assert text.isdigit()
    return text[-1] if word == "last" else text[NUMBERS.index(word)]


def extreme_bar(word: str, picture: Picture) -> str:
    order = sorted(picture.chart.bars, key=lambda bar: bar.value, reverse=word == "highest")
    assert order[0].value != order[1].value, f"no bar alone is the {word}"
    return order[0].letter


def winner(values: Sequence[float]) -> str:
    assert values.count(max(values)) == 1, "no picture alone is meant"
    return f"the {NUMBERS[values.index(max(values))]}"


def numbered(word: str, group: Sequence[Picture]) -> Picture:
    return group[NUMBERS.index(word)]


def same(field: str, group: Sequence[Picture]) -> str:
    first, second = ([getattr(s, field) for s in p.shapes] for p in group)
    assert len(first) == len(second) == 1
    return "yes" if first == second else "no"


SEVERAL = (
    (
        r"Which image has (?:the )?(?:larger|largest) number\?",
        lambda m, g: winner([int(p.writing.text) for p in g]),
    ),
    (r"Which image has (?:the )?(?:more|most) shapes\?", lambda m, g: winner([len(p.shapes) for p in g])),
    (r"How many shapes are in the (\w+) image\?", lambda m, g: str(len(numbered(m[1], g).shapes))),
    (r"What colour is the (\w+) in the (\w+) image\?", lambda m, g: the(m[1], numbered(m[2], g)).colour),
    (r"Which image has an? (\w+) shape\?", lambda m, g: winner([any(s.colour == m[1] for s in p.shapes) for p in g])),
    (r"Which image has an? (\w+)\?", lambda m, g: winner([any(s.kind == m[1] for s in p.shapes) for p in g])),
    (r"Are both shapes of the same (kind|colour)\?", lambda m, g: same(m[1], g)),
)


def work_out(text: str, group: Sequence[Picture]) -> str:
    for pattern, answer in SINGLE if len(group) == 1 else SEVERAL:
        if match := re.fullmatch(pattern, text):
            found = answer(match, group[0] if len(group) == 1 else group)
            return found if isinstance(found, str) else found[0]
    raise AssertionError(f"a question of an unknown form: {text!r}")


def assert_right(question: Question, group: Sequence[Picture]) -> None:
    """The answer follows from the pictures, and so does what it is scored by."""
    text, picture = question.text, group[-1]
    if located := re.fullmatch(r"(?:Locate )?<\|ref\|>(.+)<\|/ref\|>(?: in the image\.)?", text):
        assert question.metric == "iou" and question.boxes == (the_box(located[1], picture),)
        (box,) = parse_boxes(question.answer, [picture.size])
        assert box.label == located[1]
        assert_near(box, question.boxes[0], picture.size)
    elif text == "<|grounding|>Describe the image.":
        boxes = parse_boxes(question.answer, [picture.size])
        assert len(boxes) == len(picture.shapes)
        for box, shape in zip(boxes, picture.shapes, strict=True):
            assert box.label == f"{'an' if shape.colour == 'orange' else 'a'} {shape.colour} {shape.kind}"
            assert_near(box, shape.box, picture.size)
    elif text in ("Describe the image.", "What is in the image?"):
        said = read(question.answer)
        assert Counter(said) == described(picture)
        shapes = [clause[1:] for clause in said if clause[0] == "shape"]
        assert shapes == [(s.colour, s.kind, s.place) for s in picture.shapes]  # from left to right
        assert question.metric == "facts" and metrics.facts(question.answer, question.facts) == 1
        assert [read(fact) for fact in question.facts] == [[clause] for clause in said]
    elif told := re.fullmatch(r"Describe the (\w+) image\.", text):
        assert Counter(read(question.answer)) == described(numbered(told[1], group))
    else:
        assert question.metric == "exact" and question.answer == work_out(text, group), text
        assert metrics.exact(question.answer, [question.answer]) == 1


def assert_near(box: Box, said: tuple[int, ...], size: tuple[int, int]) -> None:
    """Coordinates up to 999 tell single pixels of sides up to there."""
    for found, expected, length in zip((box.x1, box.y1, box.x2, box.y2), said, size * 2, strict=True):
        assert found == expected or (length > 999 and abs(found - expected) <= 2)
