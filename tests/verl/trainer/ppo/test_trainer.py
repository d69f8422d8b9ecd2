"""The loop itself: what follows what, and what a run that ends early keeps. Real parts around fake models."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.fakes import FakeAgent, FakeGainService, make_question, make_trajectory
from tests.methods import make_method
from verl.algorithms.base import Algorithm, Measurement, Prefetch
from verl.algorithms.inforeasoner import InfoReasoner
from verl.algorithms.scoring.ig_service import GainRequests
from verl.algorithms.scoring.outcome import measure_outcome
from verl.algorithms.scoring.reward import Reward
from verl.algorithms.search_r1 import SearchR1, SearchR1Config
from verl.data.sampler import QuestionSampler
from verl.errors import TrainingHaltedError
from verl.rollout.collector import Collector
from verl.run.progress import Progress
from verl.run.recorder import Recorder
from verl.run.records import step_files
from verl.run.tracking import Tracker, read_metrics
from verl.trainer.config.schema import AlarmsConfig, FilterGroupsConfig, TrainerConfig
from verl.trainer.ppo.alarms import Alarms
from verl.trainer.ppo.guard import Guard
from verl.trainer.ppo.trainer import Parts, PPOTrainer
from verl.types import Group, Question, Stop, Trajectory
from verl.utils.actors import ActorError
from verl.utils.reward_score.IG_client import GainClient
from verl.workers.batch import TrainBatch
from verl.workers.checkpoint import CheckpointStore

STEPS_ALONE = {"save_freq": 0, "test_freq": 0, "val_before_train": False, "val_after_train": False}
"""Settings of a run that neither saves nor evaluates between its steps."""
QUESTIONS = [make_question(f"nq/train/{k}") for k in range(6)]
HELD_OUT = [make_question("nq/test/0")]
IDENTITY: dict[str, object] = {"trainer.seed": 0}


class FakeModels:
    """Policy, engines and publisher in one: notes what was asked of them; `hooks` run at a call."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.hooks: dict[str, Any] = {}

    def note(self, call: str) -> None:
        self.calls.append(call)
        self.hooks.get(call, lambda: None)()

    def is_on_policy(self, batch: TrainBatch) -> bool:
        return batch.num_trajectories > 0

    async def update(self, batch: TrainBatch) -> dict[str, float]:
        self.note(f"update of {batch.num_trajectories}")
        return {"num_updates": 1.0, "skipped_updates": 0.0}

    async def save(self, folder: Path) -> None:
        self.note("save")
        (folder / "weights").touch()

    async def export_hf(self, folder: Path) -> None:
        folder.mkdir()

    async def verify(self, *, version: int) -> None:
        self.note(f"verify {version}")

    async def publish(self, *, version: int) -> float:
        self.note(f"publish {version}")
        return 0.0

    def expect_version(self, version: int) -> None:
        self.note(f"expect {version}")

    @asynccontextmanager
    async def asleep(self) -> AsyncIterator[None]:
        self.note("rest")
        yield
        self.note("wake")


class FakeCopy:
    """Notes after which steps it was refreshed and saved."""

    def __init__(self, models: FakeModels) -> None:
        self._models = models

    async def refresh(self, step: int) -> None:
        self._models.note(f"refresh {step}")

    async def save(self, checkpoint: Path) -> None:
        self._models.note(f"save copy in {checkpoint.name}")


class Run:
    """A trainer whose models are fake, and what it works with."""

    def __init__(
        self,
        run_dir: Path,
        *,
        algorithm: Algorithm | None = None,
        agent: FakeAgent | None = None,
        has_copy: bool = False,
        **settings: int,
    ) -> None:
        algorithm = algorithm or make_method()
        self.models, self.agent = FakeModels(), agent or FakeAgent()
        self.sampler = QuestionSampler(QUESTIONS, batch_size=2, seed=0)
        self.checkpoints = CheckpointStore(run_dir / "checkpoints", keep=2)
        self.tracker = Tracker(run_dir, TrainerConfig(logger=[]))
        models: Any = self.models
        copy: Any = FakeCopy(self.models) if has_copy else None
        parts = Parts(
            questions=self.sampler,
            held_out=HELD_OUT,
            collector=Collector(self.agent, n=3, max_concurrent=9, max_failure_share=0.5, seed=0),
            algorithm=algorithm,
            reward=Reward(measure_outcome, algorithm=algorithm, max_failure_share=0.5, fix=""),
            policy=models,
            reference=None,
            copy=copy,
            engines=models,
            publisher=models,
            checkpoints=self.checkpoints,
            guard=Guard(run_dir, max_skipped_updates=3),
            alarms=Alarms(AlarmsConfig(steps=1), max_turns=3, max_log_prob_difference=1e-3),
            tracker=self.tracker,
            recorder=Recorder(run_dir, decode=lambda ids: "".join(map(chr, ids))),
        )
        self.trainer = PPOTrainer(
            parts,
            settings=TrainerConfig(**settings),  # type: ignore[arg-type]
            total_steps=3,
            pad_id=0,
            progress=Progress(),
            identity=IDENTITY,
        )

    def questions(self, first: int, last: int) -> set[str]:
        return {uid for uid, *_ in self.agent.asked[first:last]}


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    run = Run(tmp_path, **STEPS_ALONE)
    yield run
    run.tracker.finish()


async def test_every_step_samples_updates_and_publishes_before_the_next(run: Run) -> None:
    await run.trainer.fit()
    step = ["rest", "update of 6", "wake"]
    expected = ["verify 0", "expect 0"]
    for number in (1, 2, 3):
        expected += [*step, f"publish {number}", f"expect {number}"]
    assert run.models.calls == [*expected, "save"]
    assert run.questions(0, 18) == {q.uid for q in QUESTIONS}
    assert run.trainer.progress.step == 3
    assert not [name for line in read_metrics(run.tracker.path.parent) for name in line if "gain_" in name]


class NotingPrefetch(Prefetch):
    def __init__(self, models: FakeModels) -> None:
        self.models = models

    async def aclose(self) -> None:
        self.models.note("close prefetch")


async def test_the_prefetch_is_closed_once_before_the_update(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run.trainer.parts.algorithm, "prefetch", lambda _: NotingPrefetch(run.models))
    await run.trainer.train_step(1)
    assert run.models.calls == ["rest", "close prefetch", "update of 6", "wake", "publish 1", "expect 1"]


class SearchingAgent(FakeAgent):
    """Finds something in every episode; later samples take longer."""

    async def run(self, question: Question, *, sample: int, seed: int, greedy: bool) -> Trajectory:
        await asyncio.sleep(0.03 * sample)
        return make_trajectory(question, sample=sample, queries=(f"about {sample}",), answer="Bolton")


class LateInfoReasoner(InfoReasoner):
    """Asks for everything once all episodes have ended."""

    def prefetch(self, questions: Sequence[Question]) -> GainRequests:
        requests = super().prefetch([])
        requests.on_episode_end = lambda trajectory: None  # type: ignore[method-assign]
        return requests


async def train_with_gains(run_dir: Path, method: type[InfoReasoner]) -> list[dict[str, Any]]:
    """The metrics of three steps."""
    async with (server := FakeGainService(delay_s=0.01)).running():
        client = GainClient(server.url, timeout_s=30)
        services = make_method("inforeasoner", ig_service=client).services
        run = Run(
            run_dir,
            algorithm=method(method.settings_class(), services),
            agent=SearchingAgent(),
            **STEPS_ALONE,
        )
        await run.trainer.fit()
        await client.aclose()
    run.tracker.finish()
    return [dict(line) for line in read_metrics(run_dir)]


async def test_prefetching_changes_the_waiting_and_nothing_else(tmp_path: Path) -> None:
    early = await train_with_gains(tmp_path / "early", InfoReasoner)
    late = await train_with_gains(tmp_path / "late", LateInfoReasoner)
    assert len(early) == len(late) == 3
    for line in early:
        assert line["perf/gain_hidden_s"] > 0.0
    for line in late:
        assert line["perf/gain_hidden_s"] == 0.0
    for lines in (early, late):
        assert all(0 < line["perf/gain_visible_s"] <= line["time/reward_s"] for line in lines)
        for line in lines:
            for name in [name for name in line if name.partition("/")[0] in ("time", "perf")]:
                del line[name]
    assert early == late


async def test_evaluations_and_checkpoints_come_when_they_are_due(tmp_path: Path) -> None:
    run = Run(tmp_path, save_freq=2, test_freq=2)
    await run.trainer.fit()
    run.tracker.finish()
    assert sorted(path.name for path in (tmp_path / "checkpoints").glob("global_step_*")) == [
        "global_step_2",
        "global_step_3",
    ]
    greedy = [index for index, (*_, is_greedy) in enumerate(run.agent.asked) if is_greedy]
    assert greedy == [0, 13, 20]  # before training, after step 2, at the end


async def test_the_copy_that_scores_is_part_of_a_step_and_of_its_checkpoint(tmp_path: Path) -> None:
    run = Run(tmp_path, has_copy=True, **(STEPS_ALONE | {"save_freq": 2}))
    await run.trainer.fit()
    run.tracker.finish()
    noted = [call for call in run.models.calls if call.startswith(("update", "refresh", "save"))]
    step = ["update of 6", "refresh {}"]
    saved = ["save", "save copy in .global_step_{}.partial"]
    plan = [(step, 1), (step, 2), (saved, 2), (step, 3), (saved, 3)]
    assert noted == [call.format(number) for calls, number in plan for call in calls]


async def test_a_halted_run_keeps_its_finished_steps_and_resumes_with_the_batch_it_failed(run: Run) -> None:
    broken = {question.uid: "search_failed: retriever: down" for question in QUESTIONS}
    run.models.hooks["publish 2"] = lambda: run.agent.failures.update(broken)
    with pytest.raises(TrainingHaltedError, match="episodes failed"):
        await run.trainer.fit()
    newest = run.checkpoints.latest()
    assert newest is not None
    progress = Progress.load(newest, identity=IDENTITY)
    assert progress.step == 2
    resumed = QuestionSampler(QUESTIONS, batch_size=2, seed=0)
    resumed.load_state_dict({name: int(str(value)) for name, value in progress.sampler.items()})
    assert {question.uid for question in resumed.next_batch()} == run.questions(12, 18)


def fail(error: Exception) -> Callable[[], None]:
    def hook() -> None:
        raise error

    return hook


@pytest.mark.parametrize("call", ["publish 2", "wake"])
async def test_a_step_whose_engine_died_is_recorded_and_saved(run: Run, call: str) -> None:
    def die() -> None:
        if "publish 1" in run.models.calls:
            raise ActorError("actor 'engine-0' died")

    run.models.hooks[call] = die
    with pytest.raises(ActorError, match="engine-0"):
        await run.trainer.fit()
    newest = run.checkpoints.latest()
    assert newest is not None
    assert Progress.load(newest, identity=IDENTITY).step == 2
    run_dir = run.tracker.path.parent
    assert [line["step"] for line in read_metrics(run_dir)] == [1, 2]
    assert list(step_files(run_dir)) == [1, 2]


async def test_an_update_that_runs_when_the_run_is_interrupted_is_finished_and_saved(run: Run) -> None:
    is_slow = asyncio.Event()

    async def update(batch: TrainBatch) -> dict[str, float]:
        is_slow.set()
        await asyncio.sleep(0.05)
        return {"num_updates": 1.0, "skipped_updates": 0.0}

    run.models.update = update  # type: ignore[method-assign]
    training = asyncio.create_task(run.trainer.fit())
    await is_slow.wait()
    training.cancel()
    with pytest.raises(asyncio.CancelledError):
        await training
    newest = run.checkpoints.latest()
    assert newest is not None
    assert Progress.load(newest, identity=IDENTITY).step == 1
    assert [line["step"] for line in read_metrics(run.tracker.path.parent)] == [1]


async def test_what_cannot_be_saved_is_named_and_the_first_cause_raised(
    run: Run, caplog: pytest.LogCaptureFixture
) -> None:
    run.models.hooks["publish 2"] = fail(OSError(errno.ENOSPC, "No space left on device"))
    run.models.hooks["save"] = fail(ActorError("actor 'policy-0' died"))
    with pytest.raises(OSError, match="No space left"):
        await run.trainer.fit()
    assert (
        "steps 1 to 2 are lost: no checkpoint could be written: ActorError: actor 'policy-0' died"
        in caplog.text
    )


@pytest.mark.parametrize("settings", [{"val_only": True}, {"total_training_steps": 0}])
async def test_an_evaluation_trains_and_saves_nothing(tmp_path: Path, settings: dict[str, int]) -> None:
    run = Run(tmp_path, **settings)
    await run.trainer.fit()
    run.tracker.finish()
    assert run.models.calls == ["verify 0", "expect 0"]
    assert [is_greedy for *_, is_greedy in run.agent.asked] == [True] * len(HELD_OUT)
    assert [line["kind"] for line in read_metrics(tmp_path)] == ["val"]


async def test_weights_of_an_update_that_was_cut_off_are_not_saved(
    run: Run, caplog: pytest.LogCaptureFixture
) -> None:
    def interrupt() -> None:
        if "publish 1" in run.models.calls:
            raise asyncio.CancelledError

    run.models.hooks["update of 6"] = interrupt
    with pytest.raises(asyncio.CancelledError):
        await run.trainer.fit()
    assert run.checkpoints.latest() is None
    assert "steps 1 to 1 are lost: the update of step 2 was cut off" in caplog.text


class CutAgent(FakeAgent):
    """Sample 0 of every group is cut off by the token budget, sample 1 is right, sample 2 wrong."""

    async def run(self, question: Question, *, sample: int, seed: int, greedy: bool) -> Trajectory:
        self.asked.append((question.uid, sample, seed, greedy))
        answer = (None, question.golds[0], "wrong")[sample]
        trajectory = make_trajectory(question, sample=sample, queries=("q",), answer=answer)
        return replace(trajectory, stop=Stop.LENGTH) if sample == 0 else trajectory


async def test_overlong_filtering_leaves_trajectories_that_were_cut_off_out_of_the_update(
    tmp_path: Path,
) -> None:
    for filtering, expected in ((False, "update of 6"), (True, "update of 4")):
        algorithm = make_method(overlong_filtering=filtering)
        run = Run(tmp_path / str(filtering), algorithm=algorithm, agent=CutAgent(), **STEPS_ALONE)
        await run.trainer.train_step(1)
        run.tracker.finish()
        assert expected in run.models.calls


async def test_filtered_groups_are_replaced_within_the_step_and_counted(tmp_path: Path) -> None:
    settings = FilterGroupsConfig(enable=True, max_num_gen_batches=3)
    run = Run(tmp_path, algorithm=make_method(filter_groups=settings), **STEPS_ALONE)  # all answers are right
    await run.trainer.train_step(1)
    run.tracker.finish()
    assert run.questions(0, 18) == {q.uid for q in QUESTIONS}
    assert "update of 6" in run.models.calls
    line = read_metrics(tmp_path)[0]
    assert (line["rollout/generation_batches"], line["rollout/filtered_group_share"]) == (3.0, 1.0)


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
    run = Run(tmp_path, algorithm=algorithm, agent=CutAgent(), **STEPS_ALONE)
    run.models.is_on_policy = lambda batch: False  # type: ignore[method-assign]
    batches: list[TrainBatch] = []

    async def update(batch: TrainBatch) -> dict[str, float]:
        batches.append(batch)
        return {"num_updates": 1.0, "skipped_updates": 0.0}

    run.models.update = update  # type: ignore[method-assign]
    await run.trainer.train_step(1)  # the fake policy computes no log-probs
    run.tracker.finish()
    (batch,) = batches
    assert batch.old_log_probs is not None
    expected = np.array([-0.25, -0.5, -0.25, -0.5], np.float32)[:, None] * batch.policy_mask
    np.testing.assert_array_equal(batch.old_log_probs, expected)


async def test_an_alarm_is_a_warning_and_stops_nothing(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    async def update(batch: TrainBatch) -> dict[str, float]:
        return {"num_updates": 1.0, "skipped_updates": 0.0, "kl": 3.0}

    run.models.update = update  # type: ignore[method-assign]
    await run.trainer.fit()
    assert run.trainer.progress.step == 3
    assert caplog.text.count("policy/kl is 3, above 1 for 1 steps (trainer.alarms.max_kl): ") == 1
