"""The error of a picture or a video that is not read, and the words that several of its messages share.

Tested in tests/infer/serve/test_media.py.
"""

from __future__ import annotations

from dsvl2_jax.errors import DSVL2Error


class MediaError(DSVL2Error):
    """A picture or a video that a request names and that is not read.

    Attributes:
      field: where the request names it, as in ``messages[1].content[0].image_url.url``.
      status: the HTTP status to answer with: 400 (it cannot be read), 403 (it is not allowed here) or 413 (it is too
        large, or there are too many).
    """

    def __init__(self, field: str, status: int, problem: str):
        super().__init__(f"{field}: {problem}")
        self.field, self.status = field, status


def too_many_bytes(most: int, kind: str = "picture") -> str:
    return f"the file has more than the {most} bytes that a {kind} may have. Make it smaller."


def shown(text: str) -> str:
    """What a client gave, as a message may show it: short, and without the secrets that a query may hold."""
    text = text.partition("?")[0]
    return repr(text if len(text) <= 80 else text[:80] + "…")
