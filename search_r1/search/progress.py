"""Progress of a long build: bars with an ETA on a terminal, now and then a log line elsewhere."""

from __future__ import annotations

import logging
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

logger = logging.getLogger(__name__)

_LOG_EVERY_S = 30.0


class PhaseProgress:
    """A callable `report(phase, done, total)`; use it as a context."""

    def __init__(self) -> None:
        console = Console(stderr=True)
        self._is_terminal = console.is_terminal
        self._progress = Progress(
            TextColumn("{task.description:<20}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(elapsed_when_finished=True),
            console=console,
            disable=not self._is_terminal,
            speed_estimate_period=300.0,
        )
        self._tasks: dict[str, TaskID] = {}
        self._logged_s: dict[str, float] = {}

    def __enter__(self) -> PhaseProgress:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def __call__(self, phase: str, done: int, total: int) -> None:
        now_s = time.monotonic()
        if phase not in self._tasks:
            self._logged_s[phase] = now_s
            self._tasks[phase] = self._progress.add_task(phase, total=total, completed=done)
        self._progress.update(self._tasks[phase], completed=done, total=total)
        if not self._is_terminal and now_s - self._logged_s[phase] >= _LOG_EVERY_S:
            self._logged_s[phase] = now_s
            logger.info("%s: %s of %s", phase, f"{done:,}", f"{total:,}")
