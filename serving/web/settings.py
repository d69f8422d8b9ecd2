"""Settings of a service, each defined once: flag over environment variable over default, resolved at start.

A table of them makes the command line, its help and the table of a README.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

Value = str | int | float | bool
Parse = Callable[[str], Value]

_HOME = re.compile(r"^([^=]*=|)(~[^/]*)")
_TOKEN = re.compile(r"[!-~]+")
_ON = "true"
_SWITCH = {_ON: True, "1": True, "yes": True, "false": False, "0": False, "no": False}


class SettingError(ValueError):
    """A setting is wrong: the message names it, its value and what was expected."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """One setting."""

    name: str
    """Where its value is kept, among the resolved ones and in the namespace of a parser."""
    flag: str
    env: str
    default: str
    """In words, as a user would write it."""
    parse: Parse
    meaning: str
    shown_default: str = ""
    """What the help says instead of the default."""
    parse_flag: Parse | None = None
    """Reads the flag where it says something else than the variable: a secret must not stand in argv."""

    @property
    def shown(self) -> str:
        """The default as the help and the table say it."""
        return self.shown_default or self.default or "none"


def parse_integer(low: int, high: int | None = None) -> Parse:
    """Parser of whole numbers in these bounds; leading zeros do not matter."""
    expected = f"a whole number of at least {low}" if high is None else f"a whole number from {low} to {high}"

    def parsed(text: str) -> Value:
        try:
            value = int(text, 10)
        except ValueError:
            raise SettingError(f"{text!r}, expected {expected}") from None
        if value < low or (high is not None and value > high):
            raise SettingError(f"{text!r}, expected {expected}")
        return value

    return parsed


def parse_real(low: float, high: float, *, open_low: bool = False) -> Parse:
    """Parser of numbers in these bounds; `open_low`: without the lower one."""
    expected = f"a number {'above' if open_low else 'from'} {low:g} {'up ' if open_low else ''}to {high:g}"

    def parsed(text: str) -> Value:
        try:
            value = float(text)
        except ValueError:
            raise SettingError(f"{text!r}, expected {expected}") from None
        if not low <= value <= high or (open_low and value == low):
            raise SettingError(f"{text!r}, expected {expected}")
        return value

    return parsed


def parse_choice(choices: type[StrEnum] | Sequence[str]) -> Parse:
    """Parser of one of a few words; members of the enumeration where it is one."""

    def parsed(text: str) -> Value:
        if text not in tuple(choices):
            raise SettingError(f"{text!r}, expected one of {', '.join(choices)}")
        return choices(text) if isinstance(choices, type) else text

    return parsed


def parse_text(text: str) -> Value:
    """Anything but nothing."""
    if not text.strip():
        raise SettingError("empty, expected a text")
    return text


def expand_home(arguments: Sequence[str] | None) -> list[str]:
    """Return a command line (None: this program's) with the home folder in place of `~`.

    A shell leaves it in `--flag=~/x`, in `NAME=~/x` and in quotes.
    """
    given = sys.argv[1:] if arguments is None else arguments
    return [_HOME.sub(lambda found: found[1] + os.path.expanduser(found[2]), text) for text in given]


def parse_path(text: str) -> Value:
    """Parse a path that is not empty; `~` is the home folder, also in a variable of the environment."""
    return os.path.expanduser(str(parse_text(text)))


def parse_switch(text: str) -> Value:
    """Parser of what is on or off; its flag needs no value."""
    if text.lower() not in _SWITCH:
        raise SettingError(f"{text!r}, expected true or false")
    return _SWITCH[text.lower()]


def parse_token(text: str) -> Value:
    """Unlike the others, what this raises does not repeat the value."""
    if text and not _TOKEN.fullmatch(text):
        raise SettingError("no bearer token, expected visible ASCII characters without spaces")
    return text


def read_token_file(path: str) -> Value:
    """The token that a file holds."""
    try:
        token = Path(path).expanduser().read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no text"
        raise SettingError(
            f"{path!r}, which cannot be read ({reason}); expected a file with a token"
        ) from None
    if not _TOKEN.fullmatch(token):
        raise SettingError(f"{path!r}, which holds no bearer token, expected visible ASCII without spaces")
    return token


def add_settings(parser: argparse._ActionsContainer, settings: Iterable[Setting]) -> None:
    """The flag of every setting, for `resolve_settings` or for a command line that has more of them.

    Every value stays text; a flag that is not given leaves nothing in the namespace.
    """
    for setting in settings:
        meaning = f"{setting.meaning} (${setting.env}; default {setting.shown})".replace("%", "%%")
        if setting.parse is parse_switch:
            parser.add_argument(
                setting.flag,
                dest=setting.name,
                action="store_const",
                const=_ON,
                default=argparse.SUPPRESS,
                help=meaning,
            )
        else:
            parser.add_argument(
                setting.flag, dest=setting.name, metavar="X", default=argparse.SUPPRESS, help=meaning
            )


def resolve_settings(
    settings: Iterable[Setting],
    *,
    flags: Mapping[str, str],
    environ: Mapping[str, str],
    derive_default: Callable[[Setting, Mapping[str, Value]], str] = lambda setting, _: setting.default,
) -> dict[str, Value]:
    """The value of every setting. Raises SettingError that names the flag or the variable.

    An empty variable is as good as none. `derive_default`, which is given what is resolved so far, says what
    counts where neither is given.
    """
    values: dict[str, Value] = {}
    for setting in settings:
        source, text, parse = setting.flag, flags.get(setting.name), setting.parse_flag or setting.parse
        if text is None and environ.get(setting.env, "") != "":
            source, text, parse = f"${setting.env}", environ[setting.env], setting.parse
        if text is None:
            text, parse = derive_default(setting, values), setting.parse
        try:
            values[setting.name] = parse(text)
        except SettingError as error:
            raise SettingError(f"{source} is {error}") from None
    return values


def settings_table(settings: Iterable[Setting]) -> str:
    """The settings as a Markdown table."""
    rows = ["| flag | variable | default | meaning |", "| --- | --- | --- | --- |"]
    rows += [f"| `{s.flag}` | `{s.env}` | {s.shown} | {s.meaning} |" for s in settings]
    return "\n".join(rows)
