"""Values of dataclass fields, checked by what the fields themselves say: their types, and the metadata of `setting`.

One validator for training settings, model and processor configurations, sampling parameters and options. It collects
all problems, so that a user corrects them at once.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import numbers
import re
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from dsvl2_jax.messages import did_you_mean, nearest

Path = tuple[str | int, ...]  # keys, and the index in an array

_KINDS = {str: "a string", int: "a whole number", float: "a number", bool: "true or false", dict: "a table"}
_MISSING: Any = object()  # instead of a value that was wrong


class Problem(NamedTuple):
    """Something wrong with a value, and where the value is."""

    path: Path
    text: str

    def __str__(self) -> str:
        return f"{dotted(self.path)}: {self.text}" if self.path else self.text


@dataclasses.dataclass(frozen=True)
class Rule:
    """What a field's value must be beyond its type, and what is known about the field; see `setting`."""

    help: str = ""
    least: float | None = None
    above: float | None = None
    most: float | None = None
    below: float | None = None
    choices: tuple[Any, ...] = ()
    expected: str = ""
    hint: str = ""
    example: str = ""
    may_change: bool = False
    was: str = ""

    def range_text(self) -> str:
        """As in "must be at least 0 and below 1"."""
        if self.above == 0 and self.most is None and self.below is None:
            return "positive"
        if self.least is not None and self.most is not None:
            return f"from {self.least} to {self.most}"
        if self.least is not None and self.below is None:
            return "positive" if self.least == 1 else f"{self.least} or more"
        words = {"at least": self.least, "above": self.above, "at most": self.most, "below": self.below}
        return " and ".join(f"{word} {limit}" for word, limit in words.items() if limit is not None)

    def holds(self, value: float) -> bool:
        return (
            (self.least is None or value >= self.least)
            and (self.above is None or value > self.above)
            and (self.most is None or value <= self.most)
            and (self.below is None or value < self.below)
        )


def setting(default: Any = dataclasses.MISSING, *, factory: Callable[[], Any] | None = None, **rule: Any) -> Any:
    """A dataclass field that says what its value must be.

    Args:
      default, factory: as `dataclasses.field` has them; without either the field must be given.
      help: the field's meaning in a few words, for ``--help``.
      least, above, most, below: the range of a number, or of each number in a tuple.
      choices: all values that are allowed.
      expected: words for all that the value must be, instead of those made from type, range and choices.
      hint: words that follow the message about a wrong range, or a table of tables.
      example: a value; the field must not be empty then.
      may_change: a run that resumes may have another value than at its start.
      was: the field's old name, which is an error that names the new one.
    """
    value = {"default_factory": factory} if factory is not None else {"default": default}
    return dataclasses.field(**value, metadata={"rule": Rule(**rule)})


def rule_of(field: dataclasses.Field) -> Rule:
    return field.metadata.get("rule") or Rule()


def build(
    cls: Any, raw: Any, path: Path = (), *, strict: bool = True, accept_old_names: bool = False
) -> tuple[Any, list[Problem]]:
    """A dataclass, perhaps of dataclasses, from nested mappings, lists and scalars.

    Args:
      path: of ``raw`` itself, for the problems.
      strict: unknown keys are problems.
      accept_old_names: a key of a name that a field had before counts as that field's.

    Returns:
      The value and all problems. A wrong value leaves its field at the default; where ``raw`` is no mapping, or a field
      without a default is wrong, the value is None.
    """
    reader = _Reader(cls, strict, accept_old_names)
    value = reader.value(cls, Rule(), raw, path)
    return None if value is _MISSING else value, reader.problems


def check(instance: Any) -> list[Problem]:
    """The problems of a dataclass's fields. Lists become the tuples, and whole numbers the fractions, that are meant.

    For ``__post_init__``, frozen or not.
    """
    reader = _Reader(type(instance))
    for name, value in reader.fields(type(instance), vars(instance), ()).items():
        object.__setattr__(instance, name, value)
    return reader.problems


def refuse(problems: Iterable[Problem], error: type[Exception], heading: str = "") -> None:
    """Raises ``error`` with all problems in one message, if there are any."""
    lines = list(map(str, problems))
    if lines:
        raise error("\n  ".join([heading, *lines] if heading else lines))


def leaves(value: Any, prefix: str = "", *, may_change: bool = False) -> Iterator[tuple[str, Any, bool]]:
    """(dotted name, value, whether a resumed run may change it) of every field; a tuple is one value."""
    rules = {field.name: rule_of(field) for field in dataclasses.fields(value)} if _is_dataclass(value) else {}
    for name, inner in (vars(value) if _is_dataclass(value) else value).items():
        free = may_change or rules.get(name, Rule()).may_change
        if _is_dataclass(inner) or isinstance(inner, Mapping):
            yield from leaves(inner, f"{prefix}{name}.", may_change=free)
        else:
            yield prefix + name, inner, free


def type_at(cls: Any, path: Path) -> Any:
    """The type of the field at a path, or None where there is no such field."""
    kind = cls
    for key in path:
        if _is_dataclass(kind):
            kind = _hints(kind).get(key)
        elif typing.get_origin(kind) is not None and issubclass(typing.get_origin(kind), Mapping):
            kind = typing.get_args(kind)[1]
        else:
            return None
    return kind


def dotted(path: Path) -> str:
    """``stage.parameters[0].lr_multiplier``, as in messages."""
    parts = (f"[{key}]" if isinstance(key, int) else f".{key}" for key in path)
    return "".join(parts).removeprefix(".")


def literal(value: Any) -> str:
    """A value as TOML writes it."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(literal, value))}]"
    if _is_dataclass(value):
        value = vars(value)
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{toml_key(key)} = {literal(inner)}' for key, inner in value.items())}}}"
    return str(value)


def toml_key(key: str) -> str:
    """A key as TOML writes it, quoted where it must be."""
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else literal(key)


class _Reader:
    """Reads one value of the class ``root``, and collects its problems."""

    def __init__(self, root: Any, strict: bool = True, accept_old_names: bool = False):
        self._root, self._strict, self._accept_old_names = root, strict, accept_old_names
        self.problems: list[Problem] = []

    def value(self, kind: Any, rule: Rule, raw: Any, path: Path) -> Any:
        """``raw`` as a value of type ``kind``, or `_MISSING`."""
        before = len(self.problems)
        value = self._value(kind, rule, raw, path)
        if rule.expected and len(self.problems) > before:
            del self.problems[before:]
            return self._wrong(path, rule.expected, raw, rule.hint)
        return value

    def fields(self, cls: Any, raw: Mapping[str, Any], path: Path) -> dict[str, Any]:
        """The right ones of a dataclass's values, by field."""
        fields = {field.name: field for field in dataclasses.fields(cls) if field.init}
        old = {rule_of(field).was: name for name, field in fields.items() if rule_of(field).was}
        values = {}
        for key, inner in raw.items():
            name = old.get(key, key) if self._accept_old_names else key
            if name in fields:
                value = self.value(_hints(cls)[name], rule_of(fields[name]), inner, (*path, name))
                if value is not _MISSING:
                    values[name] = value
            elif key in old:
                self._add((*path, key), f"is now called {old[key]}; rename it.")
            elif self._strict:
                self._add((*path, key), self._unknown(key, tuple(fields)))
        wrong = {problem.path[: len(path) + 1] for problem in self.problems}
        for name, field in fields.items():
            example, here = rule_of(field).example, (*path, name)
            if example and here not in wrong and not values.get(name, field.default):
                self._add(here, f"must be given, as in {dotted(here)}={example}")
        return values

    def _value(self, kind: Any, rule: Rule, raw: Any, path: Path) -> Any:
        origin, args = typing.get_origin(kind), typing.get_args(kind)
        if origin in (typing.Union, types.UnionType):
            if raw is None:
                return None
            (kind,) = (arg for arg in args if arg is not type(None))
            return self._value(kind, rule, raw, path)
        if kind is Any:
            return raw
        if _is_dataclass(kind):
            if isinstance(raw, kind):
                return raw
            if not isinstance(raw, Mapping):
                return self._wrong(path, "a table", raw)
            values = self.fields(kind, raw, path)
            required = {f.name for f in dataclasses.fields(kind) if not _has_default(f)}
            for name in required - raw.keys():
                self._add((*path, name), "is missing.")
            return kind(**values) if required <= values.keys() else _MISSING
        if origin is tuple:
            return self._tuple(args, rule, raw, path)
        if origin is not None and issubclass(origin, Mapping):
            if not isinstance(raw, Mapping):
                return self._wrong(path, "a table" if args[1] is Any else "a table of tables", raw, rule.hint)
            values = {key: self.value(args[1], Rule(), inner, (*path, key)) for key, inner in raw.items()}
            return {key: value for key, value in values.items() if value is not _MISSING}
        return self._scalar(kind, rule, raw, path)

    def _tuple(self, args: tuple[Any, ...], rule: Rule, raw: Any, path: Path) -> Any:
        variable = args[-1] is Ellipsis
        if not isinstance(raw, list | tuple) or not (variable or len(raw) == len(args)):
            size = "an array" if variable else f"{len(args)} values"
            return self._wrong(path, f"{size} of tables" if _is_dataclass(args[0]) else size, raw)
        kinds = [args[0]] * len(raw) if variable else args
        items = dataclasses.replace(rule, expected="", hint="")
        values = [self.value(kind, items, x, (*path, i)) for i, (kind, x) in enumerate(zip(kinds, raw, strict=True))]
        return tuple(value for value in values if value is not _MISSING)

    def _scalar(self, kind: Any, rule: Rule, raw: Any, path: Path) -> Any:
        accepted = {int: numbers.Integral, float: numbers.Real}.get(kind, kind)
        if not isinstance(raw, accepted) or (isinstance(raw, bool) and kind is not bool):
            return self._wrong(path, _KINDS.get(kind, f"a {kind.__name__}"), raw)
        if kind is float and not _is_finite(raw):
            return self._wrong(path, "finite", raw)
        value = kind(raw) if kind in (int, float) else raw
        if rule.choices and value not in rule.choices:
            choices = list(map(str, rule.choices))
            return self._add(path, f"{value!r} is none of {', '.join(choices)}{did_you_mean(str(value), choices)}")
        if kind in (int, float) and not rule.holds(value):
            return self._wrong(path, rule.range_text(), value, rule.hint)
        return value

    def _unknown(self, key: str, siblings: tuple[str, ...]) -> str:
        if near := nearest(key, siblings):
            return f"unknown key; did you mean {near}?"
        everywhere = {name.rpartition(".")[2]: name for name in _names(self._root)}
        if near := nearest(key, everywhere):
            return f"unknown key here; did you mean {everywhere[near]}?"
        return f"unknown key; the keys here are {', '.join(siblings)}."

    def _wrong(self, path: Path, expected: str, found: Any, hint: str = "") -> Any:
        return self._add(path, f"must be {expected}, not {literal(found)}{'; ' if hint else ''}{hint}.")

    def _add(self, path: Path, text: str) -> Any:
        self.problems.append(Problem(path, text))
        return _MISSING


def _is_finite(value: Any) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number of more than 308 digits
        return False


def _is_dataclass(value: Any) -> bool:
    return dataclasses.is_dataclass(value)


def _has_default(field: dataclasses.Field) -> bool:
    return field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING


@functools.cache
def _hints(cls: Any) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def _names(cls: Any, prefix: str = "") -> Iterator[str]:
    """Dotted names of all fields of a dataclass of dataclasses."""
    for name, hint in _hints(cls).items():
        if _is_dataclass(hint):
            yield from _names(hint, f"{prefix}{name}.")
        else:
            yield prefix + name
