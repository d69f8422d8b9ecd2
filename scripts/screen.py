"""What the user of a long run sees: phases with their times, lines passed on, one live line at the bottom."""

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
    """What the user sees: when a phase begins and ends, the trainer's lines, one live line below."""

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
        self._last_sign = self._started

    def say(self, text: str, style: str = "bold cyan") -> None:
        """A line with the seconds since the start."""
        self._last_sign = time.monotonic()
        line = f"[{self._last_sign - self._started:6.1f} s] {text}"
        self.console.print(line, style=style, markup=False, soft_wrap=True)

    def pass_on(self, line: str) -> None:
        """A line of the trainer, as it is."""
        self._last_sign = time.monotonic()
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)

    @contextmanager
    def phase(self, name: str, *, total: int | None = None) -> Iterator[Update]:
        """Announce a phase, keep a live line while it runs, say how long it took.

        Yields what moves the live line; without a terminal it shows a sign of life now and then instead.
        """
        began = time.monotonic()
        self.say(f"{name} ...")
        task = self._progress.add_task(name, total=total, note="")
        if self._is_live:
            self._progress.start()

        def update(completed: int, note: str) -> None:
            self._progress.update(task, completed=completed, note=note)
            if not self._is_live and time.monotonic() - self._last_sign > HEARTBEAT_S:
                self.say(f"{name}: {note}", style="dim")

        try:
            yield update
        finally:
            self._progress.remove_task(task)
            if self._is_live:
                self._progress.stop()
        self.say(f"{name}: done in {time.monotonic() - began:.1f} s")
