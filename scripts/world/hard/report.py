"""What `make_world.py --world hard --check` prints: every figure, and those that are not as they must be."""

from __future__ import annotations

import json

from rich.console import Console
from rich.table import Table

from world.hard.measure import LIMITS, check
from world.making import Figures


def show(figures: Figures) -> int:
    """Print a table, then one JSON line; return the exit status, 1 if a figure is not between its limits."""
    table = Table(title="the hard world", title_justify="left")
    for heading in ("part", "figure", "value", "must be"):
        table.add_column(heading, justify="right" if heading == "value" else "left")
    for part, shown in figures.items():
        for name, value in shown.items():
            limits = LIMITS.get((part, name))
            table.add_row(part, name, f"{value:.3f}", f"{limits[0]:g} to {limits[1]:g}" if limits else "")
    console = Console()
    console.print(table)
    missed = check(figures)
    for sentence in missed:
        console.print(sentence, markup=False, soft_wrap=True)
    console.file.flush()
    print(json.dumps({"ok": not missed, "missed": missed, **figures}), flush=True)
    return 1 if missed else 0
