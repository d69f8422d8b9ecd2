"""Do shared work once: samples of a prompt, entailment of a pair of texts.

Work under way is shared by all waiters (single flight); finished work is kept in a bounded cache,
least recently used first to go. Waiters are counted: the last one that leaves cancels the work, earlier ones
leave it alone. Failures are never cached.

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
from typing import ClassVar, Generic, Protocol, TypeVar

from IG.entailment import Pair
from IG.sampler import AnswerSampler, PoisonedError, SampledAnswer, SamplingError

T = TypeVar("T")


class JudgementError(RuntimeError):
    """This pair could not be judged; others may be."""


class Source(StrEnum):
    """Where the samples of a condition came from."""

    sampled = "sampled"
    """This request started the sampling."""
    joined = "joined"
    """Sampling was under way already, for another condition or request."""
    cached = "cached"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelIdentity:
    """Which models the numbers come from."""

    generator: str
    generator_digest: str
    """SHA-256 of the files that make the model what it is."""
    entailment: str
    entailment_digest: str


@dataclass(slots=True, kw_only=True)
class Work:
    """Work that a request asked for, and how much of it had to be done; the fields are those on the wire."""

    __pydantic_config__: ClassVar[dict[str, bool]] = {"use_attribute_docstrings": True}
    """Lets the OpenAPI document show the docstrings of the fields."""

    items: int = 0
    conditions: int = 0
    """With and without context, of every item that could be read."""
    distinct_prompts: int = 0
    prompts_sampled: int = 0
    """Prompts whose sampling this request started."""
    prompts_joined: int = 0
    """Conditions whose prompt was being sampled already."""
    prompts_cached: int = 0
    """Conditions whose samples were cached."""
    baselines: int = 0
    """Conditions without context."""
    baselines_sampled: int = 0
    """Of those, really sampled by this request."""
    answers_sampled: int = 0
    answers_empty: int = 0
    """Of those, without any text."""
    pairs_naive: int = 0
    """Directed pairs that a reading without any sharing judges."""
    pairs_judged: int = 0
    """Pairs that this request sent to the model."""
    pairs_shared: int = 0
    """Pairs known or under way already."""
    pairs_equal: int = 0
    """Pairs settled by equal text."""


class PairJudge(Protocol):
    """Judge pairs of texts for many callers at once."""

    async def judge(self, pairs: Sequence[Pair]) -> list[float | Exception]:
        """Return P(premise entails hypothesis) of every pair, or why there is none, in order.

        Cancelling it drops the pairs that are not being judged yet.
        """
        ...


class SharedSamples:
    """The samples of each prompt, drawn once."""

    def __init__(self, sampler: AnswerSampler, *, key_of: Callable[[str], bytes], size: int) -> None:
        """Take `key_of`, which covers everything that the samples of a prompt depend on."""
        self._sampler = sampler
        self._key_of = key_of
        self._finished: _Cache[tuple[SampledAnswer, ...]] = _Cache(size)
        self._flights: dict[bytes, _Flight[tuple[SampledAnswer, ...]]] = {}

    async def of(self, prompt: str) -> tuple[tuple[SampledAnswer, ...], Source]:
        """Return the samples and their source. Raises what the sampler raises, SamplingError for NaN."""
        key = self._key_of(prompt)
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
        require_log_probs(answers)
        return answers

    def _settle(self, key: bytes, flight: _Flight[tuple[SampledAnswer, ...]]) -> None:
        del self._flights[key]
        if (answers := flight.outcome) is not None:
            self._finished.put(key, answers)


_Judged = dict[Pair, float | Exception]


class SharedJudgements:
    """The entailment of each pair, judged once.

    All new pairs of a call are one flight, so a call waits for one future and not for one per pair.
    """

    def __init__(self, judge: PairJudge, *, size: int) -> None:
        self._judge = judge
        self._known: _Cache[float] = _Cache(size)
        self._flights: dict[Pair, _Flight[_Judged]] = {}

    async def of(self, pairs: Sequence[Pair], work: Work) -> dict[Pair, float]:
        """Return P(premise entails hypothesis) by pair.

        Raises JudgementError and PoisonedError for a pair that has none, and what the judge raises.
        """
        outcomes = await self.outcomes(pairs, work)
        return {pair: _probability(outcome) for pair, outcome in outcomes.items()}

    async def outcomes(self, pairs: Sequence[Pair], work: Work) -> _Judged:
        """Return P(premise entails hypothesis) by pair, or why it has none. Raises what the judge raises."""
        # A pair is known, being judged for another call, or new; all new ones of a call are one flight.
        found: _Judged = {}
        new: list[Pair] = []
        waiting: dict[_Flight[_Judged], list[Pair]] = {}
        for pair in dict.fromkeys(pairs):
            probability = self._known.get(_pair_key(pair))
            if probability is not None:
                found[pair] = probability
            elif (flight := self._flights.get(pair)) is not None:
                waiting.setdefault(flight, []).append(pair)
            else:
                new.append(pair)
        work.pairs_judged += len(new)
        work.pairs_shared += len(pairs) - len(new)
        if new:
            flight = _Flight(lambda: self._judge_all(new), on_end=lambda ended: self._settle(new, ended))
            self._flights |= dict.fromkeys(new, flight)
            waiting[flight] = new
        # All are joined before the first is awaited, so that none is cancelled meanwhile for lack of waiters.
        for flight in waiting:
            flight.join()
        try:
            for flight, wanted in waiting.items():
                outcomes = await flight.result()
                found |= {pair: outcomes[pair] for pair in wanted}
        finally:
            for flight in waiting:
                flight.leave()
        return found

    async def _judge_all(self, pairs: list[Pair]) -> _Judged:
        outcomes = await self._judge.judge(pairs)
        if len(outcomes) != len(pairs):
            raise JudgementError(f"{len(outcomes)} judgements came back for {len(pairs)} pairs")
        return dict(zip(pairs, map(check_judgement, outcomes, pairs), strict=True))

    def _settle(self, pairs: list[Pair], flight: _Flight[_Judged]) -> None:
        for pair in pairs:
            del self._flights[pair]
        for pair, outcome in (flight.outcome or {}).items():
            if not isinstance(outcome, Exception):
                self._known.put(_pair_key(pair), outcome)


def require_log_probs(answers: Sequence[SampledAnswer]) -> None:
    """Raise SamplingError unless there are answers, all with finite log-probs."""
    log_probs = [answer.mean_log_prob for answer in answers]
    if not log_probs or not all(map(math.isfinite, log_probs)):
        raise SamplingError(f"the log-probs of the answers are {log_probs}, expected finite numbers")


def check_judgement(outcome: float | Exception, pair: Pair) -> float | Exception:
    """Return the outcome of a pair, or a JudgementError in place of an invalid probability."""
    if isinstance(outcome, Exception) or 0.0 <= outcome <= 1.0:
        return outcome
    return JudgementError(f"the entailment model gave {outcome} for {pair}, expected a probability")


def _pair_key(pair: Pair) -> bytes:
    """Return a short key: texts may be long and many pairs are cached."""
    premise, hypothesis = pair
    text = f"{len(premise)}\x00{premise}{hypothesis}"
    return hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=16).digest()


def _probability(outcome: float | Exception) -> float:
    if isinstance(outcome, JudgementError | PoisonedError):
        raise outcome
    if isinstance(outcome, Exception):
        raise JudgementError(f"{type(outcome).__name__}: {outcome}") from outcome
    return outcome


class _Cache(Generic[T]):
    """The `size` most recently used values."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._values: OrderedDict[bytes, T] = OrderedDict()

    def get(self, key: bytes) -> T | None:
        value = self._values.get(key)
        if value is not None:
            self._values.move_to_end(key)
        return value

    def put(self, key: bytes, value: T) -> None:
        self._values[key] = value
        while len(self._values) > self._size:
            self._values.popitem(last=False)


class _Flight(Generic[T]):
    """Work under way; each waiter joins before and leaves afterwards.

    `on_end` is called once: when the work ends, or when the last waiter leaves and the work is cancelled.
    """

    def __init__(self, start: Callable[[], Awaitable[T]], *, on_end: Callable[[_Flight[T]], None]) -> None:
        self._start = start
        self._on_end: Callable[[_Flight[T]], None] | None = on_end
        self._num_waiting = 0
        self._task = asyncio.create_task(self._run())
        self._task.add_done_callback(self._ended)

    @property
    def outcome(self) -> T | None:
        """Return the result; None while it runs, when it failed and when it was cancelled."""
        if not self._task.done() or self._task.cancelled() or self._task.exception() is not None:
            return None
        return self._task.result()

    def join(self) -> None:
        self._num_waiting += 1

    def leave(self) -> None:
        self._num_waiting -= 1
        if self._num_waiting == 0 and not self._task.done():
            self._task.cancel()
            self._end()  # now, not when the task has ended: a new waiter must start new work

    async def result(self) -> T:
        return await asyncio.shield(self._task)

    async def _run(self) -> T:
        try:
            return await self._start()
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            # The work cancelled itself. Passed on, that would look like a cancellation of the waiters.
            raise RuntimeError("the worker stopped before it was done") from None

    def _ended(self, task: asyncio.Task[T]) -> None:
        if not task.cancelled():
            task.exception()  # marks it as retrieved: abandoned work must not log a warning
        self._end()

    def _end(self) -> None:
        if self._on_end is not None:
            on_end, self._on_end = self._on_end, None
            on_end(self)
