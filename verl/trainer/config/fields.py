"""Fields of configuration sections with the values that they may have. Standard library only."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import field, fields, is_dataclass
from typing import Any
from urllib.parse import urlsplit

from verl.errors import ConfigError

_Rule = tuple[Callable[[Any], bool], str]
"""What a value must fulfill, and the words for it."""


def setting(default: object, is_valid: Callable[[Any], bool], expected: str) -> Any:
    """Declare a field; `expected` names in an error what `is_valid` accepts."""
    return field(default=default, metadata={"rule": (is_valid, expected)})


def positive(default: float | None) -> Any:
    """Declare a number above 0; None is always allowed where the type has it."""
    return setting(default, lambda value: value > 0 and math.isfinite(value), "greater than 0")


def not_negative(default: float | None) -> Any:
    """Declare a number that is at least 0."""
    return setting(default, lambda value: value >= 0 and math.isfinite(value), "at least 0")


def fraction(default: float) -> Any:
    """Declare a number from 0 up to, but not including, 1."""
    return setting(default, lambda value: 0 <= value < 1, "in [0, 1)")


def share(default: float | None) -> Any:
    """Declare a number in [0, 1], such as a discount."""
    return setting(default, lambda value: 0 <= value <= 1, "in [0, 1]")


def one_of(default: str, *others: str) -> Any:
    """Declare a choice, of which `default` is the first."""
    choices = (default, *others)
    return setting(default, lambda value: value in choices, "one of " + ", ".join(choices))


def web_url(default: str) -> Any:
    """Declare an address of a web service."""
    return setting(default, _is_web_url, "an http(s) URL such as http://127.0.0.1:8000")


def _is_web_url(value: str) -> bool:
    try:
        url = urlsplit(value)
        _ = url.port  # raises ValueError outside of 0 to 65535
    except ValueError:
        return False
    return url.scheme in ("http", "https") and bool(url.hostname)


def path_name(default: str) -> Any:
    """Declare a name that does not lead out of the folder to which it is joined."""
    return setting(
        default,
        lambda value: value.isprintable() and not {"", ".", ".."} & set(value.split("/")),
        "a name: printable, not absolute, without '..'",
    )


def check_section(key: str, section: Any) -> None:
    """Check the declared range of every field, of nested sections, too. Raises ConfigError for the first."""
    for each in fields(section):
        rule: _Rule | None = each.metadata.get("rule")
        value = getattr(section, each.name)
        name = f"{key}.{each.name}".lstrip(".")
        if rule is not None and value is not None:
            require(rule[0](value), name, value, rule[1])
        if is_dataclass(value):
            check_section(name, value)


def require(condition: bool, key: str, value: object, expected: str) -> None:
    """Raise ConfigError with key, value and what was expected unless the condition holds."""
    if not condition:
        raise ConfigError(f"{key} must be {expected}, got {value!r}")
