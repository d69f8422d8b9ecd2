from __future__ import annotations

import numpy as np
import pytest

from IG.doctor.agreement import GainOutcomes, measure_agreement, recorded_outcomes, split_half
from IG.doctor.readings import GainRule
from IG.doctor.rollouts import RecordedRollout
from IG.doctor.scenarios import Scenario
from tests.IG.doctor.synthetic import bernoulli, reading


def test_gains_that_follow_the_truth_agree_with_exact_match() -> None:
    rng = np.random.default_rng(0)
    readings = [
        reading(
            {
                Scenario.none: bernoulli(0.0, size=64, rng=rng),
                Scenario.supporting: bernoulli(0.9, size=64, rng=rng),
                Scenario.random: bernoulli(0.1, size=64, rng=rng),
            }
        )
        for _ in range(30)
    ]
    agreement = measure_agreement(split_half(readings, GainRule(), rng=rng), rng=rng)
    assert agreement is not None
    assert (agreement.num_contexts, agreement.num_questions) == (60, 30)
    assert agreement.exact_match == pytest.approx(0.5, abs=0.03)
    for interval in (agreement.pearson, agreement.within_question):
        assert interval is not None
        assert interval.low > 0.95
    assert agreement.auc is not None
    # A right answer has the context of 0.9 in 9 of 10 cases, a wrong one in 1 of 10: 0.81 + 2 * 0.09 / 2.
    assert agreement.auc.value == pytest.approx(0.9, abs=0.03)


def test_halves_of_pure_chance_do_not_agree() -> None:
    rng = np.random.default_rng(1)
    readings = [
        reading(
            {
                Scenario.none: bernoulli(0.5, size=64, rng=rng),
                Scenario.supporting: bernoulli(0.5, size=64, rng=rng),
            }
        )
        for _ in range(300)
    ]
    agreement = measure_agreement(split_half(readings, GainRule(), rng=rng), rng=rng)
    assert agreement is not None
    assert agreement.pearson is not None
    assert agreement.pearson.low < 0.0 < agreement.pearson.high, "gain and answers share no samples"
    assert agreement.within_question is None, "one context per question leaves nothing to compare"


def test_recorded_gains_go_with_the_answer_that_was_given() -> None:
    def rollout(answer: str | None, gain: float | None, *, question: str = "Where?") -> RecordedRollout:
        return RecordedRollout(
            group="1",
            question=question,
            golds=("Bolton",),
            context="c",
            answer=answer,
            outcome=0.3,
            gain=gain,
        )

    pairs = recorded_outcomes(
        [rollout("bolton", 0.5), rollout("York", 0.1, question="Who?"), rollout("Bolton", None)]
    )
    assert pairs.gains.tolist() == [0.5, 0.1]
    assert pairs.right.tolist() == [1.0, 0.0]
    assert pairs.questions.tolist() == [0, 1]


def test_without_gains_there_is_nothing_to_agree() -> None:
    empty = GainOutcomes(
        gains=np.empty(0), right=np.empty(0), answers=np.empty(0), questions=np.empty(0, dtype=np.int64)
    )
    assert measure_agreement(empty, rng=np.random.default_rng(0)) is None
