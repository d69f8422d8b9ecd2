from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest

from IG.sampler import PoisonedError, SampledAnswer, SamplingError
from IG.sharing import JudgementError, SharedJudgements, SharedSamples, Source, Work


@dataclass(slots=True)
class GatedSampler:
    """Answers with the prompt when its gate opens; keeps who started, ended and was cancelled."""

    failure: BaseException | None = None
    gate: asyncio.Event = field(default_factory=asyncio.Event)
    started: list[str] = field(default_factory=list)
    cancelled: list[str] = field(default_factory=list)

    async def sample(self, prompt: str) -> tuple[SampledAnswer, ...]:
        self.started.append(prompt)
        try:
            await self.gate.wait()
        except asyncio.CancelledError:
            self.cancelled.append(prompt)
            raise
        if self.failure is not None:
            raise self.failure
        return (SampledAnswer(text=prompt, mean_log_prob=-1.0, num_tokens=1),)


@dataclass(slots=True)
class GatedJudge:
    """P is 0.5 but for `odd` pairs; one gate for all calls."""

    odd: dict[tuple[str, str], float | Exception] = field(default_factory=dict)
    failure: BaseException | None = None
    gate: asyncio.Event = field(default_factory=asyncio.Event)
    calls: list[list[tuple[str, str]]] = field(default_factory=list)
    cancelled: int = 0

    async def judge(self, pairs: Sequence[tuple[str, str]]) -> list[float | Exception]:
        self.calls.append(list(pairs))
        try:
            await self.gate.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        if self.failure is not None:
            raise self.failure
        return [self.odd.get(pair, 0.5) for pair in pairs]


def shared(sampler: GatedSampler, *, size: int = 100) -> SharedSamples:
    return SharedSamples(sampler, key_of=str.encode, size=size)


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def test_samples_come_from_one_flight_and_then_from_the_cache() -> None:
    sampler = GatedSampler()
    samples = shared(sampler)
    waiting = [asyncio.create_task(samples.of("a")) for _ in range(3)]
    await settle()
    sampler.gate.set()
    found = await asyncio.gather(*waiting, samples.of("a"))
    assert [source for _, source in found] == [Source.sampled, Source.joined, Source.joined, Source.joined]
    assert (await samples.of("a"))[1] is Source.cached
    assert sampler.started == ["a"]


async def test_the_cache_is_bounded_and_forgets_what_was_not_asked_for_longest() -> None:
    sampler = GatedSampler()
    sampler.gate.set()
    samples = shared(sampler, size=2)
    for prompt in "abacab":
        await samples.of(prompt)
    assert sampler.started == ["a", "b", "c", "b"]


async def test_the_last_waiter_that_leaves_cancels_the_work() -> None:
    sampler = GatedSampler()
    samples = shared(sampler)
    first, second = (asyncio.create_task(samples.of("a")) for _ in range(2))
    await settle()
    first.cancel()  # the one that started it
    await settle()
    assert sampler.cancelled == []
    sampler.gate.set()
    assert (await second)[1] is Source.joined
    assert first.cancelled()

    sampler.gate.clear()
    alone = [asyncio.create_task(samples.of("b")) for _ in range(2)]
    await settle()
    for waiter in alone:
        waiter.cancel()
    await settle()
    assert sampler.cancelled == ["b"]
    sampler.gate.set()
    assert (await samples.of("b"))[1] is Source.sampled


async def test_a_waiter_that_comes_while_cancelled_work_ends_starts_new_work() -> None:
    class Stubborn(GatedSampler):
        async def sample(self, prompt: str) -> tuple[SampledAnswer, ...]:
            try:
                return await GatedSampler.sample(self, prompt)
            except asyncio.CancelledError:
                await asyncio.sleep(0.05)
                raise

    sampler = Stubborn()
    samples = shared(sampler)
    gone = asyncio.create_task(samples.of("a"))
    await settle()
    gone.cancel()
    await settle()
    again = asyncio.create_task(samples.of("a"))
    await asyncio.sleep(0.1)
    sampler.gate.set()
    async with asyncio.timeout(200):
        assert (await again)[1] is Source.sampled
    assert (await samples.of("a"))[1] is Source.cached


@pytest.mark.parametrize("failure", [SamplingError("too long"), RuntimeError("boom")])
async def test_a_failure_reaches_all_waiters_and_is_not_cached(failure: Exception) -> None:
    sampler = GatedSampler(failure=failure)
    samples = shared(sampler)
    waiting = [asyncio.create_task(samples.of("a")) for _ in range(2)]
    await settle()
    sampler.gate.set()
    for error in await asyncio.gather(*waiting, return_exceptions=True):
        assert error is failure
    sampler.failure = None
    assert (await samples.of("a"))[1] is Source.sampled


async def test_a_sampler_that_stops_by_itself_is_a_failure_and_no_cancellation() -> None:
    sampler = GatedSampler(failure=asyncio.CancelledError())
    judge = GatedJudge(failure=asyncio.CancelledError())
    sampler.gate.set()
    judge.gate.set()
    with pytest.raises(RuntimeError, match="stopped before it was done"):
        await shared(sampler).of("a")
    with pytest.raises(RuntimeError, match="stopped before it was done"):
        await SharedJudgements(judge, size=9).of([("a", "b")], Work())


@pytest.mark.parametrize("mean_log_prob", [float("nan"), float("-inf"), None])
async def test_samples_without_a_likelihood_are_a_failure(mean_log_prob: float | None) -> None:
    class Broken:
        async def sample(self, prompt: str) -> tuple[SampledAnswer, ...]:
            if mean_log_prob is None:
                return ()
            return (SampledAnswer(text="a", mean_log_prob=mean_log_prob, num_tokens=1),)

    samples = SharedSamples(Broken(), key_of=str.encode, size=9)
    with pytest.raises(SamplingError, match="expected finite numbers"):
        await samples.of("a")


async def test_pairs_are_judged_once_and_counted() -> None:
    judge = GatedJudge()
    judgements = SharedJudgements(judge, size=100)
    one, two = Work(), Work()
    first = asyncio.create_task(judgements.of([("a", "b"), ("c", "d"), ("a", "b")], one))
    await settle()
    second = asyncio.create_task(judgements.of([("c", "d"), ("b", "a")], two))
    await settle()
    judge.gate.set()
    assert await first == {("a", "b"): 0.5, ("c", "d"): 0.5}
    assert await second == {("c", "d"): 0.5, ("b", "a"): 0.5}
    assert judge.calls == [[("a", "b"), ("c", "d")], [("b", "a")]]
    assert (one.pairs_judged, one.pairs_shared) == (2, 1)
    assert (two.pairs_judged, two.pairs_shared) == (1, 1)
    assert await judgements.of([("b", "a"), ("a", "b")], two) == {("b", "a"): 0.5, ("a", "b"): 0.5}
    assert (two.pairs_judged, two.pairs_shared) == (1, 3)


async def test_pairs_are_known_by_their_texts_and_their_direction_without_being_kept() -> None:
    pairs = [
        ("ab", "c"),
        ("a", "bc"),
        ("c", "ab"),
        ("bc", "a"),
        ("", "abc"),
        ("1\x00a", "b"),
        ("\ud800", "b"),
    ]
    judge = GatedJudge(odd={pair: index / 10 for index, pair in enumerate(pairs)})
    judge.gate.set()
    judgements = SharedJudgements(judge, size=100)
    for pair in pairs:
        await judgements.of([pair], Work())
    work = Work()
    assert await judgements.of(pairs, work) == judge.odd
    assert work.pairs_shared == len(pairs)
    long = ("x" * 10_000_000, "y")
    await judgements.of([long], work)
    assert len(str(judgements._known._values)) < 1000


async def test_the_last_waiter_of_a_call_cancels_it() -> None:
    judge = GatedJudge()
    judgements = SharedJudgements(judge, size=100)
    first = asyncio.create_task(judgements.of([("a", "b"), ("c", "d")], Work()))
    await settle()
    second = asyncio.create_task(judgements.of([("c", "d"), ("e", "f")], Work()))
    await settle()
    first.cancel()
    await settle()
    assert judge.cancelled == 0
    second.cancel()
    await settle()
    assert judge.cancelled == 2
    judge.gate.set()
    assert await judgements.of([("a", "b")], Work()) == {("a", "b"): 0.5}


@pytest.mark.parametrize(
    ("outcome", "expected"),
    [
        (float("nan"), JudgementError),
        (float("inf"), JudgementError),
        (1.5, JudgementError),
        (RuntimeError("out of memory"), JudgementError),
        (PoisonedError("two workers"), PoisonedError),
    ],
)
async def test_a_pair_without_a_probability_fails_only_its_waiters(
    outcome: float | Exception, expected: type[Exception]
) -> None:
    judge = GatedJudge(odd={("a", "b"): outcome})
    judge.gate.set()
    judgements = SharedJudgements(judge, size=100)
    bad, good = await asyncio.gather(
        judgements.of([("a", "b"), ("c", "d")], Work()),
        judgements.of([("c", "d")], Work()),
        return_exceptions=True,
    )
    assert type(bad) is expected
    assert good == {("c", "d"): 0.5}
    judge.odd.clear()
    assert await judgements.of([("a", "b")], Work()) == {("a", "b"): 0.5}, "a failure was kept"


async def test_a_judge_that_fails_as_a_whole_or_loses_pairs_is_an_error() -> None:
    class Short(GatedJudge):
        async def judge(self, pairs: Sequence[tuple[str, str]]) -> list[float | Exception]:
            return [0.5]

    with pytest.raises(JudgementError, match="1 judgements came back for 2 pairs"):
        await SharedJudgements(Short(), size=9).of([("a", "b"), ("c", "d")], Work())
    broken = GatedJudge(failure=RuntimeError("no worker"))
    broken.gate.set()
    with pytest.raises(RuntimeError, match="no worker"):
        await SharedJudgements(broken, size=9).of([("a", "b")], Work())
