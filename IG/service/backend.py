"""Measure gains and judge entailment behind the HTTP surface: shared work in front, a pool of workers behind.

`Backend` is the seam: the server uses models, engines and devices only through it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from IG.config import IGServiceConfig
from IG.entailment import Pair
from IG.estimator import Estimates, GainEstimator, GainQuery
from IG.judging import Judgements, judge_pairs
from IG.service.cluster import RayCluster
from IG.service.IG_worker import LocalWorker, RayWorker
from IG.service.jobs import Worker
from IG.service.models import model_digest, require_models
from IG.service.pool import PoolStatus, WorkerPool
from IG.sharing import ModelIdentity
from serving.model_files import find_model
from serving.web.loading import load_in_thread

_CHUNKS_PER_BATCH = 4
"""Pairs are sorted by length within a batch: larger ones need less padding, smaller ones end sooner."""


class Backend(Protocol):
    """Measures gains and judges entailment."""

    @property
    def workers(self) -> PoolStatus:
        """Return the state of the workers now."""
        ...

    @property
    def identity(self) -> ModelIdentity:
        """Return which models the numbers come from."""
        ...

    async def estimate(
        self, queries: Sequence[GainQuery], *, details: bool, timeout_s: float | None
    ) -> Estimates:
        """Return one outcome per query, in order. Cancelling it cancels work that no one else waits for."""
        ...

    async def judge(self, pairs: Sequence[Pair], *, timeout_s: float | None) -> Judgements:
        """Return one outcome per pair, in order. Cancelling it cancels work that no one else waits for."""
        ...

    async def aclose(self) -> None:
        """Free the models and stop every process."""
        ...


class PooledBackend:
    """Gains and entailment from a pool of workers; make it with `start`."""

    def __init__(
        self,
        pool: WorkerPool,
        *,
        config: IGServiceConfig,
        identity: ModelIdentity,
        cluster: RayCluster | None = None,
    ) -> None:
        self.identity = identity
        """Which models the numbers come from."""
        self._pool = pool
        self._estimator = GainEstimator(pool, pool, config=config, generator_digest=identity.generator_digest)
        self._cluster = cluster

    @classmethod
    async def start(cls, config: IGServiceConfig) -> PooledBackend:
        """Load both models on every worker, which uses each once.

        One worker lives in this process, several in Ray actors. Raises ModelNotFoundError before anything
        slow, and what the libraries raise.
        """
        require_models(config)
        cluster = await RayCluster.start() if config.worker_count > 1 else None

        async def start_worker(rank: int) -> Worker:
            if cluster is None:
                return await LocalWorker.start(config, rank)
            return await RayWorker.start(cluster, config, rank)

        pool = WorkerPool(
            start_worker,
            num_workers=config.worker_count,
            # Twice what the engine decodes at a time, so that it never waits for the next prompt.
            max_prompts_in_flight=max(8, -(-2 * config.sub_batch_size // config.num_generations)),
            pairs_per_batch=_CHUNKS_PER_BATCH * config.computation_chunk_size,
        )
        try:
            identity = await _start_and_identify(pool, config=config)
        except BaseException:
            await _close(pool, cluster)
            raise
        return cls(pool, config=config, identity=identity, cluster=cluster)

    @property
    def workers(self) -> PoolStatus:
        """Return the state of the workers now."""
        return self._pool.status

    async def estimate(
        self, queries: Sequence[GainQuery], *, details: bool, timeout_s: float | None
    ) -> Estimates:
        """Return one outcome per query, in order."""
        return await self._estimator.estimate(queries, details=details, timeout_s=timeout_s)

    async def judge(self, pairs: Sequence[Pair], *, timeout_s: float | None) -> Judgements:
        """Return one outcome per pair, in order."""
        return await judge_pairs(self._estimator.judgements, pairs, timeout_s=timeout_s)

    async def aclose(self) -> None:
        """Free the models and stop every process."""
        await _close(self._pool, self._cluster)


async def _close(pool: WorkerPool, cluster: RayCluster | None) -> None:
    try:
        await pool.aclose()
    finally:
        if cluster is not None:
            await cluster.aclose()


async def _start_and_identify(pool: WorkerPool, *, config: IGServiceConfig) -> ModelIdentity:
    """Start the workers; meanwhile hash the models' files where they are local already."""

    async def digest(name: str) -> str:
        if not Path(name).is_dir():  # in the hub's cache, complete once the workers have loaded it
            await started.wait()
        return await load_in_thread(lambda: model_digest(find_model(name, cached_only=True)), name="digest")

    started = asyncio.Event()
    digests = asyncio.gather(digest(config.model_path), digest(config.entailment_model))
    try:
        await pool.start()
        started.set()
        generator_digest, entailment_digest = await digests
    finally:
        digests.cancel()
    return ModelIdentity(
        generator=config.model_path,
        generator_digest=generator_digest,
        entailment=config.entailment_model,
        entailment_digest=entailment_digest,
    )
