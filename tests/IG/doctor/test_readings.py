from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from IG.doctor.diagnosis import compare_judge
from IG.doctor.questions import Scenario
from IG.doctor.readings import QuestionReading, Samples
from IG.estimator import GainEstimate, GainEstimator, GainQuery
from IG.sampler import SampledAnswer
from IG.semantics import GainKind, ScoreKind
from tests.fakes import FakeEntailment, FakePairJudge
from tests.IG.doctor.synthetic import GOLD, config, question, reading, samples

ANSWERS = {
    "good": [("Bolton", -0.2), ("Bolton, England", -0.5), ("York", -1.0), ("in Bolton", -0.1)],
    "": [("York", -0.3), ("Hull", -0.4), ("York", -0.9), ("Bolton", -2.0)],
}


class Scripted:
    async def sample(self, prompt: str) -> tuple[SampledAnswer, ...]:
        answers = ANSWERS["good" if "good" in prompt else ""]
        return tuple(SampledAnswer(text=text, mean_log_prob=m, num_tokens=1) for text, m in answers)


@pytest.mark.parametrize("score", list(ScoreKind))
@pytest.mark.parametrize("gain", list(GainKind))
async def test_all_samples_give_what_the_service_gives(score: ScoreKind, gain: GainKind) -> None:
    there = ("Where? Bolton, England", "Where? Bolton")
    settings = config("--score", score, "--gain", gain, "--num-generations", "4")
    judge = FakePairJudge(FakeEntailment(pairs={there: 0.8, there[::-1]: 0.7}))
    estimator = GainEstimator(Scripted(), judge, config=settings, generator_digest="1")
    query = GainQuery(question="Where?", context="a good one", golds=("Bolton", "Hull"))
    (outcome,) = (await estimator.estimate([query], details=True)).outcomes
    assert isinstance(outcome, GainEstimate)
    read = QuestionReading(
        question=question(golds=("Bolton", "Hull")),
        conditions={
            Scenario.none: Samples.of(outcome.no_context),
            Scenario.supporting: Samples.of(outcome.with_context),
        },
    )
    assert read.gains(settings) == {Scenario.none: 0.0, Scenario.supporting: pytest.approx(outcome.gain)}


def test_a_part_of_the_samples_weighs_as_if_the_others_were_never_drawn() -> None:
    three = samples([GOLD, "York", "Hull"], mean_log_probs=[-0.1, -0.4, -1.6])
    share = np.exp(-0.1) / (np.exp(-0.1) + np.exp(-1.6))
    assert three.weights(np.asarray([[2, 0]]))[0] == pytest.approx([share, 0.0, 1 - share])


def test_every_draw_has_its_own_gain_and_none_without_a_document() -> None:
    conditions = {
        Scenario.none: samples(["York", GOLD]),
        Scenario.supporting: samples([GOLD, GOLD, "Hull"]),
    }
    chosen = {Scenario.none: np.asarray([[0], [1]]), Scenario.supporting: np.asarray([[0], [2]])}
    gains = reading(conditions).gains_of(chosen, config())
    assert gains[Scenario.none].tolist() == [0.0, 0.0]
    assert gains[Scenario.supporting].tolist() == [1.0, -1.0]


def test_the_judge_is_compared_with_exact_match_answer_by_answer() -> None:
    answers = samples(["Bolton", "the Bolton", "a town in Lancashire", ""])
    judged = np.asarray([[1.0], [0.1], [0.9], [0.2]])
    answers = replace(answers, response_entails_gold=judged, gold_entails_response=judged)
    found = compare_judge([reading({Scenario.none: answers}, golds=(GOLD, " "))], config())
    assert found is not None
    assert (found.only_judge, found.only_exact) == (0.25, 0.25)
    assert found.examples == (
        "Where? 'the Bolton', judged different to 'Bolton'",
        "Where? 'a town in Lancashire', judged equivalent to 'Bolton'",
    )
    assert compare_judge([reading({Scenario.none: samples(["a"], golds=())}, golds=())], config()) is None
