"""The page at the server's `/`: one file, which speaks to the server's own API and to nothing else."""

from __future__ import annotations

import base64
import hashlib
import re
from pathlib import Path

_INLINE = re.compile(r"<(script|style)>(.*?)</\1>", re.DOTALL)


def load_page() -> tuple[bytes, dict[str, str]]:
    """The page and the headers that it is served with.

    The content security policy (https://www.w3.org/TR/CSP3/) lets the browser run the page's own script and style,
    which it knows by their SHA-256, and speak to this server alone; ``blob:`` is for pictures that the user has chosen,
    ``data:`` for the page's icon.

    Returns:
      index.html in UTF-8, and the headers by name.
    """
    html = (Path(__file__).parent / "index.html").read_text(encoding="utf-8")
    hashes = {
        tag: f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"
        for tag, content in _INLINE.findall(html)
    }
    policy = {
        "default-src": "'none'",
        "script-src": hashes["script"],
        "style-src": hashes["style"],
        "img-src": "'self' blob: data:",
        "connect-src": "'self'",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
    }
    headers = {
        "Content-Type": "text/html; charset=utf-8",
        "Content-Security-Policy": "; ".join(f"{name} {value}" for name, value in policy.items()),
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",
    }
    return html.encode(), headers
