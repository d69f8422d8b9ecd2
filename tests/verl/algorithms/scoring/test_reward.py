from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from tests.fakes import make_question, make_trajectory
from tests.methods import make_method
from verl.algorithms.base import Algorithm, Measurement, Prefetch
from verl.algorithms.inforeasoner import InfoReasoner, InfoReasonerConfig
from verl.algorithms.scoring.outcome import measure_outcome
from verl.algorithms.scoring.reward import Reward
from verl.errors import TrainingHaltedError
from verl.trainer.ppo.metrics import step_metrics
from verl.types import Credit, Gain, Group, Score, ScoredGroups, Stop


class ScriptedGain(InfoReasoner):
    """A gain for every query, the same in every run; failures where asked."""

    def __init__(self, broken: frozenset[str] = frozenset()) -> None:
        super().__init__(InfoReasonerConfig(), make_method().services)
        self.broken = broken

    async def measure(self, groups: Sequence[Group], *, prefetch: Prefetch) -> Measurement:
        gains = [[self._gain(t.turns[0].action.text) for t in g.trajectories] for g in groups]
        return Measurement(gains=gains, stats={"perf/gain_visible_s": 0.5})

    def _gain(self, query: str) -> Gain:
        if query in self.broken:
            return Gain(failure="gain_failed: IG service: HTTP 500")
        return Gain(trajectory=random.Random(query).uniform(-1, 1))


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


async def score(
    algorithm: Algorithm, groups: Sequence[Group], *, max_failure_share: float = 0.5
) -> ScoredGroups:
    reward = Reward(
        measure_outcome,
        algorithm=algorithm,
        max_failure_share=max_failure_share,
        fix="is http://127.0.0.1:8310 up?",
    )
    return await reward.score(groups, prefetch=Prefetch())


async def test_outcome_gain_and_measures_of_every_trajectory() -> None:
    (group,) = make_groups(1)
    scored = await score(ScriptedGain(), [group])
    (scores,) = scored.scores
    assert [score.outcome for score in scores] == [0.0, 1.0, 1.0, 0.0, 1.0]
    assert scores[1].gain == Gain(trajectory=random.Random("0-1").uniform(-1, 1))
    assert scored.stats == {"perf/gain_visible_s": 0.5}
    assert scores[1].metrics == dict.fromkeys(("em", "sub_em", "f1", "set_f1"), 1.0)
    reward = Reward(measure_outcome, algorithm=ScriptedGain(), max_failure_share=0.5, fix="")
    validation = reward.score_validation(group.trajectories)  # asks for no gain
    assert validation == [replace(score, gain=Gain()) for score in scores]
    failed = replace(group.trajectories[0], stop=Stop.FAILED, failure="search_failed: HTTP 500")
    assert reward.score_validation([failed]) == [Score(outcome=None, failure="search_failed: HTTP 500")]


async def test_thirty_percent_failed_gains_leave_the_others_as_in_a_clean_run_without_them() -> None:
    groups = make_groups()
    queries = [t.turns[0].action.text for g in groups for t in g.trajectories]
    broken = frozenset(random.Random(0).sample(queries, 6))  # 6 of 20
    scored = await score(ScriptedGain(broken), groups)

    for group, credits in zip(groups, scored.credits, strict=True):
        kept = [t for t in group.trajectories if t.turns[0].action.text not in broken]
        clean_scored = await score(ScriptedGain(), [Group(question=group.question, trajectories=tuple(kept))])
        clean = {t.sample: c.advantages for t, c in zip(kept, clean_scored.credits[0], strict=True)}
        for trajectory, credit in zip(group.trajectories, credits, strict=True):
            expected = clean.get(trajectory.sample, np.zeros(len(trajectory.token_ids), np.float32))
            np.testing.assert_array_equal(credit.advantages, expected)

    metrics = step_metrics(scored, update={}, seconds={}, rollout_s=1.0)
    assert metrics["ig/failed_share"] == pytest.approx(0.3)
    assert metrics["ig/failures_gain_failed"] == 6
    assert metrics["reward/failed_share"] == pytest.approx(0.3)
    assert metrics["rollout/failed_share"] == 0.0


async def test_a_halt_above_the_share_names_cause_and_fix() -> None:
    groups = make_groups()
    queries = [t.turns[0].action.text for g in groups for t in g.trajectories]
    with pytest.raises(TrainingHaltedError) as halted:
        await score(ScriptedGain(frozenset(queries[:6])), groups, max_failure_share=0.25)
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

    class MostlyIdle(ScriptedGain):
        async def measure(self, groups: Sequence[Group], *, prefetch: Prefetch) -> Measurement:
            return Measurement(gains=[[Gain(failure="gain_failed: refused")] * 2, [Gain()] * 18])

    groups = [failing, Group(question=question, trajectories=lazy)]
    with pytest.raises(TrainingHaltedError, match="2 of 2 gain measurements"):
        await score(MostlyIdle(), groups, max_failure_share=0.2)


async def test_a_single_failure_halts_only_where_none_is_allowed() -> None:
    groups = make_groups(1, 2)
    gain = ScriptedGain(frozenset({"0-0"}))
    await score(gain, groups, max_failure_share=0.1)
    with pytest.raises(TrainingHaltedError):
        await score(gain, groups, max_failure_share=0.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"components": {"reward": float("nan")}}, "reward must be finite or None"),
        ({"components": {"reward": 1.0, "parts": np.float32(0.5)}}, "parts must be finite or None"),
        ({"components": {"reward": (1.0, 0.0)}}, "one number per trajectory"),
        ({"components": {"reward": 1.0, "parts": (0.5,)}}, "parts has 1 values for 2 turns"),
    ],
)
async def test_a_method_that_breaks_its_contract_is_named_before_the_update(
    change: dict[str, Any], message: str
) -> None:
    class Broken(ScriptedGain):
        def credit(
            self, groups: Sequence[Group], scores: Sequence[Sequence[Score]], *, progress: float = 0.0
        ) -> list[list[Credit]]:
            return [
                [replace(c, **change) for c in credits]
                for credits in super().credit(groups, scores, progress=progress)
            ]

    with pytest.raises(ValueError, match=message):
        await score(Broken(), make_groups(1))


async def test_a_failed_trajectory_with_an_advantage_is_refused() -> None:
    class Leaking(ScriptedGain):
        def credit(
            self, groups: Sequence[Group], scores: Sequence[Sequence[Score]], *, progress: float = 0.0
        ) -> list[list[Credit]]:
            return super().credit(groups, [[replace(s, failure=None) for s in some] for some in scores])

    with pytest.raises(ValueError, match="must have no reward and no advantage"):
        await score(Leaking(frozenset({"0-1"})), make_groups(1))
