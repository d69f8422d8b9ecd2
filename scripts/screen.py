"""Show a long run: phases with their times, lines of the program, one live line at the bottom."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)

HEARTBEAT_S = 15.0
Update = Callable[[int, str], None]


class Screen:
    """Prints when phases begin and end, lines of a child process, and one live line below."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._started = time.monotonic()
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
            console=console,
            transient=True,
        )
        self._is_live = console.is_terminal
        self._last_print = self._started

    def print(self, text: str, style: str = "bold cyan") -> None:
        """Print a line with the seconds since the start."""
        self._last_print = time.monotonic()
        line = f"[{self._last_print - self._started:6.1f} s] {text}"
        self.console.print(line, style=style, markup=False, soft_wrap=True)

    def print_line(self, line: str) -> None:
        """Print a line of a child process unchanged."""
        self._last_print = time.monotonic()
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)

    @contextmanager
    def phase(self, name: str, *, total: int | None = None) -> Iterator[Update]:
        """Print the beginning and the end of a phase, and keep a live line while it runs.

        Yields the function that updates the live line; without a terminal it prints a line now and then.
        """
        began = time.monotonic()
        self.print(f"{name} ...")
        task = self._progress.add_task(name, total=total, note="")
        if self._is_live:
            self._progress.start()

        def update(completed: int, note: str) -> None:
            self._progress.update(task, completed=completed, note=note)
            if not self._is_live and time.monotonic() - self._last_print > HEARTBEAT_S:
                self.print(f"{name}: {note}", style="dim")

        try:
            yield update
        finally:
            self._progress.remove_task(task)
            if self._is_live:
                self._progress.stop()
        self.print(f"{name}: done in {time.monotonic() - began:.1f} s")
