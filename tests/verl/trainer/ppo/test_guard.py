from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tests.fakes import make_question, make_trajectory
from verl.errors import TrainingHaltedError
from verl.trainer.ppo.guard import MAX_DUMPS, Guard
from verl.types import Credit, Gain, Group, Score, ScoredGroups

QUESTION = make_question()
GROUP = Group(question=QUESTION, trajectories=(make_trajectory(QUESTION, queries=("q",), answer="Bolton é"),))
SCORED = ScoredGroups(
    groups=[GROUP],
    scores=[[Score(outcome=1.0, gain=Gain(trajectory=0.25), metrics={"em": 1.0})]],
    credits=[
        [
            Credit(
                advantages=np.full(len(GROUP.trajectories[0].token_ids), 0.1, np.float32),
                components={"reward": 1.15},
            )
        ]
    ],
)
SKIPPED = {"num_updates": 1.0, "skipped_updates": 1.0}
APPLIED = {"num_updates": 1.0, "skipped_updates": 0.0}


def make_guard(run_dir: Path, *, max_skipped_updates: int = 1, alarm_steps: int = 5) -> Guard:
    return Guard(
        run_dir,
        max_skipped_updates=max_skipped_updates,
        max_log_prob_difference=1e-3,
        alarm_steps=alarm_steps,
    )


def check(guard: Guard, update: dict[str, float], *, step: int = 1, checkpoint: Path | None = None) -> None:
    guard.keep_skipped(update, step=step, scored=SCORED)
    guard.check(last_checkpoint=checkpoint)


def test_the_run_halts_after_the_limit_of_skipped_updates_in_a_row(tmp_path: Path) -> None:
    guard = make_guard(tmp_path, max_skipped_updates=3)
    for update in (SKIPPED, SKIPPED, APPLIED, SKIPPED, SKIPPED):
        check(guard, update)
    with pytest.raises(TrainingHaltedError) as halted:
        check(guard, SKIPPED, step=6, checkpoint=Path("runs/x/global_step_4"))
    assert "global_step_4" in str(halted.value)
    assert "step_000006.jsonl" in str(halted.value)


def test_updates_of_one_step_count_one_by_one(tmp_path: Path) -> None:
    guard = make_guard(tmp_path, max_skipped_updates=3)
    check(guard, APPLIED)
    assert not list(tmp_path.iterdir())
    check(guard, {"num_updates": 4.0, "skipped_updates": 3.0})  # one was applied
    with pytest.raises(TrainingHaltedError, match=r"4 updates in a row .* No checkpoint was saved yet"):
        check(guard, {"num_updates": 4.0, "skipped_updates": 4.0})


def test_the_batch_of_a_skipped_update_can_be_replayed(tmp_path: Path) -> None:
    check(make_guard(tmp_path, max_skipped_updates=2), SKIPPED, step=12)
    (line,) = (tmp_path / "skipped" / "step_000012.jsonl").read_text(encoding="utf-8").splitlines()
    record = json.loads(line)
    turn, original = record["trajectory"]["turns"][0], GROUP.trajectories[0].turns[0]
    assert record["trajectory"]["question"]["uid"] == QUESTION.uid
    assert turn["output_ids"] == original.output_ids.tolist()
    np.testing.assert_array_equal(np.array(turn["output_log_probs"], np.float32), original.output_log_probs)
    assert record["score"]["gain"]["trajectory"] == 0.25
    assert record["credit"]["components"] == {"reward": 1.15}
    advantages = np.array(record["credit"]["advantages"], np.float32)
    np.testing.assert_array_equal(advantages, SCORED.credits[0][0].advantages)


def test_only_the_first_batches_are_kept(tmp_path: Path) -> None:
    guard = make_guard(tmp_path, max_skipped_updates=99)
    for step in range(MAX_DUMPS + 5):
        check(guard, SKIPPED, step=step)
    assert len(list((tmp_path / "skipped").iterdir())) == MAX_DUMPS


@pytest.mark.parametrize(
    ("metric", "healthy", "sick"),
    [("policy/entropy", 1.0, 0.05), ("rollout/no_search_share", 0.5, 0.95), ("policy/kl", 0.1, 3.0)],
)
def test_an_alarm_is_raised_once_after_enough_steps_and_again_after_it_passed(
    tmp_path: Path, metric: str, healthy: float, sick: float
) -> None:
    guard = make_guard(tmp_path, max_skipped_updates=1, alarm_steps=3)
    values = [healthy, sick, sick, healthy, sick, sick, sick, sick, healthy, sick, sick, sick]
    raised = [bool(guard.alarms({metric: value})) for value in values]
    assert [i for i, alarm in enumerate(raised) if alarm] == [6, 11]


def test_engine_and_trainer_apart_is_an_alarm_after_two_steps(tmp_path: Path) -> None:
    guard = make_guard(tmp_path)
    values = [0.5e-3, 2e-3, 0.5e-3, 2e-3, 2e-3, 2e-3]
    assert guard.alarms({}) == []
    raised = [guard.alarms({"policy/log_prob_difference_mean": value}) for value in values]
    assert [len(warnings) for warnings in raised] == [0, 0, 0, 0, 1, 0]
    assert (
        "policy/log_prob_difference_mean is 0.002 after 2 steps above 0.001: rollout/trainer mismatch"
        in raised[4][0]
    )
