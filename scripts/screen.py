"""Show a long run: phases with their times, lines of the program, one live line at the bottom."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.text import Text

HEARTBEAT_S = 15.0
Update = Callable[[int, str], None]


class Screen:
    """Prints when phases begin and end, lines of a child process, and one live line below."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._started = time.monotonic()
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
        with self.console.status(Text(name)) as live_line:

            def update(completed: int, note: str) -> None:
                share = f" {completed}/{total}" if total else ""
                live_line.update(Text(f"{name}{share}: {note}"))
                if not self.console.is_terminal and time.monotonic() - self._last_print > HEARTBEAT_S:
                    self.print(f"{name}: {note}", style="dim")

            yield update
        self.print(f"{name}: done in {time.monotonic() - began:.1f} s")
