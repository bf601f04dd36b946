"""The requests of `dsvl2 bench serve`: drawn pictures, questions about them, and texts, no two alike.

Tested in tests/apps/bench/test_serve.py.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from PIL import Image

from dsvl2_jax.apps.micro import pictures
from dsvl2_jax.inputs.processor import Processor

QUESTIONS = (
    "Describe the image.",
    "How many shapes are there?",
    "What colour is the shape on the left?",
    "Which shapes are in the image?",
    "Locate <|ref|>the circle<|/ref|> in the image.",
)
_GRIDS = ((1, 1), (2, 1), (1, 2), (2, 2))  # columns × rows of tiles that ordinary pictures have
_DRAWN = 16  # pictures that are drawn; further ones are copies with other pixels

Body = dict[str, Any]


class Requests:
    """Makes bodies of requests, each with a picture or a text of its own.

    Args:
      seed: the same gives the same requests.
      processor: the model's, for the size of its tiles and the length of its tokens.
    """

    def __init__(self, seed: int, processor: Processor):
        self.rng = np.random.default_rng(seed)
        self._tile = processor.config.tile_size
        tokens = processor.tokenizer.encode(" ".join(pictures.WORDS))
        self._words_per_token = len(pictures.WORDS) / len(tokens)
        self._text_tokens = sorted(set(tokens))
        self._drawn: dict[tuple[int, int], list[np.ndarray]] = {}

    def picture(self, columns: int = 0, rows: int = 0) -> Image.Image:
        """A picture that is cut into so many tiles beside its global view; 0: one of the ordinary sizes."""
        if not columns:
            columns, rows = _GRIDS[self.rng.integers(len(_GRIDS))]
        drawn = self._drawn.setdefault((columns, rows), [])
        if len(drawn) < _DRAWN:
            small = pictures.scene(self.rng, 3, size=(columns * pictures.TILE, rows * pictures.TILE)).draw()
            drawn.append(np.asarray(small.resize((columns * self._tile, rows * self._tile))))
        pixels = drawn[self.rng.integers(len(drawn))].copy()
        pixels[:2, :8] = self.rng.integers(0, 256, (2, 8, 3))
        return Image.fromarray(pixels)

    def photograph(self, megapixels: float) -> bytes:
        """A JPEG file of about so many million pixels, 4 to 3, with the detail of a photograph."""
        width = max(64, round((megapixels * 1e6 * 4 / 3) ** 0.5))
        height = width * 3 // 4
        coarse = Image.fromarray(self.rng.integers(0, 256, (48, 64, 3), np.uint8)).resize((width, height))
        grain = self.rng.integers(0, 24, (height, width, 1), np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(np.asarray(coarse) // 2 + grain).save(buffer, "JPEG", quality=88)
        return buffer.getvalue()

    def text(self, tokens: int) -> str:
        """Words that make about so many tokens."""
        count = max(1, round(tokens * self._words_per_token))
        return " ".join(self.rng.choice(pictures.WORDS, count).tolist())

    def token_ids(self, count: int) -> list[int]:
        """Exactly so many tokens of texts."""
        return self.rng.choice(self._text_tokens, count).tolist()

    def question(self) -> str:
        return QUESTIONS[self.rng.integers(len(QUESTIONS))]

    def about_picture(self, columns: int = 0, rows: int = 0) -> Body:
        return chat(ask([png_url(self.picture(columns, rows))], self.question()))

    def about_text(self, tokens: int) -> Body:
        return chat(ask([], self.text(tokens)))

    def mixed(self, picture_share: float, text_tokens: int) -> Iterator[tuple[str, Body]]:
        """(``picture`` or ``text``, a request) without end, in the given proportion from the beginning."""
        due = 0.5
        while True:
            due += picture_share
            if due >= 1:
                due -= 1
                yield "picture", self.about_picture()
            else:
                yield "text", self.about_text(text_tokens)


def ask(urls: Sequence[str], text: str) -> dict[str, Any]:
    """A user's message: pictures, then text."""
    images = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return {"role": "user", "content": [*images, {"type": "text", "text": text}]}


def chat(*messages: dict[str, Any], **settings: Any) -> Body:
    return {"messages": list(messages), **settings}


def fixed_length(body: Body, tokens: int) -> Body:
    """The request with an answer of exactly so many tokens."""
    return body | {"max_tokens": tokens, "ignore_eos": True}


def streamed(body: Body) -> bytes:
    """A request's bytes, for a stream that tells tokens."""
    return json.dumps(body | {"stream": True, "return_token_ids": True}).encode()


def png_url(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=1)
    return url(buffer.getvalue(), "png")


def url(data: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
