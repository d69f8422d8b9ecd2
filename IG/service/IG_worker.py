"""What does the work behind the HTTP surface: one sampler and one entailment model in this process.

`Backend` is the seam: the server knows nothing else of models, engines or devices.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from IG.entailment import EntailmentModel, EntailmentQueue, Pair
from IG.estimator import GainEstimate, GainEstimator, GainFailure, GainOptions, GainQuery
from IG.loading import load_in_thread
from IG.sampler import EngineOptions, SamplingOptions, VllmSampler
from IG.service.config import IGServiceConfig
from IG.sharing import ModelIdentity

logger = logging.getLogger(__name__)

_WARM_UP = GainQuery(
    question="What is the capital of France?",
    context="Paris is the capital of France.",
    golds=("Paris, France",),
)
_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


class ModelMissingError(ValueError):
    """A model is not where the settings say: the message names the setting and the fix."""


class Backend(Protocol):
    """Measures gains."""

    @property
    def device(self) -> str:
        """Where it computes: `cpu` or `cuda:N`, as configured."""
        ...

    @property
    def failure(self) -> str | None:
        """Why nothing can be computed any more; None while all is well."""
        ...

    async def estimate(
        self, queries: Sequence[GainQuery], *, details: bool
    ) -> list[GainEstimate | GainFailure]:
        """One outcome per query, in order."""
        ...

    async def aclose(self) -> None:
        """Free the models and stop every process."""
        ...


class LocalBackend:
    """Both models on one device; make it with `start`."""

    def __init__(
        self, estimator: GainEstimator, *, sampler: VllmSampler, queue: EntailmentQueue, device: str
    ) -> None:
        self.device = device
        """Where both models compute, named as in the settings."""
        self._estimator = estimator
        self._sampler = sampler
        self._queue = queue

    @classmethod
    async def start(cls, config: IGServiceConfig) -> LocalBackend:
        """Load both models and measure one gain, so that the first request finds everything warm.

        Raises ModelMissingError before anything slow, and what the libraries raise.
        """
        require_models(config)
        threads = config.cpu_threads or max(1, (os.cpu_count() or 1) // 2)
        # The engine first: its process must be made before this one computes anything.
        sampler = await VllmSampler.start(
            _sampling_options(config),
            engine=_engine_options(config, threads=threads),
        )
        backend: LocalBackend | None = None
        try:
            entailment = await load_in_thread(
                lambda: EntailmentModel.load(
                    config.entailment_model,
                    device="cpu" if sampler.device == "cpu" else "cuda:0",
                    batch_size=config.computation_chunk_size,
                    cpu_threads=threads,
                ),
                name="entailment",
            )
            backend = cls._over(config, sampler=sampler, entailment=entailment)
            await backend._warm_up()
        except BaseException:
            await (backend or sampler).aclose()
            raise
        return backend

    @classmethod
    def _over(
        cls, config: IGServiceConfig, *, sampler: VllmSampler, entailment: EntailmentModel
    ) -> LocalBackend:
        queue = EntailmentQueue(entailment)
        estimator = GainEstimator(
            sampler,
            _QueueJudge(queue),
            options=GainOptions(
                gain=config.gain,
                prompt_type=config.prompt_type,
                max_context_words=config.max_context_words,
                log_floor=config.log_floor,
            ),
            sampling=_sampling_options(config),
            score=config.score,
            threshold=config.threshold,
            identity=ModelIdentity(
                generator=config.model_path,
                generator_digest="",
                entailment=config.entailment_model,
                entailment_digest="",
            ),
            sample_cache_size=4096,
            pair_cache_size=200_000,
        )
        device = "cpu" if sampler.device == "cpu" else config.cuda_device
        return cls(estimator, sampler=sampler, queue=queue, device=device)

    async def _warm_up(self) -> None:
        """Raises RuntimeError when the models cannot do the work they were loaded for."""
        (outcome,) = await self.estimate([_WARM_UP], details=False)
        if isinstance(outcome, GainFailure):
            raise RuntimeError(f"the first gain could not be measured: {outcome.reason}")

    @property
    def failure(self) -> str | None:
        """Set once the engine process is gone."""
        return None if self._sampler.alive else "the generator's engine process died; restart the service"

    async def estimate(
        self, queries: Sequence[GainQuery], *, details: bool
    ) -> list[GainEstimate | GainFailure]:
        """One outcome per query, in order."""
        return (await self._estimator.estimate(queries, details=details)).outcomes

    async def aclose(self) -> None:
        """Free the models and stop the engine process."""
        await self._queue.aclose()
        await self._sampler.aclose()


def require_models(config: IGServiceConfig) -> None:
    """Look for both models' config.json. Raises ModelMissingError."""
    for flag, name in (("--model-path", config.model_path), ("--entailment-model", config.entailment_model)):
        folder = Path(name).expanduser()
        if (folder / "config.json").is_file():
            continue
        if folder.is_dir():
            raise ModelMissingError(
                f"{flag} {name}: the folder has no config.json, expected a Hugging Face model"
            )
        if not _HUB_NAME.fullmatch(name):
            raise ModelMissingError(
                f"{flag} {name}: no such folder; give the folder of a Hugging Face model or a hub name such "
                "as Qwen/Qwen2.5-3B (the small default models come with a full checkout: world/models)"
            )
        _require_on_hub(name, flag=flag)


def _require_on_hub(name: str, *, flag: str) -> None:
    from huggingface_hub import hf_hub_download

    try:
        hf_hub_download(name, "config.json", etag_timeout=10)
    except (OSError, ValueError) as error:  # offline, unknown, gated: all are OSErrors or ValueErrors
        reason = str(error).strip().splitlines()[0]
        raise ModelMissingError(
            f"{flag} {name}: neither a folder here nor a model that the hub gives us ({reason}); download it "
            "first or give a folder"
        ) from error


class _QueueJudge:
    """Judges by an entailment queue."""

    def __init__(self, queue: EntailmentQueue) -> None:
        self._queue = queue

    async def judge(self, pairs: Sequence[Pair]) -> list[float | Exception]:
        """All pairs in order; they fail together."""
        known = await self._queue.probabilities(pairs)
        return [known[pair] for pair in pairs]


def _sampling_options(config: IGServiceConfig) -> SamplingOptions:
    return SamplingOptions(
        num_answers=config.num_generations,
        temperature=config.temperature,
        max_new_tokens=config.max_new_tokens,
        seed=config.seed,
    )


def _engine_options(config: IGServiceConfig, *, threads: int) -> EngineOptions:
    return EngineOptions(
        model=config.model_path,
        device=config.device.partition(":")[0],
        max_num_seqs=config.sub_batch_size,
        max_model_len=config.max_model_len or None,
        gpu_memory_utilization=config.gpu_memory_utilization,
        cpu_cache_bytes=int(config.cpu_cache_gb * 2**30),
        cpu_threads=threads,
    )
