"""What is wrong with a grammar is said, and what would cost too much is refused."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from constrained import accepts, compiler_of

from dsvl2_jax import configs
from dsvl2_jax.errors import UsageError
from dsvl2_jax.infer import constraints
from dsvl2_jax.infer.constraints import ConstraintError, GrammarCompiler


@pytest.fixture(scope="module")
def bundled() -> GrammarCompiler:
    return compiler_of(Path(configs.__file__).parent / "micro")


@pytest.mark.parametrize(
    ("expression", "message"),
    [
        (5, "must be a string that is not empty, not 5"),
        ("", 'must be a string that is not empty, not ""'),
        ("a\ud800", "lone surrogate"),
        ("a(b", "unclosed group"),
        ("(?=a)b", "look-ahead"),
        (r"(a)\1", "backreferences are not supported"),
        (r"\bfoo", "WordUnicode"),
        ("a\\", "backslash that escapes nothing"),
        (r"[^\s\S]", "no text of this model's tokens fits it"),
        ("a" * 5000, r"5,000 characters; expected at most 4,096"),
        ("a*b*" * 1000, "too complex"),
        ("(" * 300 + "a" + ")" * 300, "nested"),
    ],
)
def test_wrong_expressions_name_the_field(bundled, expression, message):
    for _ in range(2):  # also when remembered
        with pytest.raises(UsageError, match=f"^body.regex: .*{message}") as error:
            bundled.regex(expression, field="body.regex")
        assert "\n" not in str(error.value) and "start:" not in str(error.value)


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ("yes", r'choice: must be a list of strings with at least one of them, not "yes"'),
        (None, r"choice: must be a list"),
        ([], r"choice: must be a list of strings with at least one of them, not \[\]"),
        (["a", ""], r"choice\[1\]: must be a string that is not empty"),
        (["a", 3], r"choice\[1\]: .* not 3"),
        (["a\ud800"], r"choice\[0\]: .* lone surrogate"),
        (["x" * 70_000], "choice: .* 65,536 bytes"),
    ],
)
def test_wrong_choices_name_the_field(bundled, choices, message):
    with pytest.raises(UsageError, match=f"^{message}"):
        bundled.choice(choices)


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ([], "must be a JSON schema, which is an object"),
        (True, "must be a JSON schema"),
        ({"type": "objct"}, "Invalid type: objct"),
        ({"type": "string", "format": "zzz"}, "Unknown format: zzz"),
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"oneOf": [{"type": "string"}, {"minLength": 3}]}, "use anyOf"),
        ({"$ref": "#/$defs/none"}, r"'/\$defs/none' does not exist"),
        ({"$ref": "https://example.com/schema"}, "does not fetch"),
        ({"$ref": "#"}, "no text of this model's tokens fits it"),
        ({"type": "string", "minLength": 5, "maxLength": 3}, "Unsatisfiable"),
        ({"enum": [float("nan")]}, "not JSON"),
        ({"enum": [{1}]}, "not JSON"),
        ({"pattern": "(a"}, "unclosed group"),
        ({"pattern": "a" * 5000}, "5,000 characters in its regular expressions together"),
        (
            {"patternProperties": {"^a": {"pattern": "b" * 4095}}},
            "4,097 characters in its regular expressions together",
        ),
        (
            {"properties": {f"p{i}": {"pattern": "a" * 100} for i in range(50)}},
            "5,000 characters in its regular expressions together",
        ),
        ({"anyOf": [{"properties": {f"p{i}": {} for i in range(600)}}] * 2}, "1,200 properties together"),
        ({"required": [f"p{i}" for i in range(1001)]}, "1,001 names in required together"),
        ({"items": {"patternProperties": {f"^{i}": {} for i in range(33)}}}, "33 patternProperties together"),
        ({"items": [{"multipleOf": 99_999}]}, "multipleOf"),
        ({"allOf": [{"multipleOf": 0.997}, {"multipleOf": 991}]}, "multipleOf"),
        ({"description": "x" * 70_000}, "expected at most 65,536"),
        ({"x-guidance": {"lenient": True}}, "x-guidance"),
    ],
)
def test_wrong_schemas_name_the_field(bundled, schema, message):
    with pytest.raises(UsageError, match=f"^response_format.schema: .*{message}") as error:
        bundled.json_schema(schema, field="response_format.schema")
    assert "\n" not in str(error.value)


def test_an_object_may_have_as_many_optional_properties_as_are_allowed(bundled):
    names = [f"p{number}" for number in range(constraints.MAX_PROPERTIES)]
    grammar = bundled.json_schema({"type": "object", "properties": {name: {"type": "integer"} for name in names}})
    assert accepts(grammar, json.dumps(dict.fromkeys(names[::300], 1)))
    assert not accepts(grammar, json.dumps({names[0]: "one"}))


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {}
    for _ in range(depth):
        schema = {"items": schema}
    return schema


def test_schemas_nested_too_deeply_are_refused(bundled):
    for depth in (300, 3000):
        with pytest.raises(UsageError, match="json_schema: "):
            bundled.json_schema(nested(depth))
    circle: dict[str, Any] = {}
    circle["items"] = circle
    with pytest.raises(UsageError, match="not JSON"):
        bundled.json_schema(circle)


@pytest.mark.parametrize(
    ("opening", "closing", "depth"), [('{"items":', "}", 110), ('{"additionalProperties":', "}", 110)]
)
def test_long_chains_of_references_do_not_end_the_process(bundled, opening, closing, depth):
    """They need more stack than a thread has: 8 MB end the process at 600 of them."""

    def part(number: int) -> str:
        reference = f'{{"$ref":"#/$defs/{number + 1}"}}'
        return f'"{number}":' + opening * depth + reference + closing * depth

    count = 64_000 // len(part(1000))
    parts = ",".join(part(number) for number in range(count))
    grammar = bundled.json_schema(json.loads(f'{{"$ref":"#/$defs/0","$defs":{{{parts},"{count}":{{}}}}}}'))
    assert accepts(grammar, "[[[1]]]") and accepts(grammar, '{"a": {"a": {}}}')


def test_an_answer_does_not_fail_because_of_others(bundled, monkeypatch):
    """Answers share an automaton of a greatest size. Who finds it full goes on with a new one."""
    monkeypatch.setattr(constraints, "MAX_LEXER_STATES", 400)
    compiler = GrammarCompiler(bundled.tokenizer, bundled.vocab_rows)
    grammar = compiler.regex("(a|b)*a(a|b){60}")
    letters = {letter: compiler.tokenizer.encode(letter)[0] for letter in "ab"}

    def follow(seed: int, length: int) -> list[np.ndarray]:
        random_, matcher, masks = random.Random(seed), grammar.matcher(), []
        for _ in range(length):
            masks.append(matcher.mask())
            matcher.advance(letters[random_.choice("ab")])
        return masks

    first = follow(0, 60)
    for seed in range(1, 12):
        follow(seed, 60)
    assert all(map(np.array_equal, first, follow(0, 60)))
    with pytest.raises(ConstraintError, match=r"cannot be followed after \d+ tokens: it is too complex"):
        follow(0, 2000)
    assert all(map(np.array_equal, first, follow(0, 60)))
