"""Text to token ids and back, with the special tokens that the DeepSeek-VL2 processor needs.

A checkpoint's ``tokenizer.json`` is read with the `tokenizers` library; a directory that has only a
sentencepiece ``tokenizer.model`` works as well. Both sit behind one `Tokenizer`, so nothing else in the
project knows which of the two it was.
"""

import json
import re
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from dsvl2_jax.errors import TokenizerError
from dsvl2_jax.json_files import read_json_object

IMAGE_TOKEN = "<image>"
REF_TOKEN, REF_END_TOKEN = "<|ref|>", "<|/ref|>"
DET_TOKEN, DET_END_TOKEN = "<|det|>", "<|/det|>"
GROUNDING_TOKEN = "<|grounding|>"
USER_TOKEN, ASSISTANT_TOKEN = "<|User|>", "<|Assistant|>"
DEFAULT_PAD_TOKEN = "<｜▁pad▁｜>"

# The order in which missing ones are added, hence their ids: 128815..128822 in tiny and base, 100003..100010 in small.
PROCESSOR_TOKENS = (
    IMAGE_TOKEN,
    REF_TOKEN,
    REF_END_TOKEN,
    DET_TOKEN,
    DET_END_TOKEN,
    GROUNDING_TOKEN,
    USER_TOKEN,
    ASSISTANT_TOKEN,
)

REPLACEMENT = "\ufffd"  # what a decoder prints for bytes that are not (yet) UTF-8
_UTF8_PARTIAL = 3  # an unfinished UTF-8 character has at most this many bytes

# How byte-level BPE writes each byte as a character: those that print stand for themselves, the others, in order, for
# the characters from 256 on (GPT-2's encoder.py).
_PRINTING = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
_OTHERS = [byte for byte in range(256) if byte not in _PRINTING]
_BYTE_OF = {chr(byte): byte for byte in _PRINTING} | {chr(256 + i): byte for i, byte in enumerate(_OTHERS)}


class _Backend(Protocol):
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


class _JsonBackend:
    """``tokenizer.json`` through the `tokenizers` library."""

    def __init__(self, path: Path):
        import tokenizers

        self._library = tokenizers
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception for whatever is wrong with the file
            raise TokenizerError(
                f"{path}: not a readable tokenizer.json ({error}). Download the file again."
            ) from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.base_size = self._tokenizer.get_vocab_size(with_added_tokens=False)

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
        document = json.loads(self._tokenizer.to_str())
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
        self._tokenizer.add_special_tokens([make(token, special=True, normalized=False) for token in tokens])
        self.__dict__.pop("_added", None)

    def encode(self, text: str, special: bool) -> list[int]:
        tokenizer = self._tokenizer if special else self._plain
        return tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
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
        return self._tokenizer.to_str()


class _SentencePieceBackend:
    """``tokenizer.model`` through the sentencepiece library; special tokens are split off by us."""

    def __init__(self, path: Path, known: dict[int, str]):
        import sentencepiece

        try:
            self._model = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (OSError, RuntimeError) as error:
            raise TokenizerError(f"{path}: not a readable sentencepiece model ({error}).") from error
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


class Tokenizer:
    """The checkpoint's tokenizer with the processor's special tokens in place.

    Attributes: ``vocab_size`` (without added tokens; ``len()`` counts them), ``bos_id``, ``eos_id``,
    ``pad_id``, ``image_id``, ``special_ids`` (the pad and the eight processor tokens, token → id),
    ``all_special_ids`` (every id that ``skip_special_tokens`` drops), and the strings ``bos_token``,
    ``eos_token``, ``pad_token``.
    """

    def __init__(self, backend: _Backend, *, source: Path, bos: str | None, eos: str | None, pad: str | None):
        """Raises TokenizerError when bos or eos is not named, or not in the vocabulary. Use `from_dir`."""
        self._backend = backend
        self.source = source
        self.bos_token, self.bos_id = self._required("bos_token", bos)
        self.eos_token, self.eos_id = self._required("eos_token", eos)
        self.pad_token = pad or DEFAULT_PAD_TOKEN
        backend.add_special([self.bos_token, self.eos_token, self.pad_token, *PROCESSOR_TOKENS])
        self.special_ids = {token: backend.id_of(token) for token in (self.pad_token, *PROCESSOR_TOKENS)}
        self.pad_id = self.special_ids[self.pad_token]
        self.image_id = self.special_ids[IMAGE_TOKEN]
        self.all_special_ids = backend.special_ids
        self.vocab_size = backend.base_size

    @classmethod
    def from_dir(cls, path: str | Path) -> "Tokenizer":
        """Read tokenizer.json, or else tokenizer.model, from a checkpoint directory.

        The names of bos, eos and pad come from tokenizer_config.json and special_tokens_map.json, as plain
        strings or as AddedToken records; without a pad, ``<｜▁pad▁｜>`` is used.

        Raises TokenizerError when there is no tokenizer, a file is broken, or bos or eos cannot be found.
        """
        path = Path(path)
        config, names = (
            read_json_object(path / name, TokenizerError) if (path / name).is_file() else {}
            for name in ("tokenizer_config.json", "special_tokens_map.json")
        )
        known = config.get("added_tokens_decoder") or {}
        # transformers reads special_tokens_map.json first for the older layout, the one without added_tokens_decoder.
        sources = (config, names) if known else (names, config)
        bos, eos, pad = (_token_name(sources, key) for key in ("bos_token", "eos_token", "pad_token"))
        if (path / "tokenizer.json").is_file():
            backend: _Backend = _JsonBackend(path / "tokenizer.json")
        elif (path / "tokenizer.model").is_file():
            special = {int(index): token["content"] for index, token in known.items() if token.get("special")}
            backend = _SentencePieceBackend(path / "tokenizer.model", special)
        else:
            raise TokenizerError(
                f"{path}: found neither tokenizer.json nor tokenizer.model. Copy the tokenizer files of the released "
                "checkpoint into this directory."
            )
        return cls(backend, source=path, bos=bos, eos=eos, pad=pad)

    def __len__(self) -> int:
        return self._backend.size

    def encode(self, text: str, special: bool = True) -> list[int]:
        """Token ids of `text`, without bos or eos.

        `special` False is the strict mode: special-token strings in the text are encoded as ordinary text, and
        no id of `all_special_ids` comes out.
        """
        return list(self._backend.encode(text, special))

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = False) -> str:
        """Text of `ids` with no clean-up of spaces. Ids that no token has (spare embedding rows) give no text."""
        return self._backend.decode([int(index) for index in ids], skip_special_tokens)

    def token_bytes(self, index: int) -> bytes:
        """The bytes that a token stands for, perhaps a part of a character; none for an id that no token has.

        Those of a text's tokens, joined, are the text in UTF-8 (sentencepiece has a space before the first word).
        """
        return self._backend.bytes_of(index)

    def to_json(self) -> str:
        """The tokenizer as a tokenizer.json, for other libraries, with the special tokens in place.

        Raises TokenizerError for a sentencepiece model, which has no such form.
        """
        text = self._backend.to_json()
        if text is None:
            raise TokenizerError(
                f"{self.source}: found only tokenizer.model, but a tokenizer.json is needed. Make one beside it with "
                "transformers: AutoTokenizer.from_pretrained(DIRECTORY).save_pretrained(DIRECTORY)."
            )
        return text

    def check_fits(self, embedding_rows: int) -> None:
        """Raise TokenizerError naming the special tokens whose ids an embedding of this many rows does not have."""
        named = {self.bos_token: self.bos_id, self.eos_token: self.eos_id, **self.special_ids}
        outside = [f"{token} = {index}" for token, index in named.items() if index >= embedding_rows]
        if outside or self.vocab_size > embedding_rows:
            what = ", ".join(outside) or f"ordinary tokens up to {self.vocab_size - 1}"
            raise TokenizerError(
                f"{self.source}: the tokenizer has ids outside the model's embedding of {embedding_rows} rows: {what}. "
                "The tokenizer and the weights are from different checkpoints: use the tokenizer that came with them."
            )

    def _required(self, key: str, token: str | None) -> tuple[str, int]:
        if not token:
            raise TokenizerError(
                f"{self.source}: neither tokenizer_config.json nor special_tokens_map.json names a {key}. "
                "Copy these files from the released checkpoint."
            )
        index = self._backend.id_of(token)
        if index is None:
            raise TokenizerError(
                f"{self.source}: the {key} {token!r} is not in the vocabulary. "
                "The tokenizer's files are not from one checkpoint: copy all of them from the released one."
            )
        return token, index


class StreamDecoder:
    """Decode a stream of tokens, piece by piece, so that the pieces joined equal the whole decoded.

    A character whose bytes are spread over several tokens is held back until it is complete.

        decoder = StreamDecoder(tokenizer)
        for token_id in stream:
            print(decoder.push(token_id), end="")
        print(decoder.flush())
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = False):
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._ids: list[int] = []  # the last piece's tokens, as context, then those not yet printed whole
        self._context = 0  # how many are context, which sentencepiece needs to decode the space before a word
        self._printed = 0  # characters of the decoded window that are out already

    def push(self, token_id: int) -> str:
        """The text that this token makes certain; may be empty."""
        self._ids.append(int(token_id))
        text = self._tokenizer.decode(self._ids, self._skip)
        # Only the last few replacement characters can still turn into a real one.
        incomplete = min(len(text) - len(text.rstrip(REPLACEMENT)), _UTF8_PARTIAL)
        piece = text[self._printed : len(text) - incomplete]
        self._printed += len(piece)
        # A blank is no context: sentencepiece drops all spaces that a sequence begins with.
        if piece.strip() and not incomplete:
            self._ids = self._ids[self._context :]
            self._context = len(self._ids)
            self._printed = len(self._tokenizer.decode(self._ids, self._skip))
        return piece

    def flush(self) -> str:
        """What is still held back, broken characters included. The decoder is then ready for another stream."""
        rest = self._tokenizer.decode(self._ids, self._skip)[self._printed :]
        self._ids, self._context, self._printed = [], 0, 0
        return rest


def _token_name(sources: Iterable[dict[str, Any]], key: str) -> str | None:
    """The first token string that the sources give for `key`: a string, or an AddedToken record's content."""
    for source in sources:
        token = source.get(key)
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str) and token:
            return token
    return None
