"""One step off: what runs beside what, how old the episodes of a step are, and what a run that ends keeps."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from tests.fakes import FakeAgent
from tests.methods import make_method
from tests.trainer_run import IDENTITY, QUESTIONS, STEPS_ALONE, FakeModels, Run, SearchingAgent
from verl.algorithms.base import Measurement, Prefetch
from verl.algorithms.search_r1 import SearchR1, SearchR1Config
from verl.data.sampler import QuestionSampler
from verl.errors import RolloutError, TrainingHaltedError
from verl.run.progress import Progress
from verl.run.records import read_records, step_files
from verl.run.tracking import read_metrics
from verl.trainer.config.schema import ONE_STEP_OFF, FilterGroupsConfig
from verl.types import Group, Question, Trajectory
from verl.utils.actors import ActorError

OFF = {**STEPS_ALONE, "schedule": ONE_STEP_OFF}
TIMEOUT_S = 20.0
"""Of what would never end if nothing overlapped."""


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    run = Run(tmp_path, **OFF)
    yield run
    run.tracker.finish()


class Steps:
    """Agent and models that note when the episodes of a step begin and end."""

    def __init__(self) -> None:
        self.models = FakeModels()
        self.began = [asyncio.Event() for _ in range(4)]
        self.may_end = [asyncio.Event() for _ in range(4)]
        self._num_begun = self._num_ended = 0

    async def run(self, question: Question, *, sample: int, seed: int, greedy: bool) -> Trajectory:
        step, first = divmod(self._num_begun, 6)  # 2 questions, 3 samples
        self._num_begun += 1
        if first == 0:
            self.models.note(f"begin {step + 1}")
            self.began[step].set()
        await self.may_end[step].wait()
        self._num_ended += 1
        if self._num_ended % 6 == 0:
            self.models.note(f"end {step + 1}")
        return await FakeAgent().run(question, sample=sample, seed=seed, greedy=greedy)


async def test_a_step_trains_while_the_next_is_sampled_and_publishes_once_that_has_ended(
    tmp_path: Path,
) -> None:
    """Each waits for the other: an update for the first episode of the next step, that for the update."""
    steps = Steps()
    update, steps_done = steps.models.update, 0

    async def update_beside(batch: object) -> dict[str, float]:
        nonlocal steps_done
        steps_done += 1
        if steps_done < 3:
            await steps.began[steps_done].wait()
        metrics = await update(batch)  # type: ignore[arg-type]
        steps.may_end[steps_done].set()
        return metrics

    steps.models.update = update_beside  # type: ignore[method-assign]
    steps.may_end[0].set()
    run = Run(tmp_path, agent=steps, models=steps.models, **OFF)
    async with asyncio.timeout(TIMEOUT_S):
        await run.trainer.fit()
    run.tracker.finish()
    assert steps.models.calls == [
        "verify 0", "expect 0", "begin 1", "end 1",
        "begin 2", "update of 6", "end 2", "publish 1", "expect 1",
        "begin 3", "update of 6", "end 3", "publish 2", "expect 2",
        "update of 6", "publish 3", "expect 3", "save", "write step 3",
    ]  # fmt: skip
    assert [line["perf/rollout_hidden_s"] > 0 for line in read_metrics(tmp_path)] == [False, True, True]


async def test_every_step_but_the_first_is_one_update_old_and_says_so(run: Run, tmp_path: Path) -> None:
    await run.trainer.fit()
    lines = read_metrics(tmp_path)
    assert [line["policy/staleness_mean"] for line in lines] == [0.0, 1.0, 1.0]
    assert [line["policy/staleness_max"] for line in lines] == [0.0, 1.0, 1.0]
    versions = {
        step: {turn["version"] for record in read_records(path) for turn in record["turns"]}
        for step, path in step_files(tmp_path).items()
    }
    assert versions == {1: {0}, 2: {0}, 3: {1}}
    assert run.questions(0, 18) == {question.uid for question in QUESTIONS}


@pytest.mark.parametrize(("settings", "step"), [(OFF, 3), (STEPS_ALONE, 2)])
@pytest.mark.parametrize("version", [0, 9])
async def test_episodes_of_weights_that_the_schedule_does_not_allow_end_the_run(
    tmp_path: Path, settings: dict[str, int | str], version: int, step: int
) -> None:
    """Too old, or newer than those that are trained."""
    run = Run(tmp_path, **settings)

    def keep() -> None:
        run.models.version = version

    run.models.hooks |= {f"expect {number}": keep for number in (1, 2)}
    message = rf"step {step} trains the weights of version {step - 1}, .* by version {version}: at most"
    with pytest.raises(RolloutError, match=message):
        await run.trainer.fit()
    run.tracker.finish()
    assert run.trainer.progress.step == step - 1


class CountedMethod(SearchR1):
    """Counts its prefetches and those that are open."""

    def __init__(self, models: FakeModels) -> None:
        super().__init__(SearchR1Config(), make_method().services)
        self.models = models
        self.count = self.num_open = 0

    def prefetch(self, questions: Sequence[Question]) -> Prefetch:
        self.count += 1
        self.num_open += 1
        return CountedPrefetch(self)


class CountedPrefetch(Prefetch):
    def __init__(self, method: CountedMethod) -> None:
        self.method = method
        self.number = method.count

    async def aclose(self) -> None:
        self.method.num_open -= 1
        self.method.models.note(f"close {self.number}")


async def test_a_prefetch_is_closed_by_its_own_step_before_the_update(tmp_path: Path) -> None:
    models = FakeModels()
    method = CountedMethod(models)
    run = Run(tmp_path, algorithm=method, models=models, **OFF)
    await run.trainer.fit()
    run.tracker.finish()
    noted = [call for call in models.calls if call.startswith(("close", "update", "publish"))]
    step = ["close {}", "update of 6", "publish {}"]
    assert noted == [call.format(number) for number in (1, 2, 3) for call in step]
    assert method.num_open == 0


@pytest.mark.parametrize(
    ("cause", "error"),
    [
        ("episodes", TrainingHaltedError),
        ("engine", ActorError),
        ("scoring", TrainingHaltedError),
        ("interrupt", asyncio.CancelledError),
    ],
)
async def test_a_run_that_ends_while_the_next_step_is_sampled_keeps_the_finished_one(
    tmp_path: Path, cause: str, error: type[BaseException], caplog: pytest.LogCaptureFixture
) -> None:
    """Nothing runs on or stays open, and the questions that were under way are asked again."""
    models, agent = FakeModels(update_s=0.05), EndingAgent(cause)
    method = EndingMethod(models, cause)
    run = Run(tmp_path, algorithm=method, agent=agent, models=models, **OFF)
    training = asyncio.create_task(run.trainer.fit())
    if cause == "interrupt":
        models.hooks["publish 1"] = lambda: models.hooks.update({"update of 6": training.cancel})
    with pytest.raises(error):
        await asyncio.wait_for(asyncio.shield(training), TIMEOUT_S)
    run.tracker.finish()
    done = 1 if cause == "scoring" else 2
    newest = run.checkpoints.latest()
    assert newest is not None
    progress = Progress.load(newest, identity=IDENTITY)
    assert progress.step == done
    assert [line["step"] for line in read_metrics(tmp_path)] == [*range(1, done + 1)]
    assert list(step_files(tmp_path)) == [*range(1, done + 1)]
    assert (agent.num_running, method.num_open) == (0, 0)
    resumed = QuestionSampler(QUESTIONS, batch_size=2, seed=0)
    resumed.load_state_dict(progress.sampler)
    assert {question.uid for question in resumed.next_batch()} == set(agent.asked[6 * done : 6 * done + 6])
    if cause in ("episodes", "engine"):
        assert f"the episodes of step 3 failed, step 2 is finished first: {error.__name__}" in caplog.text


class EndingAgent:
    """Its episodes of the third step fail, or do not end."""

    def __init__(self, cause: str) -> None:
        self.cause = cause
        self.asked: list[str] = []
        self.num_running = 0

    async def run(self, question: Question, *, sample: int, seed: int, greedy: bool) -> Trajectory:
        self.asked.append(question.uid)
        self.num_running += 1
        try:
            return await self._run(question, sample=sample, seed=seed, greedy=greedy)
        finally:
            self.num_running -= 1

    async def _run(self, question: Question, *, sample: int, seed: int, greedy: bool) -> Trajectory:
        agent = FakeAgent()
        if len(self.asked) > 12:
            if self.cause == "engine":
                raise ActorError("actor 'engine-0' died")
            if self.cause == "episodes":
                agent.failures[question.uid] = "search_failed: retriever: down"
            else:
                await asyncio.Event().wait()
        return await agent.run(question, sample=sample, seed=seed, greedy=greedy)


class EndingMethod(CountedMethod):
    """Cannot measure the second step."""

    def __init__(self, models: FakeModels, cause: str) -> None:
        super().__init__(models)
        self.cause = cause

    async def measure(self, groups: Sequence[Group], *, prefetch: Prefetch) -> Measurement:
        if self.cause == "scoring" and "publish 1" in self.models.calls:
            await asyncio.sleep(0.01)  # the episodes of the third step have begun
            raise TrainingHaltedError("too many gains failed")
        return await super().measure(groups, prefetch=prefetch)


async def test_a_resumed_run_samples_its_first_step_with_the_weights_that_it_loads(tmp_path: Path) -> None:
    run = Run(tmp_path, **OFF)
    run.trainer.progress.step = run.models.version = 1
    await run.trainer.fit()
    run.tracker.finish()
    assert [line["policy/staleness_max"] for line in read_metrics(tmp_path)] == [0.0, 1.0]


async def test_an_evaluation_has_the_engines_alone_and_the_weights_of_its_step(tmp_path: Path) -> None:
    agent = SearchingAgent()
    run = Run(tmp_path, agent=agent, **(OFF | {"test_freq": 1}))
    running: list[int] = []
    evaluate = run.trainer.evaluate

    async def noting() -> None:
        running.append(run.models.version)
        assert not asyncio.all_tasks() - before - {asyncio.current_task()}
        await evaluate()

    before = asyncio.all_tasks()
    run.trainer.evaluate = noting  # type: ignore[method-assign]
    await run.trainer.fit()
    run.tracker.finish()
    assert running == [1, 2]


async def test_filtered_groups_are_replaced_before_the_next_step_draws_its_questions(tmp_path: Path) -> None:
    settings = FilterGroupsConfig(enable=True, max_num_gen_batches=3)
    asked = []
    for name, schedule in (("sync", STEPS_ALONE), ("off", OFF)):
        run = Run(tmp_path / name, algorithm=make_method(filter_groups=settings), **schedule)
        await run.trainer.fit()
        run.tracker.finish()
        asked.append(([uid for uid, *_ in run.agent.asked], run.trainer.progress.sampler))
    assert asked[0] == asked[1]
