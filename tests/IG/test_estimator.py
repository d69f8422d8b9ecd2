from __future__ import annotations

import asyncio

import pytest

from IG.estimator import Estimates, GainEstimate, GainEstimator, GainFailure, GainOptions, GainQuery
from IG.sampler import AnswerSampler, SamplingError, SamplingOptions
from IG.semantics import GainKind, ScoreKind
from IG.sharing import ModelIdentity, PairJudge
from tests.fakes import FakeAnswerSampler, FakePairJudge


def estimator(
    sampler: AnswerSampler,
    judge: PairJudge | None = None,
    *,
    gain: GainKind = GainKind.difference,
    score: ScoreKind = ScoreKind.hard,
    cache_size: int = 100,
) -> GainEstimator:
    return GainEstimator(
        sampler,
        judge or FakePairJudge(),
        options=GainOptions(gain=gain),
        sampling=SamplingOptions(num_answers=4, temperature=1.0, max_new_tokens=16, seed=0),
        score=score,
        threshold=0.5,
        identity=ModelIdentity(generator="g", generator_digest="1", entailment="e", entailment_digest="2"),
        sample_cache_size=cache_size,
        pair_cache_size=1000,
    )


def query(context: str, *, question: str = "Where?", golds: tuple[str, ...] = ("Bolton",)) -> GainQuery:
    return GainQuery(question=question, context=context, golds=golds)


def gains(estimates: Estimates) -> list[float | None]:
    return [outcome.gain if isinstance(outcome, GainEstimate) else None for outcome in estimates.outcomes]


BELIEVES = {
    "good passage": ["Bolton", "Bolton", "Bolton", "Leeds"],
    "Where": ["Bolton", "York", "Hull", "Leeds"],
}


async def test_a_good_context_gains_and_an_empty_one_gains_nothing() -> None:
    estimates = await estimator(FakeAnswerSampler(BELIEVES)).estimate(
        [query("a good passage"), query(""), query("other")], details=False
    )
    assert gains(estimates) == [pytest.approx(0.5), 0.0, 0.0]


async def test_each_condition_of_a_request_is_sampled_once() -> None:
    sampler = FakeAnswerSampler(BELIEVES, pause_s=0.01)
    shared = estimator(sampler)
    queries = [query("a good passage"), query("a good passage"), query("other"), query("")]
    await asyncio.gather(shared.estimate(queries, details=True), shared.estimate(queries, details=False))
    assert len(sampler.prompts) == len(set(sampler.prompts)) == 3
    await shared.estimate(queries, details=False)
    assert len(sampler.prompts) == 3


async def test_forgotten_samples_are_sampled_again() -> None:
    sampler = FakeAnswerSampler({})
    small = estimator(sampler, cache_size=1)
    await small.estimate([query("", question="One?")], details=False)
    await small.estimate([query("", question="Two?")], details=False)
    await small.estimate([query("", question="One?")], details=False)
    assert len(sampler.prompts) == 3


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


@pytest.mark.parametrize("bad", [query("x", question=" "), query("x", golds=()), query("x", golds=(" ",))])
async def test_a_query_without_question_or_golds_is_a_named_failure(bad: GainQuery) -> None:
    estimates = await estimator(FakeAnswerSampler(BELIEVES)).estimate([bad, query("")], details=False)
    assert gains(estimates) == [None, 0.0]
    assert isinstance(estimates.outcomes[0], GainFailure)
    assert "expected" in estimates.outcomes[0].reason


async def test_the_drop_of_entropy_needs_no_golds() -> None:
    sampler = FakeAnswerSampler({"sure": ["Bolton"] * 4} | BELIEVES)
    estimates = await estimator(sampler, gain=GainKind.entropy).estimate(
        [query("sure", golds=())], details=False
    )
    assert gains(estimates) == [pytest.approx(1.386294, abs=1e-6)]


async def test_log_ratio_is_floored() -> None:
    sampler = FakeAnswerSampler({"good": ["Bolton"], "Where": ["York"]})
    estimates = await estimator(sampler, gain=GainKind.log_ratio).estimate([query("good")], details=False)
    assert gains(estimates) == [3.0]
