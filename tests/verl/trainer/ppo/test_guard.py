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


def check(guard: Guard, update: dict[str, float], *, step: int = 1, checkpoint: Path | None = None) -> None:
    guard.keep_skipped(update, step=step, scored=SCORED)
    guard.check(last_checkpoint=checkpoint)


def test_the_run_halts_after_the_limit_of_skipped_updates_in_a_row(tmp_path: Path) -> None:
    guard = Guard(tmp_path, max_skipped_updates=3)
    for update in (SKIPPED, SKIPPED, APPLIED, SKIPPED, SKIPPED):
        check(guard, update)
    with pytest.raises(TrainingHaltedError) as halted:
        check(guard, SKIPPED, step=6, checkpoint=Path("runs/x/global_step_4"))
    assert "global_step_4" in str(halted.value)
    assert "step_000006.jsonl" in str(halted.value)


def test_updates_of_one_step_count_one_by_one(tmp_path: Path) -> None:
    guard = Guard(tmp_path, max_skipped_updates=3)
    check(guard, APPLIED)
    assert not list(tmp_path.iterdir())
    check(guard, {"num_updates": 4.0, "skipped_updates": 3.0})  # one was applied
    with pytest.raises(TrainingHaltedError, match=r"4 updates in a row .* No checkpoint was saved yet"):
        check(guard, {"num_updates": 4.0, "skipped_updates": 4.0})


def test_the_batch_of_a_skipped_update_can_be_replayed(tmp_path: Path) -> None:
    check(Guard(tmp_path, max_skipped_updates=2), SKIPPED, step=12)
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
    guard = Guard(tmp_path, max_skipped_updates=99)
    for step in range(MAX_DUMPS + 5):
        check(guard, SKIPPED, step=step)
    assert len(list((tmp_path / "skipped").iterdir())) == MAX_DUMPS
