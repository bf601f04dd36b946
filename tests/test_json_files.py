"""A JSON file is an object, or an error of the kind asked for that names the file."""

import pytest

from dsvl2_jax.errors import CheckpointError, TokenizerError
from dsvl2_jax.json_files import read_json_object


def test_an_object_is_read(tmp_path):
    (tmp_path / "a.json").write_text('{"b": ["ü"]}', encoding="utf-8")
    assert read_json_object(tmp_path / "a.json", CheckpointError) == {"b": ["ü"]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "not found"),
        (b"{", "cannot be read as JSON"),
        (b"{}\xff", "cannot be read as JSON"),
        (b"[]", "found a JSON list, expected an object"),
    ],
)
def test_anything_else_is_named_with_advice(tmp_path, content, message):
    file = tmp_path / "a.json"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(TokenizerError, match=rf"a\.json: {message}.* Fetch it\."):
        read_json_object(file, TokenizerError, "Fetch it.")


def test_a_directory_is_no_file(tmp_path):
    with pytest.raises(CheckpointError, match=r"cannot be read as JSON.*Download the file again"):
        read_json_object(tmp_path, CheckpointError)
