import base64
import json
import shutil
import struct

import pytest

from dsvl2_jax.errors import TokenizerError
from dsvl2_jax.inputs.tokenizer import Tokenizer
from dsvl2_jax.inputs.tokenizer_backends import JsonBackend

VOCABULARY = {"a": 0, "Ġ": 1, "b": 2, "ab": 3, "#########b": 4, "#########a": 5}
BPE = {"type": "BPE", "vocab": {"a": 0, "Ġ": 1, "b": 2}, "merges": []}
GOOD = {"version": "1.0", "added_tokens": [], "normalizer": None, "pre_tokenizer": None, "decoder": None, "model": BPE}


def opened(tmp_path, document):
    file = tmp_path / "tokenizer.json"
    file.write_bytes(document if isinstance(document, bytes) else json.dumps(document).encode())
    return JsonBackend(file)


def charsmap(size):

    return {
        "type": "Precompiled",
        "precompiled_charsmap": base64.b64encode(struct.pack("<I", size) + b"x" * 8).decode(),
    }


@pytest.mark.parametrize(
    "change, said",
    [
        ({"pre_tokenizer": {"type": "FixedLength", "length": 0}}, "chunk size"),
        ({"model": BPE | {"merges": [["a", "b"]], "vocab": VOCABULARY, "continuing_subword_prefix": "#" * 9}}, "works"),
        ({"decoder": {"type": "Strip", "content": "a", "start": 9, "stop": 9}}, "works"),
        ({"decoder": {"type": "Strip", "content": "a", "start": 10**12, "stop": 0}}, "1000000000000, expected whole"),
        ({"added_tokens": [{"id": 10**30, "content": "x"}]}, "expected whole numbers"),
        ({"normalizer": charsmap(1 << 31)}, "not a map of characters"),
        ({"normalizer": charsmap(0)}, "not a map of characters"),
        ({"normalizer": {"type": "Precompiled", "precompiled_charsmap": 7}}, "not a map of characters"),
        (
            {
                "normalizer": {
                    "type": "Sequence",
                    "normalizers": [{"type": "Replace", "pattern": {"Regex": "."}, "content": "a" * 10}] * 12,
                }
            },
            "1000 times as long",
        ),
        ({"model": {"type": "WordLevel", "vocab": {"a": 5}, "unk_token": "b"}}, "UNK"),
        ({"model": None}, "works"),
    ],
)
def test_files_that_would_make_the_library_panic_or_abort_are_refused(tmp_path, capfd, change, said):
    with pytest.raises(TokenizerError, match=said) as caught:
        opened(tmp_path, GOOD | change)
    assert str(tmp_path / "tokenizer.json") in str(caught.value)
    assert capfd.readouterr().err == ""  # no backtrace of the library's


@pytest.mark.parametrize(
    "content", [b'{"version": "\xff"}', b'{"a": ' * 5000, b'{"a": "\\ud83d"}', b"", b"9" * 5000, b"[]"]
)
def test_files_that_are_no_json_object_are_refused(tmp_path, content):
    with pytest.raises(TokenizerError, match=r"tokenizer\.json"):
        opened(tmp_path, content)


def test_a_panic_on_a_later_text_is_an_error(tmp_path):
    split = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}
    tokenizer = opened(tmp_path, GOOD | {"pre_tokenizer": split})
    assert tokenizer.encode("ab", True) == [0, 2]
    with pytest.raises(TokenizerError, match="retry-limit"):
        tokenizer.encode("a" * 60 + "!", True)


def test_truncation_and_padding_of_the_file_never_apply(tmp_path):
    pad = {"strategy": {"Fixed": 2**40}, "direction": "Right", "pad_id": 0, "pad_type_id": 0, "pad_token": "a"}
    cut = {"direction": "Right", "max_length": 1, "strategy": "LongestFirst", "stride": 0}
    assert opened(tmp_path, GOOD | {"padding": pad, "truncation": cut}).encode("abab", True) == [0, 2, 0, 2]


@pytest.mark.parametrize(
    "added",
    [
        [],
        [1],
        "x",
        {"x": {"content": "a"}},
        {"-1": {"content": "a"}},
        {"1": "a"},
        {"1": {}},
        {"9" * 5000: {"content": "a"}},
    ],
)
def test_added_tokens_are_records_by_id(tmp_path, added):
    from dsvl2_jax import configs

    micro = configs.__path__[0] + "/micro/"
    for name in ("tokenizer.json", "special_tokens_map.json"):
        shutil.copy(micro + name, tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": added}))
    if added == []:  # as none
        Tokenizer.from_dir(tmp_path)
        return
    with pytest.raises(TokenizerError, match="added_tokens_decoder"):
        Tokenizer.from_dir(tmp_path)
