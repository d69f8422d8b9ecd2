"""Run a benchmark as a command: a temporary folder, a screen, one line of JSON at the end."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

from rich.console import Console
from screen import Screen

from verl.utils.supervise import ChildFailedError


def run_bench(measure: Callable[[Screen, Path], Mapping[str, object]], *, name: str) -> int:
    """Print the figures that `measure` returns as one line of JSON; return the exit status.

    `measure` gets a temporary folder. The status is 1 if something could not be started, or if the figure
    `passed` is false.
    """
    screen = Screen(Console(width=None if sys.stdout.isatty() else 120))
    try:
        with TemporaryDirectory(prefix=f"{name}-") as folder:
            figures = measure(screen, Path(folder))
    except (ChildFailedError, ExceptionGroup) as error:
        reasons = error.exceptions if isinstance(error, ExceptionGroup) else (error,)
        lines = [
            str(one) if isinstance(one, ChildFailedError) else f"{type(one).__name__}: {one}"
            for one in reasons
        ]
        screen.print("; ".join(lines), style="bold red")
        return 1
    print(json.dumps(figures))
    return 0 if figures.get("passed", True) else 1
