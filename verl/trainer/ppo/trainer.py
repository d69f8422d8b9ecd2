"""GRPO with information gain, on one page: `PPOTrainer.fit`.

The trainer knows neither how a gain is measured nor how credit is assigned, nor whether its parts live in
this process, in Ray actors or on GPUs; `verl/trainer/build.py` decides that.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from verl.data.sampler import QuestionSampler
from verl.errors import TrainingHaltedError
from verl.protocols import CreditRule
from verl.reward.reward import Reward
from verl.rollout.collector import Collector
from verl.rollout.pool import EnginePool
from verl.run.progress import Identity, Progress
from verl.run.recorder import Recorder
from verl.run.tracking import Tracker
from verl.trainer.config.schema import TrainerConfig
from verl.trainer.ppo.evaluation import evaluate
from verl.trainer.ppo.guard import Guard
from verl.trainer.ppo.metrics import step_metrics
from verl.types import FloatArray, Group, Question, Score
from verl.utils.logs import ProgressLog
from verl.utils.timing import Timer
from verl.workers.batch import TrainBatch, build_batch
from verl.workers.checkpoint import CheckpointStore
from verl.workers.weight_sync import WeightPublisher
from verl.workers.worker_group import WorkerGroup

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """What the trainer works with, built by `verl/trainer/build.py`."""

    questions: QuestionSampler
    held_out: Sequence[Question]
    collector: Collector
    reward: Reward
    credit_rule: CreditRule
    policy: WorkerGroup
    reference: WorkerGroup | None
    """Frozen initial policy of the KL term; None without it."""
    engines: EnginePool
    publisher: WeightPublisher
    checkpoints: CheckpointStore
    guard: Guard
    tracker: Tracker
    recorder: Recorder


class PPOTrainer:
    """Sample groups of episodes, score them, credit their tokens, update the policy, publish it; again."""

    def __init__(
        self,
        parts: Parts,
        *,
        settings: TrainerConfig,
        total_steps: int,
        gain_weight: float,
        pad_id: int,
        progress: Progress,
        identity: Identity,
    ) -> None:
        self.parts = parts
        self.settings = settings
        self.total_steps = total_steps
        self.gain_weight = gain_weight
        self.pad_id = pad_id
        self.progress = progress
        self.identity = identity
        self.timer = Timer()
        self.saved_step = progress.step
        self.updating: asyncio.Task[dict[str, float]] | None = None
        """The newest update, whether it still runs or not."""
        self.unrecorded: Callable[[], None] = _nothing
        """Records the step whose update is done."""

    async def fit(self) -> None:
        """Train from `progress.step` to `total_steps`. Raises TrainingHaltedError when it must stop."""
        await self.parts.publisher.prove(version=self.progress.step)
        self.parts.engines.expect_version(self.progress.step)
        if self.settings.evaluates_only:
            await self.evaluate()
            return
        if self.settings.val_before_train and self.progress.step == 0:
            await self.evaluate()
        try:
            while self.progress.step < self.total_steps:
                await self.train_step(self.progress.step + 1)
                if self.is_due(self.settings.test_freq) and self.progress.step < self.total_steps:
                    await self.evaluate()
                if self.is_due(self.settings.save_freq) or self.progress.step == self.total_steps:
                    await self.save()
        except BaseException:  # an interrupt, too
            await self.rescue()
            raise
        if self.settings.val_after_train:
            await self.evaluate()

    async def train_step(self, step: int) -> None:
        """GRPO with information gain: sample, score, credit, update, publish."""
        parts, timer = self.parts, self.timer
        timer.reset()
        with timer("step"):
            questions = parts.questions.next_batch()

            async with parts.reward.asking_early(questions) as on_episode_end:
                with timer("rollout"):  # all episodes at once, each at its own pace
                    progress = ProgressLog(logger, f"step {step}: episodes")
                    groups = await parts.collector.collect(
                        questions, step=step, progress=progress, on_episode_end=on_episode_end
                    )

                with timer("reward"):  # outcome + information gain, per trajectory
                    scores = await parts.reward.score(groups)

            credit = [parts.credit_rule(g.trajectories, s) for g, s in zip(groups, scores, strict=True)]
            batch = self.build_batch(groups, scores, credit)

            async with parts.engines.resting():
                with timer("log_probs"):
                    if not parts.policy.is_on_policy(batch):
                        batch = batch.with_old(await parts.policy.log_probs(batch))
                    if parts.reference is not None:
                        batch = batch.with_reference(await parts.reference.log_probs(batch))

                with timer("update"):
                    self.updating = asyncio.create_task(self.update(step, batch, groups, scores, credit))
                    update = await asyncio.shield(self.updating)  # an interrupt does not cut it off

            with timer("publish"):
                update["publish_difference"] = await self.publish(step)

        self.unrecorded()

    async def update(
        self,
        step: int,
        batch: TrainBatch,
        groups: Sequence[Group],
        scores: Sequence[Sequence[Score]],
        credit: Sequence[Sequence[FloatArray]],
    ) -> dict[str, float]:
        """Train on the batch; then the step is done, and remains to be recorded."""
        update = await self.parts.policy.update(batch)
        self.progress.step = step
        self.progress.sampler = self.parts.questions.state_dict()
        self.unrecorded = partial(self.record, groups, scores, credit, update)
        return update

    async def publish(self, version: int) -> float:
        """Bring the weights to the engines; from now on completions of other weights are refused."""
        difference = await self.parts.publisher.publish(version=version)
        self.parts.engines.expect_version(version)
        return difference

    def build_batch(
        self,
        groups: Sequence[Group],
        scores: Sequence[Sequence[Score]],
        credit: Sequence[Sequence[FloatArray]],
    ) -> TrainBatch:
        """Tensors of all trajectories that did not fail; from here on nobody knows what a gain is."""
        kept = [
            (trajectory, advantages)
            for group, of_group, credit_of_group in zip(groups, scores, credit, strict=True)
            for trajectory, score, advantages in zip(
                group.trajectories, of_group, credit_of_group, strict=True
            )
            if score.failure is None and trajectory.num_policy_tokens
        ]
        if not kept:
            raise TrainingHaltedError(
                f"step {self.progress.step + 1}: every trajectory failed, nothing to train on"
            )
        return build_batch([t for t, _ in kept], [a for _, a in kept], pad_id=self.pad_id)

    def record(
        self,
        groups: Sequence[Group],
        scores: Sequence[Sequence[Score]],
        credit: Sequence[Sequence[FloatArray]],
        update: dict[str, float],
    ) -> None:
        """Write trajectories and metrics of the step.

        Raises TrainingHaltedError after too many skipped updates.
        """
        step = self.progress.step
        self.parts.recorder.write(step, groups, scores, credit)
        metrics = step_metrics(
            groups,
            scores,
            credit,
            update=update,
            gain_figures=self.parts.reward.figures,
            seconds=self.timer.seconds,
            gain_weight=self.gain_weight,
        )
        self.parts.tracker.log(step, metrics)
        self.unrecorded = _nothing
        for alarm in self.parts.guard.alarms(metrics):
            logger.warning("step %d: %s", step, alarm)
        self.parts.guard.check_update(
            update,
            step=step,
            groups=groups,
            scores=scores,
            credit=credit,
            last_checkpoint=self.parts.checkpoints.latest(),
        )

    async def evaluate(self) -> None:
        """Every held-out question once, greedy, without gains."""
        parts, step = self.parts, self.progress.step
        progress = ProgressLog(logger, f"step {step}: held-out questions")
        result = await evaluate(parts.collector, parts.reward, parts.held_out, progress=progress)
        parts.recorder.write_evaluation(step, result.trajectories, result.scores)
        parts.tracker.log(step, result.metrics, kind="val")

    async def save(self) -> None:
        """A checkpoint from which a run goes on exactly, with the policy as a Hugging Face folder inside."""

        async def write(folder: Path) -> None:
            await self.parts.policy.save(folder)
            await self.parts.policy.export_hf(folder / "huggingface")
            self.progress.save(folder, identity=self.identity)

        await self.parts.checkpoints.write(self.progress.step, write)
        self.saved_step = self.progress.step

    async def rescue(self) -> None:
        """Record and save the finished steps of a run that ends early, or report which are lost.

        An update that runs is waited for. One that failed half-way leaves the weights of no step, so that the
        steps since the last checkpoint are lost. Errors are logged: the user must see last why the run ended.
        """
        if self.updating is not None:
            if not self.updating.done():
                logger.info("finishing the update of step %d before the end", self.progress.step + 1)
            await asyncio.wait([self.updating])
        first, last = self.saved_step + 1, self.progress.step
        try:
            self.unrecorded()
        except Exception as error:
            logger.error("step %d is not recorded: %s: %s", last, type(error).__name__, error)
        why = f"the update of step {last + 1} was cut off"
        if self.updating is None or has_succeeded(self.updating):
            if first > last:
                return
            logger.info("saving step %d before the end", last)
            try:
                await self.save()
                return
            except Exception as error:
                why = f"no checkpoint could be written: {type(error).__name__}: {error}"
        if first <= last:
            logger.error("steps %d to %d are lost: %s", first, last, why)

    def is_due(self, frequency: int) -> bool:
        return frequency > 0 and self.progress.step % frequency == 0


def has_succeeded(task: asyncio.Task[dict[str, float]]) -> bool:
    """Whether a task that has ended gave a result."""
    return not task.cancelled() and task.exception() is None


def _nothing() -> None:
    """There is no step to record."""
