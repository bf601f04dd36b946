"""Constrained decoding: which tokens may come next, so that an answer keeps to a grammar.

The work is done by `llguidance` (the extra ``serve``), whose grammars are in its variant of Lark. Here its limits are
set, what a user gives is checked, and the model's own form of boxes is made a grammar (`grounding_grammar`).

    compiler = GrammarCompiler(tokenizer, vocab_rows)      # once per model; takes a second
    grammar = compiler.regex(r"[0-9]+ (cats|dogs)")        # shared by any number of answers
    matcher = grammar.matcher()                            # one answer's
    while not matcher.finished:
        matcher.advance(choose(logits, matcher.mask()))

A mask allows every token that keeps the answer the beginning of a text of the grammar, in whatever way that text is
split into tokens. Special tokens never stand for text: only `GrammarCompiler.grounding` has some of them.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import json
import math
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from decimal import Decimal
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np

from dsvl2_jax.errors import DSVL2Error, TokenizerError, UsageError
from dsvl2_jax.fields import literal
from dsvl2_jax.inputs.tokenizer import DET_END_TOKEN, DET_TOKEN, REF_END_TOKEN, REF_TOKEN, Tokenizer

if TYPE_CHECKING:
    import llguidance

_Result = TypeVar("_Result")

# What a grammar may cost at most. llguidance stops by itself where a grammar has too many symbols or states, but the
# time that it takes to read one is quadratic in an expression's length and in the number of properties, and linear in a
# multipleOf. Within these limits the worst that we know takes about a second.
MAX_SOURCE_BYTES = 65_536  # a JSON schema, or all choices together
MAX_PATTERN_CHARACTERS = 4_096  # a regular expression, or all of a schema's together
MAX_MULTIPLE = 50_000  # the sum, and the least common multiple, of all multipleOf in a schema
MAX_PROPERTIES = 1_000  # in a schema, wherever they are
MAX_PATTERN_PROPERTIES = 32  # each is compared with each
MAX_LEXER_STATES = 50_000  # about a kilobyte each
MAX_ITEMS = 4 * MAX_PROPERTIES + 1_000  # that may come next at one place; an optional property is four
CACHED_GRAMMARS = 16

# llguidance follows a schema's references by recursion, and a stack that overflows ends the process. The deepest
# schemas of MAX_SOURCE_BYTES need 130 MB; memory that is not touched costs nothing.
_STACK_BYTES = 512 << 20

# Without the option a text that the grammar determines would have to be split into tokens in one way only, in which a
# string such as "<image>" becomes the special token.
_HEADER = '%llguidance {"no_forcing": true}\n'

# One space, or a new line and its indentation: a model may not fill its answer with white space.
_JSON_WHITESPACE = r"( |\n[ \t]{0,40})"


class ConstraintError(DSVL2Error):
    """An answer cannot go on under its grammar."""


class GrammarCompiler:
    """Makes grammars for one model. May be used from several threads.

    Args:
      tokenizer: with a tokenizer.json.
      vocab_rows: rows of the output head, and so entries of a mask. Rows that no token has are never allowed.

    Raises:
      UsageError: llguidance is not installed.
      TokenizerError: the tokenizer is not one that llguidance reads.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_rows: int):
        llguidance = _library()
        tokenizer.check_fits(vocab_rows)
        self.tokenizer = tokenizer
        self.vocab_rows = vocab_rows
        self._limits = llguidance.LLParserLimits(
            max_lexer_states=MAX_LEXER_STATES, max_items_in_row=MAX_ITEMS, verbose_errors=False
        )
        try:
            rows = max(vocab_rows, len(tokenizer))  # ids above the rows are added tokens, which no text has
            self._tokens = llguidance.LLTokenizer(tokenizer.to_json(), n_vocab=rows, eos_token=tokenizer.eos_id)
        except (TokenizerError, ValueError) as error:
            raise TokenizerError(f"constrained decoding is not possible with this tokenizer. {error}") from error
        self._thread = _thread_with_stack(_STACK_BYTES)
        self._compiled = functools.lru_cache(CACHED_GRAMMARS)(self._compile)

    def json_schema(self, schema: Mapping[str, Any], *, field: str = "json_schema") -> Grammar:
        """JSON that fits a schema (draft 2020-12, as far as llguidance has it; an object's keys come in its order).

        Between the parts of the JSON is at most one space, or a new line and its indentation. Characters outside
        ASCII stand as they are, not as ``\\u`` and a number.

        Raises:
          UsageError: not a JSON schema, not supported, too large, or nothing fits it. The message begins with
            ``field``.
        """
        return self._checked(field, "JSON schema", _schema_grammar(schema, field))

    def json_object(self) -> Grammar:
        """Any JSON object."""
        return self._checked("json_object", "JSON object", _schema_grammar({"type": "object"}, "json_object"))

    def regex(self, pattern: str, *, field: str = "regex") -> Grammar:
        """Text that a regular expression matches from beginning to end.

        The syntax is that of Rust's `regex` (https://docs.rs/regex/latest/regex/#syntax): much as Python's, without
        look-around and references to groups; ``^`` and ``$`` may stand at the ends, where they change nothing.

        Raises:
          UsageError: not a regular expression, not supported, too large, or it matches nothing. The message begins
            with ``field``.
        """
        _require_text(pattern, field)
        if len(pattern) > MAX_PATTERN_CHARACTERS:
            raise UsageError(
                f"{field}: the regular expression has {len(pattern):,} characters; expected at most "
                f"{MAX_PATTERN_CHARACTERS:,}."
            )
        if (len(pattern) - len(pattern.rstrip("\\"))) % 2:
            raise UsageError(f"{field}: {_shown(pattern)} ends with a backslash that escapes nothing. Remove it.")
        return self._checked(field, "regular expression", f"start: /{_library().regex_to_lark(pattern)}/\n")

    def choice(self, choices: Sequence[str], *, field: str = "choice") -> Grammar:
        """One of some texts.

        Raises:
          UsageError: not a list of texts, an empty list or text, or too large. The message begins with ``field``.
        """
        if isinstance(choices, str) or not isinstance(choices, Sequence) or not choices:
            raise UsageError(f"{field}: must be a list of strings with at least one of them, not {_shown(choices)}.")
        for index, choice in enumerate(choices):
            _require_text(choice, f"{field}[{index}]")
        source = " | ".join(map(literal, choices))
        if len(source.encode()) > MAX_SOURCE_BYTES:
            raise UsageError(f"{field}: the choices together have more than {MAX_SOURCE_BYTES:,} bytes. Shorten them.")
        return self._checked(field, "choice", f"start: CHOICE\nCHOICE: {source}\n")

    def grounding(self) -> Grammar:
        """Text in which every box is well-formed; see `grounding_grammar`."""
        ids = self.tokenizer.special_ids
        tags = (ids[tag] for tag in (REF_TOKEN, REF_END_TOKEN, DET_TOKEN, DET_END_TOKEN))
        return self._checked("grounding", "grounding", grounding_grammar(*tags))

    def again(self, source: GrammarSource) -> Grammar:
        """The grammar that another process's compiler of the same tokenizer has made."""
        return self._checked("grammar", *source)

    def _checked(self, field: str, kind: str, source: str) -> Grammar:
        grammar, problem = self._compiled(kind, source)
        if grammar is None:
            raise UsageError(f"{field}: {problem}")
        return grammar

    def _compile(self, kind: str, source: str) -> tuple[Grammar | None, str]:
        """The grammar, or None and what is wrong with it. Being remembered, neither is found twice."""
        prototype = self._build(source)
        problem = _problem(prototype)
        if not problem:
            first = prototype.deep_copy()
            first.compute_bitmask()  # here shows what matches nothing, and much of what costs too much
            problem = _problem(first)
        if problem:
            return None, f"the {kind} cannot be used: {problem}."
        return Grammar(kind, self, source, prototype), ""

    def _build(self, source: str) -> llguidance.LLMatcher:
        make = functools.partial(_library().LLMatcher, self._tokens, _HEADER + source, limits=self._limits, log_level=0)
        return self._thread.submit(make).result()


@dataclasses.dataclass(frozen=True, eq=False)
class Grammar:
    """What answers may be; made by `GrammarCompiler`. May be used from several threads, for any number of answers.

    Attributes:
      kind: in words, as in "JSON schema".
    """

    kind: str
    _compiler: GrammarCompiler = dataclasses.field(repr=False)
    _source: str = dataclasses.field(repr=False)
    _prototype: llguidance.LLMatcher = dataclasses.field(repr=False)

    def matcher(self) -> Matcher:
        """A new answer's."""
        return Matcher(self)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled, it is what it was made of: another process makes it again, by `GrammarCompiler.again`."""
        return GrammarSource, (self.kind, self._source)


class GrammarSource(NamedTuple):
    """A grammar that came from another process."""

    kind: str
    source: str


class Matcher:
    """Follows one answer through its grammar. For one thread at a time."""

    def __init__(self, grammar: Grammar):
        """Use `Grammar.matcher`."""
        self.grammar = grammar
        self._rows = grammar._compiler.vocab_rows
        self._eos_id = grammar._compiler.tokenizer.eos_id
        self._matcher = grammar._prototype.deep_copy()
        self._alone = False  # whether the automaton is this matcher's own
        self._tokens: list[int] = []
        self._ended = False

    @property
    def finished(self) -> bool:
        """Whether the answer has ended, or nothing but the end can follow."""
        return self._ended or (self._matcher.is_stopped() and not self._matcher.is_error())

    def mask(self) -> np.ndarray:
        """bool[vocab_rows]: the tokens that may come next. That of the end is among them where the grammar may end.

        Raises:
          ConstraintError: the answer has ended, or the grammar turns out to cost too much here.
        """
        if self._ended:
            raise ConstraintError(f"the answer under a {self.grammar.kind} has ended: no token can follow.")
        bits = np.frombuffer(self._of_matcher(lambda matcher: matcher.compute_bitmask()), np.uint8)
        return np.unpackbits(bits, count=self._rows, bitorder="little").view(bool)

    def advance(self, token_id: int) -> None:
        """Adds the answer's next token.

        Raises:
          ConstraintError: the grammar does not allow it, and all stays as it was; or the grammar costs too much here.
        """
        token_id = int(token_id)
        if not self._ended and token_id == self._eos_id:
            self._ended = allowed = self._of_matcher(lambda matcher: matcher.is_accepting())
        elif self.finished or not 0 <= token_id < self._rows:
            allowed = False
        else:
            allowed = self._of_matcher(lambda matcher: matcher.try_consume_tokens([token_id])) == 1
        if not allowed:
            text = self.grammar._compiler.tokenizer.decode([token_id]) if 0 <= token_id < self._rows else ""
            raise ConstraintError(
                f"token {token_id} ({_shown(text)}) is not allowed after {len(self._tokens)} tokens of an answer under "
                f"a {self.grammar.kind}. Choose one that the mask allows."
            )
        self._tokens.append(token_id)

    def _of_matcher(self, call: Callable[[llguidance.LLMatcher], _Result]) -> _Result:
        """The result of a call. Where it fails it is made once more, on a matcher that shares nothing.

        Copies of a prototype share the automaton that they build on their way, which saves them most of the work. But
        it has a greatest size, and an answer must not fail because of others.
        """
        result = call(self._matcher)
        if self._matcher.is_error() and not self._alone:
            self._matcher, self._alone = self.grammar._compiler._build(self.grammar._source), True
            self._matcher.try_consume_tokens(self._tokens)
            result = call(self._matcher)
        if problem := _problem(self._matcher):
            raise ConstraintError(
                f"the {self.grammar.kind} cannot be followed after {len(self._tokens)} tokens: {problem}. Simplify it."
            )
        return result


def grounding_grammar(ref: int, ref_end: int, det: int, det_end: int) -> str:
    """Text with any number of ``<|ref|>label<|/ref|><|det|>[[x1, y1, x2, y2], …]<|/det|>``, in llguidance's Lark.

    The arguments are the four tags' token ids. A label is not empty, an object has at least one box, and no text spells
    a tag in ordinary characters. Coordinates are whole numbers from 0 to 999, without leading zeros, and x1 ≤ x2,
    y1 ≤ y2: a rule's parameter (https://github.com/guidance-ai/llguidance/blob/main/docs/parametric.md) holds the three
    decimal digits of x1 and those of y1, four bits each, from the hundreds up, which x2 and y2 are compared with.
    """
    return "\n".join(
        [
            "start: TEXT? (object TEXT?)*",
            f'object: <[{ref}]> TEXT <[{ref_end}]> <[{det}]> "[" box (", " box)* "]" <[{det_end}]>',
            r"TEXT: /(?s:.+)/ & ~/(?s:.*)<\|\/?(ref|det)\|>(?s:.*)/",
            'box: "[" x1::0',
            *_recorded("x1", 0, '", " y1'),
            *_recorded("y1", 12, '", " x2'),
            *_at_least("x2", 0, '", " y2::_'),
            *_at_least("y2", 12, '"]"'),
            "digit: " + " | ".join(f'"{digit}"' for digit in range(10)),
            "",
        ]
    )


def _recorded(name: str, shift: int, then: str) -> Iterator[str]:
    """Rules of a number of one to three digits, which go into the parameter's bits from ``shift`` on."""
    hundreds, tens, units = range(shift, shift + 12, 4)

    def rule(digits: Iterable[int], following: str, bit: int) -> str:
        return " | ".join(f'"{digit}" {following}::bit_or({digit << bit:#x})' for digit in digits)

    yield f"{name}::_: {name}_of_three::_ | {name}_of_two::_ | {name}_units::_"
    yield f"{name}_of_three::_: {rule(range(1, 10), f'{name}_tens', hundreds)}"
    yield f"{name}_of_two::_: {rule(range(1, 10), f'{name}_units', tens)}"
    yield f"{name}_tens::_: {rule(range(10), f'{name}_units', tens)}"
    yield f"{name}_units::_: " + " | ".join(f'"{digit}" {then}::bit_or({digit << units:#x})' for digit in range(10))


def _at_least(name: str, shift: int, then: str) -> Iterator[str]:
    """Rules of a number not less than the one whose digits are in the parameter's bits from ``shift`` on."""
    hundreds, tens, units = (f"[{bit}:{bit + 4}]" for bit in range(shift, shift + 12, 4))

    def rule(digits: Iterable[int], known: str, rest: str, following: str) -> str:
        """A greater digit, after which the rest is free, or the same one."""
        greater = [f'"{digit}" {rest} {then} %if lt({known}, {digit})' for digit in digits]
        same = [f'"{digit}" {following}::_ %if eq({known}, {digit})' for digit in digits]
        return " | ".join(greater + same)

    yield (
        f"{name}::_: {name}_of_three::_ | {name}_of_two::_ %if is_zeros({hundreds})"
        f" | {name}_units::_ %if is_zeros([{shift}:{shift + 8}])"
    )
    yield f"{name}_of_three::_: {rule(range(1, 10), hundreds, 'digit digit', f'{name}_tens')}"
    yield f"{name}_of_two::_: {rule(range(1, 10), tens, 'digit', f'{name}_units')}"
    yield f"{name}_tens::_: {rule(range(10), tens, 'digit', f'{name}_units')}"
    yield f"{name}_units::_: " + " | ".join(f'"{digit}" {then} %if le({units}, {digit})' for digit in range(10))


def _schema_grammar(schema: Mapping[str, Any], field: str) -> str:
    """The grammar of a JSON schema. Raises UsageError where it is none, or would cost too much."""
    if not isinstance(schema, Mapping):
        raise UsageError(f"{field}: must be a JSON schema, which is an object, not {_shown(schema)}.")
    if "x-guidance" in schema:
        raise UsageError(f"{field}: must not have the key x-guidance, which sets options of the server's. Remove it.")
    try:
        whole = {**schema, "x-guidance": {"whitespace_pattern": _JSON_WHITESPACE}}
        source = json.dumps(whole, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        size = len(source.encode())
    except RecursionError as error:
        raise UsageError(f"{field}: the JSON schema is nested too deeply. Name its parts in $defs.") from error
    except (TypeError, ValueError) as error:
        raise UsageError(f"{field}: the JSON schema is not JSON: {error}.") from error
    if size > MAX_SOURCE_BYTES:
        raise UsageError(
            f"{field}: the JSON schema has {size:,} bytes; expected at most {MAX_SOURCE_BYTES:,}. Shorten it."
        )
    _check_costs(schema, field)
    return f"start: %json {source}\n"


def _check_costs(schema: Mapping[str, Any], field: str) -> None:
    """Raises UsageError where a JSON schema has what takes llguidance long: see `MAX_PATTERN_CHARACTERS`."""
    characters = 0
    names = dict.fromkeys(("properties", "required", "patternProperties"), 0)
    multiples: list[Decimal] = []
    waiting: list[Any] = [schema]
    while waiting:
        value = waiting.pop()
        waiting += value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
        if not isinstance(value, Mapping):
            continue
        for key in names:
            names[key] += len(value[key]) if isinstance(value.get(key), Sized) else 0
        pattern, patterns, multiple = (value.get(key) for key in ("pattern", "patternProperties", "multipleOf"))
        characters += len(pattern) if isinstance(pattern, str) else 0
        characters += sum(map(len, map(str, patterns))) if isinstance(patterns, Mapping) else 0
        multiples += [Decimal(str(multiple))] if isinstance(multiple, int | float) and multiple > 0 else []
    for found, most, what in (
        (characters, MAX_PATTERN_CHARACTERS, "characters in its regular expressions"),
        (names["properties"], MAX_PROPERTIES, "properties"),
        (names["required"], MAX_PROPERTIES, "names in required"),
        (names["patternProperties"], MAX_PATTERN_PROPERTIES, "patternProperties"),
    ):
        if found > most:
            raise UsageError(f"{field}: the JSON schema has {found:,} {what} together; expected at most {most:,}.")
    unit = math.lcm(1, *(multiple.as_integer_ratio()[1] for multiple in multiples))
    whole = [int(multiple * unit) for multiple in multiples]
    if max(sum(whole), math.lcm(1, *whole)) > MAX_MULTIPLE:
        raise UsageError(
            f"{field}: the values of multipleOf in the JSON schema, in the smallest unit that they have, have a "
            f"sum or a least common multiple above {MAX_MULTIPLE:,}. Make them rounder, or leave them out."
        )


# What llguidance says, in the words of the person who wrote the grammar.
_MEANINGS = {
    "NoExtensionBias": "no text of this model's tokens fits it",
    "precomputation failed": "it is too complex",
    "too many": "it is too complex",
    "grammar) too big": "it is too complex",
    "max is": "it has too many possibilities at once",
    "coerce_one_of": "oneOf is supported only where its parts exclude each other plainly; use anyOf",
}


def _problem(matcher: llguidance.LLMatcher) -> str:
    """What went wrong, in one line; empty where nothing did."""
    if not matcher.is_error():
        return ""
    message = matcher.get_error()
    for part, meaning in _MEANINGS.items():
        if part in message:
            return meaning
    # The message goes on with an excerpt of the grammar, and an expression's error stands below the expression.
    message = re.split(r"\n +\d+ \| |\n<non-verbose/>", message)[0]
    message = re.sub(r"^at \d+\(\d+\): ", "", message)
    message = message.removeprefix("failed to compile JSON schema: ").rpartition("\nerror: ")[2]
    message = re.sub(r'^invalid regex ".*" \(in regex\): ', "", message, flags=re.DOTALL)
    return " ".join(message.split())[:300].rstrip(".") or matcher.stop_reason()


def _thread_with_stack(size: int) -> concurrent.futures.Executor:
    """An executor of one thread, whose stack has so many bytes."""
    executor = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="grammar")
    with _stack_lock:
        before = threading.stack_size(size)
        try:
            executor.submit(int).result()  # the thread starts with the first call
        finally:
            threading.stack_size(before)
    return executor


_stack_lock = threading.Lock()


def _library() -> Any:
    try:
        import llguidance
    except ModuleNotFoundError as error:
        raise UsageError(
            "constrained decoding needs llguidance, which is not installed: pip install -e '.[serve]'"
        ) from error
    return llguidance


def _require_text(value: Any, field: str) -> None:
    if not isinstance(value, str) or not value:
        raise UsageError(f"{field}: must be a string that is not empty, not {_shown(value)}.")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise UsageError(f"{field}: has half a character (a lone surrogate) at {error.start}. Remove it.") from error


def _shown(value: Any, longest: int = 60) -> str:
    text = json.dumps(value, ensure_ascii=False, default=repr)
    return text if len(text) <= longest else text[:longest] + "…"
