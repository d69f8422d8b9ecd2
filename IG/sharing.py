"""Work that is done once however many ask for it: samples of a prompt, entailment of a pair.

What is under way is shared by all who wait for it (single flight) and what is finished is kept in a bounded
cache, least recently used first to go. Who waits is counted: when the last one goes away the work is
cancelled and forgotten, and before that nobody's going away touches the others. Failures are never kept.

    shared = SharedSamples(sampler, key_of=key_of, size=50_000)
    answers, source = await shared.of(prompt)
"""

from __future__ import annotations

import asyncio
import hashlib
import math
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Generic, Protocol, TypeVar

from IG.entailment import Pair
from IG.sampler import AnswerSampler, PoisonedError, SampledAnswer, SamplingError

K = TypeVar("K")
T = TypeVar("T")


class JudgementError(RuntimeError):
    """This pair could not be judged; others may be."""


class Source(StrEnum):
    """Where the samples of a condition came from."""

    sampled = "sampled"
    """This request started the sampling."""
    joined = "joined"
    """It was under way already, for another condition or request."""
    cached = "cached"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelIdentity:
    """Which models the numbers come from."""

    generator: str
    generator_digest: str
    """SHA-256 of the files that make the model what it is."""
    entailment: str
    entailment_digest: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleKey:
    """Everything that the samples of a prompt depend on."""

    model_digest: str
    prompt: str
    num_answers: int
    temperature: float
    max_new_tokens: int
    seed: int
    prompt_style: str

    @property
    def digest(self) -> bytes:
        """Stands for the key where many are kept: prompts are long."""
        options = (
            self.model_digest, self.num_answers, self.temperature, self.max_new_tokens, self.seed,
            self.prompt_style,
        )  # fmt: skip
        return hashlib.sha256(f"{options!r}\x00{self.prompt}".encode(errors="surrogatepass")).digest()


@dataclass(slots=True, kw_only=True)
class Work:
    """What one request asked for and how much of it had to be done."""

    items: int = 0
    conditions: int = 0
    """With and without context, for every item that could be read."""
    distinct_prompts: int = 0
    prompts_sampled: int = 0
    """Sampling that this request started; the three sources add up to the conditions that got samples."""
    prompts_joined: int = 0
    prompts_cached: int = 0
    baselines: int = 0
    """Conditions without context."""
    baselines_sampled: int = 0
    answers_sampled: int = 0
    answers_empty: int = 0
    """Of those, without any text."""
    pairs_naive: int = 0
    """Directed pairs that a reading without any sharing judges."""
    pairs_judged: int = 0
    pairs_shared: int = 0
    """Known, or under way already."""
    pairs_equal: int = 0
    """Settled by equal text."""


class PairJudge(Protocol):
    """Judge pairs of texts for many callers at once."""

    async def judge(self, pairs: Sequence[Pair]) -> list[float | Exception]:
        """P(premise entails hypothesis) of every pair, or why there is none, in order.

        Cancelling it drops the pairs that are not being judged yet.
        """
        ...


class SharedSamples:
    """The samples of each prompt, drawn once."""

    def __init__(self, sampler: AnswerSampler, *, key_of: Callable[[str], SampleKey], size: int) -> None:
        self._sampler = sampler
        self._key_of = key_of
        self._finished: _Recent[bytes, tuple[SampledAnswer, ...]] = _Recent(size)
        self._flights: dict[bytes, _Flight[tuple[SampledAnswer, ...]]] = {}

    async def of(self, prompt: str) -> tuple[tuple[SampledAnswer, ...], Source]:
        """The samples and how they were come by. Raises what the sampler raises, SamplingError for NaN."""
        key = self._key_of(prompt).digest
        answers = self._finished.get(key)
        if answers is not None:
            return answers, Source.cached
        flight = self._flights.get(key)
        source = Source.sampled if flight is None else Source.joined
        if flight is None:
            flight = self._flights[key] = _Flight(
                lambda: self._sample(prompt), on_end=lambda ended: self._settle(key, ended)
            )
        flight.join()
        try:
            return await flight.result(), source
        finally:
            flight.leave()

    async def _sample(self, prompt: str) -> tuple[SampledAnswer, ...]:
        answers = await self._sampler.sample(prompt)
        if not answers or not all(math.isfinite(answer.mean_log_prob) for answer in answers):
            likely = [answer.mean_log_prob for answer in answers]
            raise SamplingError(f"the log-probs of the answers are {likely}, expected finite numbers")
        return answers

    def _settle(self, key: bytes, flight: _Flight[tuple[SampledAnswer, ...]]) -> None:
        if self._flights.get(key) is flight:
            del self._flights[key]
        if (answers := flight.outcome) is not None:
            self._finished.put(key, answers)


class SharedJudgements:
    """The entailment of each pair, judged once.

    All new pairs of a call go to the judge together and are waited for together: one future for the call.
    """

    def __init__(self, judge: PairJudge, *, size: int) -> None:
        self._judge = judge
        self._known: _Recent[bytes, float] = _Recent(size)
        self._flights: dict[Pair, _Flight[dict[Pair, float | Exception]]] = {}

    async def of(self, pairs: Sequence[Pair], work: Work) -> dict[Pair, float]:
        """P(premise entails hypothesis) by pair.

        Raises JudgementError and PoisonedError for a pair that has none, and what the judge raises.
        """
        found: dict[Pair, float] = {}
        fresh: list[Pair] = []
        waiting: dict[_Flight[dict[Pair, float | Exception]], list[Pair]] = {}
        for pair in dict.fromkeys(pairs):
            probability = self._known.get(_digest(pair))
            if probability is not None:
                found[pair] = probability
            elif (flight := self._flights.get(pair)) is not None:
                waiting.setdefault(flight, []).append(pair)
            else:
                fresh.append(pair)
        work.pairs_judged += len(fresh)
        work.pairs_shared += len(pairs) - len(fresh)
        if fresh:
            waiting[self._start(fresh)] = fresh
        for flight in waiting:
            flight.join()
        try:
            for flight, wanted in waiting.items():
                outcomes = await flight.result()
                for pair in wanted:
                    found[pair] = _probability(outcomes[pair])
        finally:
            for flight in waiting:
                flight.leave()
        return found

    def _start(self, pairs: list[Pair]) -> _Flight[dict[Pair, float | Exception]]:
        flight = _Flight(lambda: self._judge_all(pairs), on_end=lambda ended: self._settle(pairs, ended))
        for pair in pairs:
            self._flights[pair] = flight
        return flight

    async def _judge_all(self, pairs: list[Pair]) -> dict[Pair, float | Exception]:
        outcomes = await self._judge.judge(pairs)
        if len(outcomes) != len(pairs):
            raise JudgementError(f"{len(outcomes)} judgements came back for {len(pairs)} pairs")
        return {
            pair: outcome
            if isinstance(outcome, Exception) or 0.0 <= outcome <= 1.0
            else JudgementError(f"the entailment model gave {outcome} for {pair}, expected a probability")
            for pair, outcome in zip(pairs, outcomes, strict=True)
        }

    def _settle(self, pairs: list[Pair], flight: _Flight[dict[Pair, float | Exception]]) -> None:
        for pair in pairs:
            if self._flights.get(pair) is flight:
                del self._flights[pair]
        for pair, outcome in (flight.outcome or {}).items():
            if not isinstance(outcome, Exception):
                self._known.put(_digest(pair), outcome)


def _digest(pair: Pair) -> bytes:
    """Stands for the pair where many are kept: texts may be long."""
    premise, hypothesis = pair
    text = f"{len(premise)}\x00{premise}{hypothesis}"
    return hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=16).digest()


def _probability(outcome: float | Exception) -> float:
    if isinstance(outcome, JudgementError | PoisonedError):
        raise outcome
    if isinstance(outcome, Exception):
        raise JudgementError(f"{type(outcome).__name__}: {outcome}") from outcome
    return outcome


class _Recent(Generic[K, T]):
    """The last `size` things that were put or asked for."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._kept: OrderedDict[K, T] = OrderedDict()

    def get(self, key: K) -> T | None:
        value = self._kept.get(key)
        if value is not None:
            self._kept.move_to_end(key)
        return value

    def put(self, key: K, value: T) -> None:
        self._kept[key] = value
        self._kept.move_to_end(key)
        while len(self._kept) > self._size:
            self._kept.popitem(last=False)


class _Flight(Generic[T]):
    """Work under way; whoever waits for it joins before and leaves afterwards.

    `on_end` is called once: at the end, or when nobody waits any more and the work is cancelled.
    """

    def __init__(self, start: Callable[[], Awaitable[T]], *, on_end: Callable[[_Flight[T]], None]) -> None:
        self._start = start
        self._on_end: Callable[[_Flight[T]], None] | None = on_end
        self._num_waiting = 0
        self._task = asyncio.create_task(self._run())
        self._task.add_done_callback(self._ended)

    @property
    def outcome(self) -> T | None:
        """What came of it; None while it runs, when it failed and when it was cancelled."""
        if not self._task.done() or self._task.cancelled() or self._task.exception() is not None:
            return None
        return self._task.result()

    def join(self) -> None:
        self._num_waiting += 1

    def leave(self) -> None:
        self._num_waiting -= 1
        if self._num_waiting == 0 and not self._task.done():
            self._task.cancel()
            self._end()

    async def result(self) -> T:
        return await asyncio.shield(self._task)

    async def _run(self) -> T:
        try:
            return await self._start()
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            # Nobody cancelled this: it would look to those who wait as if somebody had cancelled them.
            raise RuntimeError("the worker stopped before it was done") from None

    def _ended(self, task: asyncio.Task[T]) -> None:
        if not task.cancelled():
            task.exception()  # work that nobody waits for any more must not leave a warning behind
        self._end()

    def _end(self) -> None:
        if self._on_end is not None:
            on_end, self._on_end = self._on_end, None
            on_end(self)
