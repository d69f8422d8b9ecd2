"""Time the phases of a step.

timer = Timer()
with timer("rollout"):
    ...
timer.seconds["rollout"]
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Timer:
    """Adds up named spans of wall time until `reset`. Spans may nest; a span that raises is counted, too."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        """Seconds per name, in order of first end."""

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Time the block under `name`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def reset(self) -> None:
        """Start a new step; a dictionary handed out before stays as it was."""
        self.seconds = {}
