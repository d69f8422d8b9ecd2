from __future__ import annotations

import asyncio
import os
import signal
from contextlib import AsyncExitStack

import pytest

from verl.utils.actors import ActorError
from verl.utils.shutdown import cancel_by_signals, close_quietly, ended_by


async def fail_soon() -> None:
    await asyncio.sleep(0)
    raise ActorError("Ray's raylet ended")


async def run_forever() -> None:
    await asyncio.Event().wait()


async def test_the_second_signal_of_a_closing_terminal_does_not_cut_off_what_is_saved() -> None:
    saved = []

    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup it is ignored

    async def train() -> None:
        cancel_by_signals()
        os.kill(os.getpid(), signal.SIGHUP)
        try:
            await run_forever()
        finally:
            for number in (signal.SIGHUP, signal.SIGTERM):
                os.kill(os.getpid(), number)
                await asyncio.sleep(0.01)
            saved.append("step 3")

    try:
        with pytest.raises(asyncio.CancelledError):
            await asyncio.create_task(train())
    finally:
        for number in (signal.SIGHUP, signal.SIGTERM):
            asyncio.get_running_loop().remove_signal_handler(number)
        signal.signal(signal.SIGHUP, before)
    assert saved == ["step 3"]


async def test_a_watch_that_fails_ends_what_runs_and_lets_it_clean_up() -> None:
    saved = []

    async def train() -> None:
        try:
            await run_forever()
        except asyncio.CancelledError:
            await asyncio.sleep(0)  # cleanup can still wait for something
            saved.append("step 3")
            raise

    with pytest.raises(ActorError, match="raylet"):
        async with ended_by(fail_soon(), cleanup_s=60):
            await train()
    assert saved == ["step 3"]
    await asyncio.sleep(0)  # the task itself is not cancelled any more


async def test_a_cleanup_that_waits_for_what_has_ended_is_cut_off() -> None:
    async def train() -> None:
        try:
            await run_forever()
        finally:
            await run_forever()  # a call of an actor on a machine without power

    with pytest.raises(ActorError, match="raylet"):
        async with ended_by(fail_soon(), cleanup_s=0.01):
            await train()
    task = asyncio.current_task()
    assert task is not None
    assert task.cancelling() == 0


async def test_interrupts_and_other_errors_are_raised_unchanged() -> None:
    async def watched() -> None:
        async with ended_by(run_forever(), cleanup_s=60):
            await run_forever()

    task = asyncio.create_task(watched())
    await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    with pytest.raises(OSError, match="full"):
        async with ended_by(run_forever(), cleanup_s=60):
            raise OSError("full")


async def test_a_failure_while_closing_is_logged_and_the_first_error_raised(
    caplog: pytest.LogCaptureFixture,
) -> None:
    closed = []

    def close() -> None:
        closed.append("file")
        raise OSError("disk full")

    async def aclose() -> None:
        closed.append("client")
        raise RuntimeError("no loop")

    stack = AsyncExitStack()
    close_quietly(stack, close)
    close_quietly(stack, aclose)
    with pytest.raises(ActorError, match="engine"):
        async with stack:
            raise ActorError("the engine died")
    assert closed == ["client", "file"]
    assert "OSError: disk full" in caplog.text
    assert "RuntimeError: no loop" in caplog.text
