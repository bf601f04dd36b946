"""The content security policy of our pages: what a browser runs and loads, whatever a text in them tries.

Tested in tests/infer/serve/page and tests/security.
"""

from __future__ import annotations

import base64
import hashlib
import re

_INLINE = re.compile(r"<(script|style)>(.*?)</\1>", re.DOTALL)


def content_security_policy(page: str, **directives: str) -> str:
    """A policy (https://www.w3.org/TR/CSP3/) that allows the page's own script and style, and else what is named.

    Args:
      page: HTML with one ``<script>`` and one ``<style>``, which the browser knows by their SHA-256.
      directives: sources by the directive's name, as in ``img_src="'self'"``.
    """
    hashes = {
        f"{tag}-src": f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"
        for tag, content in _INLINE.findall(page)
    }
    named = {name.replace("_", "-"): sources for name, sources in directives.items()}
    nothing = {"default-src": "'none'", "base-uri": "'none'", "form-action": "'none'"}
    return "; ".join(f"{name} {sources}" for name, sources in (nothing | hashes | named).items())
