from __future__ import annotations

import random
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field

import numpy as np
import pytest

from tests.fakes import make_question, make_trajectory
from verl.errors import TrainingHaltedError
from verl.protocols import OnEpisodeEnd
from verl.reward.outcome import measure_outcome
from verl.reward.reward import Reward
from verl.trainer.ppo.advantage import outcome_plus_gain
from verl.trainer.ppo.metrics import step_metrics
from verl.types import Gain, Group, Question, Score, Trajectory

RULE = outcome_plus_gain(gain_weight=0.6, normalise_by_std=True)


@dataclass
class ScriptedGain:
    """A gain for every query, the same in every run; failures where asked."""

    broken: frozenset[str] = frozenset()
    figures: dict[str, float] = field(default_factory=lambda: {"perf/gain_visible_s": 0.5})

    def asking_early(self, questions: Sequence[Question]) -> nullcontext[OnEpisodeEnd]:
        return nullcontext(self.note)

    def note(self, trajectory: Trajectory) -> None:
        raise AssertionError("the collector is not there")

    async def measure(self, groups: Sequence[Group]) -> list[list[Gain]]:
        return [[self._gain(t.searches[0].action.text) for t in g.trajectories] for g in groups]

    def _gain(self, query: str) -> Gain:
        if query in self.broken:
            return Gain(failure="gain_failed: IG service: HTTP 500")
        return Gain(value=random.Random(query).uniform(-1, 1))


class NeverAsked:
    async def measure(self, groups: Sequence[Group]) -> list[list[Gain]]:
        raise AssertionError("validation asks for no gain")


def make_groups(questions: int = 4, samples: int = 5) -> list[Group]:
    made = []
    for q in range(questions):
        question = make_question(f"nq/train/{q}")
        made.append(
            Group(
                question=question,
                trajectories=tuple(
                    make_trajectory(
                        question, sample=s, queries=(f"{q}-{s}",), answer="Bolton" if (q + s) % 3 else "Paris"
                    )
                    for s in range(samples)
                ),
            )
        )
    return made


def reward(gain: ScriptedGain | NeverAsked | None, *, max_failure_share: float = 0.5) -> Reward:
    return Reward(
        measure_outcome, gain=gain, max_failure_share=max_failure_share, fix="is http://127.0.0.1:8310 up?"
    )


async def test_outcome_gain_and_measures_of_every_trajectory() -> None:
    (scores,) = await reward(ScriptedGain()).score(make_groups(1))
    assert [score.outcome for score in scores] == [0.0, 1.0, 1.0, 0.0, 1.0]
    assert scores[1].gain == random.Random("0-1").uniform(-1, 1)
    assert scores[1].metrics == {"em": 1.0, "sub_em": 1.0, "f1": 1.0}


async def test_gains_are_asked_for_early_where_there_are_gains() -> None:
    gain = ScriptedGain()
    async with reward(gain).asking_early([]) as on_episode_end:
        assert on_episode_end == gain.note
    assert reward(gain).figures == {"perf/gain_visible_s": 0.5}
    async with reward(None).asking_early([]) as on_episode_end:
        on_episode_end(make_trajectory(make_question(), answer="x"))
    assert reward(None).figures == {}


async def test_a_failed_trajectory_has_no_outcome() -> None:
    question = make_question()
    failed = make_trajectory(question, queries=("q",), answer="Bolton", failure="search_failed: HTTP 500")
    (scores,) = await reward(None).score([Group(question=question, trajectories=(failed,))])
    assert scores == [Score(outcome=None, failure="search_failed: HTTP 500")]


async def test_validation_never_asks_for_a_gain() -> None:
    (group,) = make_groups(1)
    scores = await reward(NeverAsked()).score_validation(group.trajectories)
    assert [score.gain for score in scores] == [None] * 5
    assert [score.outcome for score in scores] == [0.0, 1.0, 1.0, 0.0, 1.0]


async def test_thirty_percent_failed_gains_leave_the_others_as_in_a_clean_run_without_them() -> None:
    groups = make_groups()
    queries = [t.searches[0].action.text for g in groups for t in g.trajectories]
    broken = frozenset(random.Random(0).sample(queries, 6))  # 6 of 20
    scores = await reward(ScriptedGain(broken)).score(groups)
    credit = [RULE(g.trajectories, s) for g, s in zip(groups, scores, strict=True)]

    for group, arrays in zip(groups, credit, strict=True):
        kept = [t for t in group.trajectories if t.searches[0].action.text not in broken]
        subset = Group(question=group.question, trajectories=tuple(kept))
        (clean_scores,) = await reward(ScriptedGain()).score([subset])
        clean = {t.sample: a for t, a in zip(kept, RULE(kept, clean_scores), strict=True)}
        for trajectory, array in zip(group.trajectories, arrays, strict=True):
            expected = clean.get(trajectory.sample, np.zeros(len(trajectory.token_ids), np.float32))
            np.testing.assert_array_equal(array, expected)

    metrics = step_metrics(groups, scores, credit, update={}, gain_figures={}, seconds={}, gain_weight=0.6)
    assert metrics["ig/failed_share"] == pytest.approx(0.3)
    assert metrics["ig/failures_gain_failed"] == 6
    assert metrics["reward/failed_share"] == pytest.approx(0.3)
    assert metrics["rollout/failed_share"] == 0.0


async def test_a_group_without_a_valid_sample_contributes_nothing_and_stops_nothing() -> None:
    groups = make_groups()
    broken = frozenset(t.searches[0].action.text for t in groups[2].trajectories)
    scores = await reward(ScriptedGain(broken)).score(groups)
    assert all(score.failure for score in scores[2])
    assert not any(array.any() for array in RULE(groups[2].trajectories, scores[2]))


async def test_training_halts_above_the_share_and_says_why_and_what_to_do() -> None:
    groups = make_groups()
    queries = [t.searches[0].action.text for g in groups for t in g.trajectories]
    with pytest.raises(TrainingHaltedError) as halted:
        await reward(ScriptedGain(frozenset(queries[:6])), max_failure_share=0.25).score(groups)
    message = str(halted.value)
    assert "6 of 20 gain measurements failed (30%" in message
    assert "6 x gain_failed. First failure: gain_failed: IG service: HTTP 500" in message
    assert "is http://127.0.0.1:8310 up?" in message


async def test_the_share_is_of_what_was_asked_not_of_the_batch() -> None:
    """A dead service is noticed although most trajectories did not search."""
    groups = make_groups(1)
    question = groups[0].question
    failing = Group(question=question, trajectories=groups[0].trajectories[:2])
    lazy = tuple(make_trajectory(question, answer="Bolton") for _ in range(18))

    class MostlyIdle:
        async def measure(self, asked: Sequence[Group]) -> list[list[Gain]]:
            return [[Gain(failure="gain_failed: refused")] * 2, [Gain()] * 18]

    with pytest.raises(TrainingHaltedError, match="2 of 2 gain measurements"):
        await Reward(measure_outcome, gain=MostlyIdle(), max_failure_share=0.2).score(
            [failing, Group(question=question, trajectories=lazy)]
        )


async def test_one_odd_failure_does_not_halt_unless_none_is_allowed() -> None:
    groups = make_groups(1, 2)
    gain = ScriptedGain(frozenset({"0-0"}))
    await reward(gain, max_failure_share=0.1).score(groups)
    with pytest.raises(TrainingHaltedError):
        await reward(gain, max_failure_share=0.0).score(groups)
