"""Fields that say what their values must be: reading, checking, and what is said about wrong values."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np
import pytest

from dsvl2_jax.errors import UsageError
from dsvl2_jax.fields import Problem, build, check, dotted, leaves, literal, refuse, setting, type_at


@dataclasses.dataclass(frozen=True)
class Inner:
    size: int = setting(3, least=1, most=5)
    share: float = setting(0.5, above=0, below=1, was="part")
    kind: str = setting("round", choices=("round", "square"))


@dataclasses.dataclass(frozen=True)
class Outer:
    name: str = setting("", example="x")
    point: tuple[float, float] = setting((0.0, 0.0), least=-1, expected="two numbers from -1")
    inner: Inner = Inner()
    many: tuple[Inner, ...] = ()
    named: Mapping[str, Inner] = setting(factory=dict, may_change=True)
    most: int | None = setting(None, least=1)
    flag: bool = False


@dataclasses.dataclass(frozen=True)
class Needed:
    size: int = setting(least=1)


def test_nested_tables_become_dataclasses():
    raw = {
        "name": "a",
        "point": [1, 2.5],
        "inner": {"size": 2, "kind": "square"},
        "many": [{"size": 1}, {}],
        "named": {"x": {"share": 0.25}},
        "most": 4,
    }
    value, problems = build(Outer, raw)
    assert not problems
    many, named = (Inner(1), Inner()), {"x": Inner(share=0.25)}
    assert value == Outer("a", (1.0, 2.5), Inner(2, kind="square"), many, named, 4)
    assert all(isinstance(number, float) for number in value.point)
    assert build(Outer, {"name": "a", "most": None}) == (Outer("a"), [])


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ({"point": [1]}, "point: must be two numbers from -1, not [1]."),
        ({"point": [1, -2]}, "point: must be two numbers from -1, not [1, -2]."),
        ({"point": "x"}, 'point: must be two numbers from -1, not "x".'),
        ({"inner": {"size": 6}}, "inner.size: must be from 1 to 5, not 6."),
        ({"inner": {"size": True}}, "inner.size: must be a whole number, not true."),
        ({"inner": {"share": 1}}, "inner.share: must be above 0 and below 1, not 1.0."),
        ({"inner": {"share": float("inf")}}, "inner.share: must be finite, not inf."),
        ({"inner": {"kind": "sqare"}}, "inner.kind: 'sqare' is none of round, square; did you mean square?"),
        ({"inner": {"part": 0.5}}, "inner.part: is now called share; rename it."),
        ({"inner": {"sise": 1}}, "inner.sise: unknown key; did you mean size?"),
        ({"size": 1}, "size: unknown key here; did you mean inner.size?"),
        ({"many": [{}, 3]}, "many[1]: must be a table, not 3."),
        ({"many": {}}, "many: must be an array of tables, not {}."),
        ({"named": {"x": {"size": "2"}}}, 'named.x.size: must be a whole number, not "2".'),
        ({"most": 0}, "most: must be positive, not 0."),
        ({"flag": 1}, "flag: must be true or false, not 1."),
        ({"name": ""}, "name: must be given, as in name=x"),
    ],
)
def test_a_wrong_value_is_named_and_its_field_keeps_the_default(raw, expected):
    value, problems = build(Outer, {"name": "a"} | raw)
    assert list(map(str, problems)) == [expected]
    assert (value.point, value.inner, value.most, value.flag) == ((0.0, 0.0), Inner(), None, False)


def test_all_problems_are_collected_under_the_path_that_is_given():
    _, problems = build(Outer, {"flag": 1, "inner": {"size": 0, "kind": 3}}, ("top",))
    paths = [dotted(problem.path) for problem in problems]
    assert paths == ["top.flag", "top.inner.size", "top.inner.kind", "top.name"]
    assert build(Needed, {}) == (None, [Problem(("size",), "is missing.")])
    assert build(Outer, {"name": "a", "other": 1}, strict=False) == (Outer("a"), [])


def test_an_old_name_may_be_accepted():
    assert build(Inner, {"part": 0.25}, accept_old_names=True) == (Inner(share=0.25), [])


def test_an_instance_is_checked_and_its_values_become_what_is_meant():
    outer = Outer("a", [1, 2], most=np.int64(2))
    assert check(outer) == [] and outer.point == (1.0, 2.0) and type(outer.most) is int
    assert [problem.path for problem in check(Outer("a", inner=Inner(size=2), most=-1))] == [("most",)]


def test_problems_are_raised_together():
    refuse([], UsageError)
    with pytest.raises(UsageError, match=r"^wrong:\n  a\.b: is odd\.\n  c: is even\.$"):
        refuse([Problem(("a", "b"), "is odd."), Problem(("c",), "is even.")], UsageError, "wrong:")


def test_leaves_say_what_may_change():
    value = Outer("a", many=(Inner(),), named={"x": Inner()})
    found = {name: free for name, _, free in leaves(value)}
    assert found == {
        **dict.fromkeys(("name", "point", "inner.size", "inner.share", "inner.kind", "many", "most", "flag"), False),
        **dict.fromkeys(("named.x.size", "named.x.share", "named.x.kind"), True),
    }


def test_types_are_found_by_path():
    assert type_at(Outer, ("named", "x", "kind")) is str
    assert type_at(Outer, ("inner", "share")) is float
    assert type_at(Outer, ("inner", "nothing")) is None


def test_values_are_written_as_in_toml():
    assert literal([True, 1.5, 'a"b', {"x": (1, 2)}]) == '[true, 1.5, "a\\"b", {x = [1, 2]}]'
