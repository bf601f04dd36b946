"""The page at the server's `/`: one file, which speaks to the server's own API and to nothing else."""

from __future__ import annotations

from pathlib import Path

from dsvl2_jax.infer.content_security import content_security_policy


def load_page() -> tuple[bytes, dict[str, str]]:
    """The page and the headers that it is served with.

    The content security policy lets the browser run the page's own script and style,
    which it knows by their SHA-256, and speak to this server alone; ``blob:`` is for pictures that the user has chosen,
    ``data:`` for the page's icon.

    Returns:
      index.html in UTF-8, and the headers by name.
    """
    html = (Path(__file__).parent / "index.html").read_text(encoding="utf-8")
    policy = content_security_policy(html, img_src="'self' blob: data:", connect_src="'self'", frame_ancestors="'none'")
    headers = {
        "Content-Type": "text/html; charset=utf-8",
        "Content-Security-Policy": policy,
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",
    }
    return html.encode(), headers
