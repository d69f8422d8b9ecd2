"""Groups, concurrency, seeds and the failure policy of the collector."""

from __future__ import annotations

import pytest

from tests.fakes import FakeAgent, make_question
from verl.errors import TrainingHaltedError
from verl.protocols import Agent
from verl.rollout.collector import Collector
from verl.types import Question, Stop, Trajectory

QUESTIONS = [make_question(f"nq/test/{k}") for k in range(4)]
UIDS = [question.uid for question in QUESTIONS]


def make_collector(
    agent: Agent, *, n: int = 3, seed: int = 1, share: float = 0.2, slots: int = 100
) -> Collector:
    return Collector(agent, n=n, max_concurrent=slots, max_failure_share=share, seed=seed)


async def test_one_group_per_question_in_order_with_every_sample() -> None:
    agent = FakeAgent(delays_s={UIDS[0]: 0.02})
    calls: list[tuple[int, int]] = []
    groups = await make_collector(agent).collect(
        QUESTIONS, step=1, progress=lambda done, of: calls.append((done, of))
    )
    assert [group.question.uid for group in groups] == UIDS
    assert [[t.sample for t in group.trajectories] for group in groups] == [[0, 1, 2]] * 4
    assert all(t.question.uid == group.question.uid for group in groups for t in group.trajectories)
    assert calls == [(k, 12) for k in range(1, 13)]


async def test_the_end_of_each_episode_is_reported_but_not_in_evaluation() -> None:
    agent = FakeAgent(delays_s={UIDS[0]: 0.05})
    calls: list[tuple[str, int, int]] = []
    await make_collector(agent, n=1).collect(
        QUESTIONS,
        step=1,
        on_episode_end=lambda t: calls.append((t.question.uid, t.sample, len(agent.finished))),
    )
    assert [uid for uid, *_ in calls] == [*UIDS[1:], UIDS[0]]
    assert calls[0][2] < 4
    await make_collector(agent).evaluate(QUESTIONS)
    assert len(calls) == 4


async def test_seeds_depend_on_run_step_question_and_sample_and_on_nothing_else() -> None:
    async def seeds(questions: list[Question], *, step: int, seed: int = 1) -> dict[tuple[str, int], int]:
        agent = FakeAgent()
        await make_collector(agent, seed=seed).collect(questions, step=step)
        return {(uid, sample): drawn for uid, sample, drawn, _ in agent.asked}

    first = await seeds(QUESTIONS, step=1)
    assert len(set(first.values())) == 12
    assert await seeds(QUESTIONS[::-1], step=1) == first
    assert not set((await seeds(QUESTIONS, step=2)).values()) & set(first.values())
    assert not set((await seeds(QUESTIONS, step=1, seed=2)).values()) & set(first.values())


async def test_at_most_max_concurrent_episodes_run_at_a_time() -> None:
    agent = FakeAgent(delays_s=dict.fromkeys(UIDS, 0.001))
    await make_collector(agent, slots=5).collect(QUESTIONS, step=1)
    assert agent.max_running == 5


async def test_evaluation_asks_every_question_once_and_greedily() -> None:
    agent = FakeAgent()
    trajectories = await make_collector(agent).evaluate(QUESTIONS)
    assert [t.question.uid for t in trajectories] == UIDS
    assert [(uid, sample, greedy) for uid, sample, _, greedy in agent.asked] == [
        (uid, 0, True) for uid in UIDS
    ]


async def test_answers_are_sampled_and_what_is_done_is_left_out() -> None:
    agent, counts, played = FakeAgent(), list[tuple[int, int]](), list[tuple[str, int]]()
    done = {(UIDS[0], 0), (UIDS[3], 2)}
    await make_collector(agent, slots=2).answer(
        QUESTIONS,
        greedy=False,
        done=done,
        progress=lambda *count: counts.append(count),
        on_episode_end=lambda t: played.append((t.question.uid, t.sample)),
    )
    assert sorted(played) == [(u, sample) for u in UIDS for sample in range(3) if (u, sample) not in done]
    assert counts == [(k, 12) for k in range(3, 13)]
    assert agent.max_running == 2
    assert len({seed for _, _, seed, _ in agent.asked}) == 10


async def test_above_the_failure_share_it_halts_at_once_with_counts_and_the_first_message() -> None:
    agent = FakeAgent(
        failures={UIDS[1]: "search_failed: retriever: down", UIDS[2]: "generation_failed: dead"},
        delays_s={UIDS[3]: 60.0},
    )
    with pytest.raises(TrainingHaltedError) as halted:
        await make_collector(agent, share=0.4).collect(QUESTIONS, step=1)
    message = str(halted.value)
    assert "5 of 12 episodes failed (42%, reward.max_failure_share allows 40%)" in message
    assert "3 x search_failed, 2 x generation_failed" in message
    assert "First failure: search_failed: retriever: down" in message


async def test_a_lone_failure_halts_neither_training_nor_evaluation_unless_none_is_allowed() -> None:
    agent = FakeAgent(failures={UIDS[1]: "search_failed: retriever: down"})
    tolerant, strict = (make_collector(agent, n=1, share=share) for share in (0.1, 0.0))
    groups = await tolerant.collect(QUESTIONS, step=1)
    assert [g.trajectories[0].stop is Stop.FAILED for g in groups] == [False, True, False, False]
    await tolerant.evaluate(QUESTIONS)
    with pytest.raises(TrainingHaltedError, match="1 of 4 episodes"):
        await strict.evaluate(QUESTIONS)


class BrokenAgent:
    """Has a defect that shows with one question."""

    async def run(self, question: Question, *, sample: int, seed: int, greedy: bool) -> Trajectory:
        if question.uid == UIDS[0]:
            raise KeyError("oops")
        return await FakeAgent().run(question, sample=sample, seed=seed, greedy=greedy)


async def test_a_broken_episode_does_not_lose_the_others() -> None:
    groups = await make_collector(BrokenAgent(), n=1, share=0.25).collect(QUESTIONS, step=1)
    failures = [g.trajectories[0].failure for g in groups]
    assert failures == ["episode_broke: KeyError: 'oops'", None, None, None]
    assert groups[0].trajectories[0].token_ids.tolist() == []
