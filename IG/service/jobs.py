"""What a worker can be given: a prompt to sample from, or a batch of pairs to judge."""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from collections.abc import Iterable, Sequence
from typing import Protocol

from IG.entailment import Pair
from IG.sampler import PoisonedError, SampledAnswer
from IG.sharing import JudgementError

_SHOWN_CHARS = 80


class Computes(Protocol):
    """The part of a worker that does the work."""

    async def sample(self, prompt: str) -> tuple[SampledAnswer, ...]:
        """Answers to the prompt; cancelling it stops the work. Raises SamplingError."""
        ...

    async def judge(self, pairs: Sequence[Pair]) -> list[float]:
        """P(premise entails hypothesis) of every pair, in order."""
        ...


class Job(Protocol):
    """A piece of work and who waits for it."""

    num_lost_workers: int
    """How many workers were lost while they had it."""
    task: asyncio.Task[None] | None

    @property
    def is_over(self) -> bool:
        """Whether nobody waits for it any more."""
        ...

    async def run(self, worker: Computes) -> None:
        """Do it and tell who waits. Raises what the worker raises, before anybody was told."""
        ...

    def fail(self, error: Exception) -> list[PairBatch]:
        """The worker is well, but this did not work: tell who waits, or return what to try instead."""
        ...

    def alone(self) -> list[Job]:
        """The same work in pieces that cannot harm each other."""
        ...

    def give_up(self) -> None:
        """Say that it cost too many workers."""
        ...

    def stop(self, error: Exception) -> None:
        """There is nobody to do it."""
        ...


class PromptJob:
    """One prompt to sample from."""

    def __init__(self, prompt: str) -> None:
        self.prompt = prompt
        self.future: asyncio.Future[tuple[SampledAnswer, ...]] = asyncio.get_running_loop().create_future()
        self.num_lost_workers = 0
        self.task: asyncio.Task[None] | None = None

    def __str__(self) -> str:
        return f"prompt {_shown(self.prompt)}"

    @property
    def is_over(self) -> bool:
        return self.future.done()

    async def run(self, worker: Computes) -> None:
        answers = await worker.sample(self.prompt)
        if not self.future.done():
            self.future.set_result(answers)

    def fail(self, error: Exception) -> list[PairBatch]:
        self.stop(error)
        return []

    def alone(self) -> list[Job]:
        return [self]

    def give_up(self) -> None:
        self.stop(PoisonedError("sampling from this prompt ended two workers in a row; it is given up"))

    def stop(self, error: Exception) -> None:
        if not self.future.done():
            self.future.set_exception(error)


class PairCall:
    """Pairs that one caller waits for."""

    def __init__(self, pairs: Sequence[Pair]) -> None:
        self.pairs = pairs
        self.future: asyncio.Future[list[float | Exception]] = asyncio.get_running_loop().create_future()
        self._outcomes: list[float | Exception] = [0.0] * len(pairs)
        self._num_open = len(pairs)

    def settle(self, start: int, outcomes: Sequence[float | Exception]) -> None:
        """Take the outcomes of the pairs from `start` on; each pair is settled once."""
        self._outcomes[start : start + len(outcomes)] = outcomes
        self._num_open -= len(outcomes)
        if self._num_open == 0 and not self.future.done():
            self.future.set_result(self._outcomes)


Run = tuple[PairCall, int, int]
"""The pairs from one place up to another of a call."""


class PairBatch:
    """Pairs of one or many calls, judged together."""

    def __init__(self, runs: Sequence[Run], *, num_lost_workers: int = 0) -> None:
        self.num_lost_workers = num_lost_workers
        self.task: asyncio.Task[None] | None = None
        self._runs = runs
        """What it still has to settle: nothing once that was handed on."""

    def __str__(self) -> str:
        return f"{len(self)} pairs, the first {_shown(' | '.join(self._pairs()[0]))}"

    def __len__(self) -> int:
        return sum(stop - start for _, start, stop in self._runs)

    @property
    def is_over(self) -> bool:
        return all(call.future.done() for call, _, _ in self._runs)

    async def run(self, worker: Computes) -> None:
        pairs = self._pairs()
        judged = await worker.judge(pairs)
        if len(judged) != len(pairs):
            raise ValueError(f"the entailment model gave {len(judged)} scores for {len(pairs)} pairs")
        done = 0
        for call, start, stop in self._runs:
            call.settle(start, judged[done : done + stop - start])
            done += stop - start

    def fail(self, error: Exception) -> list[PairBatch]:
        """Halves until the pair is found whose fault it is."""
        if len(self) > 1:
            return [PairBatch(half) for half in _halves(self._runs, len(self) // 2)]
        self._settle_all(JudgementError(f"the entailment model failed: {type(error).__name__}: {error}"))
        return []

    def alone(self) -> list[Job]:
        runs, self._runs = self._runs, ()
        return [
            PairBatch([(call, at, at + 1)], num_lost_workers=self.num_lost_workers)
            for call, start, stop in runs
            if not call.future.done()
            for at in range(start, stop)
        ]

    def give_up(self) -> None:
        self._settle_all(PoisonedError("judging this pair ended two workers in a row; it is given up"))

    def stop(self, error: Exception) -> None:
        for call, _, _ in self._runs:
            _stop(call, error)

    def _pairs(self) -> list[Pair]:
        return [pair for call, start, stop in self._runs for pair in call.pairs[start:stop]]

    def _settle_all(self, error: Exception) -> None:
        runs, self._runs = self._runs, ()
        for call, start, stop in runs:
            call.settle(start, [error] * (stop - start))


class PairQueue:
    """Pairs that wait, cut into batches: first come first served, but who has many lets others between."""

    def __init__(self, pairs_per_batch: int) -> None:
        self._most = pairs_per_batch
        self._least = -(-pairs_per_batch // 4)
        """A batch for one of several workers is not cut smaller."""
        self._first: deque[PairBatch] = deque()
        self._waiting: OrderedDict[PairCall, int] = OrderedDict()
        """And from which pair on."""

    def append(self, call: PairCall) -> None:
        """Let a call wait."""
        self._waiting[call] = 0

    def remove(self, call: PairCall) -> None:
        """Nobody waits for it any more."""
        self._waiting.pop(call, None)

    def return_first(self, batches: Iterable[PairBatch]) -> None:
        """Let batches be next, as they are."""
        self._first.extendleft(batches)

    def next_batch(self, *, num_sharers: int) -> PairBatch | None:
        """What one of several free workers should take, that all may have their share; None when empty."""
        while self._first:
            batch = self._first.popleft()
            if not batch.is_over:
                return batch
        room = max(self._least, min(self._most, -(-self._count(self._most * num_sharers) // num_sharers)))
        runs: list[Run] = []
        while self._waiting and room:
            call, start = self._waiting.popitem(last=False)
            if call.future.done():
                continue
            stop = min(start + room, len(call.pairs))
            runs.append((call, start, stop))
            room -= stop - start
            if stop < len(call.pairs):
                self._waiting[call] = stop
                self._waiting.move_to_end(call, last=len(call.pairs) - stop > self._most)
        return PairBatch(runs) if runs else None

    def stop(self, error: Exception) -> None:
        """Fail and forget everything."""
        for batch in self._first:
            batch.stop(error)
        for call in self._waiting:
            _stop(call, error)
        self._first.clear()
        self._waiting.clear()

    def _count(self, enough: int) -> int:
        """How many pairs wait, counted up to `enough`."""
        count = 0
        for call, start in self._waiting.items():
            count += 0 if call.future.done() else len(call.pairs) - start
            if count >= enough:
                return enough
        return count


def _halves(runs: Sequence[Run], size: int) -> tuple[list[Run], list[Run]]:
    left: list[Run] = []
    right: list[Run] = []
    for call, start, stop in runs:
        middle = min(stop, start + size)
        size -= middle - start
        if start < middle:
            left.append((call, start, middle))
        if middle < stop:
            right.append((call, middle, stop))
    return left, right


def _stop(call: PairCall, error: Exception) -> None:
    if not call.future.done():
        call.future.set_exception(error)


def _shown(text: str) -> str:
    return repr(text if len(text) <= _SHOWN_CHARS else "..." + text[-_SHOWN_CHARS:])
