"""End a program in order: notice that a part died, close all parts, keep the first cause."""

from __future__ import annotations

import asyncio
import inspect
import logging
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager

logger = logging.getLogger(__name__)


def cancel_by_signals() -> None:
    """Let the first signal of a closing terminal cancel the task that calls this, as Ctrl-C does.

    Later ones do nothing: a terminal that closes sends SIGHUP twice, and a second cancellation would cut off
    what the first one lets the task save.
    """
    task, loop = asyncio.current_task(), asyncio.get_running_loop()
    assert task is not None
    # As nohup sets it, a signal stays ignored.
    numbers = [n for n in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) is not signal.SIG_IGN]

    def cancel_once() -> None:
        for number in numbers:
            loop.add_signal_handler(number, lambda: None)
        task.cancel()

    for number in numbers:
        loop.add_signal_handler(number, cancel_once)


def close_quietly(stack: AsyncExitStack, close: Callable[[], Awaitable[None] | None]) -> None:
    """Let the stack call `close`. A failure is only logged: it must not hide why the program ends."""
    stack.push_async_callback(_close, close)


async def _close(close: Callable[[], Awaitable[None] | None]) -> None:
    try:
        pending = close()
        if inspect.isawaitable(pending):
            await pending
    except Exception as error:
        logger.warning("while closing: %s: %s", type(error).__name__, error)
        logger.debug("%s failed", close, exc_info=True)


@asynccontextmanager
async def ended_by(watch: Coroutine[None, None, None], *, cleanup_s: float) -> AsyncIterator[None]:
    """Cancel what runs inside as soon as `watch` fails, and raise that error in place of the cancellation.

    What still runs after `cleanup_s` is cancelled again, because it may wait for what has ended.
    """
    task = asyncio.current_task()
    assert task is not None
    watching = asyncio.create_task(watch)
    cancelled_after: list[float] = []

    async def cancel() -> None:
        await asyncio.wait([watching])
        for delay_s in (0.0, cleanup_s):
            await asyncio.sleep(delay_s)
            cancelled_after.append(delay_s)
            task.cancel()

    cancelling = asyncio.create_task(cancel())
    try:
        yield
    except asyncio.CancelledError:
        error = watching.exception() if watching.done() else None
        if error is None:
            raise
        for _ in cancelled_after:
            task.uncancel()
        raise error from None
    finally:
        cancelling.cancel()
        watching.cancel()
