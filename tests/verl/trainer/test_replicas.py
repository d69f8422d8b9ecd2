"""Two real engines with their agents in Ray actors: same results as one, the same weights, named deaths."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.fakes import FakeServer, Reply
from verl.rollout.collector import Collector
from verl.rollout.host import RolloutWorker
from verl.rollout.pool import EnginePool
from verl.rollout.vllm_engine import VllmEngine
from verl.trainer.config.loading import config_class
from verl.trainer.launch import engine_settings
from verl.trainer.wiring import (
    bind_agent,
    load_prompts,
    make_format,
    make_resources,
    make_tokenizer,
    make_tools,
)
from verl.types import Group, Question, Trajectory
from verl.utils.actors import Actor, ActorError, make_launcher

pytestmark = [pytest.mark.slow, pytest.mark.vllm, pytest.mark.timeout(900)]

NUM_REPLICAS = 2
HIT = {"document": {"id": "7", "contents": '"Gilbert Nash"\nThe birthplace is Harwick.'}, "score": 1.0}


class Retriever(FakeServer):
    """Finds the same passage for every query."""

    def reply(self, body: bytes) -> Reply:
        found = {"result": [[HIT] for _ in json.loads(body)["queries"]]} if body else {"passages": 1}
        return Reply(json.dumps(found))


class CountingActor:
    """Counts the calls of an actor."""

    def __init__(self, actor: Actor) -> None:
        self._actor = actor
        self.node = actor.node
        self.calls: Counter[str] = Counter()

    async def call(self, method: str, /, *args: object, **kwargs: object) -> Any:
        self.calls[method] += 1
        return await self._actor.call(method, *args, **kwargs)

    def kill(self) -> None:
        self._actor.kill()


def make_pool(*replicas: Actor) -> EnginePool:
    return EnginePool(replicas, max_concurrent=64, request_timeout_s=120.0)


async def collect(engine_pool: EnginePool, questions: list[Question]) -> list[Group]:
    collector = Collector(engine_pool, n=3, max_concurrent=64, max_failure_share=1, seed=0)
    return await collector.collect(questions, step=1)


def facts(groups: list[Group]) -> list[object]:
    """Return all that does not depend on time."""

    def of_trajectory(t: Trajectory) -> object:
        return t.token_ids.tolist(), t.sampling_log_probs.tolist(), t.stop, t.failure, t.passages, t.question

    return [of_trajectory(t) for group in groups for t in group.trajectories]


async def test_two_replicas_play_what_one_plays_with_the_same_weights_until_one_dies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RETRIEVER_TOKEN", "geheim")
    config = config_class()()
    config.trainer.num_cpu_engines = NUM_REPLICAS
    config.agent.format, config.actor_rollout_ref.rollout.cpu_kv_cache_gib = "search_r1", 0.1
    server = Retriever()
    launcher = make_launcher("ray", object_store_mb=80)
    try:
        async with server.running():
            config.retriever.url = server.url
            settings = engine_settings(config, device="cpu", scratch=tmp_path, num_replicas=NUM_REPLICAS)
            kwargs: dict[str, object] = {
                "engine": partial(VllmEngine, **settings),
                "open_agent": bind_agent(config, device="cpu", temperature=1.0),
            }
            replicas = [
                CountingActor(
                    launcher.launch(RolloutWorker, kwargs=kwargs, name=f"engine-{k}", max_concurrency=64)
                )
                for k in range(NUM_REPLICAS)
            ]
            both, one = make_pool(*replicas), make_pool(replicas[0])
            await both.wait_until_ready()
            tokenizer = make_tokenizer(config)
            tools = make_tools(config, make_resources(config))
            prompt_format = make_format(config, tokenizer=tokenizer, tools=tools)
            questions = load_prompts(config, config.data.val_paths, prompt_format=prompt_format, limit=8)

            alone = await collect(one, questions)
            replicas[0].calls.clear()
            together = await collect(both, questions)
            assert [actor.calls["play"] for actor in replicas] == [12, 12]
            assert facts(together) == facts(alone)
            # Arrays that cannot be written to are memory of Ray.
            assert all(t.prompt_ids.flags.writeable for group in together for t in group.trajectories)
            assert any(t.passages for group in alone for t in group.trajectories)
            assert {headers["authorization"] for _, headers, _ in server.requests} == {"Bearer geheim"}

            folder = str(Path(config.actor_rollout_ref.model.path).resolve())
            await asyncio.gather(*(receiver.load_weights(folder, 5) for receiver in both.receivers))
            scores = [await receiver.score(np.arange(2, 40, dtype=np.int32)) for receiver in both.receivers]
            assert np.array_equal(*scores)
            stale = await collect(both, questions)
            assert {str(t.failure).split("engine-")[1] for g in stale for t in g.trajectories} == {
                f"{k} sampled from weights of version 5, expected version 0" for k in range(NUM_REPLICAS)
            }
            both.expect_version(5)
            assert facts(await collect(both, questions)) == facts(alone)

            replicas[1].kill()
            with pytest.raises(ActorError, match=r"'engine-1' \(RolloutWorker\) died; 'play' has no result"):
                await collect(both, questions)
            await both.shutdown()
    finally:
        launcher.shutdown()
