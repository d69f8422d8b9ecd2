"""Define each setting of a service once: its flag wins over its environment variable, that over its default.

The command line and its help are made from the definitions; the tests compare the README with them.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
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
    """A setting is wrong: the message names it, its value and what is expected."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """The definition of one setting."""

    name: str
    """Its key among the resolved values and in the namespace of a parser."""
    flag: str
    env: str
    default: str
    """As a user would write it."""
    parse: Parse
    meaning: str
    shown_default: str = ""
    """Shown instead of the default, if not empty."""
    parse_flag: Parse | None = None
    """Reads the flag if its meaning differs from the variable's: a secret must not be in argv."""

    @property
    def shown(self) -> str:
        """Return the default as the help and the table show it."""
        return self.shown_default or self.default or "none"


def parse_integer(low: int, high: int | None = None) -> Parse:
    """Return a parser of whole numbers within these bounds; leading zeros do not matter."""
    expected = f"a whole number of at least {low}" if high is None else f"a whole number from {low} to {high}"
    return _parse_number(int, lambda value: low <= value <= (value if high is None else high), expected)


def parse_real(low: float, high: float, *, open_low: bool = False) -> Parse:
    """Return a parser of numbers within these bounds, without the lower one if `open_low`."""
    expected = f"a number {'above' if open_low else 'from'} {low:g} {'up ' if open_low else ''}to {high:g}"
    return _parse_number(
        float, lambda value: (low < value if open_low else low <= value) and value <= high, expected
    )


def _parse_number(read: Callable[[str], float], is_within: Callable[[float], bool], expected: str) -> Parse:
    def parsed(text: str) -> Value:
        with suppress(ValueError):
            if is_within(value := read(text)):
                return value
        raise SettingError(f"{text!r}, expected {expected}")

    return parsed


def parse_choice(choices: type[StrEnum] | Sequence[str]) -> Parse:
    """Return a parser of one of these words, or of the members of an enumeration."""

    def parsed(text: str) -> Value:
        if text not in tuple(choices):
            raise SettingError(f"{text!r}, expected one of {', '.join(choices)}")
        return choices(text) if isinstance(choices, type) else text

    return parsed


def parse_text(text: str) -> Value:
    """Parse a text that is not blank."""
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
    """Parse a switch; its flag needs no value."""
    if text.lower() not in _SWITCH:
        raise SettingError(f"{text!r}, expected true or false")
    return _SWITCH[text.lower()]


def parse_token(text: str) -> Value:
    """Parse a bearer token. The message of the error does not repeat it."""
    if text and not _TOKEN.fullmatch(text):
        raise SettingError("not a bearer token, expected visible ASCII characters without spaces")
    return text


def read_token_file(path: str) -> Value:
    """Return the token in a file."""
    try:
        token = Path(path).expanduser().read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text"
        raise SettingError(
            f"{path!r}, which cannot be read ({reason}); expected a file with a token"
        ) from None
    if not _TOKEN.fullmatch(token):
        raise SettingError(f"{path!r}, which holds no bearer token, expected visible ASCII without spaces")
    return token


def add_settings(parser: argparse._ActionsContainer, settings: Iterable[Setting]) -> None:
    """Add the flag of every setting to a parser.

    Values stay text, for `resolve_settings`; a flag that is not given leaves nothing in the namespace.
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
    """Return the value of every setting. Raises SettingError that names the flag or the variable.

    An empty variable counts as unset. `derive_default` gets the values so far and returns the default.
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
