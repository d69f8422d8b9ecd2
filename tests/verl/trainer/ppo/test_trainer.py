"""The loop itself: what follows what, and what a run that ends early keeps. Real parts around fake models."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from serving.files import FileRecord
from tests.fakes import FakeGainService
from tests.methods import make_method
from tests.trainer_run import (
    HELD_OUT,
    IDENTITY,
    QUESTIONS,
    STEPS_ALONE,
    FakeModels,
    Run,
    SearchingAgent,
    make_writer,
)
from verl.algorithms.base import Prefetch
from verl.algorithms.inforeasoner import InfoReasoner
from verl.algorithms.scoring.ig_service import GainRequests
from verl.algorithms.search_r1 import SearchR1, SearchR1Config
from verl.data.sampler import QuestionSampler
from verl.errors import TrainingHaltedError
from verl.run.progress import Progress
from verl.run.records import step_files
from verl.run.tracking import read_metrics
from verl.trainer.ppo.schedule import SCHEDULES
from verl.types import Question, Trajectory
from verl.utils.actors import ActorError
from verl.utils.reward_score.IG_client import GainClient


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    run = Run(tmp_path, **STEPS_ALONE)
    yield run
    run.tracker.finish()


async def test_every_step_samples_updates_and_publishes_before_the_next(run: Run) -> None:
    await run.trainer.fit()
    step = ["rest", "update of 6"]
    expected = ["verify 0", "expect 0"]
    for number in (1, 2, 3):
        expected += [*step, f"publish {number}", f"expect {number}"]
    assert run.models.calls == [*expected, "save", "write step 3"]
    assert run.questions(0, 18) == {q.uid for q in QUESTIONS}
    assert run.trainer.progress.step == 3
    assert not [name for line in read_metrics(run.tracker.path.parent) for name in line if "gain_" in name]


class NotingMethod(SearchR1):
    """Notes when its prefetch is closed."""

    def __init__(self, models: FakeModels) -> None:
        super().__init__(SearchR1Config(), make_method().services)
        self.models = models

    def prefetch(self, questions: Sequence[Question]) -> Prefetch:
        return NotingPrefetch(self.models)


class NotingPrefetch(Prefetch):
    def __init__(self, models: FakeModels) -> None:
        self.models = models

    async def aclose(self) -> None:
        self.models.note("close prefetch")


async def test_the_prefetch_is_closed_once_before_the_update(tmp_path: Path) -> None:
    models = FakeModels()
    run = Run(tmp_path, algorithm=NotingMethod(models), models=models, **STEPS_ALONE)
    await run.trainer.train_step(1)
    run.tracker.finish()
    assert models.calls == ["rest", "close prefetch", "update of 6", "publish 1", "expect 1"]


class LateRequests(GainRequests):
    """Sends nothing while episodes run."""

    def on_episode_end(self, trajectory: Trajectory) -> None:
        pass


class LateInfoReasoner(InfoReasoner):
    """Asks for everything once all episodes have ended."""

    def prefetch(self, questions: Sequence[Question]) -> GainRequests:
        assert self.services.ig_service is not None
        return LateRequests(self.services.ig_service, requests_of=self._requests_of)


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
    noted = [call for call in run.models.calls if call.startswith(("update", "refresh", "save", "write"))]
    step = ["update of 6", "refresh {}"]
    staged, written = ["save", "save copy"], ["write step {}", "write copy of step {}"]
    plan = [(step, 1), (step, 2), (staged, 2), (written, 2), (step, 3), (staged, 3), (written, 3)]
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


async def test_a_step_whose_engine_died_is_recorded_and_saved(run: Run) -> None:
    run.models.hooks["publish 2"] = fail(ActorError("actor 'engine-0' died"))
    with pytest.raises(ActorError, match="engine-0"):
        await run.trainer.fit()
    newest = run.checkpoints.latest()
    assert newest is not None
    assert Progress.load(newest, identity=IDENTITY).step == 2
    run_dir = run.tracker.path.parent
    assert [line["step"] for line in read_metrics(run_dir)] == [1, 2]
    assert list(step_files(run_dir)) == [1, 2]


@pytest.mark.parametrize("schedule", SCHEDULES)
async def test_an_update_that_runs_when_the_run_is_interrupted_is_finished_and_saved(
    tmp_path: Path, schedule: str
) -> None:
    run = Run(tmp_path, models=FakeModels(update_s=0.05), schedule=schedule, **STEPS_ALONE)
    has_begun = asyncio.Event()
    run.models.hooks["update of 6"] = has_begun.set
    training = asyncio.create_task(run.trainer.fit())
    await has_begun.wait()
    training.cancel()
    with pytest.raises(asyncio.CancelledError):
        await training
    run.tracker.finish()
    newest = run.checkpoints.latest()
    assert newest is not None
    assert Progress.load(newest, identity=IDENTITY).step == 1
    assert [line["step"] for line in read_metrics(run.tracker.path.parent)] == [1]


@pytest.mark.parametrize("is_full", [True, False])
async def test_an_evaluation_that_did_not_end_is_made_when_the_run_resumes(
    tmp_path: Path, is_full: bool
) -> None:
    run = Run(tmp_path, **(STEPS_ALONE | {"test_freq": 2, "save_freq": 2}))
    blocked = tmp_path / "evaluation"
    if is_full:
        blocked.touch()  # where the folder of the evaluations would be
    else:
        run.models.hooks["publish 3"] = fail(OSError("after the evaluation of step 2"))
    with pytest.raises(OSError, match=None if is_full else "after the evaluation"):
        await run.trainer.fit()
    run.tracker.finish()
    if is_full:
        blocked.unlink()
    resumed = Run(tmp_path, **(STEPS_ALONE | {"test_freq": 2}))
    saved = Progress.load(tmp_path / "checkpoints" / "global_step_2", identity=IDENTITY)
    resumed.trainer.progress = saved
    resumed.sampler.load_state_dict(saved.sampler)
    await resumed.trainer.fit()
    resumed.tracker.finish()
    evaluated = [line["step"] for line in read_metrics(tmp_path) if line["kind"] == "val"]
    assert evaluated == [2]


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


@pytest.mark.parametrize("schedule", SCHEDULES)
async def test_a_checkpoint_is_written_while_the_next_step_runs(tmp_path: Path, schedule: str) -> None:
    """Its step is what was staged; the next save waits for it, and so does the end of the run."""
    run = Run(tmp_path, schedule=schedule, **(STEPS_ALONE | {"save_freq": 1}))
    is_trained, models = asyncio.Event(), run.models
    write = models.write

    async def write_late(key: str, folder: Path, *, export: Path) -> dict[Path, FileRecord]:
        if key == "step 1":
            await is_trained.wait()
        return await write(key, folder, export=export)

    models.write = write_late  # type: ignore[method-assign]
    models.hooks["publish 2"] = is_trained.set
    await run.trainer.fit()
    run.tracker.finish()
    noted = [call for call in models.calls if call.startswith(("publish", "save", "write"))]
    assert noted == [
        "publish 1", "save", "publish 2", "write step 1", "save", "write step 2", "publish 3", "save",
        "write step 3",
    ]  # fmt: skip
    for step in (2, 3):
        folder = tmp_path / "checkpoints" / f"global_step_{step}"
        assert Progress.load(folder, identity=IDENTITY).step == step


async def test_a_checkpoint_that_fails_in_the_background_ends_the_run_which_saves_again(run: Run) -> None:
    run.trainer.settings = replace(run.trainer.settings, save_freq=1)
    run.models.hooks["write step 1"] = fail(OSError(errno.ENOSPC, "No space left on device"))
    with pytest.raises(OSError, match="No space left"):
        await run.trainer.fit()
    newest = run.checkpoints.latest()
    assert newest is not None
    assert Progress.load(newest, identity=IDENTITY).step == run.trainer.progress.step >= 2


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


async def test_an_alarm_is_a_warning_and_stops_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    models, agent = FakeModels(metrics={"kl": 3.0}), make_writer("<answer>Bolton</answer>")
    run = Run(tmp_path, models=models, agent=agent, **STEPS_ALONE)
    await run.trainer.fit()
    run.tracker.finish()
    assert run.trainer.progress.step == 3
    for alarm in (
        "policy/kl is 3, above 1 for 1 steps (trainer.alarms.max_kl): ",
        "rollout/no_search_share is 1, above 0.9 for 1 steps (trainer.alarms.max_no_search_share): ",
    ):
        assert caplog.text.count(alarm) == 1
