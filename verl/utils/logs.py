"""Set up the logging of an entry point: readable on stderr, complete in the run folder."""

from __future__ import annotations

import logging
import sys
import time
from datetime import timedelta
from pathlib import Path

from rich.console import Console
from rich.logging import RichHandler

from serving.logs import SafeFormatter

logger = logging.getLogger(__name__)

ONLY_IN_FILE = {"only_in_file": True}
"""`extra` of a record that is not shown on the screen."""
_CHATTY = (
    "httpx",
    "httpcore",
    "urllib3",
    "asyncio",
    "matplotlib",
    "fontTools",
    "filelock",
    "wandb",
)


class _LogFile(logging.FileHandler):
    """A log file that warns once when it cannot be written, as on a full disk."""

    _has_failed = False

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802, ARG002 - named by the library
        if not self._has_failed:
            self._has_failed = True
            logger.warning("%s cannot be written: %s", self.baseFilename, sys.exc_info()[1])


def configure_logging(*, log_file: Path | None = None) -> None:
    """Set up the root logger; a second call replaces the first set-up."""
    screen = RichHandler(console=_stderr_console(), show_path=False, log_time_format="%H:%M:%S", markup=False)
    screen.setFormatter(SafeFormatter("%(message)s"))
    screen.addFilter(lambda record: not vars(record).keys() & ONLY_IN_FILE.keys())
    handlers: list[logging.Handler] = [screen]
    if log_file is not None:
        log_file.parent.mkdir(parents=True, exist_ok=True)
        to_file = _LogFile(log_file, encoding="utf-8")
        to_file.setFormatter(SafeFormatter("%(asctime)s %(levelname)-7s %(name)s: %(message)s"))
        handlers.append(to_file)
    logging.basicConfig(level=logging.INFO, handlers=handlers, force=True)
    for name in _CHATTY:
        logging.getLogger(name).setLevel(logging.WARNING)


class ProgressLog:
    """Logs the progress of a long phase, at most every 15 seconds, so that short phases log nothing."""

    def __init__(self, target: logging.Logger, what: str, *, done: int = 0, interval_s: float = 15.0) -> None:
        """Begin a phase of which `done` pieces are finished."""
        self._target = target
        self._what = what
        self._done = done
        self._interval_s = interval_s
        self._start = self._last = time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        """Report that `done` of `total` pieces are finished, with the rate and the time that is left."""
        now = time.monotonic()
        if now - self._last < self._interval_s:
            return
        self._last = now
        rate = (done - self._done) / max(now - self._start, 1e-6)
        left = f", {timedelta(seconds=round((total - done) / rate))} left" if rate else ""
        self._target.info("%s: %d of %d, %.2f per second%s", self._what, done, total, rate, left)


def _stderr_console() -> Console:
    """Return a console for stderr, wide if it is not a terminal, where rich would fold at 80 columns."""
    console = Console(stderr=True)
    return console if console.is_terminal else Console(stderr=True, width=160)
