"""The engine replicas as one `Generate`: routing, deadlines, and the handshake on the weights' version."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from verl.errors import ConfigError, RolloutError
from verl.types import Completion, FloatArray, IntArray, Sampling
from verl.utils.actors import ActorError

if TYPE_CHECKING:
    from verl.utils.actors import Actor

logger = logging.getLogger(__name__)

_GRACE_S = 10.0
"""What an engine gets on top of the deadline to abort the request and say so itself."""
_SHUTDOWN_TIMEOUT_S = 10.0


class EngineReceiver:
    """One replica as the weight sync sees it."""

    def __init__(self, engine: Actor, *, name: str) -> None:
        self._engine = engine
        self.name = name

    async def load_weights(self, folder: str, version: int) -> None:
        """Raises WeightSyncError."""
        await self._engine.call("load_weights", folder, version)

    async def score(self, ids: Sequence[int] | IntArray) -> FloatArray:
        """Log-prob of every token given those before it, at temperature 1 [L]; position 0 holds 0."""
        scores: FloatArray = await self._engine.call("score", ids)
        return scores


class EnginePool:
    """Implements `verl.protocols.Generate` over replicas."""

    def __init__(self, engines: Sequence[Actor], *, request_timeout_s: float, rests: bool = False) -> None:
        """`rests`: the replicas share their GPUs with the trainer and free the memory while it works."""
        if not engines:
            raise ConfigError("the rollout needs at least one engine, got none")
        self._engines = tuple(engines)
        self._request_timeout_s = request_timeout_s
        self._rests = rests
        self._version = 0
        self._num_running = [0] * len(engines)
        self._replica_of: dict[str, int] = {}

    @property
    def receivers(self) -> tuple[EngineReceiver, ...]:
        """The replicas, for the weight sync."""
        return tuple(EngineReceiver(engine, name=f"engine-{k}") for k, engine in enumerate(self._engines))

    def expect_version(self, version: int) -> None:
        """From now on refuse completions that were sampled from other weights."""
        self._version = version
        self._replica_of.clear()  # no prefix outlives its weights

    async def start(self) -> None:
        """Wait until every replica stands. Raises what its construction raised."""
        await self._call_all("version")

    async def generate(self, prompt_ids: IntArray, *, sampling: Sampling, session: str) -> Completion:
        """Sample on the session's replica. Raises RolloutError: deadline, dead engine, other weights."""
        replica = self._route(session)
        self._num_running[replica] += 1
        try:
            async with asyncio.timeout(self._request_timeout_s + _GRACE_S):
                completion: Completion = await self._engines[replica].call(
                    "generate", prompt_ids, sampling, timeout_s=self._request_timeout_s
                )
        except TimeoutError as error:
            raise RolloutError(
                f"engine-{replica} gave no completion within {self._request_timeout_s:g} s "
                "(actor_rollout_ref.rollout.request_timeout_s)"
            ) from error
        except ActorError as error:
            raise RolloutError(f"engine-{replica} is gone: {error}") from error
        finally:
            self._num_running[replica] -= 1
        if completion.version != self._version:
            raise RolloutError(
                f"engine-{replica} sampled from weights of version {completion.version}, "
                f"expected version {self._version}"
            )
        return completion

    @asynccontextmanager
    async def resting(self) -> AsyncIterator[None]:
        """The engines' GPU memory is free inside; nothing happens where they have their own."""
        if self._rests:
            await self._call_all("sleep")
        yield
        if self._rests:
            await self._call_all("wake")

    async def shutdown(self) -> None:
        """End the replicas' child processes, whatever state each is in, then the replicas.

        One that does not answer, because it still starts or hangs, is killed after ten seconds.
        """
        farewells = (engine.call("shutdown") for engine in self._engines)
        try:
            async with asyncio.timeout(_SHUTDOWN_TIMEOUT_S):
                await asyncio.gather(*farewells, return_exceptions=True)
        except TimeoutError:
            logger.warning("an engine did not end within %g s; it is killed", _SHUTDOWN_TIMEOUT_S)
        finally:
            for engine in self._engines:
                engine.kill()

    async def _call_all(self, method: str) -> list[Any]:
        return await asyncio.gather(*(engine.call(method) for engine in self._engines))

    def _route(self, session: str) -> int:
        """The replica that may hold the session's prefix; a new session goes to the least busy one."""
        if session not in self._replica_of:
            self._replica_of[session] = self._num_running.index(min(self._num_running))
        return self._replica_of[session]
