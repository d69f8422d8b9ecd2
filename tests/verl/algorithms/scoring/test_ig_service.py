"""What is asked, when, and what becomes of the answers. The service is a fake behind a real socket."""

from __future__ import annotations

import asyncio
import gc
import logging
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field

import pytest

from IG.messages import GainRequest, GainResult
from tests.fakes import FakeGainService, Reply, ScriptedServer, make_question, make_trajectory, make_turn
from tests.methods import make_method
from verl.algorithms.base import Algorithm, IGService
from verl.algorithms.scoring.ig_service import HIDDEN, VISIBLE
from verl.errors import TrainingHaltedError
from verl.rollout.collector import Collector
from verl.types import ActionKind, Gain, Group, Question, Stop, Trajectory
from verl.utils.reward_score.IG_client import GainClient

QUESTION = make_question(golds=("Bolton", "Bolton, England"), text="Where?")
QUESTIONS = [make_question(f"nq/train/{k}") for k in range(4)]


def group(*trajectories: Trajectory) -> Group:
    return Group(question=QUESTION, trajectories=trajectories)


@dataclass
class ScriptedClient:
    """Answers `submit` and `compute` with the next of its script."""

    script: list[GainResult]
    asked: list[GainRequest] = field(default_factory=list)
    timeout_s: float = 5.0

    def take_work(self) -> dict[str, int]:
        return {}

    async def compute(
        self, requests: Sequence[GainRequest], *, timeout_s: float | None = None
    ) -> list[GainResult]:
        return [await self.submit(request) for request in requests]

    async def submit(self, request: GainRequest) -> GainResult:
        self.asked.append(request)
        return self.script.pop(0)


def inforeasoner(service: IGService) -> Algorithm:
    return make_method("inforeasoner", ig_service=service)


async def measure(
    method: Algorithm, *groups: Group, questions: Sequence[Question] = (), ended: Sequence[Trajectory] = ()
) -> tuple[list[list[Gain]], dict[str, float]]:
    """Begin a step over `questions`, end the episodes of `ended`, measure `groups`: gains and stats."""
    async with aclosing(method.prefetch(questions)) as prefetch:
        for trajectory in ended:
            prefetch.on_episode_end(trajectory)
        measurement = await method.measure(groups, prefetch=prefetch)
    return measurement.gains, measurement.stats


@asynccontextmanager
async def connected(
    server: FakeGainService | ScriptedServer, *, timeout_s: float = 30.0
) -> AsyncIterator[Algorithm]:
    async with server.running():
        client = GainClient(server.url, timeout_s=timeout_s)
        yield inforeasoner(client)
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


async def play(method: Algorithm, agent: SearchingAgent) -> tuple[list[list[Gain]], dict[str, float]]:
    async with aclosing(method.prefetch(QUESTIONS)) as prefetch:
        groups = await collector(agent).collect(QUESTIONS, step=1, on_episode_end=prefetch.on_episode_end)
        measurement = await method.measure(groups, prefetch=prefetch)
    return measurement.gains, measurement.stats


async def test_only_what_searched_found_and_answered_is_asked_about() -> None:
    found_nothing = Trajectory(
        question=QUESTION,
        sample=0,
        prompt_ids=make_turn(ActionKind.ANSWER).output_ids,
        turns=(make_turn(ActionKind.TOOL, "q", observed=3), make_turn(ActionKind.ANSWER, "Bolton")),
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
    gains, _ = await measure(
        inforeasoner(client), group(*trajectories), questions=[QUESTION], ended=trajectories
    )
    assert client.asked == [
        GainRequest(question="Where?", context="", golds=QUESTION.golds),
        GainRequest(question="Where?", context="a | b", golds=QUESTION.golds),
    ]
    assert gains == [[Gain(), Gain(trajectory=0.4), Gain(), Gain(), Gain()]]


async def test_the_context_of_a_trajectory_is_rendered_once() -> None:
    rendered: list[Trajectory] = []

    def render(trajectory: Trajectory) -> str:
        rendered.append(trajectory)
        return "passages"

    method = make_method(
        "inforeasoner", ig_service=ScriptedClient([GainResult(gain=0.4)]), render_context=render
    )
    searched = make_trajectory(QUESTION, queries=("q",), answer="x")
    gains, _ = await measure(method, group(searched), ended=[searched])
    assert gains == [[Gain(trajectory=0.4)]]
    assert rendered == [searched]


async def test_gains_go_to_the_trajectories_that_they_were_measured_on() -> None:
    """Also those that read the same: they are asked for once."""
    client = ScriptedClient([GainResult(gain=float(i)) for i in range(3)])
    first, second, third = (make_trajectory(QUESTION, queries=(q,), answer="x") for q in "abc")
    lazy = make_trajectory(QUESTION, answer="x")
    gains, _ = await measure(
        inforeasoner(client), group(first, lazy, first), group(lazy), group(lazy, second, third)
    )
    assert [[gain.trajectory for gain in of_group] for of_group in gains] == [
        [0.0, None, 0.0],
        [None],
        [None, 1.0, 2.0],
    ]


async def test_gains_are_asked_for_while_episodes_run() -> None:
    async with (
        connected(server := FakeGainService()) as method,
        aclosing(method.prefetch(QUESTIONS)) as prefetch,
    ):
        groups = await collector(SearchingAgent(pace_s=0.05)).collect(
            QUESTIONS, step=1, on_episode_end=prefetch.on_episode_end
        )
        while len(server.items) < 4 + 8:  # baselines and two queries per question, before any is measured
            await asyncio.sleep(0.01)
        await method.measure(groups, prefetch=prefetch)
    assert server.items[: len(QUESTIONS)] == [(q.text, "") for q in QUESTIONS]
    assert len(server.items) == len(set(server.items)) == 4 + 8


@dataclass
class HeldClient:
    """Answers a request when the test releases its question."""

    released: dict[str, asyncio.Event]
    timeout_s: float = 30.0

    def take_work(self) -> dict[str, int]:
        return {}

    async def compute(
        self, requests: Sequence[GainRequest], *, timeout_s: float | None = None
    ) -> list[GainResult]:
        return list(await asyncio.gather(*map(self.submit, requests)))

    async def submit(self, request: GainRequest) -> GainResult:
        await self.released[request.question].wait()
        return GainResult(gain=0.0)


async def test_hidden_is_the_time_in_which_anything_was_under_way_and_no_moment_counts_twice() -> None:
    """Two requests overlap, then none is under way, then one lasts beyond the end of the episodes."""
    names = ("first", "second", "last")
    client = HeldClient({name: asyncio.Event() for name in names})
    method = inforeasoner(client)
    first, second, last = (make_question(text=name) for name in names)
    trajectories = [make_trajectory(question, queries=("q",), answer="x") for question in (second, last)]
    async with aclosing(method.prefetch([first])) as prefetch:
        started = time.perf_counter()
        await asyncio.sleep(0.05)
        prefetch.on_episode_end(trajectories[0])
        await asyncio.sleep(0.05)
        for name in ("first", "second"):
            client.released[name].set()
        await asyncio.sleep(0.05)  # lets both end; at most this much more is busy
        idle = time.perf_counter()
        await asyncio.sleep(0.3)
        idle_s = time.perf_counter() - idle
        prefetch.on_episode_end(trajectories[1])
        await asyncio.sleep(0.05)
        hidden_at_most_s = time.perf_counter() - started - idle_s
        asyncio.get_running_loop().call_later(0.05, client.released["last"].set)
        measuring = time.perf_counter()
        stats = (await method.measure([group(*trajectories)], prefetch=prefetch)).stats
        measured_s = time.perf_counter() - measuring
    assert 0.15 <= stats[HIDDEN] <= hidden_at_most_s + 0.01
    assert 0.05 <= stats[VISIBLE] <= measured_s


async def test_gains_do_not_depend_on_when_they_are_requested() -> None:
    async with connected(FakeGainService()) as method:
        groups = await collector(SearchingAgent()).collect(QUESTIONS, step=1)
        late, _ = await measure(method, *groups)
        early, stats = await play(method, SearchingAgent())
        staggered, _ = await play(method, SearchingAgent(pace_s=0.02))
    assert early == late == staggered
    assert set(stats) == {VISIBLE, HIDDEN}  # this service does not count its work
    assert {gain.trajectory for of_group in late for gain in of_group} == {
        FakeGainService.gain(q.text, f"{q.uid} {k}") for q in QUESTIONS for k in range(2)
    }


async def test_a_transient_failure_of_a_prefetched_request_is_no_failure_of_the_gain(
    caplog: pytest.LogCaptureFixture,
) -> None:
    transient = GainResult(gain=None, error="IG service: out of time", retryable=True)
    client = ScriptedClient([transient, transient, GainResult(gain=0.25)])
    trajectory = make_trajectory(QUESTION, queries=("q",), answer="x")
    gains, _ = await measure(
        inforeasoner(client), group(trajectory), questions=[QUESTION], ended=[trajectory]
    )
    assert gains == [[Gain(trajectory=0.25)]]
    assert [record.message for record in caplog.records if record.levelno == logging.WARNING] == [
        "2 of 2 prefetched requests for gains failed, the first by: IG service: out of time"
    ]


async def test_an_item_that_the_service_refused_is_not_asked_for_again() -> None:
    client = ScriptedClient(
        [GainResult(gain=0.0), GainResult(gain=None, error="IG service: prompt too long")]
    )
    trajectory = make_trajectory(QUESTION, queries=("q",), answer="x")
    gains, _ = await measure(
        inforeasoner(client), group(trajectory), questions=[QUESTION], ended=[trajectory]
    )
    assert gains == [[Gain(failure="gain_failed: IG service: prompt too long")]]
    assert len(client.asked) == 2


async def test_a_silent_service_is_waited_for_once_and_its_gains_fail() -> None:
    async with connected(server := ScriptedServer([Reply(delay_s=600)]), timeout_s=0.6) as method:
        gains, _ = await play(method, SearchingAgent())
    assert server.url
    assert all((g.failure or "").startswith("gain_failed: ") for of_group in gains for g in of_group)


async def test_a_halted_step_leaves_no_request_behind(caplog: pytest.LogCaptureFixture) -> None:
    async with connected(server := FakeGainService(delay_s=600)) as method:
        before = asyncio.all_tasks()

        async def halted_step() -> None:
            async with aclosing(method.prefetch(QUESTIONS)) as prefetch:
                prefetch.on_episode_end(make_trajectory(QUESTION, queries=("q",), answer="x"))
                while not server.arrivals:
                    await asyncio.sleep(0.01)
                raise TrainingHaltedError("episodes failed")

        with pytest.raises(TrainingHaltedError):
            await halted_step()
        while not server.num_abandoned:
            await asyncio.sleep(0.01)
        assert not [task for task in asyncio.all_tasks() - before if "_serve" not in repr(task)]
        gc.collect()
        server.delay_s = 0.0
        gains, _ = await play(method, SearchingAgent())
        assert all(g.trajectory is not None for of_group in gains for g in of_group)
        assert "never retrieved" not in caplog.text


async def test_the_work_of_the_service_is_counted_per_step() -> None:
    work = {"items": 4, "prompts_sampled": 2, "baselines_sampled": 1, "answers_empty": 3, "pairs_judged": 5}
    async with connected(FakeGainService(work=work)) as method:
        for query in "ab":
            trajectory = make_trajectory(QUESTION, queries=(query,), answer="x")
            _, stats = await measure(method, group(trajectory))
            assert {name: value for name, value in stats.items() if name.startswith("ig/")} == {
                "ig/prompts_sampled": 2.0,
                "ig/baselines_sampled": 1.0,
                "ig/answers_empty": 3.0,
                "ig/pairs_judged": 5.0,
            }
