"""Seconds of a step with `trainer.schedule=sync` and `one_step_off`: the training loop around scripted parts.

Episodes, gains, update and publish take known times and compute nothing, so that what they overlap shows.
"""

from __future__ import annotations

import asyncio
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from serving.files import FileRecord
from verl.agent.tools.search import render_context
from verl.algorithms.base import Measurement, Prefetch, Services
from verl.algorithms.scoring.outcome import measure_outcome
from verl.algorithms.scoring.reward import Reward
from verl.algorithms.search_r1 import SearchR1, SearchR1Config
from verl.data.sampler import QuestionSampler
from verl.rollout.collector import Collector
from verl.run.progress import Progress
from verl.run.recorder import Recorder
from verl.run.tracking import Tracker, read_metrics
from verl.trainer.config.alarms import AlarmsConfig
from verl.trainer.config.schema import ONE_STEP_OFF, SYNC, TrainerConfig
from verl.trainer.ppo.alarms import Alarms
from verl.trainer.ppo.guard import Guard
from verl.trainer.ppo.trainer import Parts, PPOTrainer
from verl.types import Action, ActionKind, Group, Question, Stop, Trajectory, Turn
from verl.workers.batch import TrainBatch
from verl.workers.checkpoint import CheckpointStore

STEPS, QUESTIONS, GROUP = 8, 8, 4
EPISODE_S, SCORE_S, UPDATE_S, PUBLISH_S = 0.4, 0.1, 0.25, 0.05
TURN = Turn(
    output_ids=np.arange(3, 11, dtype=np.int32),
    output_log_probs=np.full(8, -1, np.float32),
    action=Action(kind=ActionKind.ANSWER),
)


class ScriptedModels:
    """Policy, engines, agent and publisher in one."""

    def __init__(self) -> None:
        self.version = 0

    async def run(self, question: Question, *, sample: int, seed: int, greedy: bool) -> Trajectory:  # noqa: ARG002
        """Play an episode."""
        turn = replace(TURN, version=self.version)
        await asyncio.sleep(EPISODE_S)
        return Trajectory(
            question=question,
            sample=sample,
            prompt_ids=np.arange(3, 6, dtype=np.int32),
            turns=(turn,),
            stop=Stop.ANSWERED,
        )

    def is_on_policy(self, num_trajectories: int) -> bool:  # noqa: ARG002
        """Return that no old log-probs are needed."""
        return True

    async def update(self, batch: TrainBatch) -> dict[str, float]:  # noqa: ARG002
        """Train."""
        await asyncio.sleep(UPDATE_S)
        return {"num_updates": 1.0, "skipped_updates": 0.0}

    async def verify(self, *, version: int) -> None:
        """Do nothing."""

    async def publish(self, *, version: int) -> float:  # noqa: ARG002
        """Send the weights."""
        await asyncio.sleep(PUBLISH_S)
        return 0.0

    def expect_version(self, version: int) -> None:
        """Sample from this version on."""
        self.version = version

    async def sleep(self) -> None:
        """Do nothing."""

    async def stage(self, key: str) -> None:
        """Do nothing."""

    async def write(self, key: str, folder: Path, *, export: Path) -> dict[Path, FileRecord]:  # noqa: ARG002
        """Write empty folders."""
        folder.mkdir()
        export.mkdir()
        return {}


class ScriptedMethod(SearchR1):
    """Measures for a while."""

    async def measure(self, groups: Sequence[Group], *, prefetch: Prefetch) -> Measurement:
        """Return no gains."""
        await asyncio.sleep(SCORE_S)
        return await super().measure(groups, prefetch=prefetch)


def make_trainer(run_dir: Path, *, schedule: str) -> PPOTrainer:
    """Return the loop around scripted parts."""
    models: Any = ScriptedModels()
    method = ScriptedMethod(SearchR1Config(), Services(render_context=render_context))
    questions = [
        Question(uid=f"scale/train/{k}", text="", messages=(), golds=("x",), data_source="scale")
        for k in range(STEPS * QUESTIONS)
    ]
    parts = Parts(
        questions=QuestionSampler(questions, batch_size=QUESTIONS, seed=0),
        held_out=(),
        collector=Collector(models, n=GROUP, max_concurrent=QUESTIONS * GROUP, max_failure_share=0, seed=0),
        algorithm=method,
        reward=Reward(measure_outcome, algorithm=method, max_failure_share=0, fix=""),
        policy=models,
        reference=None,
        engines=models,
        publisher=models,
        checkpoints=CheckpointStore(run_dir / "checkpoints", keep=1),
        guard=Guard(run_dir, max_skipped_updates=3),
        alarms=Alarms(AlarmsConfig(steps=STEPS + 1), max_turns=1, max_log_prob_difference=None),
        tracker=Tracker(run_dir, TrainerConfig(logger=[])),
        recorder=Recorder(run_dir, decode=lambda ids: " ".join(map(str, ids))),
    )
    settings = TrainerConfig(schedule=schedule, save_freq=0, val_before_train=False, val_after_train=False)
    return PPOTrainer(parts, settings=settings, total_steps=STEPS, progress=Progress(), identity={})


def measure_step(schedule: str) -> float:
    """Return the seconds of a step, in the median of those that have one before and one after."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(Path(folder), schedule=schedule)
        asyncio.run(trainer.fit())
        trainer.parts.tracker.finish()
        return statistics.median(line["time/step_s"] for line in read_metrics(Path(folder))[1:-1])


def measure() -> dict[str, float]:
    """Return the seconds of a step with both schedules, and those that its parts would take."""
    train_s = SCORE_S + UPDATE_S
    return {
        "sync_step_s": round(measure_step(SYNC), 3),
        "sync_sum_s": round(EPISODE_S + train_s + PUBLISH_S, 3),
        "one_step_off_step_s": round(measure_step(ONE_STEP_OFF), 3),
        "one_step_off_max_s": round(max(EPISODE_S, train_s) + PUBLISH_S, 3),
    }
