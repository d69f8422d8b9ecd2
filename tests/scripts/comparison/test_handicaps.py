"""Rewards that are broken on purpose: only the credit changes."""

from __future__ import annotations

from collections import Counter
from functools import partial

import numpy as np

from comparison.handicaps import ChangedCredit, credit_shuffled, keep_failed_groups, shuffle_outcomes
from tests.fakes import make_question, make_trajectory
from tests.methods import make_method
from verl.algorithms.base import Prefetch
from verl.algorithms.scoring.outcome import measure_outcome
from verl.algorithms.scoring.reward import Reward
from verl.types import Group, Score, ScoredGroups

METHOD = make_method("search_r1")
REWARD = Reward(measure_outcome, algorithm=METHOD, max_failure_share=0.5, fix="")


def make_group(number: int, *, num_right: int, num_samples: int = 4) -> Group:
    question = make_question(f"nq/train/{number}")
    answers = [question.golds[0]] * num_right + ["wrong"] * (num_samples - num_right)
    trajectories = [
        make_trajectory(question, sample=k, queries=("a",), answer=text) for k, text in enumerate(answers)
    ]
    return Group(question=question, trajectories=tuple(trajectories))


GROUPS = [make_group(0, num_right=2), make_group(1, num_right=0), make_group(2, num_right=4)]


def peaks(scored: ScoredGroups) -> list[list[float]]:
    return [[float(np.abs(c.advantages).max()) for c in of_group] for of_group in scored.credits]


def test_outcomes_are_shuffled_over_the_whole_step_and_failed_episodes_keep_none() -> None:
    scores = [[Score(outcome=float(k % 3 == 0)) for k in range(20)], [Score(outcome=None, failure="x")] * 2]
    shuffled = shuffle_outcomes(scores, seed=1)
    assert shuffled[1] == scores[1]
    assert shuffled[0] != scores[0]
    assert Counter(s.outcome for s in shuffled[0]) == Counter(s.outcome for s in scores[0])
    assert shuffle_outcomes(scores, seed=1) == shuffled
    assert shuffle_outcomes(scores, seed=2) != shuffled


async def test_with_shuffled_outcomes_the_scores_stay_true_and_the_credit_is_that_of_others() -> None:
    true = await REWARD.score(GROUPS, prefetch=Prefetch())
    change = partial(credit_shuffled, algorithm=METHOD, seed=0)
    broken = await ChangedCredit(REWARD, change).score(GROUPS, prefetch=Prefetch())
    assert broken.scores == true.scores
    assert peaks(broken) != peaks(true)
    assert peaks(true)[1] == [0.0] * 4


async def test_only_groups_in_which_all_fail_keep_their_credit() -> None:
    method = make_method("stepsearch")
    reward = Reward(measure_outcome, algorithm=method, max_failure_share=0.5, fix="")
    true = await reward.score(GROUPS, prefetch=Prefetch())
    assert any(peaks(true)[0])
    silent = await ChangedCredit(reward, keep_failed_groups).score(GROUPS, prefetch=Prefetch())
    assert peaks(silent)[0] == peaks(silent)[2] == [0.0] * 4
    assert peaks(silent)[1] == peaks(true)[1]
    assert silent.scores == true.scores
