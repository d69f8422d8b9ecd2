"""An engine and the agent that plays episodes with it, in one process: completions stay on its event loop."""

from __future__ import annotations

import asyncio
import pickle
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from typing import Protocol

from verl.protocols import Agent, Generate
from verl.types import FloatArray, IntArray, Question

OpenAgent = Callable[[Generate], AbstractAsyncContextManager[Agent]]
"""Connect the tools and return the agent that plays with an engine; closing it closes the tools."""


class Engine(Generate, Protocol):
    """An engine with weights that can be replaced."""

    async def version(self) -> int:
        """Return the version of the weights."""
        ...

    async def score(self, ids: Sequence[int] | IntArray) -> FloatArray:
        """Return the log-prob of every token at temperature 1 [L]; position 0 holds 0."""
        ...

    async def load_weights(self, folder: str, version: int) -> None:
        """Load the weights of a folder. Raises WeightSyncError."""
        ...

    async def shutdown(self) -> None:
        """End the child processes."""
        ...


class RolloutWorker:
    """One replica. Build it on any thread, call it on one event loop, `open` first."""

    def __init__(self, *, engine: Callable[[], Engine], open_agent: OpenAgent) -> None:
        """Build the engine; `open` the agent later, on the event loop of its connections."""
        self._open_agent = open_agent
        self._stack = AsyncExitStack()
        self._agent: Agent | None = None
        self._episodes: set[asyncio.Task[object]] = set()
        self._engine = engine()

    async def open(self) -> None:
        """Connect the tools. Calling it again does nothing. Raises ServiceError, ConfigError."""
        if self._agent is None:
            self._agent = await self._stack.enter_async_context(self._open_agent(self._engine))

    async def play(self, question: Question, *, sample: int, seed: int, greedy: bool) -> bytes:
        """Play one episode, see `verl.protocols.Agent`; return the trajectory pickled.

        Arrays themselves would stay in Ray's object store as long as the trajectory is used, and fill it.
        """
        assert self._agent is not None
        task = asyncio.current_task()
        assert task is not None
        self._episodes.add(task)
        try:
            return pickle.dumps(await self._agent.run(question, sample=sample, seed=seed, greedy=greedy))
        finally:
            self._episodes.remove(task)

    async def call_engine(self, method: str, /, *args: object) -> object:
        """Return or raise what a method of the engine does, once all cancelled episodes have ended."""
        # After a hang their requests may still run, and an engine refuses weights as long as one does.
        if cancelled := [task for task in self._episodes if task.cancelling()]:
            await asyncio.wait(cancelled)
        return await getattr(self._engine, method)(*args)

    async def shutdown(self) -> None:
        """Close the tools, then end the child processes of the engine."""
        try:
            await self._stack.aclose()
        finally:
            await self._engine.shutdown()
