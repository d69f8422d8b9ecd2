from __future__ import annotations

import asyncio
import math
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pytest

from IG.config import resolve_config
from IG.estimator import Estimates, GainEstimate, GainEstimator, GainFailure, GainQuery
from IG.prompts import entailment_text
from IG.sampler import AnswerSampler, PoisonedError, SampledAnswer, SamplingError
from IG.semantics import GainKind, ScoreKind
from IG.sharing import PairJudge, Source, Work
from tests.fakes import FakeAnswerSampler, FakeEntailment, FakePairJudge


def estimator(
    sampler: AnswerSampler,
    judge: PairJudge | None = None,
    *,
    gain: GainKind = GainKind.difference,
    score: ScoreKind = ScoreKind.hard,
    cache_size: int = 100,
) -> GainEstimator:
    flags = ["--gain", gain, "--score", score, "--sample-cache-size", str(cache_size)]
    config = resolve_config(flags, environ={})
    return GainEstimator(sampler, judge or FakePairJudge(), config=config, generator_digest="1")


def query(context: str, *, question: str = "Where?", golds: tuple[str, ...] = ("Bolton",)) -> GainQuery:
    return GainQuery(question=question, context=context, golds=golds)


def gains(estimates: Estimates) -> list[float | None]:
    return [outcome.gain if isinstance(outcome, GainEstimate) else None for outcome in estimates.outcomes]


@dataclass(slots=True)
class StoppableSampler:
    """Answers that depend on the prompt alone, after a pause by a part of it; keeps how each ended."""

    pauses_s: dict[str, float]
    jitter: random.Random | None = None
    stopped: list[str] = field(default_factory=list)
    finished: list[str] = field(default_factory=list)

    async def sample(self, prompt: str) -> tuple[SampledAnswer, ...]:
        pause = next((pause for key, pause in self.pauses_s.items() if key in prompt), 0.0)
        try:
            await asyncio.sleep(pause if self.jitter is None else self.jitter.random() * 0.02)
        except asyncio.CancelledError:
            self.stopped.append(prompt)
            raise
        self.finished.append(prompt)
        rng = random.Random(prompt)
        return tuple(
            SampledAnswer(
                text=rng.choice(["a", "A.", "b", "one c", ""]), mean_log_prob=-rng.random(), num_tokens=1
            )
            for _ in range(4)
        )


@dataclass(slots=True)
class JitteryJudge:
    """Judges as the fake model does, each call in an order and after a pause of its own."""

    rng: random.Random

    async def judge(self, pairs: Sequence[tuple[str, str]]) -> list[float | Exception]:
        order = list(range(len(pairs)))
        self.rng.shuffle(order)
        await asyncio.sleep(self.rng.random() * 0.01)
        judged = np.empty(len(pairs))
        judged[order] = FakeEntailment().probabilities([pairs[at] for at in order])
        outcomes: list[float | Exception] = judged.tolist()
        return outcomes


BELIEVES = {
    "good passage": ["Bolton", "Bolton", "Bolton", "Leeds"],
    "Where": ["Bolton", "York", "Hull", "Leeds"],
}


async def test_a_good_context_gains_and_an_empty_one_gains_nothing() -> None:
    estimates = await estimator(FakeAnswerSampler(BELIEVES)).estimate(
        [query("a good passage"), query(""), query("other")], details=False
    )
    assert gains(estimates) == [pytest.approx(0.5), 0.0, 0.0]


def test_everything_that_samples_depend_on_is_in_their_key() -> None:
    def key(*flags: str, digest: str = "1", prompt: str = "p") -> bytes:
        config = resolve_config(flags, environ={})
        made = GainEstimator(FakeAnswerSampler({}), FakePairJudge(), config=config, generator_digest=digest)
        return made._sample_key(prompt)

    others = [
        key(digest="2"),
        key(prompt="q"),
        key(prompt="\ud800"),
        key("--num-generations", "3"),
        key("--temperature", "0.5"),
        key("--max-new-tokens", "9"),
        key("--seed", "1"),
        key("--prompt-style", "chat"),
    ]
    assert len({key(), *others}) == 1 + len(others)
    assert key() == key("--threshold", "0.7"), "nothing else is"


@pytest.mark.parametrize("error", [SamplingError("prompt too long"), RuntimeError("prompt too long")])
async def test_a_failing_query_fails_alone_and_with_its_reason(error: Exception) -> None:
    sampler = FakeAnswerSampler({"poison": error} | BELIEVES)
    shared = estimator(sampler)
    queries = [query("a good passage"), query("poison"), query("other")]
    estimates = await shared.estimate(queries, details=False)
    assert gains(estimates) == [pytest.approx(0.5), None, 0.0]
    assert isinstance(estimates.outcomes[1], GainFailure)
    assert "prompt too long" in estimates.outcomes[1].reason
    asked = len(sampler.prompts)
    await shared.estimate(queries, details=False)
    assert len(sampler.prompts) == asked + 1, "a failure must not be remembered as an answer"


@pytest.mark.parametrize(("num_empty", "warnings"), [(3, 1), (1, 0)])
async def test_many_empty_answers_are_counted_and_warned_about_once(
    num_empty: int, warnings: int, caplog: pytest.LogCaptureFixture
) -> None:
    texts = [""] * num_empty + ["Bolton"] * (4 - num_empty)
    shared = estimator(FakeAnswerSampler({}, default=texts), cache_size=1000)
    for _ in range(2):
        queries = [query(f"passage {k}") for k in range(60)]
        work = (await shared.estimate(queries, details=False)).work
    assert work.answers_empty == 0  # the second time all are remembered
    work = (await shared.estimate([query("another")], details=False)).work
    assert (work.answers_sampled, work.answers_empty) == (4, num_empty)
    said = [record.message for record in caplog.records if "answers are empty" in record.message]
    assert len(said) == warnings
    assert all("183 of 244" in line and "--prompt-style chat" in line for line in said)


@pytest.mark.parametrize(
    ("unreadable", "reason"),
    [
        (query("x", question=" "), "the question is empty"),
        (query("x", golds=(" ",)), "answers holds no text, expected at least one"),
        (query("x", golds=tuple(map(str, range(1001)))), "holds 1001 texts, expected at most 1000"),
        (query("x", golds=("Bolton", "B" * 20_001)), "20001 characters, expected at most 20000"),
        (query("x", question="W" * 20_001), "20001 characters, expected at most 20000"),
    ],
)
async def test_oversized_queries_are_refused_before_any_work(unreadable: GainQuery, reason: str) -> None:
    sampler = FakeAnswerSampler(BELIEVES)
    (outcome,) = (await estimator(sampler).estimate([unreadable], details=True)).outcomes
    assert isinstance(outcome, GainFailure)
    assert outcome.kind == "invalid"
    assert reason in outcome.reason
    assert sampler.prompts == []


async def test_the_drop_of_entropy_needs_no_golds() -> None:
    sampler = FakeAnswerSampler({"sure": ["Bolton"] * 4} | BELIEVES)
    estimates = await estimator(sampler, gain=GainKind.entropy).estimate(
        [query("sure", golds=())], details=False
    )
    assert gains(estimates) == [pytest.approx(1.386294, abs=1e-6)]


async def test_the_work_is_counted() -> None:
    """Two questions; four answers a condition, of which the baseline has four kinds and the passage two."""
    shared = estimator(FakeAnswerSampler(BELIEVES))
    queries = [query("a good passage"), query("a good passage"), query(""), query("", question=" ")]
    work = (await shared.estimate(queries, details=False)).work
    assert work == Work(
        items=4,
        conditions=6,
        distinct_prompts=2,
        prompts_sampled=2,
        prompts_joined=4,
        baselines=3,
        baselines_sampled=1,
        answers_sampled=8,
        pairs_naive=6 * (4 * 3 + 2 * 4 * 1),
        # York, Hull and Leeds against Bolton, one way, for three baselines; Leeds for two passages; and the
        # answer that is the gold, both ways, for all of them. The blank context is read with its baseline.
        pairs_judged=3,
        pairs_shared=3 * 3 + 2 - 3,
        pairs_equal=5 * 2,
    )
    again = (await shared.estimate(queries, details=False)).work
    assert (again.prompts_cached, again.prompts_sampled, again.baselines_sampled) == (6, 0, 0)
    assert (again.answers_sampled, again.pairs_judged, again.pairs_naive) == (0, 0, work.pairs_naive)


async def test_each_condition_names_its_source() -> None:
    shared = estimator(FakeAnswerSampler(BELIEVES))

    async def sources(*queries: GainQuery) -> list[tuple[Source, Source]]:
        outcomes = (await shared.estimate(queries, details=False)).outcomes
        assert all(isinstance(outcome, GainEstimate) for outcome in outcomes)
        return [(o.with_context.source, o.no_context.source) for o in outcomes]  # type: ignore[union-attr]

    sampled, joined, cached = Source.sampled, Source.joined, Source.cached
    first = await sources(query("a good passage"), query("other"), query(""))
    assert first == [(sampled, joined), (sampled, joined), (joined, sampled)]
    assert await sources(query("third"), query("")) == [(sampled, cached), (cached, cached)]
    assert await sources(query("", question="New?")) == [(joined, sampled)]


@pytest.mark.parametrize("gain", list(GainKind))
async def test_a_gain_has_a_standard_error_but_for_one_sample(gain: GainKind) -> None:
    """By hand: of four equal weights, one correct without and three with the context."""
    shared = estimator(FakeAnswerSampler(BELIEVES), gain=gain)
    (outcome,) = (await shared.estimate([query("good passage")], details=False)).outcomes
    assert isinstance(outcome, GainEstimate)
    values = {  # left out: a right answer once (thrice), a wrong one thrice (once)
        GainKind.difference: ([2 / 3] * 3 + [1.0], [0.0] + [1 / 3] * 3),
        GainKind.log_ratio: ([math.log(2 / 3)] * 3 + [0.0], [math.log(0.01)] + [math.log(1 / 3)] * 3),
        GainKind.entropy: (
            [-(2 / 3) * math.log(2 / 3) - (1 / 3) * math.log(1 / 3)] * 3 + [0.0],
            [math.log(3)] * 4,
        ),
    }[gain]
    expected = [
        math.sqrt(3 / 4 * sum((value - sum(left_out) / 4) ** 2 for value in left_out)) for left_out in values
    ]
    assert outcome.standard_error_with_context == pytest.approx(expected[0])
    assert outcome.standard_error_no_context == pytest.approx(expected[1])
    assert outcome.standard_error == pytest.approx(math.hypot(*expected))

    alone = estimator(FakeAnswerSampler({}, default=["Bolton"]), gain=gain)
    one, blank = (await alone.estimate([query("passage"), query(" ")], details=True)).outcomes
    assert isinstance(one, GainEstimate)
    assert isinstance(blank, GainEstimate)
    assert (one.standard_error, one.standard_error_with_context) == (None, None)
    assert (blank.gain, blank.standard_error, blank.standard_error_no_context) == (0.0, 0.0, None)


async def test_every_failure_has_a_kind() -> None:
    sampler = FakeAnswerSampler(
        {"long": SamplingError("too long"), "poison": PoisonedError("two workers"), "bug": KeyError("bug")}
        | BELIEVES
    )
    pair = (entailment_text("Broken?", "York"), entailment_text("Broken?", "Bolton"))
    judge = FakePairJudge(FakeEntailment(pairs={pair: math.nan, pair[::-1]: math.nan}))
    queries = [
        query("good passage"),
        query("x", question=" "),
        query("long"),
        query("poison"),
        query("bug"),
        query("York", question="Broken?"),
    ]
    sampler.default = ["York"]
    estimates = await estimator(sampler, judge).estimate(queries, details=False)
    kinds = [None if isinstance(o, GainEstimate) else o.kind for o in estimates.outcomes]
    assert kinds == [None, "invalid", "sampling", "poisoned", "internal", "entailment"]


async def test_a_failing_baseline_fails_the_items_of_its_question_and_stops_their_other_half() -> None:
    class Sampler(FakeAnswerSampler):
        async def sample(self, prompt: str) -> tuple[SampledAnswer, ...]:
            if "Context" not in prompt and "Bad?" in prompt:
                raise SamplingError("no baseline")
            if "Context" in prompt and "Bad?" in prompt:
                await asyncio.sleep(3600)
            return await FakeAnswerSampler.sample(self, prompt)

    queries = [query("a", question="Bad?"), query("a good passage"), query("b", question="Bad?")]
    async with asyncio.timeout(200):
        estimates = await estimator(Sampler(BELIEVES)).estimate(queries, details=False)
    assert gains(estimates) == [None, pytest.approx(0.5), None]
    assert len(asyncio.all_tasks()) == 1


async def test_what_is_not_done_at_the_deadline_is_late_and_is_cancelled() -> None:
    sampler = StoppableSampler({"slow": 3600.0})
    shared = estimator(sampler)
    queries = [query("quick"), query("slow"), query("quick", question="Slow slow?")]
    estimates = await shared.estimate(queries, details=False, timeout_s=0.1000001)
    assert gains(estimates) == [0.0, None, None]
    for late in estimates.outcomes[1:]:
        assert isinstance(late, GainFailure)
        assert (late.kind, late.reason) == ("deadline", "deadline: not done within 0.1 s")
    await asyncio.sleep(0.01)
    assert len(sampler.stopped) == 3, "the slow passage and both conditions of the slow question"
    assert (estimates.work.prompts_sampled, estimates.work.prompts_joined) == (2, 1), "what is late has none"
    assert gains(await shared.estimate(queries[:1], details=False, timeout_s=0.1)) == [0.0]
    assert len(asyncio.all_tasks()) == 1


async def test_a_large_request_compares_a_part_at_a_time_and_leaves_room_for_others() -> None:
    class Judge(FakePairJudge):
        def __init__(self) -> None:
            super().__init__()
            self.gate, self.num_asked = asyncio.Event(), 0

        async def judge(self, pairs: Sequence[tuple[str, str]]) -> list[float | Exception]:
            self.num_asked += 1
            if "Many" in pairs[0][0]:
                await self.gate.wait()
            return await FakePairJudge.judge(self, pairs)

    judge = Judge()
    shared = estimator(FakeAnswerSampler({}, default=["York"]), judge, cache_size=1000)
    many = [query("passage", question=f"Many {number}?") for number in range(600)]
    large = asyncio.create_task(shared.estimate(many, details=False))
    while not judge.num_asked:
        await asyncio.sleep(0.01)
    for _ in range(2000):  # all of it could ask by then
        await asyncio.sleep(0)
    assert judge.num_asked <= 512
    assert gains(await shared.estimate([query("passage")], details=False, timeout_s=5)) == [0.0]
    judge.gate.set()
    assert gains(await large) == [0.0] * 600


async def test_200_requests_that_come_and_go_get_the_serial_gains_from_one_baseline_a_question() -> None:
    rng = random.Random(0)
    questions = [f"Question {number}?" for number in range(12)]
    pool = [
        query(rng.choice(["", "one", "two", f"text {number}"]), question=question, golds=("a", "word b"))
        for question in questions
        for number in range(6)
    ]
    serial = estimator(StoppableSampler({}))
    expected = {one: gains(await serial.estimate([one], details=False))[0] for one in pool}
    assert len(set(expected.values())) > 3

    sampler = StoppableSampler({}, jitter=rng)
    shared = estimator(sampler, JitteryJudge(rng), cache_size=1000)

    async def ask() -> int:
        await asyncio.sleep(rng.random() * 0.2)
        asked = rng.sample(pool, k=rng.randint(1, 10))
        request = asyncio.create_task(shared.estimate(asked, details=rng.random() < 0.3))
        if rng.random() < 0.3:
            await asyncio.sleep(rng.random() * 0.02)
            request.cancel()
        try:
            estimates = await request
        except asyncio.CancelledError:
            return 0
        assert gains(estimates) == [expected[one] for one in asked]
        return estimates.work.baselines_sampled

    async with asyncio.timeout(200):
        await asyncio.gather(*(ask() for _ in range(200)))
    baselines = Counter(prompt for prompt in sampler.finished if "Context" not in prompt)
    assert set(baselines.values()) == {1}, "a baseline was sampled to its end more than once"
    assert len(asyncio.all_tasks()) == 1
