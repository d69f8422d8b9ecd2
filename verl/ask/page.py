"""The page of the endpoint: one file, whose script and style are the only ones that may run in it."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

_FILE = Path(__file__).with_name("page.html")


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    """A page and the headers it is sent with."""

    html: str
    headers: Mapping[str, str]


def make_page() -> Page:
    """Return the page; its policy permits its own script and style by their hashes, and its own server."""
    html = _FILE.read_text(encoding="utf-8")
    script, style = (_hash_of(tag, html) for tag in ("script", "style"))
    policy = (
        f"default-src 'none'; script-src '{script}'; style-src '{style}'; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    headers = {
        "Content-Security-Policy": policy,
        "X-Content-Type-Options": "nosniff",
        "Cache-Control": "no-cache",
    }
    return Page(html=html, headers=headers)


def _hash_of(tag: str, html: str) -> str:
    (content,) = re.findall(rf"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
    return "sha256-" + base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
