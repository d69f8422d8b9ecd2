"""The engine replicas behind one `Generate`: routing, deadlines and the check of the weights' version."""

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
"""Time on top of the deadline in which an engine aborts the request and reports it itself."""
_SHUTDOWN_TIMEOUT_S = 10.0


class EngineReceiver:
    """One replica as a receiver of weights."""

    def __init__(self, engine: Actor, *, name: str) -> None:
        self._engine = engine
        self.name = name

    async def load_weights(self, folder: str, version: int) -> None:
        """Load the weights of a folder. Raises WeightSyncError."""
        await self._engine.call("load_weights", folder, version)

    async def score(self, ids: Sequence[int] | IntArray) -> FloatArray:
        """Return the log-prob of every token at temperature 1 [L]; position 0 holds 0."""
        scores: FloatArray = await self._engine.call("score", ids)
        return scores


class EnginePool:
    """Implements `verl.protocols.Generate` over replicas."""

    def __init__(
        self, engines: Sequence[Actor], *, request_timeout_s: float, colocated: bool = False
    ) -> None:
        """`colocated`: the replicas share their GPUs with the trainer and free them while it trains."""
        if not engines:
            raise ConfigError("the rollout needs at least one engine, got none")
        self._engines = tuple(engines)
        self._request_timeout_s = request_timeout_s
        self._colocated = colocated
        self._version = 0
        self._num_running = [0] * len(engines)
        self._replica_of: dict[str, int] = {}

    @property
    def receivers(self) -> tuple[EngineReceiver, ...]:
        """The replicas as receivers of weights."""
        return tuple(EngineReceiver(engine, name=f"engine-{k}") for k, engine in enumerate(self._engines))

    def expect_version(self, version: int) -> None:
        """Refuse completions of other weights from now on."""
        self._version = version
        self._replica_of.clear()  # no prefix outlives its weights

    async def wait_until_ready(self) -> None:
        """Wait until every replica is built. Raises what its constructor raised."""
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
    async def asleep(self) -> AsyncIterator[None]:
        """Free the engines' GPU memory inside the block; do nothing where they do not share it."""
        if self._colocated:
            await self._call_all("sleep")
        yield
        if self._colocated:
            await self._call_all("wake")

    async def shutdown(self) -> None:
        """End the child processes of every replica, then the replicas.

        A replica that does not answer within ten seconds, because it is starting or hangs, is killed.
        """
        shutdowns = (engine.call("shutdown") for engine in self._engines)
        try:
            async with asyncio.timeout(_SHUTDOWN_TIMEOUT_S):
                await asyncio.gather(*shutdowns, return_exceptions=True)
        except TimeoutError:
            logger.warning("an engine did not end within %g s; it is killed", _SHUTDOWN_TIMEOUT_S)
        finally:
            for engine in self._engines:
                engine.kill()

    async def _call_all(self, method: str) -> list[Any]:
        return await asyncio.gather(*(engine.call(method) for engine in self._engines))

    def _route(self, session: str) -> int:
        """Return the replica that may have the session's prefix cached; for a new session the least busy."""
        if session not in self._replica_of:
            self._replica_of[session] = self._num_running.index(min(self._num_running))
        return self._replica_of[session]
