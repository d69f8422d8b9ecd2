"""Secrets never reach a file or a log line: one place that knows what a secret looks like.

redact({"api_key": "abc", "retriever": {"url": "http://me:pw@host/retrieve"}})
-> {"api_key": "***", "retriever": {"url": "http://***@host/retrieve"}}
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TypeVar, cast

HIDDEN = "***"
T = TypeVar("T")

_SECRET_NAME = re.compile(
    r"secret|passw(or)?d|api[_-]?key|credential|authorization|private[_-]?key|access[_-]?key"
    r"|(^|[_-])(key|token|auth|pwd)$",
    re.IGNORECASE,
)
_URL_LOGIN = re.compile(r"(?<=://)[^/\s@]+(?=@)")
_NAMED_VALUE = re.compile(
    r"""((?:api[_-]?key|access[_-]?key|token|secret|passw(?:or)?d)["']?\s*[=:]\s*["']?)[^\s&"',;}]{4,}""",
    re.IGNORECASE,
)
_BEARER = re.compile(r"(?i)(\bbearer\s+)[\w.~+/=-]{8,}")
_KNOWN_FORMS = re.compile(
    r"\b(?:hf_\w{16,}|sk-[\w-]{16,}|gh[opsu]_\w{16,}|github_pat_\w{16,}|wandb_v1_\w{16,})"
)


def is_secret_name(name: str) -> bool:
    """`hf_token`, `WANDB_API_KEY`; not `max_tokens` nor `ppo_max_token_len_per_gpu`."""
    return _SECRET_NAME.search(name) is not None


def redact_text(text: str) -> str:
    """Hide logins in URLs, `key=value` pairs, bearer tokens and keys of known form in free text."""
    text = _URL_LOGIN.sub(HIDDEN, text)
    text = _NAMED_VALUE.sub(rf"\1{HIDDEN}", text)
    text = _BEARER.sub(rf"\1{HIDDEN}", text)
    return _KNOWN_FORMS.sub(HIDDEN, text)


def redact(value: T) -> T:
    """The same JSON-like tree without secrets."""
    return cast(T, _redact(value))


def _redact(value: object) -> object:
    if isinstance(value, str):
        return redact_text(value)
    if isinstance(value, Mapping):
        return {name: _hide(str(name), inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_redact(inner) for inner in value]
    return value


def _hide(name: str, value: object) -> object:
    is_empty = value is None or value == "" or isinstance(value, bool)
    return HIDDEN if is_secret_name(name) and not is_empty else _redact(value)
