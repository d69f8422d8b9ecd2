"""Settings of the online engines. Keys come from the environment only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import date
from enum import StrEnum
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import proxy_bypass_environment  # type: ignore[attr-defined]

from pydantic import SecretStr

from search_r1.search.errors import RetrieverError
from search_r1.search.online.engines import ENGINES

MOCK = "mock"
ENGINE_NAMES = (*ENGINES, MOCK)
MOCK_VARIABLE = "IGPO_MOCK_SEARCH"
ANY_DATE = "any"
_MIN_KEY_CHARS = 8
"""Shorter values are no keys, and could not be removed from texts without harm."""


class OnlineMode(StrEnum):
    """What the recording is used for."""

    LIVE = "live"
    """Always ask the engine."""
    RECORD = "record"
    """Answer from the recording, else ask and record."""
    REPLAY = "replay"
    """Answer from the recording only: no connection is ever made."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OnlineOptions:
    """How an engine is asked. Raises RetrieverError for values that do not go together."""

    keys: Mapping[str, SecretStr] = field(default_factory=dict, repr=False)
    """By environment variable: those that are set."""
    mode: OnlineMode = OnlineMode.LIVE
    cache_path: Path | None = None
    """SQLite file of recorded answers and of the number of requests."""
    date: str | None = None
    """Day under which answers are recorded and looked up; `any` looks up the newest and records under today.
    None: today when recording, any when replaying."""
    url: str | None = None
    """Where the engine is asked; None: its published address."""
    num_parallel_calls: int = 16
    max_requests: int | None = None
    mock: bool = False
    """Make every answer up."""
    proxies: Mapping[str, SecretStr] = field(default_factory=dict, repr=False)
    """By scheme; `no` lists the hosts that need none."""

    def __post_init__(self) -> None:
        if self.mode is not OnlineMode.LIVE and self.cache_path is None:
            raise RetrieverError(f"--online_mode {self.mode} needs a file: --online_cache FILE")
        if self.max_requests is not None and self.cache_path is None:
            raise RetrieverError("--max_online_requests needs a file to count in: --online_cache FILE")
        if self.date not in (None, ANY_DATE):
            _check_date(str(self.date))
        if self.url is not None:
            _check_url(self.url)

    def proxy_for(self, url: str) -> SecretStr | None:
        """Return the proxy for `url`; None: reached directly."""
        parts = urlsplit(url)
        shown = {scheme: secret.get_secret_value() for scheme, secret in self.proxies.items()}
        if proxy_bypass_environment(parts.hostname or "", shown):
            return None
        return self.proxies.get(parts.scheme) or self.proxies.get("all")


def resolve_online(values: Mapping[str, object], environ: Mapping[str, str]) -> OnlineOptions:
    """Return the options of resolved settings, with keys and proxies of the environment.

    Raises RetrieverError.
    """
    cache = Path(str(values["online_cache"])) if values["online_cache"] else None
    default_mode = OnlineMode.LIVE if cache is None else OnlineMode.RECORD
    limit = values["max_online_requests"]
    names = [name for engine in ENGINES.values() for name in engine.key_variables if environ.get(name)]
    return OnlineOptions(
        keys={name: _read_key(name, environ[name]) for name in names},
        mode=OnlineMode(str(values["online_mode"] or default_mode)),
        cache_path=cache,
        date=str(values["online_date"]) or None,
        url=str(values["online_url"]) or None,
        num_parallel_calls=int(str(values["online_parallel"])),
        max_requests=None if limit == "" else int(str(limit)),
        mock=bool(values["mock_search"]),
        proxies=_read_proxies(environ),
    )


def _read_key(name: str, key: str) -> SecretStr:
    """Check that URL and header can carry the key. The message does not show it."""
    if len(key) < _MIN_KEY_CHARS:
        raise RetrieverError(f"{name} has only {len(key)} characters; no engine has keys of that length")
    if not key.isascii() or not key.isprintable() or " " in key:
        raise RetrieverError(f"{name} must be printable ASCII without spaces or line breaks")
    return SecretStr(key)


def _read_proxies(environ: Mapping[str, str]) -> dict[str, SecretStr]:
    """Return the values of `https_proxy`, `all_proxy` and `no_proxy`; lower-case names have priority."""
    names = sorted(name for name in environ if name.lower().endswith("_proxy") and environ[name])
    return {name.lower().removesuffix("_proxy"): SecretStr(environ[name]) for name in names}


def _check_date(text: str) -> None:
    try:
        is_date = date.fromisoformat(text).isoformat() == text
    except ValueError:
        is_date = False
    if not is_date:
        raise RetrieverError(f"--online_date must look like 2025-01-31 or be {ANY_DATE}, got {text!r}")


def _check_url(text: str) -> None:
    try:
        parts = urlsplit(text)
        is_usable = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        is_usable = False
    # What is no URL may hold a password anywhere.
    if "@" in (parts.netloc if is_usable else text):
        raise RetrieverError("--online_url must not hold a user or password: it is shown and logged")
    if not is_usable:
        raise RetrieverError(f"--online_url must look like https://host/path, got {text!r}")
