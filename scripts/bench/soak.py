"""What the soaks share: the memory at their two ends, and their table."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from rich.table import Table

MAX_GROWTH = 0.10
"""Of the memory, from the middle of a soak to its end."""
MAX_COMPLAINTS = 10


def edges(memory: Sequence[int]) -> tuple[float, float]:
    """Median bytes of the middle and of the last third: the first one warms up."""
    third = max(1, len(memory) // 3)
    return statistics.median(memory[third : 2 * third] or memory), statistics.median(memory[-third:])


def soak_table(title: str, *, facts: Mapping[str, object], complaints: Sequence[str]) -> Table:
    """What a person reads."""
    shown = Table(title=title)
    shown.add_column("what")
    shown.add_column("count", justify="right")
    for name, value in facts.items():
        shown.add_row(name.replace("_", " "), str(value))
    for complaint in complaints:
        shown.add_row("complaint", complaint)
    return shown
