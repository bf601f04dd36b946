"""Pieces of messages: the first line of an error, long lists, the nearest name."""

from dsvl2_jax.messages import did_you_mean, first_line, listed, nearest


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
