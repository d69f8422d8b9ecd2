"""Recognize secrets and hide them, so that none reaches a file or a log line.

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
    r"secret|passw(or)?d|passphrase|api[_-]?key|credential|authorization|private[_-]?key|access[_-]?key"
    r"|(^|[_-])(key|token|auth|pwd|sig|signature|cookie)$",
    re.IGNORECASE,
)
_URL_LOGIN = re.compile(r"(?<=://)[^/\s?#]+(?=@)")
_NAMED_VALUE = re.compile(
    r"""((?:api[_-]?key|access[_-]?key|token|secret|credential|passw(?:or)?d|passphrase|signature)["']?\s*[=:]"""
    r"""\s*["']?|(?<![\w-])(?:key|sig|pwd|auth)=["']?)[^\s&"',;}]{4,}""",
    re.IGNORECASE,
)
_HEADER = re.compile(r"""(?i)((?:authorization|cookie)["']?\s*[=:]\s*["']?)[^"'\n]{4,}""")
_BEARER = re.compile(r"(?i)(\bbearer\s+)[\w.~+/=-]{8,}")
_BASIC = re.compile(r"(\b[Bb]asic\s+)(?=[A-Za-z+/]*[0-9=]|[\w+/][a-z+/]*[A-Z])[\w+/]{8,}={0,2}")
_KNOWN_FORMS = re.compile(
    r"-----BEGIN [A-Z ]*PRIVATE KEY-----[\s\S]*?(?:-----END|\Z)"
    r"|\b(?:"
    r"(?:AKIA|ASIA|ABIA|ACCA)[A-Z0-9]{16}"  # AWS
    r"|AIza[\w-]{35}|ya29\.[\w-]{16,}|GOCSPX-[\w-]{16,}"  # Google
    r"|gh[oprsu]_\w{16,}|github_pat_\w{16,}"
    r"|gl(?:pat|dt|rt|cbt|ptt|ft|imt|agent|oas|soat)-[\w-]{16,}"  # GitLab
    r"|xox[a-z]-[\w-]{10,}|xapp-[\w-]{10,}|hooks\.slack\.com/[\w/-]{16,}"
    r"|(?:hf|api_org|r8)_[A-Za-z0-9]{16,}|wandb_v1_\w{16,}"  # Hugging Face, Replicate, W&B
    r"|sk-[\w-]{16,}|[rs]k_(?:live|test)_\w{16,}"  # OpenAI, Anthropic, OpenRouter; Stripe
    r"|(?:nvapi|tvly|pplx|xai|jina|gsk)[-_][\w-]{16,}"  # models and web search
    r"|npm_[A-Za-z0-9]{36}|pypi-AgE[\w-]{16,}|dckr_pat_[\w-]{16,}"
    r"|eyJ[\w-]{16,}(?:\.[\w-]+)*"  # JSON web tokens
    r")"
)


def is_secret_name(name: str) -> bool:
    """Return whether a key or variable has a secret as its value: `hf_token`, but not `max_tokens`."""
    return _SECRET_NAME.search(name) is not None


def redact_text(text: str) -> str:
    """Hide logins in URLs, values of secret names, HTTP credentials and keys of known form in free text."""
    for pattern in (_HEADER, _NAMED_VALUE, _BEARER, _BASIC):
        text = pattern.sub(rf"\1{HIDDEN}", text)
    return _KNOWN_FORMS.sub(HIDDEN, _URL_LOGIN.sub(HIDDEN, text))


def redact(value: T) -> T:
    """Return the same JSON-like tree without secrets."""
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
