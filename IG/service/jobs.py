"""The work of a worker: prompts to sample from, and pairs to judge in batches."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any, Protocol

from IG.entailment import Pair
from IG.sampler import SampledAnswer

_MAX_SHOWN_CHARS = 80


class WorkerLostError(RuntimeError):
    """The worker is gone, and with it the work that it had."""


class Worker(Protocol):
    """Both models on one device; its methods raise WorkerLostError once it is gone."""

    @property
    def device(self) -> str:
        """Return where it computes: `cpu` or `cuda:N`."""
        ...

    async def sample(self, prompt: str) -> tuple[SampledAnswer, ...]:
        """Return answers to the prompt; cancelling it stops the work. Raises SamplingError."""
        ...

    async def judge(self, pairs: Sequence[Pair]) -> list[float]:
        """Return P(premise entails hypothesis) of every pair, in order."""
        ...

    async def wait_lost(self) -> str:
        """Wait until it is gone and return the reason."""
        ...

    async def aclose(self) -> None:
        """Stop it, also when it is lost or partly lost."""
        ...


class Item:
    """A prompt to sample from or a pair to judge, and the future that its caller waits for."""

    def __init__(self, work: str | Pair) -> None:
        self.work = work
        self.future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self.num_lost_workers = 0
        """Workers that were lost while they had this item."""
        self.task: asyncio.Task[None] | None = None

    def __str__(self) -> str:
        text = self.work if isinstance(self.work, str) else " | ".join(self.work)
        return repr(text if len(text) <= _MAX_SHOWN_CHARS else "..." + text[-_MAX_SHOWN_CHARS:])

    def settle(self, outcome: object) -> None:
        """Give the caller a result or an exception, unless it has one or has left."""
        if self.future.done():
            return
        if isinstance(outcome, Exception):
            self.future.set_exception(outcome)
        else:
            self.future.set_result(outcome)


class Job:
    """What a worker does at a time: one prompt, or a batch of pairs."""

    def __init__(self, items: Sequence[Item]) -> None:
        self.items = items
        self.is_batch = isinstance(items[0].work, tuple)

    async def run(self, worker: Worker) -> None:
        """Do the work and settle it. Raises what the worker raises, before anything is settled."""
        works: list[Any] = [item.work for item in self.items]
        results: list[Any] = await worker.judge(works) if self.is_batch else [await worker.sample(works[0])]
        if len(results) != len(works):
            raise ValueError(f"the entailment model gave {len(results)} scores for {len(works)} pairs")
        for item, result in zip(self.items, results, strict=True):
            item.settle(result)
