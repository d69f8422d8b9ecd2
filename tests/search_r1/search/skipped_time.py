"""Time that passes only where everybody waits: what depends on it happens alike on every machine, at once."""

from __future__ import annotations

import asyncio
import functools
import selectors
from collections.abc import Callable, Coroutine
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


class _SkippingSelector(selectors.DefaultSelector):
    skipped_s = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        ready = super().select(0)
        if not ready:
            assert timeout is not None, "all wait, and nobody for a time: this would never end"
            self.skipped_s += max(timeout, 0.0)
        return ready


class _SkippingLoop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        self._skipping = _SkippingSelector()
        super().__init__(self._skipping)

    def time(self) -> float:
        return self._skipping.skipped_s


def run_skipping(main: Coroutine[Any, Any, T]) -> T:
    """Run what waits for nothing but time and itself, by a clock of its own."""
    with asyncio.Runner(loop_factory=_SkippingLoop) as runner:
        return runner.run(main)


def on_skipped_time(test: Callable[P, Coroutine[Any, Any, T]]) -> Callable[P, T]:
    """Make a test of a coroutine that runs by that clock, where sleeps order events."""

    @functools.wraps(test)
    def run(*arguments: P.args, **fixtures: P.kwargs) -> T:
        return run_skipping(test(*arguments, **fixtures))

    return run
