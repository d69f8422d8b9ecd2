"""The engine replicas behind one `Agent`: routing, deadlines and the check of the weights' version."""

from __future__ import annotations

import asyncio
import logging
import pickle
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from verl.errors import ConfigError, RolloutError
from verl.protocols import EnginePart
from verl.types import FloatArray, IntArray, Question, Trajectory

if TYPE_CHECKING:
    from verl.utils.actors import Actor

logger = logging.getLogger(__name__)

_SHUTDOWN_TIMEOUT_S = 10.0


class EngineReceiver:
    """One replica as a receiver of weights."""

    def __init__(self, engine: Actor, *, name: str, colocated: bool) -> None:
        self._engine = engine
        self.name = name
        self.node = engine.node
        self._colocated = colocated

    async def sleep(self) -> None:
        """Free the GPU memory, where the trainer shares it; see `VllmEngine.sleep`."""
        if self._colocated:
            await self._engine.call("call_engine", "sleep")

    async def wake(self, part: EnginePart) -> None:
        """Take back the memory of a part, without its content; do nothing if that is not asleep."""
        if self._colocated:
            await self._engine.call("call_engine", "wake", part)

    async def load_weights(self, folder: str, version: int) -> None:
        """Load the weights of a folder. Raises WeightSyncError."""
        await self._engine.call("call_engine", "load_weights", folder, version)

    async def connect(self, info: Mapping[str, object]) -> None:
        """Prepare once for the weights of `update`. Raises WeightSyncError, as the methods below do."""
        await self._engine.call("call_engine", "connect", info)

    async def start_update(self) -> None:
        """Prepare for new weights; there are none until `finish_update`."""
        await self._engine.call("call_engine", "start_update")

    async def update(self, chunk: Mapping[str, object]) -> None:
        """Load the tensors of a chunk; they are copied when this returns."""
        await self._engine.call("call_engine", "update", chunk)

    async def finish_update(self, version: int) -> None:
        """Use the new weights; completions carry `version` from then on."""
        await self._engine.call("call_engine", "finish_update", version)

    async def score(self, ids: Sequence[int] | IntArray) -> FloatArray:
        """Return the log-prob of every token at temperature 1 [L]; position 0 holds 0."""
        scores: FloatArray = await self._engine.call("call_engine", "score", ids)
        return scores


class EnginePool:
    """Implements `verl.protocols.Agent` over replicas: actors of `verl.rollout.host.RolloutWorker`."""

    def __init__(
        self,
        engines: Sequence[Actor],
        *,
        max_concurrent: int,
        request_timeout_s: float,
        colocated: bool = False,
    ) -> None:
        """Store `max_concurrent`, the episodes that a collector may run at a time over all replicas.

        Replicas limit what an episode waits for. One that does not even answer a short call within
        `request_timeout_s` hangs. `colocated`: they share their GPUs with the trainer and free them while it
        trains.
        """
        if not engines:
            raise ConfigError("the rollout needs at least one engine, got none")
        self.max_concurrent = max_concurrent
        self._engines = tuple(engines)
        self._request_timeout_s = request_timeout_s
        self._colocated = colocated
        self._version = 0
        self._num_running = [0] * len(engines)
        self._replica_of: dict[str, int] = {}

    @property
    def receivers(self) -> tuple[EngineReceiver, ...]:
        """Return the replicas as receivers of weights."""
        return tuple(
            EngineReceiver(engine, name=f"engine-{k}", colocated=self._colocated)
            for k, engine in enumerate(self._engines)
        )

    def expect_version(self, version: int) -> None:
        """Refuse completions of other weights from now on."""
        self._version = version
        self._replica_of.clear()  # no prefix outlives its weights

    async def wait_until_ready(self) -> None:
        """Wait until every replica is built and has connected its tools. Raises what it raised."""
        await asyncio.gather(*(engine.call("open") for engine in self._engines))

    async def run(self, question: Question, *, sample: int, seed: int, greedy: bool) -> Trajectory:
        """Play an episode on the replica of its question.

        Raises ActorError if that has died, RolloutError if it hangs or has other weights.
        """
        replica = self._route(question.uid)
        engine = self._engines[replica]
        episode = asyncio.ensure_future(
            engine.call("play", question, sample=sample, seed=seed, greedy=greedy)
        )
        self._num_running[replica] += 1
        try:
            while not (await asyncio.wait([episode], timeout=self._request_timeout_s))[0]:
                await self._require_answer(replica)
        finally:
            episode.cancel()
            self._num_running[replica] -= 1
        trajectory: Trajectory = pickle.loads(episode.result())
        for turn in trajectory.turns:
            if len(turn.output_ids) and turn.version != self._version:
                raise RolloutError(
                    f"engine-{replica} sampled from weights of version {turn.version}, "
                    f"expected version {self._version}"
                )
        return trajectory

    async def sleep(self) -> None:
        """Free the engines' GPU memory until the next publish; do nothing where they do not share it."""
        await asyncio.gather(*(receiver.sleep() for receiver in self.receivers))

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

    async def _require_answer(self, replica: int) -> None:
        """Raise RolloutError unless the replica answers a call."""
        try:
            async with asyncio.timeout(self._request_timeout_s):
                await self._engines[replica].call("call_engine", "version")
        except TimeoutError as error:
            raise RolloutError(
                f"engine-{replica} hangs: it answered no call within {self._request_timeout_s:g} s "
                "(actor_rollout_ref.rollout.request_timeout_s)"
            ) from error

    def _route(self, uid: str) -> int:
        """Return the replica that may have the question's prompt cached; for a new one the least busy."""
        if uid not in self._replica_of:
            self._replica_of[uid] = self._num_running.index(min(self._num_running))
        return self._replica_of[uid]
