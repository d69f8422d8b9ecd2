"""What is asked, when, and what becomes of the answers. The service is a fake behind a real socket."""

from __future__ import annotations

import asyncio
import gc
import logging
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import pytest

from tests.fakes import FakeGainService, Reply, ScriptedServer, make_question, make_trajectory, make_turn
from verl.errors import TrainingHaltedError
from verl.reward.semantic import HIDDEN, VISIBLE, SemanticGain
from verl.rollout.collector import Collector
from verl.types import ActionKind, Gain, Group, Question, Stop, Trajectory
from verl.utils.reward_score.IG_client import GainClient, GainRequest, GainResult

QUESTION = make_question(golds=("Bolton", "Bolton, England"), text="Where?")
QUESTIONS = [make_question(f"nq/train/{k}") for k in range(4)]


def titles(trajectory: Trajectory) -> str:
    return " | ".join(passage.title for passage in trajectory.passages)


def group(*trajectories: Trajectory) -> Group:
    return Group(question=QUESTION, trajectories=trajectories)


@dataclass
class ScriptedClient:
    """Answers `submit` and `compute` with the next of its script."""

    script: list[GainResult]
    asked: list[GainRequest] = field(default_factory=list)
    work: dict[str, int] = field(default_factory=dict)

    async def compute(
        self, requests: Sequence[GainRequest], *, timeout_s: float | None = None
    ) -> list[GainResult]:
        return [await self.submit(request) for request in requests]

    async def submit(self, request: GainRequest) -> GainResult:
        self.asked.append(request)
        return self.script.pop(0)


def estimator(client: ScriptedClient) -> SemanticGain:
    return SemanticGain(client, render_context=titles, timeout_s=5)


@asynccontextmanager
async def connected(
    server: FakeGainService | ScriptedServer, *, timeout_s: float = 10.0
) -> AsyncIterator[SemanticGain]:
    async with server.running():
        client = GainClient(server.url, timeout_s=timeout_s)
        yield SemanticGain(client, render_context=titles, timeout_s=timeout_s)
        await client.aclose()


@dataclass
class SearchingAgent:
    """Searches and answers; its k-th sample of a question takes k times `pace_s`."""

    pace_s: float = 0.0

    async def run(self, question: Question, *, sample: int, seed: int, greedy: bool) -> Trajectory:
        await asyncio.sleep(sample * self.pace_s)
        queries = (f"{question.uid} {sample % 2}",)
        return make_trajectory(question, sample=sample, queries=queries, answer="x")


def collector(agent: SearchingAgent) -> Collector:
    return Collector(agent, n=4, max_concurrent=99, max_failure_share=0.5, seed=0)


async def play(gain: SemanticGain, agent: SearchingAgent) -> list[list[Gain]]:
    async with gain.asking_early(QUESTIONS) as on_episode_end:
        groups = await collector(agent).collect(QUESTIONS, step=1, on_episode_end=on_episode_end)
        return await gain.measure(groups)


async def test_only_what_searched_found_and_answered_is_asked_about() -> None:
    found_nothing = Trajectory(
        question=QUESTION,
        sample=0,
        prompt_ids=make_turn(ActionKind.ANSWER).output_ids,
        turns=(make_turn(ActionKind.SEARCH, "q", observed=3), make_turn(ActionKind.ANSWER, "Bolton")),
        stop=Stop.ANSWERED,
    )
    trajectories = (
        make_trajectory(QUESTION, answer="Bolton"),
        make_trajectory(QUESTION, queries=("a", "b"), answer="Paris"),
        make_trajectory(QUESTION, queries=("c",), answer=None),
        make_trajectory(QUESTION, queries=("d",), answer="Bolton", failure="search_failed: down"),
        found_nothing,
    )
    client = ScriptedClient([GainResult(gain=0.0), GainResult(gain=0.4)])
    gain = estimator(client)
    async with gain.asking_early([QUESTION]) as on_episode_end:
        for trajectory in trajectories:
            on_episode_end(trajectory)
        gains = await gain.measure([group(*trajectories)])
    assert client.asked == [
        GainRequest(question="Where?", context="", golds=QUESTION.golds),
        GainRequest(question="Where?", context="a | b", golds=QUESTION.golds),
    ]
    assert gains == [[Gain(), Gain(value=0.4), Gain(), Gain(), Gain()]]


async def test_gains_go_to_the_trajectories_that_they_were_measured_on() -> None:
    """Also those that read the same: they are asked for once."""
    client = ScriptedClient([GainResult(gain=float(i)) for i in range(3)])
    first, second, third = (make_trajectory(QUESTION, queries=(q,), answer="x") for q in "abc")
    lazy = make_trajectory(QUESTION, answer="x")
    gains = await estimator(client).measure(
        [group(first, lazy, first), group(lazy), group(lazy, second, third)]
    )
    assert [[gain.value for gain in of_group] for of_group in gains] == [
        [0.0, None, 0.0],
        [None],
        [None, 1.0, 2.0],
    ]


async def test_nothing_to_ask_asks_nothing() -> None:
    client = ScriptedClient([])
    assert await estimator(client).measure([group(make_trajectory(QUESTION, answer="x"))]) == [[Gain()]]
    assert not client.asked


async def test_a_failed_measurement_is_named_and_has_no_number() -> None:
    searched = make_trajectory(QUESTION, queries=("q",), answer="x")
    client = ScriptedClient([GainResult(gain=None, error="IG service: HTTP 500")])
    assert await estimator(client).measure([group(searched, searched)]) == [
        [Gain(failure="gain_failed: IG service: HTTP 500")] * 2
    ]


async def test_gains_are_asked_for_while_episodes_run_and_hardly_waited_for() -> None:
    async with (
        connected(server := FakeGainService(delay_s=0.1)) as gain,
        gain.asking_early(QUESTIONS) as on_episode_end,
    ):
        groups = await collector(SearchingAgent(pace_s=0.15)).collect(
            QUESTIONS, step=1, on_episode_end=on_episode_end
        )
        ended = time.perf_counter()
        await asyncio.sleep(0.15)
        await gain.measure(groups)
    assert all(arrival < ended + 0.05 for arrival in server.arrivals)
    assert {item for item in server.items if not item[1]} == {(q.text, "") for q in QUESTIONS}
    assert server.items[: len(QUESTIONS)] == [(q.text, "") for q in QUESTIONS]
    assert len(server.items) == len(set(server.items)) == 4 + 8
    assert gain.figures[VISIBLE] < 0.05
    assert 0.2 < gain.figures[HIDDEN] < 0.6


async def test_a_service_that_is_slower_than_the_episodes_is_waited_for_visibly() -> None:
    async with connected(FakeGainService(delay_s=0.4)) as gain:
        await play(gain, SearchingAgent(pace_s=0.03))
    assert 0.25 < gain.figures[VISIBLE] < 0.7
    assert 0.05 < gain.figures[HIDDEN] < 0.3


@dataclass
class TimedClient:
    """Answers each request after the seconds that its question says."""

    work: dict[str, int] = field(default_factory=dict)

    async def compute(
        self, requests: Sequence[GainRequest], *, timeout_s: float | None = None
    ) -> list[GainResult]:
        return list(await asyncio.gather(*map(self.submit, requests)))

    async def submit(self, request: GainRequest) -> GainResult:
        await asyncio.sleep(float(request.question))
        return GainResult(gain=0.0)


async def test_hidden_is_the_time_in_which_anything_was_under_way_and_no_moment_counts_twice() -> None:
    """0 to 0.2 and 0.1 to 0.3 together, nothing until 0.5, from there to the end of the episodes at 0.6."""
    gain = SemanticGain(TimedClient(), render_context=titles, timeout_s=5)
    first, second, last = (make_question(text=seconds) for seconds in ("0.2", "0.201", "0.4"))
    trajectories = [make_trajectory(question, queries=("q",), answer="x") for question in (second, last)]
    started = time.perf_counter()
    async with gain.asking_early([first]) as on_episode_end:
        await asyncio.sleep(0.1)
        on_episode_end(trajectories[0])
        await asyncio.sleep(0.4)
        on_episode_end(trajectories[1])
        await asyncio.sleep(0.1)
        late_s = time.perf_counter() - started - 0.6
        await gain.measure([group(*trajectories)])
    assert gain.figures[HIDDEN] == pytest.approx(0.4, abs=0.05 + late_s)
    assert gain.figures[VISIBLE] == pytest.approx(0.3, abs=0.05 + late_s)
    assert late_s < 0.3


async def test_early_or_late_in_whatever_order_the_gains_are_the_same() -> None:
    async with connected(FakeGainService()) as gain:
        groups = await collector(SearchingAgent()).collect(QUESTIONS, step=1)
        late = await gain.measure(groups)
        early = await play(gain, SearchingAgent())
        staggered = await play(gain, SearchingAgent(pace_s=0.02))
    assert early == late == staggered
    assert {gain.value for of_group in late for gain in of_group} == {
        FakeGainService.gain(q.text, f"{q.uid} {k}") for q in QUESTIONS for k in range(2)
    }


async def test_a_passing_failure_of_an_early_request_is_no_failure_of_the_gain(
    caplog: pytest.LogCaptureFixture,
) -> None:
    passing = GainResult(gain=None, error="IG service: out of time", retryable=True)
    client = ScriptedClient([passing, passing, GainResult(gain=0.25)])
    gain, trajectory = estimator(client), make_trajectory(QUESTION, queries=("q",), answer="x")
    async with gain.asking_early([QUESTION]) as on_episode_end:
        on_episode_end(trajectory)
        assert await gain.measure([group(trajectory)]) == [[Gain(value=0.25)]]
    assert [record.message for record in caplog.records if record.levelno == logging.WARNING] == [
        "2 of 2 early requests for gains failed, the first by: IG service: out of time"
    ]


async def test_an_item_that_the_service_refused_is_not_asked_for_again() -> None:
    client = ScriptedClient(
        [GainResult(gain=0.0), GainResult(gain=None, error="IG service: prompt too long")]
    )
    gain, trajectory = estimator(client), make_trajectory(QUESTION, queries=("q",), answer="x")
    async with gain.asking_early([QUESTION]) as on_episode_end:
        on_episode_end(trajectory)
        (gains,) = await gain.measure([group(trajectory)])
    assert gains == [Gain(failure="gain_failed: IG service: prompt too long")]
    assert len(client.asked) == 2


async def test_a_silent_service_is_waited_for_once_and_not_longer_than_allowed() -> None:
    async with connected(ScriptedServer([Reply(delay_s=60)]), timeout_s=0.6) as gain:
        started = time.monotonic()
        gains = await play(gain, SearchingAgent())
    assert time.monotonic() - started < 2.0
    assert all((g.failure or "").startswith("gain_failed: ") for of_group in gains for g in of_group)


async def test_a_halted_step_leaves_no_request_behind(caplog: pytest.LogCaptureFixture) -> None:
    async with connected(server := FakeGainService(delay_s=30)) as gain:
        before = asyncio.all_tasks()

        async def halted_step() -> None:
            async with gain.asking_early(QUESTIONS) as on_episode_end:
                on_episode_end(make_trajectory(QUESTION, queries=("q",), answer="x"))
                while not server.arrivals:
                    await asyncio.sleep(0.01)
                raise TrainingHaltedError("episodes failed")

        with pytest.raises(TrainingHaltedError):
            await halted_step()
        async with asyncio.timeout(5):
            while not server.num_abandoned:
                await asyncio.sleep(0.01)
        assert not [task for task in asyncio.all_tasks() - before if "_serve" not in repr(task)]
        gc.collect()
        server.delay_s = 0.0
        assert all(g.value is not None for of_group in await play(gain, SearchingAgent()) for g in of_group)
        assert "never retrieved" not in caplog.text


async def test_the_work_of_the_service_is_told_per_step() -> None:
    work = {"items": 4, "prompts_sampled": 2, "baselines_sampled": 1, "answers_empty": 3, "pairs_judged": 5}
    async with connected(FakeGainService(work=work)) as gain:
        for _ in range(2):
            trajectory = make_trajectory(QUESTION, queries=("q",), answer="x")
            async with gain.asking_early([QUESTION]):
                await asyncio.sleep(0.1)
                await gain.measure([group(trajectory)])
            told = {name: value for name, value in gain.figures.items() if name.startswith("ig/")}
            assert told == {
                "ig/prompts_sampled": 4.0,
                "ig/baselines_sampled": 2.0,
                "ig/answers_empty": 6.0,
                "ig/pairs_judged": 10.0,
            }


async def test_work_is_told_once_also_where_nobody_asks_early() -> None:
    async with connected(FakeGainService(work={"pairs_judged": 5})) as gain:
        for query in "ab":
            await gain.measure([group(make_trajectory(QUESTION, queries=(query,), answer="x"))])
            assert gain.figures["ig/pairs_judged"] == 5.0


async def test_a_service_that_does_not_count_its_work_adds_no_figures() -> None:
    async with connected(FakeGainService()) as gain:
        await play(gain, SearchingAgent())
    assert set(gain.figures) == {VISIBLE, HIDDEN}
