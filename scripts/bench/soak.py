"""Shared parts of the soaks: statistics of their clients, memory at both ends, the table."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from rich.table import Table

MAX_GROWTH = 0.10
"""Of the memory, from the middle of a soak to its end."""
_MAX_COMPLAINTS = 10


@dataclass(slots=True)
class Statistics:
    """Results of all clients together. Right, wrong, failed and late count single questions, not requests."""

    statuses: Counter[int] = field(default_factory=Counter)
    requests: Counter[str] = field(default_factory=Counter)
    right: int = 0
    wrong: int = 0
    failed: int = 0
    late: int = 0
    broken_connections: int = 0
    complaints: list[str] = field(default_factory=list)

    def complain(self, text: str) -> None:
        """Keep the first few problems for the table."""
        if len(self.complaints) < _MAX_COMPLAINTS:
            self.complaints.append(text)


def edges(memory: Sequence[int]) -> tuple[float, float]:
    """Return median bytes of the middle and of the last third; the first third is the warm-up."""
    third = max(1, len(memory) // 3)
    return statistics.median(memory[third : 2 * third] or memory), statistics.median(memory[-third:])


def soak_table(title: str, *, facts: Mapping[str, object], complaints: Sequence[str]) -> Table:
    """Return the result for the terminal."""
    shown = Table(title=title)
    shown.add_column("what")
    shown.add_column("count", justify="right")
    for name, value in facts.items():
        shown.add_row(name.replace("_", " "), str(value))
    for complaint in complaints:
        shown.add_row("complaint", complaint)
    return shown
