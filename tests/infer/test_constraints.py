"""Constrained decoding: whatever is drawn under the masks fits the grammar, and whatever fits it can be drawn."""

from __future__ import annotations

import concurrent.futures
import json
import random
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from constrained import TAGS, accepts, compiler_of, draw, full_directory, spell, written
from golden import DATA
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dsvl2_jax import configs
from dsvl2_jax.errors import TokenizerError, UsageError
from dsvl2_jax.infer.constraints import ConstraintError, GrammarCompiler
from dsvl2_jax.inputs.grounding import format_boxes, parse_boxes
from dsvl2_jax.inputs.tokenizer import DET_END_TOKEN, DET_TOKEN, REF_END_TOKEN, REF_TOKEN

SIZE = (999, 999)  # coordinates are pixels
seeds = st.integers(0, 2**32)
few = settings(max_examples=30)


@pytest.fixture(scope="module")
def bundled() -> GrammarCompiler:
    return compiler_of(Path(configs.__file__).parent / "micro")


@pytest.fixture(scope="module", params=["bundled", "mini-tiny", "full"])
def compiler(request, tmp_path_factory) -> GrammarCompiler:
    if request.param == "bundled":
        return request.getfixturevalue("bundled")
    if request.param == "full":
        return compiler_of(full_directory(tmp_path_factory.mktemp("full")))
    return compiler_of(DATA / "checkpoints" / request.param)


# Regular expressions and choices

EXPRESSIONS = [
    r"[0-9]{1,3}( (cats|dogs))?",
    r"^(?i:yes|no)[.!]?$",
    r"(?s).{3,5}",
    r"[^,]{0,8}(,[^,]{0,8}){2}",
    r"a/b\/c|\"'#//\n|\\",
    "é+(日本|😀)?\n?",
    r"(?P<year>[12][0-9]{3})-(0[1-9]|1[0-2])",
]


@pytest.mark.parametrize("expression", EXPRESSIONS)
@few
@given(seed=seeds)
def test_what_is_drawn_matches_the_regular_expression(compiler, expression, seed):
    text = draw(compiler.regex(expression), seed)
    assert re.fullmatch(expression, text), text


@pytest.mark.parametrize("expression", EXPRESSIONS)
@few
@given(data=st.data())
def test_what_matches_can_be_drawn_in_any_tokens(bundled, expression, data):
    text = data.draw(
        st.from_regex(expression, fullmatch=True).filter(lambda text: re.search("[\ud800-\udfff]", text) is None)
    )
    # Python's `$` lets a last newline follow, and the languages' case-folding differs outside ASCII.
    if (not text.isascii() and "(?i" in expression) or ("$" in expression and text.endswith("\n")):
        return
    assert accepts(bundled.regex(expression), text)
    assert accepts(bundled.regex(expression), text, random.Random(data.draw(seeds)))


@few
@given(data=st.data())
def test_choices_are_drawn_and_each_can_be(compiler, data):
    choices = data.draw(st.lists(st.text(min_size=1, max_size=8), min_size=1, max_size=5))
    grammar = compiler.choice(choices)
    assert draw(grammar, data.draw(seeds)) in choices
    assert all(accepts(grammar, choice) for choice in choices)
    other = data.draw(st.text(max_size=8))
    assert accepts(grammar, other) == (other in choices)


def test_the_end_is_allowed_where_the_grammar_may_end(bundled):
    eos = bundled.tokenizer.eos_id
    grammar = bundled.choice(["yes", "yes please"])
    matcher = spell(grammar, "ye")
    assert not matcher.mask()[eos] and not matcher.finished
    with pytest.raises(ConstraintError, match=r"is not allowed after .* tokens of an answer under a choice"):
        matcher.advance(eos)
    matcher = spell(grammar, "yes")
    assert matcher.mask()[eos] and matcher.mask().sum() > 1 and not matcher.finished
    matcher.advance(eos)
    assert matcher.finished
    with pytest.raises(ConstraintError, match="has ended"):
        matcher.mask()
    with pytest.raises(ConstraintError, match="not allowed"):
        matcher.advance(eos)
    matcher = spell(grammar, "yes please")
    assert matcher.finished and np.flatnonzero(matcher.mask()).tolist() == [eos]
    with pytest.raises(ConstraintError, match="not allowed"):
        matcher.advance(bundled.tokenizer.encode("!")[0])
    matcher.advance(eos)


@pytest.mark.parametrize("text", ["", "7", "7 c", "7 cats"])
def test_exactly_what_the_mask_allows_can_follow(bundled, text):
    grammar = bundled.regex(EXPRESSIONS[0])
    matcher = spell(grammar, text)
    mask = matcher.mask()
    for token in (-1, *np.flatnonzero(~mask), bundled.vocab_rows, 2**40):
        with pytest.raises(ConstraintError, match=f"token {token} "):
            matcher.advance(token)
    assert np.array_equal(matcher.mask(), mask)  # nothing has changed
    for token in np.flatnonzero(mask):
        spell(grammar, text).advance(token)


# JSON

LABELLED = {
    "type": "object",
    "properties": {
        "label": {"type": "string", "minLength": 1, "maxLength": 12},
        "kind": {"enum": ["cat", "dog", 3, None]},
        "score": {"type": "number", "minimum": 0, "maximum": 1},
        "boxes": {
            "type": "array",
            "items": {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 999}, "minItems": 4},
            "maxItems": 2,
        },
        "price": {"type": "integer", "multipleOf": 25, "maximum": 1000, "minimum": 0},
    },
    "required": ["label", "kind", "score"],
    "additionalProperties": False,
}
TREE = {
    "$ref": "#/$defs/node",
    "$defs": {
        "node": {
            "type": "object",
            "properties": {
                "name": {"type": "string", "pattern": "^[a-z]{1,5}$"},
                "children": {"type": "array", "items": {"$ref": "#/$defs/node"}, "maxItems": 2},
            },
            "required": ["name"],
            "additionalProperties": False,
        }
    },
}


def fits(value: Any, schema: dict[str, Any], root: dict[str, Any]) -> bool:
    """Whether JSON fits a schema of the keywords above, and has no more of an object's keys than it names."""
    if "$ref" in schema:
        return fits(value, root["$defs"][schema["$ref"].rpartition("/")[2]], root)
    if "enum" in schema:
        return any(value == choice and type(value) is type(choice) for choice in schema["enum"])
    if schema["type"] == "object":
        named = schema["properties"]
        return (
            isinstance(value, dict)
            and set(schema["required"]) <= value.keys() <= named.keys()
            and all(fits(inner, named[key], root) for key, inner in value.items())
        )
    if schema["type"] == "array":
        few_enough = isinstance(value, list) and schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", 99)
        return few_enough and all(fits(inner, schema["items"], root) for inner in value)
    if schema["type"] == "string":
        long_enough = isinstance(value, str) and schema.get("minLength", 0) <= len(value) <= schema.get("maxLength", 99)
        return long_enough and re.search(schema.get("pattern", ""), value) is not None
    numbers = (int,) if schema["type"] == "integer" else (int, float)
    in_range = isinstance(value, numbers) and schema["minimum"] <= value <= schema["maximum"]
    return in_range and value % schema.get("multipleOf", value or 1) == 0


@pytest.mark.parametrize("schema", [LABELLED, TREE])
@few
@given(seed=seeds)
def test_what_is_drawn_fits_the_schema(compiler, schema, seed):
    value = json.loads(draw(compiler.json_schema(schema), seed))
    assert fits(value, schema, schema), value


@few
@given(seed=seeds)
def test_what_is_drawn_is_a_json_object(compiler, seed):
    assert isinstance(json.loads(draw(compiler.json_object(), seed)), dict)


labelled = st.fixed_dictionaries(
    {
        "label": st.text(min_size=1, max_size=12),
        "kind": st.sampled_from(["cat", "dog", 3, None]),
        "score": st.floats(0.001, 1),
    },
    optional={
        "boxes": st.lists(st.lists(st.integers(0, 999), min_size=4, max_size=5), max_size=2),
        "price": st.integers(0, 40).map(lambda n: 25 * n),
    },
)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
styles = st.sampled_from([{}, {"indent": 2}, {"indent": 4}, {"indent": "\t"}, {"separators": (",", ":")}])


def written_json(value: Any, style: dict[str, Any]) -> str:
    return json.dumps(value, ensure_ascii=False, **style).replace("\x7f", "\\u007f")


@few
@given(value=labelled, style=styles, seed=seeds)
def test_json_that_fits_the_schema_can_be_drawn(bundled, value, style, seed):
    in_order = {key: value[key] for key in LABELLED["properties"] if key in value}
    text = written_json(in_order, style)
    assert accepts(bundled.json_schema(LABELLED), text, random.Random(seed))


@few
@given(value=st.dictionaries(st.text(max_size=4), values, max_size=3), style=styles)
def test_every_json_object_can_be_drawn(bundled, value, style):
    assert accepts(bundled.json_object(), written_json(value, style))


@pytest.mark.parametrize(
    "value",
    [
        {"label": "", "kind": "cat", "score": 1},
        {"label": "a", "kind": "cow", "score": 1},
        {"label": "a", "kind": "cat", "score": 1.5},
        {"label": "a", "kind": "cat"},
        {"label": "a", "kind": "cat", "score": 1, "other": 1},
        {"label": "a", "kind": "cat", "score": 1, "price": 26},
        [],
    ],
)
def test_json_that_does_not_fit_cannot_be_drawn(bundled, value):
    assert not accepts(bundled.json_schema(LABELLED), json.dumps(value))


def test_json_is_not_filled_with_white_space(bundled):
    assert not accepts(bundled.json_object(), "{  }")
    assert not accepts(bundled.json_object(), "{\n\n}")


# Grounding

GROUNDED = re.compile(
    r"([^<]|<(?!\|/?(ref|det)\|>))*"
    r"(<\|ref\|>([^<]|<(?!\|/?(ref|det)\|>))+<\|/ref\|><\|det\|>"
    r"\[(\[\d{1,3}(, \d{1,3}){3}\])(, (\[\d{1,3}(, \d{1,3}){3}\]))*\]<\|/det\|>"
    r"([^<]|<(?!\|/?(ref|det)\|>))*)*"
)


@settings(max_examples=60)
@given(seed=seeds)
def test_boxes_that_are_drawn_are_well_formed_and_ordered(compiler, seed):
    text = draw(compiler.grounding(), seed)
    assert GROUNDED.fullmatch(text), text
    boxes = parse_boxes(text, [SIZE])
    inside = re.findall(r"<\|det\|>(.*?)<\|/det\|>", text)
    assert len(boxes) == sum(content.count("], [") + 1 for content in inside)
    for box in boxes:
        assert 0 <= box.x1 <= box.x2 <= 999 and 0 <= box.y1 <= box.y2 <= 999


edges = st.sampled_from([0, 1, 9, 10, 11, 19, 90, 99, 100, 101, 110, 199, 200, 909, 990, 998, 999])
coordinates = st.integers(0, 999) | edges
texts = st.text(max_size=8).filter(lambda text: not any(tag in text for tag in TAGS))
labels = texts.filter(bool)


@settings(max_examples=150)
@given(x1=coordinates, y1=coordinates, x2=coordinates, y2=coordinates, label=labels)
@example(x1=5, y1=0, x2=10, y2=0, label="<|")
@example(x1=999, y1=999, x2=999, y2=999, label="[[1, 2, 3, 4]]")
def test_a_box_can_be_drawn_if_its_corners_are_ordered(bundled, x1, y1, x2, y2, label):
    text = f"{REF_TOKEN}{label}{REF_END_TOKEN}{DET_TOKEN}[[{x1}, {y1}, {x2}, {y2}]]{DET_END_TOKEN}"
    assert accepts(bundled.grounding(), text) == (x1 <= x2 and y1 <= y2)


ordered = st.tuples(coordinates, coordinates, coordinates, coordinates).map(
    lambda box: (min(box[0], box[2]), min(box[1], box[3]), max(box[0], box[2]), max(box[1], box[3]))
)


@few
@given(
    before=texts,
    objects=st.lists(st.tuples(labels, st.lists(ordered, min_size=1, max_size=3)), max_size=3),
)
def test_what_the_project_writes_can_be_drawn(compiler, before, objects):
    text = before + " and ".join(format_boxes(label, boxes, SIZE) for label, boxes in objects) + "."
    assert accepts(compiler.grounding(), text)


@pytest.mark.parametrize(
    "text",
    [
        "<|det|>[[1, 2, 3, 4]]<|/det|>",
        "<|ref|><|/ref|><|det|>[[1, 2, 3, 4]]<|/det|>",
        "<|ref|>a<|/ref|>",
        "<|ref|>a<|/ref|> <|det|>[[1, 2, 3, 4]]<|/det|>",
        "<|ref|>a<|/ref|><|det|>[]<|/det|>",
        "<|ref|>a<|/ref|><|det|>[[1, 2, 3]]<|/det|>",
        "<|ref|>a<|/ref|><|det|>[[1, 2, 3, 4],]<|/det|>",
        "<|ref|>a<|/ref|><|det|>[[01, 2, 3, 4]]<|/det|>",
        "<|ref|>a<|/ref|><|det|>[[1, 2, 3, 1000]]<|/det|>",
        "<|ref|>a<|/ref|><|det|>[[1, 2, 3, 4]]",
    ],
)
def test_malformed_boxes_cannot_be_drawn(bundled, text):
    assert not accepts(bundled.grounding(), text)


def test_tags_are_special_tokens_and_never_spelled(bundled):
    grammar = bundled.grounding()
    ordinary = bundled.tokenizer.encode("a <|det|", special=False)
    matcher = grammar.matcher()
    for token in ordinary:
        matcher.advance(token)
    last = bundled.tokenizer.encode(">", special=False)
    with pytest.raises(ConstraintError):
        matcher.advance(last[0])


# Tokenizers


def test_special_tokens_never_stand_for_text(compiler):
    tokenizer = compiler.tokenizer
    text = "a <image> <think> <|ref|> </think> <|EOT|>"
    for grammar in (compiler.choice([text]), compiler.regex(r"a <image> <think> <\|ref\|> </think> <\|EOT\|>")):
        matcher = grammar.matcher()
        for token in tokenizer.encode(text, special=False):
            assert matcher.mask()[sorted(tokenizer.all_special_ids)].sum() == 0
            matcher.advance(token)
        assert matcher.finished


def test_characters_among_the_added_tokens_can_be_spelled(tmp_path):
    """The tokenizer of the small model has bytes missing from its vocabulary, and characters of their names added."""
    document = json.loads((DATA / "checkpoints" / "mini-small" / "tokenizer.json").read_text(encoding="utf-8"))
    model = document["model"]
    model["vocab"]["not a byte"] = model["vocab"].pop("ö")
    added = {"content": "ö", "id": 976, "special": False, "normalized": True}
    document["added_tokens"] = [token for token in document["added_tokens"] if token["id"] < 976]
    document["added_tokens"].append(added | dict.fromkeys(("single_word", "lstrip", "rstrip"), False))
    compiler = compiler_of(written(tmp_path, document))
    assert accepts(compiler.choice(["schön"]), "schön")
    assert draw(compiler.choice(["schön"]), 0) == "schön"


def test_tokenizers_without_tokenizer_json_are_refused(bundled, monkeypatch):
    monkeypatch.setattr(bundled.tokenizer._backend, "to_json", lambda: None)
    with pytest.raises(TokenizerError, match=r"constrained decoding .* found only tokenizer\.model.* transformers"):
        GrammarCompiler(bundled.tokenizer, bundled.vocab_rows)


def test_a_head_without_rows_for_the_tokens_is_refused(bundled):
    with pytest.raises(TokenizerError, match="600 rows"):
        GrammarCompiler(bundled.tokenizer, 600)


def test_the_extra_to_install_is_named(bundled, monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(UsageError, match=r"needs llguidance, which is not installed: pip install -e '\.\[serve\]'"):
        GrammarCompiler(bundled.tokenizer, bundled.vocab_rows)


# Sharing


def test_grammars_are_shared_by_threads(bundled):
    sources = [(seed, schema) for seed in range(12) for schema in (LABELLED, TREE)]

    def answer(source: tuple[int, dict[str, Any]]) -> str:
        seed, schema = source
        return draw(bundled.json_schema(schema), seed) + draw(bundled.grounding(), seed)

    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        together = list(pool.map(answer, sources))
    assert together == list(map(answer, sources))


def test_a_grammar_is_compiled_once(bundled):
    assert bundled.regex("a+b") is bundled.regex("a+b")
    assert bundled.json_schema(TREE) is bundled.json_schema(json.loads(json.dumps(TREE)))
    assert bundled.grounding() is bundled.grounding()
    assert repr(bundled.choice(["my secret"])) == "Grammar(kind='choice')"
