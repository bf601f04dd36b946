"""Text to token ids and back, with the special tokens that the DeepSeek-VL2 processor needs.

A checkpoint's ``tokenizer.json`` is read with the `tokenizers` library; a directory that has only a
sentencepiece ``tokenizer.model`` works as well. Both sit behind one `Tokenizer`, so nothing else in the
project knows which of the two it was.
"""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from dsvl2_jax.errors import TokenizerError
from dsvl2_jax.inputs.tokenizer_backends import Backend, JsonBackend, SentencePieceBackend
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


class Tokenizer:
    """The checkpoint's tokenizer with the processor's special tokens in place.

    Attributes: ``vocab_size`` (without added tokens; ``len()`` counts them), ``bos_id``, ``eos_id``,
    ``pad_id``, ``image_id``, ``special_ids`` (the pad and the eight processor tokens, token → id),
    ``all_special_ids`` (every id that ``skip_special_tokens`` drops), and the strings ``bos_token``,
    ``eos_token``, ``pad_token``.
    """

    def __init__(self, backend: Backend, *, source: Path, bos: str | None, eos: str | None, pad: str | None):
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
        known = _added_tokens(config, path / "tokenizer_config.json")
        # transformers reads special_tokens_map.json first for the older layout, the one without added_tokens_decoder.
        sources = (config, names) if known else (names, config)
        bos, eos, pad = (_token_name(sources, key) for key in ("bos_token", "eos_token", "pad_token"))
        if (path / "tokenizer.json").is_file():
            backend: Backend = JsonBackend(path / "tokenizer.json")
        elif (path / "tokenizer.model").is_file():
            special = {index: token["content"] for index, token in known.items() if token.get("special")}
            backend = SentencePieceBackend(path / "tokenizer.model", special)
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


def _added_tokens(config: dict[str, Any], path: Path) -> dict[int, dict[str, Any]]:
    """``added_tokens_decoder`` of tokenizer_config.json: AddedToken records by id. Raises TokenizerError for others."""
    known = config.get("added_tokens_decoder") or {}
    if not isinstance(known, dict):
        raise TokenizerError(f"{path}: added_tokens_decoder is a {type(known).__name__}, expected an object by ids.")
    for index, token in known.items():
        content = token.get("content") if isinstance(token, dict) else None
        if not re.fullmatch("[0-9]{1,9}", index) or not isinstance(content, str) or not content:
            raise TokenizerError(
                f"{path}: added_tokens_decoder has {index[:20]!r}: {token!r:.60}, expected an id and its token's "
                'record with "content". Download the file again.'
            )
    return {int(index): token for index, token in known.items()}
