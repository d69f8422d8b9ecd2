"""The settings of the endpoint: flags of `python -m verl.ask --serve` and variables."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from serving.web.settings import (
    Parse,
    Setting,
    SettingError,
    parse_integer,
    parse_real,
    parse_text,
    parse_token,
    read_token_file,
    resolve_settings,
)
from verl.errors import ConfigError

TOKEN_VARIABLE = "ASK_TOKEN"


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSettings:
    """Settings of the server."""

    host: str
    port: int
    max_questions: int
    """Answered at the same time; more get 429."""
    max_messages: int
    max_body_mb: float
    shutdown_grace_s: float
    token: str = field(repr=False)
    """Callers must present it as a bearer token; empty lets everyone in."""


def _setting(name: str, default: str, parse: Parse, meaning: str) -> Setting:
    return Setting(
        name=name,
        flag=f"--{name.replace('_', '-')}",
        env=f"ASK_{name.upper()}",
        default=default,
        parse=parse,
        meaning=meaning,
    )


SERVER_SETTINGS = (
    _setting("host", "127.0.0.1", parse_text, "address to listen on"),
    _setting("port", "8400", parse_integer(0, 65535), "port to listen on; 0 takes a free one"),
    _setting("max_questions", "64", parse_integer(1), "questions at the same time; more get 429"),
    _setting("max_messages", "1000", parse_integer(1), "messages of a request; more get 413"),
    _setting("max_body_mb", "1", parse_real(0, 4096, open_low=True), "longest body in MiB; more gets 413"),
    _setting("shutdown_grace_s", "30", parse_real(0, 86400), "seconds in which accepted questions may end"),
    Setting(
        name="token",
        flag="--token-file",
        env=TOKEN_VARIABLE,
        default="",
        parse=parse_token,
        meaning="bearer token that callers must present; the flag names a file that holds it",
        parse_flag=read_token_file,
    ),
)


def resolve_server(flags: Mapping[str, str], environ: Mapping[str, str]) -> ServerSettings:
    """Return the settings of the server. Raises ConfigError."""
    try:
        values = resolve_settings(SERVER_SETTINGS, flags=flags, environ=environ)
    except SettingError as error:
        raise ConfigError(str(error)) from error
    return ServerSettings(**values)  # type: ignore[arg-type]
