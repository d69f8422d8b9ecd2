"""Read and check the prompt file, which holds every fixed text that the environment writes."""

from __future__ import annotations

import re
import reprlib
import string
from collections.abc import Mapping
from pathlib import Path
from typing import NoReturn

import yaml

from verl.errors import ConfigError
from verl.protocols import FixedText

PACKAGED_FILE = Path(__file__).with_name("prompts.yaml")
CONTEXT_TEXTS = {"dropped": FixedText()}
"""The section `context`, which `agent.context=drop_observations` needs."""
SURROGATE = re.compile("[\ud800-\udfff]")
"""Half a character, which an escape in YAML can write and no tokenizer can read."""


def prompt_file(chosen: str | None) -> Path:
    """Return the prompt file that `data.prompt_file` names, the packaged one for None."""
    return PACKAGED_FILE if chosen is None else Path(chosen)


def load_texts(path: Path, *, section: str, entries: Mapping[str, FixedText]) -> dict[str, str]:
    """Return the texts of a section, such as `search_r1` or `tools.search`, exactly the given entries.

    Raises ConfigError for a file that cannot be read, and for missing, unknown or malformed entries and
    placeholders.
    """
    try:
        content: object = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        reason = " ".join(_printable(str(error)).split())
        raise ConfigError(
            f"data.prompt_file={str(path)!r} cannot be read ({reason}); expected YAML like {PACKAGED_FILE}"
        ) from error
    texts = content
    for name in section.split("."):
        texts = texts.get(name) if isinstance(texts, dict) else None
    if not isinstance(texts, dict):
        if not entries and texts is None:
            return {}
        _refuse(path, section, f"is {reprlib.repr(texts)}, expected a section with {', '.join(entries)}")
    if unknown := sorted(map(str, texts.keys() - entries.keys())):
        _refuse(path, f"{section}.{unknown[0]}", f"is not known, expected only {', '.join(entries)}")
    for name, entry in entries.items():
        _check_text(texts.get(name), entry=entry, path=path, key=f"{section}.{name}")
    return texts


def _check_text(value: object, *, entry: FixedText, path: Path, key: str) -> None:
    """Raise ConfigError unless `value` is a text with the required and no unknown placeholders."""
    allowed = ", ".join(f"{{{name}}}" for name in (*entry.required, *entry.optional)) or "no placeholder"
    if not isinstance(value, str):
        _refuse(path, key, f"is {reprlib.repr(value)}, expected a text with {allowed}")
    if half := SURROGATE.search(value):
        _refuse(path, key, f"has half a character, {half[0]!r}; write the whole character itself")
    try:
        fields = [field for _, *field in string.Formatter().parse(value) if field[0] is not None]
    except ValueError as error:
        _refuse(
            path,
            key,
            f"is malformed ({error}), expected a text with {allowed}; a literal brace is written twice",
        )
    found = [name for name, _, _ in fields]
    for name, spec, conversion in fields:
        if spec or conversion or name not in (*entry.required, *entry.optional):
            _refuse(
                path,
                key,
                f"has the placeholder {{{name}}}, expected {allowed}; a literal brace is written twice",
            )
    if missing := [name for name in entry.required if found.count(name) != 1]:
        _refuse(path, key, f"has {{{missing[0]}}} {found.count(missing[0])} times, expected it once")


def _refuse(path: Path, key: str, problem: str) -> NoReturn:
    """Raise the ConfigError of one entry."""
    raise ConfigError(_printable(f"data.prompt_file={str(path)!r}: {key} {problem}; compare {PACKAGED_FILE}"))


def _printable(text: str) -> str:
    """Return a text that can be written in UTF-8, half characters escaped."""
    return text.encode(errors="backslashreplace").decode()
