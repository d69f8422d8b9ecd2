"""The two kinds of work for a worker: a prompt to sample from, and a batch of pairs to judge."""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from collections.abc import Sequence
from typing import Protocol

from IG.entailment import Pair
from IG.sampler import PoisonedError, SampledAnswer
from IG.sharing import JudgementError

_MAX_SHOWN_CHARS = 80


class Computes(Protocol):
    """The part of a worker that does the work."""

    async def sample(self, prompt: str) -> tuple[SampledAnswer, ...]:
        """Return answers to the prompt; cancelling it stops the work. Raises SamplingError."""
        ...

    async def judge(self, pairs: Sequence[Pair]) -> list[float]:
        """Return P(premise entails hypothesis) of every pair, in order."""
        ...


class PromptJob:
    """One prompt to sample from, and its caller."""

    def __init__(self, prompt: str) -> None:
        self.prompt = prompt
        self.future: asyncio.Future[tuple[SampledAnswer, ...]] = asyncio.get_running_loop().create_future()
        self.num_lost_workers = 0
        """Workers that were lost while they had this job."""
        self.task: asyncio.Task[None] | None = None

    def __str__(self) -> str:
        return f"prompt {_shown(self.prompt)}"

    @property
    def is_over(self) -> bool:
        """Whether no caller waits for it any more."""
        return self.future.done()

    async def run(self, worker: Computes) -> None:
        """Do the work and settle it. Raises what the worker raises, before anything is settled."""
        answers = await worker.sample(self.prompt)
        if not self.future.done():
            self.future.set_result(answers)

    def fail(self, error: Exception) -> list[PairBatch]:
        """Settle it with an error of its own, or return smaller batches to try instead."""
        self.stop(error)
        return []

    def split(self) -> list[Job]:
        """Return the same work in pieces that can be retried one by one."""
        return [self]

    def quarantine(self) -> None:
        """Settle it as poisoned: two workers were lost with it."""
        self.stop(PoisonedError("sampling from this prompt ended two workers in a row; it is quarantined"))

    def stop(self, error: Exception) -> None:
        """Fail its caller: there is no worker any more."""
        if not self.future.done():
            self.future.set_exception(error)


class PairCall:
    """Pairs that one caller waits for; they may be judged in several batches."""

    def __init__(self, pairs: Sequence[Pair]) -> None:
        self.pairs = pairs
        self.future: asyncio.Future[list[float | Exception]] = asyncio.get_running_loop().create_future()
        self.num_taken = 0
        """Pairs that were put into batches so far."""
        self._outcomes: list[float | Exception] = [0.0] * len(pairs)
        self._num_open = len(pairs)

    def settle(self, index: int, outcome: float | Exception) -> None:
        """Set the outcome of a pair; each pair is settled once."""
        self._outcomes[index] = outcome
        self._num_open -= 1
        if self._num_open == 0 and not self.future.done():
            self.future.set_result(self._outcomes)

    def stop(self, error: Exception) -> None:
        """Fail the whole call."""
        if not self.future.done():
            self.future.set_exception(error)


class PairBatch:
    """Pairs of one or many calls that are judged together; a job with the methods of PromptJob."""

    def __init__(self, members: list[tuple[PairCall, int]], *, num_lost_workers: int = 0) -> None:
        """`members` are calls and indices of their pairs."""
        self.num_lost_workers = num_lost_workers
        self.task: asyncio.Task[None] | None = None
        self._members = members

    def __str__(self) -> str:
        return f"{len(self._members)} pairs, the first {_shown(' | '.join(self._pairs()[0]))}"

    @property
    def is_over(self) -> bool:
        return all(call.future.done() for call, _ in self._members)

    async def run(self, worker: Computes) -> None:
        judged = await worker.judge(self._pairs())
        if len(judged) != len(self._members):
            raise ValueError(f"the entailment model gave {len(judged)} scores for {len(self._members)} pairs")
        for (call, index), probability in zip(self._members, judged, strict=True):
            call.settle(index, probability)

    def fail(self, error: Exception) -> list[PairBatch]:
        """Return halves until the pair that fails is alone."""
        if (half := len(self._members) // 2) > 0:
            return [PairBatch(self._members[:half]), PairBatch(self._members[half:])]
        self._settle_all(JudgementError(f"the entailment model failed: {type(error).__name__}: {error}"))
        return []

    def split(self) -> list[Job]:
        # A worker that was lost may still answer; what it settles then must not be settled twice.
        members, self._members = self._members, []
        return [
            PairBatch([member], num_lost_workers=self.num_lost_workers)
            for member in members
            if not member[0].future.done()
        ]

    def quarantine(self) -> None:
        self._settle_all(PoisonedError("judging this pair ended two workers in a row; it is quarantined"))

    def stop(self, error: Exception) -> None:
        for call, _ in self._members:
            call.stop(error)

    def _pairs(self) -> list[Pair]:
        return [call.pairs[index] for call, index in self._members]

    def _settle_all(self, error: Exception) -> None:
        members, self._members = self._members, []
        for call, index in members:
            call.settle(index, error)


Job = PromptJob | PairBatch


class PairQueue:
    """Waiting pairs, cut into batches: first come first served, but a very long call lets others between."""

    def __init__(self, pairs_per_batch: int) -> None:
        self._most = pairs_per_batch
        self._least = -(-pairs_per_batch // 4)
        """Batches for several idle workers are not cut smaller."""
        self._retries: deque[PairBatch] = deque()
        self._calls: OrderedDict[PairCall, None] = OrderedDict()
        self._num_waiting = 0

    def append(self, call: PairCall) -> None:
        """Add a call."""
        self._calls[call] = None
        self._num_waiting += len(call.pairs)

    def remove(self, call: PairCall) -> None:
        """Drop what still waits of a call that was abandoned."""
        if call in self._calls:
            del self._calls[call]
            self._num_waiting -= len(call.pairs) - call.num_taken

    def retry_first(self, batches: Sequence[PairBatch]) -> None:
        """Put batches before everything else, as they are."""
        self._retries.extendleft(batches)

    def next_batch(self, *, num_idle: int) -> PairBatch | None:
        """Return a batch for one of `num_idle` workers, an even share of what waits; None when empty."""
        while self._retries:
            batch = self._retries.popleft()
            if not batch.is_over:
                return batch
        size = max(self._least, min(self._most, -(-self._num_waiting // num_idle)))
        members: list[tuple[PairCall, int]] = []
        while self._calls and len(members) < size:
            call, _ = self._calls.popitem(last=False)
            start, left = call.num_taken, len(call.pairs) - call.num_taken
            taken = min(size - len(members), left)
            members += [(call, index) for index in range(start, start + taken)]
            call.num_taken += taken
            self._num_waiting -= taken
            if left > taken:
                self._calls[call] = None
                self._calls.move_to_end(call, last=left - taken > self._most)
        return PairBatch(members) if members else None

    def stop(self, error: Exception) -> None:
        """Fail and forget everything."""
        for batch in self._retries:
            batch.stop(error)
        for call in self._calls:
            call.stop(error)
        self._retries.clear()
        self._calls.clear()
        self._num_waiting = 0


def _shown(text: str) -> str:
    return repr(text if len(text) <= _MAX_SHOWN_CHARS else "..." + text[-_MAX_SHOWN_CHARS:])
