"""Settings of the online engines, from flags and environment. Keys come from the environment only."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import date
from enum import StrEnum
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import proxy_bypass_environment  # type: ignore[attr-defined]

from pydantic import SecretStr

from search_r1.search.errors import RetrieverError
from search_r1.search.online.engines import ENGINES, LIST_PRICES_OF, Engine
from search_r1.search.online.store import ANY_DATE
from search_r1.search.online.transport import check_key

MOCK = "mock"
ONLINE_NAMES = (*ENGINES, MOCK)
MOCK_VARIABLE = "IGPO_MOCK_SEARCH"

_TRUE = frozenset({"true", "1", "yes", "on"})
_FALSE = frozenset({"false", "0", "no", "off", ""})


class OnlineMode(StrEnum):
    """What the recording is used for."""

    LIVE = "live"
    """Ask the engine, always."""
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
    """SQLite file of recorded answers and of what was spent."""
    date: str | None = None
    """Day under which answers are recorded and looked up; `any` looks up the newest and records under today.
    None: today when recording, any when replaying."""
    url: str | None = None
    """Where the engine is asked; None: its published address."""
    num_parallel_calls: int = 16
    spend_cap_usd: float | None = None
    price_per_1000_usd: float | None = None
    """None: the published list price."""
    mock: bool = False
    """Make every answer up."""
    proxies: Mapping[str, SecretStr] = field(default_factory=dict, repr=False)
    """By scheme; `no` lists the hosts that need none."""

    def __post_init__(self) -> None:
        if self.mode is not OnlineMode.LIVE and self.cache_path is None:
            raise RetrieverError(f"--online_mode {self.mode} needs a file: --online_cache FILE")
        if self.spend_cap_usd is not None and self.cache_path is None:
            raise RetrieverError("--spend_cap_usd needs a file to count in: --online_cache FILE")
        for flag, amount in (
            ("--spend_cap_usd", self.spend_cap_usd),
            ("--price_per_1000_usd", self.price_per_1000_usd),
        ):
            if amount is not None and not (math.isfinite(amount) and amount >= 0):
                raise RetrieverError(f"{flag} must be an amount of US dollars, at least 0, got {amount}")
        if not 1 <= self.num_parallel_calls <= 256:
            raise RetrieverError(f"--online_parallel must be in 1..256, got {self.num_parallel_calls}")
        if self.date is not None:
            _check_date(self.date)
        if self.url is not None:
            _check_url(self.url)

    def price_of(self, engine: Engine) -> float | None:
        """US dollars for 1,000 queries; None when nobody said."""
        return engine.list_price_usd if self.price_per_1000_usd is None else self.price_per_1000_usd

    def proxy_for(self, url: str) -> SecretStr | None:
        """Through which `url` is reached; None: directly."""
        parts = urlsplit(url)
        shown = {scheme: secret.get_secret_value() for scheme, secret in self.proxies.items()}
        if proxy_bypass_environment(parts.hostname or "", shown):
            return None
        return self.proxies.get(parts.scheme) or self.proxies.get("all")


def add_online_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags that only online engines read."""
    group = parser.add_argument_group(
        "online engines",
        "keys are read from the environment only: " + ", ".join(_all_key_variables()),
    )
    add = group.add_argument
    add(
        "--online_mode",
        choices=[mode.value for mode in OnlineMode],
        default=None,
        help="live: always ask; record: answer from --online_cache, else ask and record; replay: only from "
        "--online_cache, without any network (default: record with --online_cache, else live)",
    )
    add("--online_cache", metavar="FILE", default=None, help="SQLite file: recorded answers, spending")
    add(
        "--online_date",
        metavar="YYYY-MM-DD",
        default=None,
        help="day of the recorded answers, or any (default: today for record, any for replay)",
    )
    add("--online_url", metavar="URL", default=None, help="ask a compatible service instead")
    add("--online_parallel", metavar="N", type=int, default=16, help="connections, and requests at a time")
    add(
        "--spend_cap_usd",
        metavar="USD",
        type=float,
        default=None,
        help="refuse to ask when all that --online_cache ever counted would exceed this",
    )
    prices = ", ".join(f"{name} {e.list_price_usd:g}" for name, e in ENGINES.items() if e.list_price_usd)
    add(
        "--price_per_1000_usd",
        metavar="USD",
        type=float,
        default=None,
        help=f"what 1,000 queries cost you (default: list prices of {LIST_PRICES_OF}: {prices})",
    )
    add(
        "--mock_search",
        action="store_true",
        help=f"make all answers up, without network and key (also {MOCK_VARIABLE}=true)",
    )


def resolve_online(settings: argparse.Namespace, environ: Mapping[str, str]) -> OnlineOptions:
    """Flags of `add_online_arguments` and the environment as one. Raises RetrieverError."""
    cache = Path(settings.online_cache) if settings.online_cache else None
    default_mode = OnlineMode.LIVE if cache is None else OnlineMode.RECORD
    return OnlineOptions(
        keys={name: _read_key(name, environ[name]) for name in _all_key_variables() if environ.get(name)},
        mode=OnlineMode(settings.online_mode) if settings.online_mode else default_mode,
        cache_path=cache,
        date=settings.online_date,
        url=settings.online_url,
        num_parallel_calls=settings.online_parallel,
        spend_cap_usd=settings.spend_cap_usd,
        price_per_1000_usd=settings.price_per_1000_usd,
        mock=settings.mock_search or _read_switch(environ.get(MOCK_VARIABLE, "")),
        proxies=_read_proxies(environ),
    )


def _all_key_variables() -> list[str]:
    return [name for engine in ENGINES.values() for name in engine.key_variables]


def _read_key(name: str, key: str) -> SecretStr:
    try:
        return SecretStr(check_key(name, key))
    except ValueError as error:
        raise RetrieverError(str(error)) from None


def _read_switch(value: str) -> bool:
    if value.strip().lower() in _TRUE:
        return True
    if value.strip().lower() in _FALSE:
        return False
    raise RetrieverError(f"{MOCK_VARIABLE} must be true or false, got {value!r}")


def _read_proxies(environ: Mapping[str, str]) -> dict[str, SecretStr]:
    """As everybody reads them: `https_proxy`, `all_proxy`, `no_proxy`, the small spelling first."""
    names = sorted((name for name in environ if name.lower().endswith("_proxy")), key=str.swapcase)
    found: dict[str, SecretStr] = {}
    for name in names:
        if environ[name]:
            found.setdefault(name.lower().removesuffix("_proxy"), SecretStr(environ[name]))
    return found


def _check_date(text: str) -> None:
    if text == ANY_DATE:
        return
    try:
        known = bool(re.fullmatch(r"\d{4}-\d{2}-\d{2}", text)) and date.fromisoformat(text)
    except ValueError:
        known = False
    if not known:
        raise RetrieverError(f"--online_date must look like 2025-01-31 or be {ANY_DATE}, got {text!r}")


def _check_url(text: str) -> None:
    try:
        parts = urlsplit(text)
        usable = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
        hidden = parts.username is not None or parts.password is not None
    except ValueError:
        usable, hidden = False, False
    if hidden:
        raise RetrieverError("--online_url must not hold a user or password: it is shown and logged")
    if not usable:
        raise RetrieverError(f"--online_url must look like https://host/path, got {text!r}")
