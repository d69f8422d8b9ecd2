"""End a program in order: notice that a part died, close all parts, keep the first cause."""

from __future__ import annotations

import asyncio
import inspect
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager

logger = logging.getLogger(__name__)


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
async def ended_by(watch: Coroutine[None, None, None]) -> AsyncIterator[None]:
    """Cancel what runs inside as soon as `watch` fails, and raise that error in place of the cancellation."""
    task = asyncio.current_task()
    assert task is not None
    watching = asyncio.create_task(watch)
    watching.add_done_callback(lambda done: done.cancelled() or task.cancel())
    try:
        yield
    except asyncio.CancelledError:
        error = watching.exception() if watching.done() else None
        if error is None:
            raise
        task.uncancel()
        raise error from None
    finally:
        watching.cancel()
