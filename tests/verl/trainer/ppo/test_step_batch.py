"""Which trajectories a step trains on, and with what."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.fakes import FakeAgent, make_trajectory
from tests.methods import make_method
from tests.trainer_run import QUESTIONS, STEPS_ALONE, FakeModels, Run, make_writer
from verl.algorithms.base import Measurement, Prefetch
from verl.algorithms.search_r1 import SearchR1, SearchR1Config
from verl.errors import TrainingHaltedError
from verl.protocols import Agent
from verl.run.tracking import read_metrics
from verl.trainer.config.schema import FilterGroupsConfig
from verl.types import Group, Question, Stop, Trajectory

RIGHT, WRONG, CUT = "<answer>Bolton</answer>", "<answer>Leeds</answer>", "<think> and on and on"


class CutAgent(FakeAgent):
    """Sample 0 of every group is cut off by the token budget, sample 1 is right, sample 2 wrong."""

    async def run(self, question: Question, *, sample: int, seed: int, greedy: bool) -> Trajectory:
        answer = (None, question.golds[0], "wrong")[sample]
        trajectory = make_trajectory(question, sample=sample, queries=("q",), answer=answer)
        return replace(trajectory, stop=Stop.LENGTH) if sample == 0 else trajectory


@pytest.mark.parametrize("agent", [CutAgent(), make_writer(RIGHT, WRONG, CUT)], ids=["budget", "completion"])
@pytest.mark.parametrize(("filtering", "expected"), [(False, "update of 6"), (True, "update of 4")])
async def test_overlong_filtering_leaves_trajectories_that_were_cut_off_out_of_the_update(
    tmp_path: Path, agent: Agent, filtering: bool, expected: str
) -> None:
    run = Run(tmp_path, algorithm=make_method(overlong_filtering=filtering), agent=agent, **STEPS_ALONE)
    await run.trainer.train_step(1)
    run.tracker.finish()
    assert expected in run.models.calls


async def test_a_step_of_trajectories_that_were_all_cut_off_says_how_many_and_what_to_raise(
    tmp_path: Path,
) -> None:
    algorithm = make_method(overlong_filtering=True)
    run = Run(tmp_path, algorithm=algorithm, agent=make_writer(CUT), **STEPS_ALONE)
    message = (
        r"step 1: nothing to train on: 0 of 6 trajectories failed.* 6 were cut off and "
        r"algorithm\.overlong_filtering=true.*data\.max_prompt_length.*data\.max_response_length"
    )
    with pytest.raises(TrainingHaltedError, match=message):
        await run.trainer.train_step(1)
    run.tracker.finish()


async def test_filtered_groups_are_replaced_within_the_step_and_counted(tmp_path: Path) -> None:
    settings = FilterGroupsConfig(enable=True, max_num_gen_batches=3)
    run = Run(tmp_path, algorithm=make_method(filter_groups=settings), **STEPS_ALONE)  # all answers are wrong
    await run.trainer.train_step(1)
    run.tracker.finish()
    assert run.questions(0, 18) == {q.uid for q in QUESTIONS}
    assert "update of 6" in run.models.calls
    line = read_metrics(tmp_path)[0]
    assert (line["rollout/generation_batches"], line["rollout/filtered_group_share"]) == (3.0, 1.0)


class KnowingOneAgent(FakeAgent):
    """One attempt at one question is right, all others are wrong."""

    async def run(self, question: Question, *, sample: int, seed: int, greedy: bool) -> Trajectory:
        is_right = question == QUESTIONS[0] and sample == 0
        return make_trajectory(question, sample=sample, answer="Bolton" if is_right else "Leeds")


async def test_groups_that_were_filtered_away_count_in_what_the_policy_did(tmp_path: Path) -> None:
    settings = FilterGroupsConfig(enable=True, max_num_gen_batches=3)
    algorithm = make_method(filter_groups=settings)
    run = Run(tmp_path, algorithm=algorithm, agent=KnowingOneAgent(), **STEPS_ALONE)
    await run.trainer.train_step(1)
    run.tracker.finish()
    assert "update of 3" in run.models.calls
    line = read_metrics(tmp_path)[0]
    assert line["rollout/trajectories"] == 18
    assert line["reward/em_mean"] == pytest.approx(1 / 18)
    assert line["reward/mean"] == pytest.approx(1 / 3)  # the reward trained on


class KnowingMethod(SearchR1):
    """Its measurement comes with the log-probs of the sampled tokens."""

    async def measure(self, groups: Sequence[Group], *, prefetch: Prefetch) -> Measurement:
        measurement = await super().measure(groups, prefetch=prefetch)
        old = [
            [np.where(t.policy_mask, np.float32(-0.25 * t.sample), np.float32(0)) for t in g.trajectories]
            for g in groups
        ]
        return replace(measurement, old_log_probs=old)


async def test_log_probs_that_measuring_computed_are_not_computed_again(tmp_path: Path) -> None:
    algorithm = KnowingMethod(SearchR1Config(overlong_filtering=True), make_method().services)
    models = FakeModels(is_fresh=False)
    run = Run(tmp_path, algorithm=algorithm, agent=CutAgent(), models=models, **STEPS_ALONE)
    await run.trainer.train_step(1)  # the fake policy computes no log-probs
    run.tracker.finish()
    (batch,) = models.batches
    assert batch.old_log_probs is not None
    expected = np.repeat([-0.25, -0.5, -0.25, -0.5], batch.policy_lengths)
    np.testing.assert_array_equal(batch.old_log_probs, expected)
