"""Routing, deadlines and the version handshake of the engine pool."""

from __future__ import annotations

import asyncio
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from verl.errors import ConfigError, RolloutError
from verl.rollout import pool
from verl.rollout.pool import EnginePool
from verl.rollout.vllm_engine import VllmEngine
from verl.trainer.config.schema import RolloutConfig
from verl.types import Completion, Finish, IntArray, Sampling
from verl.utils.actors import ActorError, make_launcher

SAMPLING = Sampling(temperature=1.0, max_tokens=4, stop=(), seed=0)
PROMPT = np.array([1, 2], np.int32)


@dataclass(slots=True)
class FakeEngineActor:
    """An engine that says which weights it has; `delay_s` before every completion, `error` instead of one."""

    version: int = 0
    delay_s: float = 0.0
    error: Exception | None = None
    prompts: list[list[int]] = field(default_factory=list)
    calls: list[str] = field(default_factory=list)

    async def call(self, method: str, /, *args: object, **kwargs: object) -> Any:
        self.calls.append(method)
        return await getattr(self, method)(*args, **kwargs)

    def kill(self) -> None:
        self.calls.append("kill")

    async def generate(self, prompt_ids: IntArray, sampling: Sampling, *, timeout_s: float) -> Completion:
        self.prompts.append(prompt_ids.tolist())
        await asyncio.sleep(self.delay_s)
        if self.error is not None:
            raise self.error
        return Completion(
            ids=np.array([3], np.int32),
            log_probs=np.zeros(1, np.float32),
            finish=Finish.STOP,
            version=self.version,
        )

    async def load_weights(self, folder: str, version: int) -> None:
        self.version = version

    async def score(self, ids: IntArray) -> np.ndarray:
        return np.zeros(len(ids), np.float32)

    async def shutdown(self) -> None:
        if self.error is not None:
            raise self.error


def make_pool(*engines: FakeEngineActor, timeout_s: float = 5.0) -> EnginePool:
    return EnginePool(engines, request_timeout_s=timeout_s)


async def test_a_session_stays_on_its_replica_and_sessions_spread() -> None:
    engines = [FakeEngineActor(delay_s=0.001) for _ in range(2)]
    engine_pool = make_pool(*engines)
    for _ in range(2):
        await asyncio.gather(
            *(
                engine_pool.generate(np.array([group], np.int32), sampling=SAMPLING, session=f"nq/{group}")
                for group in range(4)
                for _ in range(3)
            )
        )
    groups = [{prompt[0] for prompt in engine.prompts} for engine in engines]
    assert groups[0] | groups[1] == {0, 1, 2, 3}
    assert not groups[0] & groups[1]
    assert len(groups[0]) == 2


async def test_a_completion_from_other_weights_is_refused_by_both_versions() -> None:
    engine = FakeEngineActor(version=4)
    engine_pool = make_pool(engine)
    engine_pool.expect_version(4)
    assert (await engine_pool.generate(PROMPT, sampling=SAMPLING, session="s")).version == 4
    engine_pool.expect_version(5)
    with pytest.raises(RolloutError, match="version 4, expected version 5"):
        await engine_pool.generate(PROMPT, sampling=SAMPLING, session="s")
    for receiver in engine_pool.receivers:
        await receiver.load_weights("/folder", 5)
    assert (await engine_pool.generate(PROMPT, sampling=SAMPLING, session="s")).version == 5


async def test_a_late_completion_is_a_rollout_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "_GRACE_S", 0.0)
    with pytest.raises(RolloutError, match=r"engine-0 gave no completion within 0.01 s .*request_timeout_s"):
        await make_pool(FakeEngineActor(delay_s=5.0), timeout_s=0.01).generate(
            PROMPT, sampling=SAMPLING, session="s"
        )


async def test_a_dead_engine_is_a_rollout_error_and_does_not_stop_the_shutdown() -> None:
    dead, alive = FakeEngineActor(error=ActorError("it died")), FakeEngineActor()
    engine_pool = make_pool(dead, alive)
    with pytest.raises(RolloutError, match="engine-0 is gone: it died"):
        await engine_pool.generate(PROMPT, sampling=SAMPLING, session="s")
    await engine_pool.shutdown()
    assert dead.calls[-2:] == alive.calls[-2:] == ["shutdown", "kill"]


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
    launcher = make_launcher("local")
    stuck = launcher.launch(StuckEngine, kwargs={"released": released}, name="engine-0")
    healthy = FakeEngineActor()
    try:
        async with asyncio.timeout(200):
            await EnginePool([stuck, healthy], request_timeout_s=5.0).shutdown()
        assert healthy.calls == ["shutdown", "kill"]
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
