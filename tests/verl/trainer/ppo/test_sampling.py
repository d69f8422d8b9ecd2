from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

import pytest

from tests.fakes import make_question, make_trajectory
from verl.trainer.config.schema import FilterGroupsConfig
from verl.trainer.ppo.sampling import collect_groups
from verl.types import Group, Question, Score, Trajectory

ENABLED = FilterGroupsConfig(enable=True)


class Source:
    """Questions 0, 1, 2, ...; those in `mixed` have a right and a wrong answer, all others right ones."""

    def __init__(self, mixed: set[int], *, numbers: Iterable[int] | None = None) -> None:
        self.mixed = mixed
        self.numbers = iter(itertools.count() if numbers is None else numbers)
        self.asked: list[list[str]] = []

    def next_batch(self) -> list[Question]:
        return [make_question(uid=f"q/{next(self.numbers)}") for _ in range(2)]

    async def collect(self, questions: Sequence[Question]) -> list[Group]:
        self.asked.append([question.uid for question in questions])
        return [
            Group(
                question=q,
                trajectories=tuple(make_trajectory(q, sample=i, answer="right") for i in range(2)),
            )
            for q in questions
        ]

    def judge(self, trajectories: Sequence[Trajectory]) -> list[Score]:
        is_mixed = int(trajectories[0].question.uid.removeprefix("q/")) in self.mixed
        return [Score(outcome=0.0 if is_mixed and t.sample == 0 else 1.0) for t in trajectories]


async def run(
    source: Source, settings: FilterGroupsConfig = ENABLED
) -> tuple[list[str], list[str], dict[str, float]]:
    """Return the uids of the groups to train on and of those that were left out, and the metrics."""
    collected = await collect_groups(
        source.next_batch(),
        collect=source.collect,
        more_questions=source.next_batch,
        judge=source.judge,
        settings=settings,
    )
    trained, left_out = (
        [group.question.uid for group in groups] for groups in (collected.groups, collected.left_out)
    )
    return trained, left_out, collected.stats


async def test_without_filtering_the_groups_are_those_of_the_questions() -> None:
    source = Source(mixed=set())
    assert await run(source, FilterGroupsConfig()) == (["q/0", "q/1"], [], {})
    assert len(source.asked) == 1


async def test_equal_groups_are_replaced_by_those_of_further_questions() -> None:
    source = Source(mixed={1, 4, 5})
    kept, left_out, stats = await run(source)
    assert kept == ["q/1", "q/4"]
    assert left_out == ["q/0", "q/2", "q/3", "q/5"]
    assert stats == {
        "rollout/generation_batches": 3.0,
        "rollout/filtered_group_share": pytest.approx(3 / 6),
    }


async def test_after_the_last_batch_a_step_is_smaller(caplog: pytest.LogCaptureFixture) -> None:
    kept, *_ = await run(Source(mixed={3}), FilterGroupsConfig(enable=True, max_num_gen_batches=2))
    assert kept == ["q/3"]
    assert "only 1 of 2 groups have outcomes that differ" in caplog.text


async def test_where_no_group_differs_the_first_batch_stays() -> None:
    settings = FilterGroupsConfig(enable=True, max_num_gen_batches=2)
    kept, left_out, stats = await run(Source(mixed=set()), settings)
    assert (kept, left_out) == (["q/0", "q/1"], ["q/2", "q/3"])
    assert stats["rollout/filtered_group_share"] == 1.0


async def test_a_question_is_asked_once_in_a_step() -> None:
    source = Source(mixed=set(), numbers=[0, 1, 1, 2, 2, 0])
    await run(source, FilterGroupsConfig(enable=True, max_num_gen_batches=3))
    assert source.asked == [["q/0", "q/1"], ["q/2"], []]
