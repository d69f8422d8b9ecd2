"""Apply the rules of published_keys.yaml: what to write instead of the keys of other trainers."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

PROJECTS = {"S": "Search-R1 or InfoReasoner", "G": "IGPO", "V": "verl"}
_TABLE = Path(__file__).with_name("published_keys.yaml")
_SIGNS = {"{": "(?:", "}": ")", ",": "|", "*": ".*", ".": r"\."}


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """One entry of published_keys.yaml, which explains the fields."""

    keys: str
    projects: str
    condition: str
    here: str
    note: str

    def covers(self, key: str) -> bool:
        return _matches(self.keys, key)

    def advise(self, key: str, settings: Mapping[str, Any]) -> str:
        """Return what to write instead of `key`, with values computed from the script; nothing for null."""
        value = settings.get(key)
        overrides = "" if value is None else _fill(self.here, _by_last_part(settings, key))
        if overrides == f"{key}={_text(value)}":
            return self.note
        advice = f"write {overrides}; " if overrides else "leave it out: "
        return f"{advice}{self.note}".rstrip("; :")


@cache
def read_rules() -> tuple[Rule, ...]:
    """Return the rules in their order."""
    return tuple(
        Rule(
            keys=rule["keys"],
            projects=rule.get("projects", "SGV"),
            condition=rule.get("if", ""),
            here=rule.get("here", ""),
            note=rule.get("note", ""),
        )
        for rule in OmegaConf.load(_TABLE)["rules"]
    )


@cache
def read_same_keys(project: str) -> tuple[str, ...]:
    """Return the patterns of the keys that mean the same in `project` (a letter of PROJECTS) and here."""
    same = OmegaConf.load(_TABLE)["same"]
    return tuple(pattern for projects in same if project in projects for pattern in same[projects])


def recognize(unknown: Iterable[str]) -> str:
    """Return the letter of the project whose own keys are most frequent among `unknown`, or an empty text."""
    letters: Counter[str] = Counter()
    for key in unknown:
        owners = set().union(*(rule.projects for rule in read_rules() if rule.covers(key)))
        if len(owners) == 1:
            letters.update(owners)
    return letters.most_common(1)[0][0] if letters else ""


def has_key(project: str, key: str) -> bool:
    """Return whether `project` (a letter of PROJECTS) also has this key."""
    is_same = any(_matches(pattern, key) for pattern in read_same_keys(project))
    return is_same or any(project in rule.projects and rule.covers(key) for rule in read_rules())


def find_rule(key: str, settings: Mapping[str, Any], *, projects: str) -> Rule | None:
    """Return the first rule of these projects that holds for `key` in a script with these settings."""
    names = _by_last_part(settings, key)
    for rule in read_rules():
        if set(projects) & set(rule.projects) and rule.covers(key) and _holds(rule.condition, names):
            return rule
    return None


def _matches(pattern: str, key: str) -> bool:
    return re.fullmatch(re.sub(r"[{},*.]", lambda sign: _SIGNS[sign[0]], pattern), key) is not None


def _by_last_part(settings: Mapping[str, Any], key: str) -> dict[str, Any]:
    """Name settings by the last part of their keys; `key` itself wins, then the shortest path."""
    ordered = sorted(settings, key=lambda name: (name == key, -name.count(".")))
    return {name.rsplit(".", 1)[-1]: settings[name] for name in ordered}


def _holds(condition: str, names: Mapping[str, Any]) -> bool:
    match = re.fullmatch(r"(\w+)(?:(!?=)(.*))?", condition)
    if match is None:
        return True
    name, sign, expected = match.groups()
    if sign is None:
        return names.get(name) is not None
    return name in names and _matches(expected, _text(names[name]).lower()) == (sign == "=")


def _fill(template: str, names: Mapping[str, Any]) -> str:
    """Compute each `{expression}`; one with a setting that the script lacks stays, in <>."""

    def compute(match: re.Match[str]) -> str:
        try:
            # The expressions are those of the table; settings of the user are only values in them.
            return _text(eval(match[1], {"__builtins__": {"min": min, "max": max}}, dict(names)))
        except (NameError, TypeError, ArithmeticError, LookupError):
            return f"<{match[1]}>"

    return re.sub(r"\{(.*?)\}", compute, template)


def _text(value: Any) -> str:
    """Format a value as an override; token counts are rounded up."""
    if isinstance(value, bool) or value is None:
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, float):
        return str(math.ceil(value)) if value >= 1 else f"{value:.4g}"
    return str(value)
