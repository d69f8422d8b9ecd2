from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest

from tests.fakes import make_question, make_trajectory
from verl.trainer.config.schema import FilterGroupsConfig
from verl.trainer.ppo.sampling import collect_groups
from verl.types import Group, Question, Score, Trajectory


class Source:
    """Questions 0, 1, 2, ...; those in `mixed` have a right and a wrong answer, all others right ones."""

    def __init__(self, mixed: set[int], *, size: int = 2) -> None:
        self.mixed = mixed
        self.numbers = itertools.count()
        self.size = size
        self.asked: list[list[str]] = []

    def next_batch(self) -> list[Question]:
        return [make_question(uid=f"q/{next(self.numbers)}") for _ in range(self.size)]

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


async def run(source: Source, **settings: object) -> tuple[list[str], dict[str, float]]:
    groups, stats = await collect_groups(
        source.next_batch(),
        collect=source.collect,
        more_questions=source.next_batch,
        judge=source.judge,
        settings=FilterGroupsConfig(**settings),  # type: ignore[arg-type]
    )
    return [group.question.uid for group in groups], stats


async def test_without_filtering_the_groups_are_those_of_the_questions() -> None:
    source = Source(mixed=set())
    assert await run(source) == (["q/0", "q/1"], {})
    assert len(source.asked) == 1


async def test_equal_groups_are_replaced_by_those_of_further_questions() -> None:
    source = Source(mixed={1, 4, 5})
    kept, stats = await run(source, enable=True)
    assert kept == ["q/1", "q/4"]
    assert stats == {
        "rollout/generation_batches": 3.0,
        "rollout/filtered_group_share": pytest.approx(3 / 6),
    }


async def test_after_the_last_batch_a_step_is_smaller(caplog: pytest.LogCaptureFixture) -> None:
    kept, _ = await run(Source(mixed={3}), enable=True, max_num_gen_batches=2)
    assert kept == ["q/3"]
    assert "only 1 of 2 groups have outcomes that differ" in caplog.text


async def test_where_no_group_differs_the_first_batch_stays() -> None:
    kept, stats = await run(Source(mixed=set()), enable=True, max_num_gen_batches=2)
    assert kept == ["q/0", "q/1"]
    assert stats["rollout/filtered_group_share"] == 1.0


async def test_a_question_is_asked_once_in_a_step() -> None:
    source = Source(mixed=set(), size=2)
    source.numbers = iter([0, 1, 1, 2, 2, 0])  # type: ignore[assignment]
    await run(source, enable=True, max_num_gen_batches=3)
    assert source.asked == [["q/0", "q/1"], ["q/2"], []]
