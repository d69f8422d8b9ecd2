"""Loads that nobody has to wait for: a service that is asked to stop must not finish loading first.

Python joins the threads of an executor when the interpreter ends; a daemon thread can be left behind. It
still runs then, so whoever ends the process looks at `is_loading` and leaves without the interpreter's
farewell.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

_PREFIX = "load-"

T = TypeVar("T")


def load_in_thread(
    load: Callable[[], T], *, name: str, then: Callable[[], None] = lambda: None
) -> asyncio.Future[T]:
    """Run `load` in a thread of its own; cancelling the result abandons it.

    The thread goes on with `then`, whatever came of the load: for what must not outlive its thread.
    """
    outcome: Future[T] = Future()
    outcome.set_running_or_notify_cancel()  # cancelling what waits for it leaves the outcome alone

    def run() -> None:
        try:
            outcome.set_result(load())
        except BaseException as error:  # it belongs to whoever awaits the outcome
            outcome.set_exception(error)
        threading.current_thread().name = f"keep-{name}"
        then()

    threading.Thread(target=run, name=_PREFIX + name, daemon=True).start()
    return asyncio.wrap_future(outcome)


def is_loading() -> bool:
    """Whether a load still runs in this process, awaited or abandoned."""
    return any(thread.name.startswith(_PREFIX) for thread in threading.enumerate())
