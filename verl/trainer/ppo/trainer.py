"""The training loop on one page: `PPOTrainer.fit` and `PPOTrainer.train_step`.

The trainer knows neither how a method measures and credits a step, nor whether its parts live in this
process, in Ray actors or on GPUs; `verl/trainer/build.py` decides that.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Protocol

from serving.files import FileRecord
from verl.algorithms.base import Algorithm, Prefetch
from verl.data.sampler import QuestionSampler
from verl.errors import TrainingHaltedError
from verl.rollout.collector import Collector
from verl.rollout.pool import EnginePool
from verl.run.progress import Identity, Progress
from verl.run.recorder import Recorder
from verl.run.tracking import Tracker
from verl.trainer.config.schema import TrainerConfig
from verl.trainer.ppo.alarms import Alarms
from verl.trainer.ppo.evaluation import evaluate
from verl.trainer.ppo.guard import Guard
from verl.trainer.ppo.metrics import Played, step_metrics
from verl.trainer.ppo.profiler import Profiler
from verl.trainer.ppo.sampling import Collected, collect_groups
from verl.trainer.ppo.schedule import SCHEDULES, Rollout, measure_staleness
from verl.trainer.ppo.speed import Machine, speed_metrics
from verl.types import Finish, Group, Question, Score, ScoredGroups, Stop, Trajectory
from verl.utils.logs import ProgressLog
from verl.utils.timing import Timer
from verl.workers.batch import TrainBatch, build_batch
from verl.workers.checkpoint import EXPORT, POLICY, CheckpointStore
from verl.workers.scorer import PolicyCopy, ScoringModel
from verl.workers.weight_sync import WeightPublisher
from verl.workers.worker_group import WorkerGroup

logger = logging.getLogger(__name__)


class StepReward(Protocol):
    """The part of `verl.algorithms.scoring.reward.Reward` that the loop uses."""

    async def score(
        self,
        groups: Sequence[Group],
        *,
        prefetch: Prefetch,
        progress: float = 0.0,
        stats: Mapping[str, float] | None = None,
    ) -> ScoredGroups:
        """Measure and credit every trajectory of a step."""
        ...

    def score_validation(self, trajectories: Sequence[Trajectory]) -> list[Score]:
        """Return outcomes only."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """The parts that the trainer works with, built by `verl/trainer/build.py`."""

    questions: QuestionSampler
    held_out: Sequence[Question]
    collector: Collector
    algorithm: Algorithm
    reward: StepReward
    policy: WorkerGroup
    reference: ScoringModel | None
    """Frozen initial policy of the KL term; None without it."""
    copy: PolicyCopy | None = None
    """Copy of the policy that the method scores with, where that is refreshed."""
    engines: EnginePool
    publisher: WeightPublisher
    checkpoints: CheckpointStore
    guard: Guard
    alarms: Alarms
    tracker: Tracker
    recorder: Recorder
    machine: Machine = field(default_factory=Machine)
    profiler: Profiler = field(default_factory=Profiler)


class PPOTrainer:
    """Runs the steps: sample groups of episodes, score and credit them, update the policy, publish it."""

    def __init__(
        self,
        parts: Parts,
        *,
        settings: TrainerConfig,
        total_steps: int,
        progress: Progress,
        identity: Identity,
    ) -> None:
        self.parts = parts
        self.settings = settings
        self.total_steps = total_steps
        self.progress = progress
        self.identity = identity
        self.timer = Timer()
        self.schedule = SCHEDULES[settings.schedule](
            self.sample, engines=parts.engines, timer=self.timer, last_step=total_steps
        )
        self.saved_step = progress.step
        self.saving: asyncio.Task[int] | None = None
        """Writes a checkpoint."""
        self.updating: asyncio.Task[dict[str, float]] | None = None
        """The newest update, whether it still runs or not."""
        self.unrecorded: Callable[[], None] = _nothing
        """Records the step whose update is done."""

    async def fit(self) -> None:
        """Train from `progress.step` to `total_steps`. Raises TrainingHaltedError when it must stop."""
        await self.parts.publisher.verify(version=self.progress.step)
        self.parts.engines.expect_version(self.progress.step)
        if self.settings.evaluates_only:
            await self.evaluate()
            return
        await self.evaluate_if_due()  # also what an interrupted run did not finish
        try:
            while self.progress.step < self.total_steps:
                step = self.progress.step + 1
                async with self.parts.profiler.recorded(step, policy=self.parts.policy, timer=self.timer):
                    await self.train_step(step)
                await self.saved(wait=False)
                await self.evaluate_if_due()
                if self.is_due(self.settings.save_freq) or self.progress.step == self.total_steps:
                    await self.save()
            await self.saved()
        except BaseException:  # an interrupt, too
            await self.rescue()
            raise
        if self.settings.val_after_train:
            await self.evaluate()

    async def train_step(self, step: int) -> None:
        """Collect episodes, make room on the device, score and credit them, update, publish."""
        parts, timer = self.parts, self.timer
        timer.reset()
        with timer("step"):
            async with AsyncExitStack() as room:
                rollout = await self.schedule.rollout(step)
                # Closed before the update: no request of this step then runs beside the training.
                async with aclosing(rollout.prefetch):
                    await room.enter_async_context(self.schedule.training(step))
                    with timer("reward"):  # may run the policy, which now has the device
                        scored = await self.score(step, rollout)

                with timer("log_probs"):
                    batch = await self.add_log_probs(self.build_batch(scored))

                with timer("update"):
                    update_step = self.update(step, batch, scored, rollout)
                    self.updating = asyncio.create_task(update_step)
                    update = await asyncio.shield(self.updating)  # an interrupt does not cut it off

            with timer("publish"):  # the engines wake
                update["publish_difference"] = await self.publish(step)

        self.unrecorded()
        parts.guard.check(last_checkpoint=parts.checkpoints.latest())

    async def sample(self, step: int) -> Rollout:
        """Run the episodes of a step, of further questions, too, if groups are filtered."""
        parts, began = self.parts, time.perf_counter()
        questions = parts.questions.next_batch()
        prefetch = parts.algorithm.prefetch(questions)
        try:
            collected = await collect_groups(
                questions,
                collect=partial(
                    parts.collector.collect,
                    step=step,
                    progress=ProgressLog(logger, f"step {step}: episodes"),
                    on_episode_end=prefetch.on_episode_end,
                ),
                more_questions=parts.questions.next_batch,
                judge=parts.reward.score_validation,
                settings=parts.algorithm.settings.filter_groups,
            )
        except BaseException:
            await prefetch.aclose()
            raise
        return Rollout(
            collected=collected,
            prefetch=prefetch,
            sampler=parts.questions.state_dict(),
            seconds=time.perf_counter() - began,
        )

    async def score(self, step: int, rollout: Rollout) -> ScoredGroups:
        """Measure and credit the episodes of a step. Raises RolloutError if their weights are too old."""
        groups, max_staleness = rollout.collected.groups, self.schedule.max_staleness
        return await self.parts.reward.score(
            groups,
            prefetch=rollout.prefetch,
            progress=self.progress.step / self.total_steps,
            stats={
                **rollout.collected.stats,
                **measure_staleness(groups, step=step, max_staleness=max_staleness),
                "perf/rollout_hidden_s": rollout.hidden_s,
            },
        )

    def judge(self, collected: Collected) -> list[Played]:
        """Return the trajectories of groups that were left out with their outcomes."""
        trajectories = [t for group in collected.left_out for t in group.trajectories]
        return list(zip(trajectories, self.parts.reward.score_validation(trajectories), strict=True))

    async def update(
        self, step: int, batch: TrainBatch, scored: ScoredGroups, rollout: Rollout
    ) -> dict[str, float]:
        """Train on the batch; then the step is done, and remains to be recorded."""
        update = await self.parts.policy.update(batch)
        if self.parts.copy is not None:
            await self.parts.copy.refresh(step)
        self.progress.step = step
        self.progress.sampler = rollout.sampler
        self.unrecorded = partial(self.record, scored, batch, update, rollout)
        return update

    async def publish(self, version: int) -> float:
        """Copy the weights to the engines; completions of other weights are refused from then on."""
        difference = await self.parts.publisher.publish(version=version)
        self.parts.engines.expect_version(version)
        return difference

    def build_batch(self, scored: ScoredGroups) -> TrainBatch:
        """Return arrays of all trajectories that did not fail; from here on only advantages count."""
        samples = scored.samples()
        overlong_filtering = self.parts.algorithm.settings.overlong_filtering
        valid = [
            i for i, s in enumerate(samples) if s.score.failure is None and s.trajectory.num_policy_tokens
        ]
        kept = [i for i in valid if not (overlong_filtering and was_cut_off(samples[i].trajectory))]
        if not kept:
            why = f"{len(samples) - len(valid)} of {len(samples)} trajectories failed or are empty"
            if valid:
                why += (
                    f", the other {len(valid)} were cut off and algorithm.overlong_filtering=true leaves "
                    "them out; raise data.max_prompt_length (tokens of an episode) or "
                    "data.max_response_length (of a completion), or set algorithm.overlong_filtering=false"
                )
            raise TrainingHaltedError(f"step {self.progress.step + 1}: nothing to train on: {why}")
        known = scored.old_log_probs
        old = None if known is None else [log_probs for of_group in known for log_probs in of_group]
        return build_batch(
            [samples[i].trajectory for i in kept],
            [samples[i].credit.advantages for i in kept],
            old_log_probs=None if old is None else [old[i] for i in kept],
        )

    async def add_log_probs(self, batch: TrainBatch) -> TrainBatch:
        """Return the batch with the log-probs that the update needs: the old ones, those of the reference."""
        policy, reference = self.parts.policy, self.parts.reference
        if batch.old_log_probs is None and not policy.is_on_policy(batch.num_trajectories):
            batch = batch.with_old(await policy.log_probs(batch))
        if reference is not None:
            batch = batch.with_reference(await reference.log_probs(batch))
        return batch

    def record(
        self, scored: ScoredGroups, batch: TrainBatch, update: dict[str, float], rollout: Rollout
    ) -> None:
        """Write trajectories and metrics of the step, and the batch of a skipped update."""
        step, seconds, left_out = self.progress.step, self.timer.seconds, self.judge(rollout.collected)
        self.parts.recorder.write(step, scored)
        metrics = step_metrics(
            scored, update=update, seconds=seconds, rollout_s=rollout.seconds, left_out=left_out
        )
        metrics |= speed_metrics(
            self.parts.machine,
            scored=scored,
            batch=batch,
            backward_share=update.get("backward_share", 1.0),
            computed_share=update.get("computed_share", 1.0),
            seconds=seconds,
            rollout_s=rollout.seconds,
            left_out=left_out,
            written=self.parts.checkpoints.take_written(),
        )
        self.parts.tracker.log(step, metrics)
        self.unrecorded = _nothing
        for alarm in self.parts.alarms.observe(step, metrics):
            logger.warning("step %d: %s", step, alarm)
        self.parts.guard.keep_skipped(update, step=step, scored=scored)

    async def evaluate_if_due(self) -> None:
        """Evaluate before the first or between two steps, as the settings say, unless that is recorded."""
        step, settings = self.progress.step, self.settings
        due = settings.val_before_train if step == 0 else self.is_due(settings.test_freq)
        if due and step < self.total_steps and not self.parts.recorder.has_evaluation(step):
            await self.evaluate()

    async def evaluate(self) -> None:
        """Evaluate every held-out question once, greedy, without gains, and record the result."""
        parts, step = self.parts, self.progress.step
        progress = ProgressLog(logger, f"step {step}: held-out questions")
        result = await evaluate(parts.collector, parts.reward, parts.held_out, progress=progress)
        parts.recorder.write_evaluation(step, result.trajectories, result.scores)
        parts.tracker.log(step, result.metrics, kind="val")

    async def save(self) -> None:
        """Copy the state to host memory; a checkpoint to resume from exactly is written beside the steps.

        Waits for the one before, see `saved`.
        """
        await self.saved()
        policy, copy, progress = self.parts.policy, self.parts.copy, replace(self.progress)
        key = f"step {progress.step}"
        await policy.stage(key)
        if copy is not None:
            await copy.stage(key)

        async def write(folder: Path) -> dict[Path, FileRecord]:
            records = await policy.write(key, folder / POLICY, export=folder / EXPORT)
            if copy is not None:
                records |= await copy.write(key, folder)
            progress.save(folder, identity=self.identity)
            return records

        self.saving = asyncio.create_task(self.parts.checkpoints.write(progress.step, write))

    async def saved(self, *, wait: bool = True) -> None:
        """Wait until the checkpoint that is being written is complete; raise what prevented it.

        Without `wait` one that is not yet complete is left alone.
        """
        if self.saving is None or not (wait or self.saving.done()):
            return
        try:
            self.saved_step = await asyncio.shield(self.saving)  # an interrupt does not cut it off
        finally:
            if self.saving.done():
                self.saving = None

    async def rescue(self) -> None:
        """Record and save the finished steps of a run that ends early, or report which are lost.

        Episodes that run ahead are stopped, an update that runs is waited for. One that failed half-way
        leaves the weights of no step, so that the steps since the last checkpoint are lost. Errors are
        logged: the user must see last why the run ended.
        """
        await self.schedule.aclose()
        if self.updating is not None:
            if not self.updating.done():
                logger.info("finishing the update of step %d before the end", self.progress.step + 1)
            await asyncio.wait([self.updating])
        try:
            await self.saved()
        except Exception as error:
            logger.error("the last checkpoint is not complete: %s: %s", type(error).__name__, error)
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
                await self.saved()
                return
            except Exception as error:
                why = f"no checkpoint could be written: {type(error).__name__}: {error}"
        if first <= last:
            logger.error("steps %d to %d are lost: %s", first, last, why)

    def is_due(self, frequency: int) -> bool:
        return frequency > 0 and self.progress.step % frequency == 0


def was_cut_off(trajectory: Trajectory) -> bool:
    """Return whether a token limit, of the episode or of its last completion, ended the trajectory."""
    return trajectory.stop is Stop.LENGTH or trajectory.turns[-1].finish is Finish.LENGTH


def has_succeeded(task: asyncio.Task[dict[str, float]]) -> bool:
    """Return whether a task that has ended gave a result."""
    return not task.cancelled() and task.exception() is None


def _nothing() -> None:
    """Do nothing: there is no step to record."""
