"""The table of settings that READMEs must contain."""

from __future__ import annotations

from collections.abc import Iterable

from serving.web.settings import Setting


def settings_table(settings: Iterable[Setting]) -> str:
    """Return the settings as a Markdown table."""
    rows = ["| flag | variable | default | meaning |", "| --- | --- | --- | --- |"]
    rows += [f"| `{s.flag}` | `{s.env}` | {s.shown} | {s.meaning} |" for s in settings]
    return "\n".join(rows)
