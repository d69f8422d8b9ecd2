"""How far a long build is: bars with an ETA on a terminal, now and then a log line elsewhere."""

from __future__ import annotations

import logging
import time
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

logger = logging.getLogger(__name__)

_LOG_EVERY_S = 30.0


class PhaseProgress:
    """Call it with (phase, done, total). The ETA leaves out what was done before a phase's first call."""

    def __init__(self, *, log_every_s: float = _LOG_EVERY_S) -> None:
        console = Console(stderr=True)
        self._bars = console.is_terminal
        self._log_every_s = log_every_s
        self._progress = Progress(
            TextColumn("{task.description:<20}"),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.completed:,.0f} of {task.total:,.0f}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(elapsed_when_finished=False),
            console=console,
            disable=not self._bars,
            speed_estimate_period=300.0,
        )
        self._tasks: dict[str, TaskID] = {}
        self._starts: dict[str, tuple[float, int]] = {}
        self._logged: dict[str, float] = {}

    def __enter__(self) -> PhaseProgress:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def __call__(self, phase: str, done: int, total: int) -> None:
        now = time.monotonic()
        if phase not in self._tasks:
            self._starts[phase] = (now, done)
            self._logged[phase] = now
            self._tasks[phase] = self._progress.add_task(phase, total=total, completed=done)
        self._progress.update(self._tasks[phase], completed=done, total=total)
        if not self._bars and now - self._logged[phase] >= self._log_every_s:
            self._logged[phase] = now
            logger.info("%s: %s", phase, self._say(phase, done, total, now=now))

    def _say(self, phase: str, done: int, total: int, *, now: float) -> str:
        started, before = self._starts[phase]
        text = f"{done:,} of {total:,}"
        if done <= before:
            return text
        left = (total - done) * (now - started) / (done - before)
        return f"{text}, about {format_seconds(left)} left"


def format_seconds(seconds: float) -> str:
    """`42 s`, `7 min`, `3.5 h`"""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
