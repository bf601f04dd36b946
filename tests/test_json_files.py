import contextlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsvl2_jax import json_files
from dsvl2_jax.errors import ConfigError
from dsvl2_jax.json_files import MAX_DEPTH, parse_json, parse_toml, read_json_object, read_lines, read_text, read_toml


@given(st.binary(max_size=200) | st.text(max_size=200))
def test_whatever_is_no_json_is_a_value_error(text):
    with contextlib.suppress(ValueError):
        parse_json(text)


values = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**30), 10**30) | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@given(values, st.booleans())
def test_what_json_writes_is_read(value, ascii_only):
    assert parse_json(json.dumps(value, ensure_ascii=ascii_only).encode()) == value


@pytest.mark.parametrize(
    "text, said",
    [
        ("[" * 200_000 + "]" * 200_000, "levels"),
        ('{"a":' * 150 + "1" + "}" * 150, "levels"),
        ("[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1), "levels"),
        ("9" * 5000, "digits"),
        (r'{"a": "\ud83d"}', r"\\ud83d"),
        (r'{"\uDE00": 1}', r"\\ude00"),
        (b"\xff\xfe", "utf-8"),
        ("", "Expecting value"),
    ],
)
def test_refused(text, said):
    with pytest.raises(ValueError, match=said):
        parse_json(text)


def test_allowed():
    assert parse_json("[" * MAX_DEPTH + "]" * MAX_DEPTH)
    assert parse_json(r'"\ud83d\ude00"') == "\U0001f600"
    assert parse_json(b"\xef\xbb\xbf[1]") == [1]
    assert len(parse_json(json.dumps([[1, 2]] * 1000))) == 1000


def test_files_are_named_with_what_was_found(tmp_path, monkeypatch):
    path = tmp_path / "config.json"
    with pytest.raises(ConfigError, match=r"config\.json: not found.*Copy it\."):
        read_json_object(path, ConfigError, "Copy it.")
    path.write_bytes(b'{"a": "\xff"}')
    with pytest.raises(ConfigError, match=r"config\.json: not UTF-8 text \(invalid start byte at byte 7\)"):
        read_json_object(path, ConfigError)
    path.write_text("[" * 5000)
    with pytest.raises(ConfigError, match="cannot be read as JSON"):
        read_json_object(path, ConfigError)
    path.write_text("[1]")
    with pytest.raises(ConfigError, match="found a JSON list, expected an object"):
        read_json_object(path, ConfigError)
    monkeypatch.setattr(json_files, "MAX_BYTES", 2)
    with pytest.raises(ConfigError, match="more than 2 bytes"):
        read_text(path, ConfigError)
    for name in ("a" * 300, "a\0b"):
        with pytest.raises(ConfigError, match="cannot be read"):
            read_text(tmp_path / name, ConfigError)
    with pytest.raises(ConfigError, match="directory"):
        read_text(tmp_path, ConfigError)


@pytest.mark.parametrize(
    "text", ["a = " + "[" * 5000, "a = " + "[" * 150 + "]" * 150, "a = " + "9" * 5000, "a", "a = 1\na = 2"]
)
def test_toml_that_cannot_be_read_is_a_value_error(text, tmp_path):
    with pytest.raises(ValueError):
        parse_toml(text)
    (tmp_path / "c.toml").write_text(text)
    with pytest.raises(ConfigError, match=r"c\.toml: not readable as TOML"):
        read_toml(tmp_path / "c.toml", ConfigError)


def test_lines_are_numbered_and_what_is_wrong_is_named(tmp_path, monkeypatch):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\xef\xbb\xbfone\n\xe2\x80\xa8two\n\nlast")
    assert list(read_lines(path, ConfigError, "")) == [(1, "one\n"), (2, "\u2028two\n"), (3, "\n"), (4, "last")]
    path.write_bytes(b"one\n\xff\n")
    with pytest.raises(ConfigError, match=r"a\.jsonl:2: not UTF-8"):
        list(read_lines(path, ConfigError, ""))
    monkeypatch.setattr(json_files, "MAX_BYTES", 3)
    with pytest.raises(ConfigError, match=r"a\.jsonl:1: a line of more than 3 bytes"):
        list(read_lines(path, ConfigError, ""))
    for name in ("missing", "a" * 300, "a\0"):
        with pytest.raises(ConfigError):
            list(read_lines(tmp_path / name, ConfigError, ""))
