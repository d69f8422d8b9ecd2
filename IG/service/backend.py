"""What measures gains behind the HTTP surface: shared work in front, a pool of workers behind.

`Backend` is the seam: the server knows nothing else of models, engines or devices.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from IG.estimator import Estimates, GainEstimator, GainFailure, GainOptions, GainQuery
from IG.service.cluster import RayCluster
from IG.service.config import IGServiceConfig
from IG.service.IG_worker import LocalWorker, RayWorker, count_workers, sampling_options
from IG.service.models import model_digest, require_models
from IG.service.pool import StartWorker, Worker, WorkerPool
from IG.sharing import ModelIdentity
from serving.model_files import find_model
from serving.web.loading import load_in_thread

logger = logging.getLogger(__name__)

_WARM_UP = GainQuery(
    question="What is the capital of France?",
    context="Paris is the capital of France.",
    golds=("Paris, France",),
)
_BATCHES_OF_CHUNKS = 4
"""Pairs are sorted by length inside a batch: the more, the less padding; the fewer, the sooner the next."""


class Backend(Protocol):
    """Measures gains."""

    @property
    def devices(self) -> tuple[str, ...]:
        """Where each worker computes, in the order of ranks: `cpu` or `cuda:N`."""
        ...

    @property
    def num_ready_workers(self) -> int:
        """Workers that can take work now; the others are being replaced or were given up."""
        ...

    @property
    def num_worker_restarts(self) -> int:
        """Lost workers that were replaced so far."""
        ...

    @property
    def failure(self) -> str | None:
        """Why nothing can be computed any more; None also while a worker is being replaced."""
        ...

    @property
    def identity(self) -> ModelIdentity:
        """Which models the numbers come from."""
        ...

    async def estimate(
        self, queries: Sequence[GainQuery], *, details: bool, timeout_s: float | None
    ) -> Estimates:
        """One outcome per query, in order. Cancelling it cancels what nobody else waits for."""
        ...

    async def aclose(self) -> None:
        """Free the models and stop every process."""
        ...


class PooledBackend:
    """Gains from a pool of workers; make it with `start`."""

    def __init__(
        self,
        pool: WorkerPool,
        *,
        estimator: GainEstimator,
        identity: ModelIdentity,
        cluster: RayCluster | None = None,
    ) -> None:
        self.identity = identity
        """Which models the numbers come from."""
        self._pool = pool
        self._estimator = estimator
        self._cluster = cluster

    @classmethod
    async def start(cls, config: IGServiceConfig) -> PooledBackend:
        """Load both models on every worker and measure one gain.

        One worker lives in this process, several in Ray actors. Raises ModelNotFoundError before anything
        slow, and what the libraries raise.
        """
        require_models(config)
        cluster = await RayCluster.start() if count_workers(config) > 1 else None
        pool = _make_pool(config, cluster=cluster)
        backend: PooledBackend | None = None
        try:
            identity = await _start_and_identify(pool, config=config)
            estimator = _make_estimator(config, pool=pool, identity=identity)
            backend = cls(pool, estimator=estimator, identity=identity, cluster=cluster)
            await backend.warm_up()
        except BaseException:
            await _close(pool, cluster)
            raise
        return backend

    @property
    def devices(self) -> tuple[str, ...]:
        """Where each worker computes."""
        return self._pool.devices

    @property
    def num_ready_workers(self) -> int:
        """Workers that can take work now."""
        return self._pool.num_ready_workers

    @property
    def num_worker_restarts(self) -> int:
        """Lost workers that were replaced so far."""
        return self._pool.num_worker_restarts

    @property
    def failure(self) -> str | None:
        """Set once no worker is left and none can be started."""
        return self._pool.failure

    async def estimate(
        self, queries: Sequence[GainQuery], *, details: bool, timeout_s: float | None
    ) -> Estimates:
        """One outcome per query, in order."""
        return await self._estimator.estimate(queries, details=details, timeout_s=timeout_s)

    async def warm_up(self) -> None:
        """Measure one gain. Raises RuntimeError when the models cannot do what they were loaded for."""
        estimates = await self.estimate([_WARM_UP], details=False, timeout_s=None)
        (outcome,) = estimates.outcomes
        if isinstance(outcome, GainFailure):
            raise RuntimeError(f"the first gain could not be measured: {outcome.reason}")

    async def aclose(self) -> None:
        """Free the models and stop every process."""
        await _close(self._pool, self._cluster)


async def _close(pool: WorkerPool, cluster: RayCluster | None) -> None:
    try:
        await pool.aclose()
    finally:
        if cluster is not None:
            await cluster.aclose()


def _make_pool(config: IGServiceConfig, *, cluster: RayCluster | None) -> WorkerPool:
    return WorkerPool(
        _starter(config, cluster=cluster),
        num_workers=count_workers(config),
        # Twice what the engine decodes at a time, so that it never waits for the next prompt.
        max_prompts_in_flight=max(8, -(-2 * config.sub_batch_size // config.num_generations)),
        pairs_per_batch=_BATCHES_OF_CHUNKS * config.computation_chunk_size,
        start_timeout_s=config.worker_start_timeout_s,
    )


def _starter(config: IGServiceConfig, *, cluster: RayCluster | None) -> StartWorker:
    async def start(rank: int) -> Worker:
        if cluster is None:
            return await LocalWorker.start(config, rank)
        return await RayWorker.start(cluster, config, rank)

    return start


def _make_estimator(config: IGServiceConfig, *, pool: WorkerPool, identity: ModelIdentity) -> GainEstimator:
    return GainEstimator(
        pool,
        pool,
        options=GainOptions(
            gain=config.gain,
            prompt_type=config.prompt_type,
            max_context_words=config.max_context_words,
            log_floor=config.log_floor,
        ),
        sampling=sampling_options(config),
        score=config.score,
        threshold=config.threshold,
        identity=identity,
        sample_cache_size=config.sample_cache_size,
        pair_cache_size=config.pair_cache_size,
    )


async def _start_and_identify(pool: WorkerPool, *, config: IGServiceConfig) -> ModelIdentity:
    """Start the workers and read the models' files meanwhile, where they are here already."""

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
