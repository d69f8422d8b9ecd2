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
from typing import NamedTuple


class Span(NamedTuple):
    """When something ran, in nanoseconds of Unix time: the clock that all processes of a machine share."""

    name: str
    start_ns: int
    end_ns: int


class Timer:
    """Adds up named spans of wall time until `reset`. Spans may nest; a span that raises is counted, too."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        """Seconds per name, in order of first end."""
        self.spans: list[Span] = []
        """In order of their ends."""

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Time the block under `name`."""
        start_ns, start = time.time_ns(), time.perf_counter()
        try:
            yield
        finally:
            seconds = time.perf_counter() - start
            self.seconds[name] = self.seconds.get(name, 0.0) + seconds
            self.spans.append(Span(name, start_ns, start_ns + round(seconds * 1e9)))

    def reset(self) -> None:
        """Start a new step; what was handed out before stays as it was."""
        self.seconds, self.spans = {}, []
