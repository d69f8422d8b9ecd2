from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from IG.doctor.aliases import alias_report
from IG.doctor.matching import Match, exact_matches, matches_of
from IG.doctor.readings import GainRule
from IG.doctor.scenarios import Scenario
from tests.IG.doctor.synthetic import GOLD, reading, samples


def test_exact_match_counts_as_the_reward_does() -> None:
    right = exact_matches(["the", "The Bolton.", "", "A."], ["a", "bolton"])
    assert right.tolist() == [0.0, 1.0, 0.0, 1.0]


def test_each_answer_counts_by_the_first_way_it_is_right() -> None:
    entailed = samples(["Bolton.", "the Bolton", "Bolton in England", "York"])
    entailed.response_entails_gold[2, 0] = entailed.gold_entails_response[2, 0] = 0.9
    assert matches_of(entailed, ["Bolton"], threshold=0.5) == [
        Match.text,
        Match.exact_match,
        Match.entailment,
        Match.none,
    ]
    one_way = replace(entailed, gold_entails_response=np.zeros((4, 1)))
    assert matches_of(one_way, ["Bolton"], threshold=0.5)[2] is Match.none


def test_alias_statistics_by_hand() -> None:
    golds = (GOLD, "Bolton, England", "bolton!")
    two = ("Bolton", "Bolton, England")
    conditions = {
        Scenario.none: samples(["York", "Hull", "York", "Bath"], golds=golds),
        Scenario.supporting: samples([*two, "Bolton, England", "York"], golds=golds),
    }
    report = alias_report([reading(conditions, golds=golds)], GainRule())
    assert report is not None
    assert (report.golds_per_question, report.golds_max, report.multi_alias_share) == (2.0, 2, 1.0)
    assert report.match_shares == {
        Match.text: 3 / 8,
        Match.exact_match: 0.0,
        Match.entailment: 0.0,
        Match.none: 5 / 8,
    }
    assert report.distinct_answers == pytest.approx((3 + 3) / 2)
    assert report.mean_gain == pytest.approx(0.75)
    assert report.mean_gain_first_gold == pytest.approx(0.25)
    assert report.changed_share == 1.0


def test_no_golds_give_no_alias_statistics() -> None:
    bare = reading({Scenario.none: samples(["York"], golds=())}, golds=())
    assert alias_report([bare], GainRule()) is None
    alone = alias_report([reading({Scenario.none: samples(["York"])}, num_documents=0)], GainRule())
    assert alone is not None
    assert (alone.mean_gain, alone.mean_gain_first_gold, alone.changed_share) == (None, None, None)
