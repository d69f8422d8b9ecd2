"""Routing of episodes, the version of their weights, and replicas that hang or die."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.agents import make_agent
from tests.fakes import CharTokenizer, ScriptedSearch, make_question
from verl.errors import ConfigError, RolloutError
from verl.protocols import Agent, EnginePart, Generate
from verl.rollout import pool
from verl.rollout.collector import Collector
from verl.rollout.host import RolloutWorker
from verl.rollout.pool import EnginePool
from verl.rollout.vllm_engine import VllmEngine
from verl.trainer.config.schema import RolloutConfig
from verl.types import Completion, Finish, FloatArray, IntArray, Question, Sampling, Trajectory
from verl.utils.actors import Actor, ActorError, LocalLauncher

QUESTIONS = [make_question(f"nq/test/{k}") for k in range(4)]


@dataclass(slots=True)
class FakeEngine:
    """Writes an answer, `delay_s` later; remembers what it was asked, and how it ended."""

    delay_s: float = 0.0
    weights: int = 0
    prompts: list[str] = field(default_factory=list)
    calls: list[str] = field(default_factory=list)

    async def generate(self, prompt_ids: IntArray, *, sampling: Sampling) -> Completion:
        self.prompts.append(CharTokenizer().decode(prompt_ids.tolist()))
        await asyncio.sleep(self.delay_s)
        ids = np.array(CharTokenizer().encode("<answer>Bolton</answer>"), np.int32)
        log_probs = np.zeros(len(ids), np.float32)
        return Completion(ids=ids, log_probs=log_probs, finish=Finish.STOP, version=self.weights)

    async def version(self) -> int:
        return self.weights

    async def score(self, ids: Sequence[int] | IntArray) -> FloatArray:
        return np.zeros(len(ids), np.float32)

    async def load_weights(self, folder: str, version: int) -> None:
        self.weights = version

    async def sleep(self) -> None:
        self.calls.append("sleep")

    async def wake(self, part: EnginePart) -> None:
        self.calls.append(f"wake {part}")

    async def shutdown(self) -> None:
        self.calls.append("shutdown")


@dataclass(slots=True)
class SilentActor:
    """Answers no call."""

    node: int = 0
    calls: list[str] = field(default_factory=list)

    async def call(self, method: str, /, *args: object, **kwargs: object) -> Any:
        self.calls.append(method)
        await asyncio.Event().wait()

    def kill(self) -> None:
        self.calls.append("kill")


def launch(engine: FakeEngine, *, search: ScriptedSearch | None = None) -> Actor:
    """Return a replica around this engine, whose tools are closed where they were opened."""
    tools = search or ScriptedSearch()

    @asynccontextmanager
    async def open_agent(generate: Generate) -> AsyncIterator[Agent]:
        yield make_agent(generate, tools, tokenizer=CharTokenizer())
        await tools.aclose()

    kwargs: dict[str, object] = {"engine": lambda: engine, "open_agent": open_agent}
    return LocalLauncher().launch(RolloutWorker, kwargs=kwargs, name="engine", max_concurrency=100)


def make_pool(*replicas: Actor, timeout_s: float = 60.0, colocated: bool = False) -> EnginePool:
    return EnginePool(replicas, max_concurrent=100, request_timeout_s=timeout_s, colocated=colocated)


async def play(engine_pool: EnginePool, question: Question = QUESTIONS[0]) -> Trajectory:
    return await engine_pool.run(question, sample=0, seed=1, greedy=False)


async def test_a_group_stays_on_its_replica_and_groups_spread() -> None:
    engines = [FakeEngine(delay_s=0.001) for _ in range(2)]
    engine_pool = make_pool(*map(launch, engines))
    await engine_pool.wait_until_ready()
    collector = Collector(engine_pool, n=3, max_concurrent=100, max_failure_share=0, seed=0)
    for step in (1, 2):
        groups = await collector.collect(QUESTIONS, step=step)
        assert [t.answer for group in groups for t in group.trajectories] == ["Bolton"] * 12
    first, second = ({*engine.prompts} for engine in engines)
    assert len(first) == len(second) == 2
    assert len(first | second) == 4


async def test_an_episode_of_other_weights_is_refused_by_both_versions() -> None:
    engines = [FakeEngine(weights=4), FakeEngine(weights=4)]
    engine_pool = make_pool(*map(launch, engines))
    await engine_pool.wait_until_ready()
    engine_pool.expect_version(4)
    assert (await play(engine_pool)).turns[0].version == 4
    engine_pool.expect_version(5)
    with pytest.raises(RolloutError, match="engine-0 sampled from weights of version 4, expected version 5"):
        await play(engine_pool)
    for receiver in engine_pool.receivers:
        await receiver.load_weights("/folder", 5)
        assert not (await receiver.score([1, 2])).any()
    assert [engine.weights for engine in engines] == [5, 5]
    assert (await play(engine_pool)).turns[0].version == 5


async def test_a_long_episode_is_waited_for_but_not_a_replica_that_hangs() -> None:
    slow = make_pool(launch(FakeEngine(delay_s=0.1)), timeout_s=0.02)
    await slow.wait_until_ready()
    assert (await play(slow)).answer == "Bolton"
    hanging = make_pool(SilentActor(), timeout_s=0.02)
    with pytest.raises(RolloutError, match=r"engine-0 hangs: .* within 0.02 s .*request_timeout_s"):
        await play(hanging)
    collector = Collector(hanging, n=1, max_concurrent=9, max_failure_share=1, seed=0)
    (group,) = await collector.collect(QUESTIONS[:1], step=1)
    assert str(group.trajectories[0].failure).startswith("generation_failed: engine-0 hangs")


@dataclass(slots=True)
class HungEngine(FakeEngine):
    """Answers nothing until it is released; an aborted request takes a while to end."""

    released: asyncio.Event = field(default_factory=asyncio.Event)
    num_running: int = 0

    async def generate(self, prompt_ids: IntArray, *, sampling: Sampling) -> Completion:
        self.num_running += 1
        try:
            await asyncio.Event().wait()
            raise AssertionError("the request goes on")
        finally:
            await self.released.wait()
            await asyncio.sleep(0.01)
            self.num_running -= 1

    async def version(self) -> int:
        await self.released.wait()
        return self.weights

    async def load_weights(self, folder: str, version: int) -> None:
        assert self.num_running == 0, "requests still run"
        self.weights = version


async def test_a_replica_that_hung_takes_weights_once_its_episodes_have_ended() -> None:
    engine = HungEngine()
    engine_pool = make_pool(launch(engine), timeout_s=0.02)
    await engine_pool.wait_until_ready()
    with pytest.raises(RolloutError, match="engine-0 hangs"):
        await play(engine_pool)
    publish = asyncio.ensure_future(engine_pool.receivers[0].load_weights("/folder", 5))
    await asyncio.sleep(0)
    assert engine.num_running == 1
    engine.released.set()
    await publish
    assert engine.weights == 5


async def test_a_replica_that_died_ends_the_step_and_does_not_stop_the_shutdown() -> None:
    engines, search = [FakeEngine(), FakeEngine()], ScriptedSearch()
    dead, alive = launch(engines[0]), launch(engines[1], search=search)
    engine_pool = make_pool(dead, alive)
    await engine_pool.wait_until_ready()
    dead.kill()
    collector = Collector(engine_pool, n=2, max_concurrent=9, max_failure_share=1, seed=0)
    with pytest.raises(ActorError, match="'engine' was killed"):
        await collector.collect(QUESTIONS, step=1)
    await engine_pool.shutdown()
    assert (search.num_closes, engines[1].calls) == (1, ["shutdown"])
    with pytest.raises(ActorError, match="was killed"):
        await alive.call("open")


@pytest.mark.parametrize("colocated", [True, False])
async def test_only_colocated_replicas_sleep(*, colocated: bool) -> None:
    engine = FakeEngine()
    engine_pool = make_pool(launch(engine), colocated=colocated)
    await engine_pool.sleep()
    await engine_pool.receivers[0].wake(EnginePart.WEIGHTS)
    assert engine.calls == (["sleep", "wake weights"] if colocated else [])


class StuckEngine:
    """Never finishes its construction by itself."""

    def __init__(self, *, released: threading.Event) -> None:
        released.wait()

    async def shutdown(self) -> None:
        """Nothing to end."""


async def test_an_engine_that_hangs_in_its_constructor_does_not_hang_the_shutdown(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pool, "_SHUTDOWN_TIMEOUT_S", 0.1)
    released = threading.Event()
    launcher = LocalLauncher()
    stuck = launcher.launch(StuckEngine, kwargs={"released": released}, name="engine-0")
    healthy = FakeEngine()
    try:
        async with asyncio.timeout(200):
            await make_pool(stuck, launch(healthy)).shutdown()
        assert healthy.calls == ["shutdown"]
        with pytest.raises(ActorError, match="was killed"):
            await stuck.call("shutdown")
    finally:
        released.set()
        launcher.shutdown()


def test_no_engines_and_a_model_that_is_not_there_are_config_errors(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="at least one engine"):
        make_pool()
    with pytest.raises(ConfigError, match=r"actor_rollout_ref\.model\.path=.*config\.json"):
        VllmEngine(RolloutConfig(), model_path=str(tmp_path / "none"), max_model_len=64)
