"""The tokenizer libraries behind `dsvl2_jax.inputs.tokenizer`: each file is checked before its library reads it.

The `tokenizers` library panics on some files, and ends the process on others: a panic is no `Exception`, and prints a
backtrace. So what a file asks for is bounded here, and tried once when it is opened. Tested in
tests/inputs/test_tokenizer_files.py.
"""

import base64
import binascii
import contextlib
import json
import os
import re
import struct
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from dsvl2_jax.errors import TokenizerError
from dsvl2_jax.json_files import parse_json, read_json_object
from dsvl2_jax.messages import first_line

# How byte-level BPE writes each byte as a character: those that print stand for themselves, the others, in order, for
# the characters from 256 on (GPT-2's encoder.py).
_PRINTING = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
_OTHERS = [byte for byte in range(256) if byte not in _PRINTING]
_BYTE_OF = {chr(byte): byte for byte in _PRINTING} | {chr(256 + i): byte for i, byte in enumerate(_OTHERS)}

_MAX_NUMBER = (1 << 31) - 1  # of an id, and of every other whole number in a tokenizer.json
_MAX_GROWTH = 1000  # times that a text may become as long when all replacements of a tokenizer.json apply in turn
# What every tokenizer is tried on when it is opened: words, digits, spaces, other scripts, a control character.
_PROBE = "The 3 cats, 12345\n\n  wrote: naïve 世界 \U0001f600 \x00 " + "a" * 40
_ADVICE = "Download the file again."


class Backend(Protocol):
    """What `Tokenizer` needs of a tokenizer library."""

    special_ids: frozenset[int]
    base_size: int
    size: int

    def id_of(self, token: str) -> int | None: ...
    def add_special(self, tokens: Iterable[str]) -> None: ...
    def encode(self, text: str, special: bool) -> list[int]: ...
    def decode(self, ids: list[int], skip_special_tokens: bool) -> str: ...
    def bytes_of(self, index: int) -> bytes: ...
    def to_json(self) -> str | None: ...


class JsonBackend:
    """``tokenizer.json`` through the `tokenizers` library."""

    def __init__(self, path: Path):
        """Raises TokenizerError when the file is broken, or does not work on a text that every tokenizer takes."""
        import tokenizers

        self._library, self._path = tokenizers, path
        document = read_json_object(path, TokenizerError)
        _check_document(document, path)
        document |= {"truncation": None, "padding": None}  # never used here, and their numbers are not checked
        with self._guarded(), _silent():
            self._tokenizer = tokenizers.Tokenizer.from_str(json.dumps(document, ensure_ascii=False))
            self._tokenizer.decode(self._tokenizer.encode(_PROBE, add_special_tokens=False).ids)
            self.base_size = self._tokenizer.get_vocab_size(with_added_tokens=False)

    @contextlib.contextmanager
    def _guarded(self) -> Iterator[None]:
        """Turns whatever the library raises into a TokenizerError: a bare Exception, or its panic."""
        try:
            yield
        except BaseException as error:
            # The panic's class derives from BaseException alone, and has no public name.
            if isinstance(error, Exception) or type(error).__name__ == "PanicException":
                raise TokenizerError(
                    f"{self._path}: not a tokenizer.json that works ({first_line(error)}). {_ADVICE}"
                ) from None
            raise

    @property
    def size(self) -> int:
        return self._tokenizer.get_vocab_size(with_added_tokens=True)

    @cached_property
    def special_ids(self) -> frozenset[int]:
        added = self._tokenizer.get_added_tokens_decoder()
        return frozenset(index for index, token in added.items() if token.special)

    @cached_property
    def _plain(self) -> Any:
        """The same tokenizer without its control tokens: those flagged special, and those that look like markup.

        Some vocabularies keep ordinary characters among the added tokens; those stay.
        """
        document = parse_json(self._tokenizer.to_str())
        document["added_tokens"] = [
            token
            for token in document["added_tokens"]
            if not token["special"] and not (token["content"].startswith("<") and token["content"].endswith(">"))
        ]
        return self._library.Tokenizer.from_str(json.dumps(document))

    def id_of(self, token: str) -> int | None:
        return self._tokenizer.token_to_id(token)

    def add_special(self, tokens: Iterable[str]) -> None:
        # A token that exists keeps its id and only becomes special.
        make = self._library.AddedToken
        with self._guarded():
            self._tokenizer.add_special_tokens([make(token, special=True, normalized=False) for token in tokens])
        self.__dict__.pop("_added", None)

    def encode(self, text: str, special: bool) -> list[int]:
        with self._guarded():
            tokenizer = self._tokenizer if special else self._plain
            return tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        with self._guarded():
            return self._tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)

    def bytes_of(self, index: int) -> bytes:
        token = self._tokenizer.id_to_token(index)
        if token is None:
            return b""
        if index in self._added or not all(character in _BYTE_OF for character in token):
            return token.encode()
        return bytes(_BYTE_OF[character] for character in token)

    @cached_property
    def _added(self) -> frozenset[int]:
        return frozenset(self._tokenizer.get_added_tokens_decoder())

    def to_json(self) -> str:
        with self._guarded():
            return self._tokenizer.to_str()


class SentencePieceBackend:
    """``tokenizer.model`` through the sentencepiece library; special tokens are split off by us."""

    def __init__(self, path: Path, known: dict[int, str]):
        import sentencepiece

        try:
            self._model = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (OSError, RuntimeError) as error:
            raise TokenizerError(
                f"{path}: not a readable sentencepiece model ({first_line(error)}). {_ADVICE}"
            ) from None
        self.base_size = self._model.get_piece_size()
        # Ids at and above the model's size can only be added tokens; tokenizer_config.json gives their places.
        self._special = {token: index for index, token in known.items() if index >= self.base_size}
        self.add_special(token for index, token in known.items() if index < self.base_size)

    @property
    def size(self) -> int:
        return self.base_size + sum(index >= self.base_size for index in self._special.values())

    @property
    def special_ids(self) -> frozenset[int]:
        return frozenset(self._special.values())

    @cached_property
    def _token_of(self) -> dict[int, str]:
        return {index: token for token, index in self._special.items()}

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        longest_first = sorted(self._special, key=len, reverse=True)
        return re.compile("(" + "|".join(map(re.escape, longest_first)) + ")")

    def id_of(self, token: str) -> int | None:
        if token in self._special:
            return self._special[token]
        index = self._model.piece_to_id(token)
        return None if index == self._model.unk_id() and self._model.id_to_piece(index) != token else index

    def add_special(self, tokens: Iterable[str]) -> None:
        for token in tokens:
            index = self.id_of(token)
            if index is None:
                index = max(self.base_size - 1, *self._special.values(), 0) + 1
            self._special[token] = index
        for derived in ("_token_of", "_pattern"):
            self.__dict__.pop(derived, None)

    def encode(self, text: str, special: bool) -> list[int]:
        if special:
            ids: list[int] = []
            for piece in filter(None, self._pattern.split(text)):
                ids += [self._special[piece]] if piece in self._special else self._model.encode(piece)
            return ids
        ids = self._model.encode(text)
        if self.special_ids.isdisjoint(ids):
            return ids
        # The model knows a special token as a user-defined symbol: cut each one after its first character.
        cut = self._pattern.sub(lambda match: match[0][0] + "\0" + match[0][1:], text)
        return [index for piece in cut.split("\0") for index in self._model.encode(piece)]

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        text, run = [], []
        for index in ids:
            if index in self._token_of:
                text += [self._model.decode(run), "" if skip_special_tokens else self._token_of[index]]
                run = []
            elif index < self.base_size:
                run.append(index)
        return "".join(text) + self._model.decode(run)

    def bytes_of(self, index: int) -> bytes:
        if index in self._token_of:
            return self._token_of[index].encode()
        if not 0 <= index < self.base_size:
            return b""
        piece = self._model.id_to_piece(index)
        return bytes([int(piece[1:-1], 16)]) if self._model.is_byte(index) else piece.replace("▁", " ").encode()

    def to_json(self) -> None:
        return None


def _check_document(document: dict[str, Any], path: Path) -> None:
    """Raises TokenizerError for what would make the library end the process, or use memory without bound."""

    def refuse(found: str) -> None:
        raise TokenizerError(f"{path}: {found}. {_ADVICE}")

    growth, waiting = 1, [document]
    while waiting:
        value = waiting.pop()
        if isinstance(value, list):
            waiting += value
        elif isinstance(value, dict):
            waiting += value.values()
            kind = value.get("type")
            if kind in ("Replace", "Prepend"):
                growth *= max(1, *(len(str(value.get(key, ""))) for key in ("content", "prepend")))
                if growth > _MAX_GROWTH:
                    refuse(f"its replacements could make a text over {_MAX_GROWTH} times as long")
            if kind == "Precompiled":
                _check_charsmap(value.get("precompiled_charsmap"), refuse)
        elif isinstance(value, int) and not -1 <= value <= _MAX_NUMBER:
            refuse(f"found the number {value!s:.20}, expected whole numbers from 0 to {_MAX_NUMBER}")


def _check_charsmap(encoded: Any, refuse: Any) -> None:
    """A map of characters begins with the bytes of its trie as a little-endian u32; the library reserves as many."""
    try:
        content = base64.b64decode(encoded, validate=True)
        (size,) = struct.unpack_from("<I", content)
    except (TypeError, binascii.Error, ValueError, struct.error):
        size = -1
    if size <= 0 or size % 4 or size > len(content) - 4:
        refuse("precompiled_charsmap is not a map of characters")


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Keeps what a library prints on standard error by itself, as the backtrace of its panic, from it."""
    try:
        kept = os.dup(2)
    except OSError:  # there is none
        yield
        return
    try:
        with open(os.devnull, "wb") as nothing:
            os.dup2(nothing.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
