"""Load in daemon threads, so that a service can stop before it has finished loading.

Python waits for the threads of an executor when the interpreter ends, but not for daemon threads. If one is
still loading (`is_loading`), the process must end without the interpreter's shutdown (`server.exit_now`).
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

    The thread then runs `then`, whether the load succeeded or not: for what ends with its thread.
    """
    outcome: Future[T] = Future()
    outcome.set_running_or_notify_cancel()  # cancelling the awaiting task does not change the outcome

    def run() -> None:
        try:
            outcome.set_result(load())
        except BaseException as error:  # raised where the outcome is awaited
            outcome.set_exception(error)
        threading.current_thread().name = f"keep-{name}"
        then()

    threading.Thread(target=run, name=_PREFIX + name, daemon=True).start()
    return asyncio.wrap_future(outcome)


def is_loading() -> bool:
    """Return whether a load still runs in this process, awaited or abandoned."""
    return any(thread.name.startswith(_PREFIX) for thread in threading.enumerate())
