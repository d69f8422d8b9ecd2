from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from IG.doctor.agreement import auc, compare_judge, exact_matches, gain_auc
from IG.doctor.questions import Scenario
from tests.IG.doctor.synthetic import GOLD, bernoulli, config, reading, samples


def test_exact_match_ignores_case_articles_and_punctuation_and_never_holds_for_nothing() -> None:
    matches = exact_matches(["the bolton.", "Bolton, England", "", "York"], [GOLD, "!"])
    assert matches.tolist() == [True, False, False, False]


def test_the_judge_is_compared_with_exact_match_answer_by_answer() -> None:
    asked = samples(["Bolton", "the Bolton", "a town in Lancashire", "York"])
    judged = np.asarray([[1.0], [0.1], [0.9], [0.2]])
    asked = replace(asked, response_entails_gold=judged, gold_entails_response=judged)
    found = compare_judge([reading({Scenario.none: asked})], config())
    assert found is not None
    assert (found.num_answers, found.both, found.only_judge, found.only_exact) == (4, 0.25, 0.25, 0.25)
    assert found.examples == (
        "Where? 'the Bolton', judged different to 'Bolton'",
        "Where? 'a town in Lancashire', judged equivalent to 'Bolton'",
    )
    assert compare_judge([reading({Scenario.none: samples(["a"], golds=())}, golds=())], config()) is None


def test_auc_counts_ties_half_and_needs_both_classes() -> None:
    values = np.asarray([0.1, 0.5, 0.5])
    found = auc(values, positives=np.asarray([0.0, 1.0, 0.0]), negatives=np.asarray([1.0, 0.0, 1.0]))
    assert found == pytest.approx(0.75)
    assert auc(values, positives=np.zeros(3), negatives=np.ones(3)) is None


def test_gain_and_answers_come_from_different_halves() -> None:
    rng = np.random.default_rng(0)

    def alike(share: float) -> list[float | None]:
        conditions = {name: bernoulli(share, size=16, rng=rng) for name in (Scenario.none, Scenario.first)}
        return [gain_auc([reading(conditions) for _ in range(20)], config(), rng=rng)]

    (by_chance,) = alike(0.5)
    assert by_chance is not None
    assert 0.35 < by_chance < 0.65, "the same samples would agree by construction"
    helped = [
        reading(
            {
                Scenario.none: samples(["York"] * 16),
                Scenario.first: bernoulli(share, size=16, rng=rng),
            }
        )
        for share in (0.0, 1.0) * 10
    ]
    assert gain_auc(helped, config(), rng=rng) == 1.0
