"""Check the arguments of `main_ppo` before Hydra: keys of other trainers, typing errors, missing quotes.

Hydra stops at the first argument that it cannot use, and names neither what replaces a key nor the quotes.
"""

from __future__ import annotations

import difflib
import re
import shlex
from collections.abc import Collection, Sequence
from functools import cached_property
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException

from verl.errors import ConfigError
from verl.trainer.config.loading import chosen_method, config_groups, name_owners, schema_keys
from verl.trainer.config.published import PROJECTS, find_rule, has_key, recognize

_KEYS = "verl/trainer/config/ppo_trainer.yaml, of methods docs/methods.md"
_NEAR = 0.85
"""Similarity from which a key counts as a typing error of another."""


class Argument:
    """One argument of the command line: a flag, a key of Hydra or an override of our configuration."""

    def __init__(self, text: str) -> None:
        name, _, value = text.partition("=")
        # Hydra's grammar has no bare path that begins in the home folder.
        self.text = f"{name}={in_quotes(value)}" if re.match(r"~(/[^,]*)?$", value) else text
        self.key = name.lstrip("+~").split("@")[0]
        sets_key = "=" in text or text.startswith("~")
        self.is_override = sets_key and not text.startswith("-") and not re.match("hydra[./]", self.key)

    @cached_property
    def parsed(self) -> Override | None:
        """Return the argument as Hydra reads it; None if its grammar does not allow it."""
        try:
            return OverridesParser.create().parse_override(self.text)
        except HydraException:
            return None

    @property
    def value(self) -> Any:
        if self.parsed is None or self.parsed.is_sweep_override():
            return self.text.partition("=")[2]
        return self.parsed.value()


def check_overrides(arguments: Sequence[str]) -> list[str]:
    """Return the arguments in a form that Hydra accepts: flags first, no `+` before known keys.

    Raises one ConfigError that lists every argument that cannot be used, and what to write instead.
    """
    read = [Argument(text) for text in arguments]
    overrides = [argument for argument in read if argument.is_override]
    groups = config_groups()
    choices = [f"{a.key}={a.value}" for a in overrides if a.value in groups.get(a.key, ())]
    known = {*schema_keys(), *groups, *schema_keys(chosen_method(choices), "algorithm.")}
    project = recognize(a.key for a in overrides if a.key not in known)
    settings = {a.key: a.value for a in overrides}
    # A key that exists only here means that the script is written or converted for this trainer.
    is_ours = not project or any(
        key in known and key not in groups and not has_key(project, key) for key in settings
    )
    sweeps = not {"-m", "--multirun"}.isdisjoint(arguments)
    problems: dict[str, None] = {}
    for argument in read:
        is_known = argument.is_override and argument.key in known
        form = _check_form(argument, sweeps=sweeps) if is_known else None
        if is_known and form is None and argument.key in groups:
            form = _check_choice(argument, groups[argument.key])
        is_settled = is_known and is_ours
        key = None if is_settled else _check_key(argument, settings, known=known, project=project)
        problems.update(dict.fromkeys(problem for problem in (form, key) if problem))
    if problems:
        raise ConfigError(_join(list(problems), project))
    read.sort(key=lambda argument: re.match(r"[^-].*=|~", argument.text) is not None)
    return [a.text.lstrip("+") if a.is_override and a.key in known else a.text for a in read]


def _join(problems: Sequence[str], project: str) -> str:
    if len(problems) == 1:
        return problems[0]
    origin = f" as they are in {PROJECTS[project]} (docs/migration.md)" if project else ""
    return "\n".join([f"{len(problems)} arguments cannot be used{origin}:", *problems])


def _check_key(
    argument: Argument, settings: dict[str, Any], *, known: Collection[str], project: str
) -> str | None:
    """Return what replaces a key that does not exist here or means something else in `project`."""
    key = argument.key
    is_unknown = argument.is_override and key not in known
    rule = find_rule(key, settings, projects=project) if project else None
    if rule is None and is_unknown:
        rule = find_rule(key, settings, projects="".join(PROJECTS))
    if rule is not None:
        return f"{key}: {rule.advise(key, settings)}"
    if is_unknown and (owners := name_owners(key)):
        return f"{key}: {owners}"
    if key == "reward.gain":
        return f"{key}: the method is chosen by name; write algorithm=search_r1 for none, or inforeasoner"
    if is_unknown:
        return f"{key}: no such key{_suggest(key, known)}; all keys: {_KEYS}"
    return None


def _suggest(key: str, known: Collection[str]) -> str:
    """Suggest a key: the same name in another section, or a similar one."""
    same_name = [k for k in known if k.rsplit(".", 1)[-1] == key.rsplit(".", 1)[-1]]
    near = same_name if len(same_name) == 1 else difflib.get_close_matches(key, known, n=1, cutoff=_NEAR)
    return f", did you mean {near[0]}?" if near else ""


def _check_form(argument: Argument, *, sweeps: bool) -> str | None:
    """Return what is wrong with the form of an override of a key that exists."""
    key, value = argument.key, argument.text.partition("=")[2]
    if argument.text.startswith("~"):
        return f"{argument.text}: a setting cannot be removed; write {key}=VALUE"
    if argument.parsed is None:
        return f"{argument.text}: put the value in quotes: {_quote(key, value)}"
    if argument.parsed.is_sweep_override() and not sweeps:
        as_list = _quote(key, f"[{value}]")
        return f"{argument.text}: for a list write {as_list}, for one text {_quote(key, value)}"
    return None


def _check_choice(argument: Argument, choices: Sequence[str]) -> str | None:
    """Return what is wrong with the choice of a config group; a sweep is left to Hydra."""
    if argument.value in choices or argument.parsed is None or argument.parsed.is_sweep_override():
        return None
    return f"{argument.key} must be one of {', '.join(choices)}, got {argument.value!r}"


def _quote(key: str, value: str) -> str:
    """Write `key=value` for a shell, with quotes in the grammar of Hydra; a list keeps its brackets."""
    if value.startswith("[") and value.endswith("]"):
        elements = ",".join(in_quotes(element.strip()) for element in value[1:-1].split(","))
        return shlex.quote(f"{key}=[{elements}]")
    return shlex.quote(f"{key}={in_quotes(value)}")


def in_quotes(text: str) -> str:
    """Quote a text for Hydra, where a backslash is doubled before a quote and at the end only."""
    if re.fullmatch(r"\"[^\"]*\"|'[^']*'", text):
        return text
    return '"{}"'.format(re.sub(r'(\\*)("|$)', lambda m: m[1] * 2 + m[2].replace('"', r"\""), text))
