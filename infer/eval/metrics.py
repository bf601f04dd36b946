"""Scores of one answer, by the definitions of the benchmarks' papers. Pure functions: text or boxes in, 0 to 1 out.

`docs/evaluation.md` says which benchmark uses which.

>>> exact("A red star.", ["a red star"]), anls("Helo", ["hello"]), relaxed("104", ["100"])
(1.0, 0.8, 1.0)
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

ANLS_THRESHOLD = 0.5
RELAXED_TOLERANCE = 0.05
IOU_THRESHOLD = 0.5
VQA_AGREEING = 3  # annotators who make an answer wholly right

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"

_NUMBER = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)(e[+-]?\d+)?%?", re.IGNORECASE)
_CLAUSE_END = re.compile(r"[.,;:]|\band\b", re.IGNORECASE)

# What the VQA evaluation does to answers before it compares them.
_VQA_NUMBERS = {"none": "0"} | {
    word: str(number)
    for number, word in enumerate(
        ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
    )
}
_VQA_ARTICLES = frozenset({"a", "an", "the"})
_VQA_PUNCTUATION = ';/[]"{}()=+\\_-><@`!'  # commas and question marks have gone before
_VQA_PERIOD = re.compile(r"\.(?!\d)")
# Contractions as people write them without the apostrophe, or one of the two, to how they are spelt. The evaluation
# has them for I as well, but compares in lower case, where they never match.
_CONTRACTIONS = (
    "ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd "
    "he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've "
    "needn't not've o'clock oughtn't shan't she'd've should've shouldn't shouldn't've somebody'd somebody'd've "
    "somebody'll somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll "
    "that's there'd there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've "
    "we've weren't what'll what're what's what've when's where'd where's where've who'd who'd've who'll who's "
    "who've why'll why're why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've "
    "you'll you're you've"
)
_VQA_CONTRACTIONS = {
    word[:at] + word[at + 1 :]: word
    for word in _CONTRACTIONS.split()
    for at, character in enumerate(word)
    if character == "'"
}


def normalise(text: str) -> str:
    """Case folded, spaces at the ends dropped and inner ones made one, a final full stop dropped."""
    return " ".join(text.casefold().split()).removesuffix(".").rstrip()


def exact(answer: str, references: Sequence[str]) -> float:
    """1 when the answer equals a reference after `normalise`, else 0."""
    return float(normalise(answer) in {normalise(reference) for reference in references})


def contains(answer: str, references: Sequence[str]) -> float:
    """1 when a reference is somewhere in the answer (OCRBench), in lower case with single spaces; else 0."""
    return float(any(_spaced(reference) in _spaced(answer) for reference in references))


def anls(answer: str, references: Sequence[str]) -> float:
    """Average normalised Levenshtein similarity of one question (ST-VQA, DocVQA, InfographicVQA).

    1 − NL for the nearest reference, where NL is the edit distance over the longer text's length, both in lower case
    with single spaces; 0 where NL is 0.5 or more.
    """
    return max(_similarity(_spaced(answer), _spaced(reference)) for reference in references)


def relaxed(answer: str, references: Sequence[str]) -> float:
    """Relaxed accuracy (ChartQA): numbers may be 5 % off, other texts must be equal but for case.

    A number may end in ``%``, which divides it by 100, so that 5% is 0.05. A reference of 0 needs 0. As in the
    published evaluation, 1,000 with its comma is a text.
    """
    return float(any(_relaxed_match(answer.strip(), reference.strip()) for reference in references))


def vqa(answer: str, references: Sequence[str]) -> float:
    """VQA accuracy (TextVQA): min(agreeing / 3, 1), averaged over leaving out each of the (ten) annotators.

    Raises ValueError with fewer than two references: none would be left.
    """
    if len(references) < 2:
        raise ValueError(f"VQA accuracy needs the answers of several annotators, found {len(references)}")
    normalised = vqa_normalise(answer)
    agreeing = [vqa_normalise(reference) == normalised for reference in references]
    total = sum(agreeing)
    return sum(min((total - agrees) / VQA_AGREEING, 1.0) for agrees in agreeing) / len(agreeing)


def vqa_normalise(text: str) -> str:
    """The VQA evaluation's form of an answer.

    Lower case without commas, question marks, punctuation, articles and full stops that begin no decimal; number
    words up to ten as digits; ``'s`` apart; apostrophes put back into contractions.
    """
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    text = text.replace("\n", " ").replace("\t", " ").strip()
    original = text
    for mark in _VQA_PUNCTUATION:
        # A mark beside a space separates nothing; one within a word does.
        at_space = f"{mark} " in original or f" {mark}" in original
        text = text.replace(mark, "" if at_space else " ")
    words = [_VQA_NUMBERS.get(word, word) for word in _VQA_PERIOD.sub("", text).split()]
    return " ".join(_VQA_CONTRACTIONS.get(word, word) for word in words if word not in _VQA_ARTICLES)


def choice(answer: str, choices: Sequence[str], reference: str) -> float:
    """1 when `chosen` finds the reference, a letter or the text of one of the choices, in the answer; else 0.

    Raises ValueError when the reference is neither.
    """
    right = choice_letter(reference, choices)
    if right is None:
        raise ValueError(f"{reference!r} is neither a letter up to {LETTERS[len(choices) - 1]} nor one of the choices")
    return float(chosen(answer, choices) == right)


def choice_letter(reference: str, choices: Sequence[str]) -> str | None:
    """The letter that a reference means: a letter itself before a choice's text; None when it is neither."""
    letters, reference = LETTERS[: len(choices)], reference.strip()
    if len(reference) == 1 and reference.upper() in letters:
        return reference.upper()
    texts = [normalise(text) for text in choices]
    return letters[texts.index(normalise(reference))] if normalise(reference) in texts else None


def chosen(answer: str, choices: Sequence[str]) -> str | None:
    """The letter of the choice that an answer names, or None when it names none or several. The first that holds:

    1. it is a letter, or begins with one that is set off: ``B``, ``(b)``, ``B. a dog``, ``**B**``;
    2. it is the text of one choice;
    3. it says which: ``the answer is B``, ``option (B)``; of several sentences the last;
    4. it has one letter in brackets, or one capital other than A and I standing alone;
    5. it has the text of one choice in it.
    """
    letters, answer = LETTERS[: len(choices)], answer.strip().replace("*", "")
    letter = f"[{letters}{letters.lower()}]"
    start = re.match(rf"\(({letter})\)|({letter})(?:[.):,]|\s*$|\s*\n)", answer)
    if start:
        return (start[1] or start[2]).upper()
    texts = [normalise(text) for text in choices]
    if texts.count(normalise(answer)) == 1:
        return letters[texts.index(normalise(answer))]
    # A small letter, A or I after such words is a choice unless a word follows, as in "the answer is a dog".
    stated = re.findall(
        r"\b(?i:answer|option|choice)(?i:\s+is)?\s*:?\s*(?i:option\s+|choice\s+)?"
        rf"(?:\(({letter})\)|(?=[B-HJ-Z])([{letters}])(?![\w'’])|({letter})(?![\w'’])(?!\s+(?!because|since|as\b)\w))",
        answer,
    )
    if stated:
        return "".join(stated[-1]).upper()
    for pattern in (rf"\(([{letters}])\)", rf"(?<![\w'’])([{letters}])(?![\w'’])"):
        candidates = set(re.findall(pattern, answer)) - (set() if pattern.startswith(r"\(") else {"A", "I"})
        if len(candidates) == 1:
            return candidates.pop()
    within = [text for text in texts if text and re.search(rf"(?<!\w){re.escape(text)}(?!\w)", normalise(answer))]
    longest = [text for text in within if not any(text != other and text in other for other in within)]
    return letters[texts.index(longest[0])] if len(longest) == 1 and texts.count(longest[0]) == 1 else None


def iou(box: Sequence[float], reference: Sequence[float]) -> float:
    """Intersection over union of two boxes x1, y1, x2, y2; 0 for one without area, corners in the wrong order too."""
    width = min(box[2], reference[2]) - max(box[0], reference[0])
    height = min(box[3], reference[3]) - max(box[1], reference[1])
    if width <= 0 or height <= 0:
        return 0.0
    areas = [(b[2] - b[0]) * (b[3] - b[1]) for b in (box, reference)]
    return width * height / (sum(areas) - width * height)


def boxes_iou(boxes: Sequence[Sequence[float]], references: Sequence[Sequence[float]]) -> float:
    """`iou` for n references and the first n boxes of an answer: the mean over n, best pairs first.

    With one reference, as in RefCOCO, it is the IoU of the first box; 0 when there is none.
    """
    boxes, total = list(boxes[: len(references)]), 0.0
    pairs = [(iou(box, reference), i, j) for i, box in enumerate(boxes) for j, reference in enumerate(references)]
    used_boxes, used_references = set(), set()
    for value, i, j in sorted(pairs, key=lambda pair: -pair[0]):
        if i not in used_boxes and j not in used_references:
            total += value
            used_boxes.add(i)
            used_references.add(j)
    return total / len(references)


def facts(answer: str, references: Sequence[str]) -> float:
    """How many facts an answer has right: |clauses ∩ facts| / max(|clauses|, |facts|).

    Clauses are what lies between ``. , ; :`` and the word "and", normalised. One said twice counts twice, so that
    neither a missing nor a repeated clause is free. No clause and no fact: 1.
    """
    clauses = Counter(filter(None, map(normalise, _CLAUSE_END.split(answer))))
    expected = Counter(normalise(reference) for reference in references)
    most = max(clauses.total(), expected.total())
    return (clauses & expected).total() / most if most else 1.0


def edit_distance(first: str, second: str) -> int:
    """Levenshtein's: the least number of characters to insert, delete or replace."""
    if len(first) < len(second):
        first, second = second, first
    row = list(range(len(second) + 1))
    for i, a in enumerate(first, 1):
        before, row[0] = row[0], i
        for j, b in enumerate(second, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (a != b))
    return row[-1]


def _similarity(answer: str, reference: str) -> float:
    longest = max(len(answer), len(reference))
    distance = edit_distance(answer, reference) / longest if longest else 0.0
    return 1 - distance if distance < ANLS_THRESHOLD else 0.0


def _spaced(text: str) -> str:
    return " ".join(text.lower().split())


def _relaxed_match(answer: str, reference: str) -> bool:
    value, expected = _number(answer), _number(reference)
    if value is None or expected is None:
        return answer.lower() == reference.lower()
    return abs(value - expected) <= RELAXED_TOLERANCE * abs(expected)


def _number(text: str) -> float | None:
    if not _NUMBER.fullmatch(text):
        return None
    return float(text[:-1]) / 100 if text.endswith("%") else float(text)
