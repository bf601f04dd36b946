"""Pieces of messages: the first line of an error, long lists, the nearest name."""

from dsvl2_jax.messages import changes, did_you_mean, first_line, listed, nearest


def test_the_first_line_of_an_error():
    assert first_line(ValueError("\n one\ntwo")) == "one"
    assert first_line(ValueError(" ")) == "ValueError"
    assert first_line(KeyboardInterrupt()) == "KeyboardInterrupt"


def test_long_lists_are_cut():
    assert listed(["a", "b"]) == "    a\n    b"
    assert listed(iter("abc"), limit=2, indent="- ") == "- a\n- b\n- and 1 more"
    assert listed([]) == ""


def test_the_nearest_name():
    assert nearest("v5e-9", ["v5e-8", "h100-1"]) == "v5e-8"
    assert nearest("nothing", ["v5e-8"]) is None
    assert did_you_mean("v5e-9", {"v5e-8": 1}) == "; did you mean v5e-8?"
    assert did_you_mean("nothing", ["v5e-8"]) == "."


def test_changes_of_nested_values():
    old = {"a": {"x": 1, "y": "one", "z": 0}, "b": [1], "c": None}
    new = {"a": {"x": 1, "y": "two", "w": 0}, "b": [2], "c": None, "d": 4}
    assert list(changes(old, new)) == [
        'a.y was "one", is "two"',
        "a.z is gone",
        "a.w is new",
        "b was [1], is [2]",
        "d is new",
    ]
    assert list(changes({"f": "12", "g": "3"}, {"f": "13"}, "file: ", values=False)) == [
        "file: f has changed",
        "file: g is gone",
    ]
    assert not list(changes(old, old))
