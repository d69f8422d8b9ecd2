"""Run both models of the service in this process, or in an actor of a private Ray cluster.

A worker only samples answers to prompts and judges pairs of texts; questions, gold answers and gains are
handled outside, so one worker and several give the same numbers.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from IG.config import IGServiceConfig, visible_gpu
from IG.entailment import DeviceLostError, EntailmentModel, Pair
from IG.prompts import build_prompt
from IG.sampler import EngineLostError, SampledAnswer, SamplingError, VllmSampler
from IG.service.cluster import RayActor, RayCluster
from IG.service.jobs import WorkerLostError
from IG.sharing import check_judgement, require_log_probs
from serving.web.loading import load_in_thread

logger = logging.getLogger(__name__)

_POLL_S = 0.2
_CLOSE_TIMEOUT_S = 10.0
_WARM_UP_PAIRS = (("The capital of France is Paris.", "Paris is the capital."), ("Paris", "London"))


class LocalWorker:
    """Both models on one device, called from this process; the generator's engine is a child process."""

    def __init__(self, sampler: VllmSampler, *, entailment: EntailmentModel, device: str) -> None:
        self.device = device
        """Where both models compute: `cpu` or `cuda:N`."""
        self._sampler = sampler
        self._entailment: EntailmentModel | None = entailment
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="ig-entailment")

    @classmethod
    async def start(cls, config: IGServiceConfig, rank: int) -> LocalWorker:
        """Load both models and use each once. Raises what the libraries and `warm_up` raise."""
        cores = len(os.sched_getaffinity(0)) / config.worker_count
        # The engine first: its process must be started before this one computes anything.
        sampler = await VllmSampler.start(config, cores=cores)
        try:
            entailment = await load_in_thread(
                lambda: EntailmentModel.load(
                    config.entailment_model,
                    device="cpu" if sampler.device == "cpu" else "cuda:0",
                    batch_size=config.computation_chunk_size,
                    cpu_threads=config.cpu_threads or max(1, int(cores)),
                ),
                name="entailment",
            )
        except BaseException:
            await sampler.aclose()
            raise
        gpu = config.cuda_device if config.num_gpus == 1 else f"cuda:{rank}"
        worker = cls(sampler, entailment=entailment, device="cpu" if sampler.device == "cpu" else gpu)
        try:
            await worker.warm_up(config)
        except BaseException:
            await worker.aclose()
            raise
        keep_from_collector()
        return worker

    async def warm_up(self, config: IGServiceConfig) -> None:
        """Use both models once. Raises RuntimeError when no gain can be measured with them."""
        prompt = build_prompt(
            "What is the capital of France?",
            context="",
            prompt_type=config.prompt_type,
            max_context_words=config.max_context_words,
            prompt_style=config.prompt_style,
            prompt_file=config.prompt_file,
        )
        try:
            answers, scores = await asyncio.gather(self.sample(prompt), self.judge(_WARM_UP_PAIRS))
            require_log_probs(answers)
        except SamplingError as error:
            raise RuntimeError(f"no gain can be measured with the generator: {error}") from error
        for outcome in map(check_judgement, scores, _WARM_UP_PAIRS):
            if isinstance(outcome, Exception):
                raise RuntimeError(f"no gain can be measured with the entailment model: {outcome}")

    async def sample(self, prompt: str) -> tuple[SampledAnswer, ...]:
        """Return answers to the prompt; cancelling it stops the engine's work."""
        try:
            return await self._sampler.sample(prompt)
        except EngineLostError as error:
            raise WorkerLostError(str(error)) from error

    async def judge(self, pairs: Sequence[Pair]) -> list[float]:
        """Return P(premise entails hypothesis) of every pair; one batch at a time, in a thread."""
        if self._entailment is None:
            raise WorkerLostError("the worker was closed")
        judge = self._entailment.probabilities
        try:
            judged = await asyncio.get_running_loop().run_in_executor(self._thread, judge, pairs)
        except DeviceLostError as error:
            raise WorkerLostError(str(error)) from error
        scores: list[float] = judged.tolist()
        return scores

    async def wait_lost(self) -> str:
        """Wait until the worker is gone and return the reason."""
        while self._sampler.alive:
            await asyncio.sleep(_POLL_S)
        return "the generator's engine process died"

    async def aclose(self) -> None:
        """Stop the engine process, wait for the running batch, free the models."""
        self._entailment = None
        try:
            await self._sampler.aclose()
        finally:
            await asyncio.to_thread(self._thread.shutdown, wait=True, cancel_futures=True)


def keep_from_collector() -> None:
    """Exempt models and libraries from garbage collection, which else pauses everything for 0.3 s."""
    gc.unfreeze()  # the remains of a lost worker may be collected
    gc.collect()
    gc.freeze()


class _Host:
    """The object of an actor; it holds the worker."""

    def __init__(self) -> None:
        self._worker: LocalWorker | None = None

    async def start(self, config: IGServiceConfig, rank: int, gpu: str | None) -> tuple[str, int]:
        """Load both models; return the device and the process id. `gpu` is the only GPU that it may see."""
        os.environ.pop("CUDA_VISIBLE_DEVICES", None)  # Ray hides all GPUs from an actor that requests none
        if gpu is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = gpu
        self._worker = await LocalWorker.start(config, rank)
        return self._worker.device, os.getpid()

    async def call(self, method: str, *arguments: object) -> object:
        """Call a method of the worker."""
        return await getattr(self._worker, method)(*arguments)


class RayWorker:
    """A LocalWorker in an actor; make it with `start`."""

    def __init__(self, actor: RayActor, *, device: str, pid: int) -> None:
        self.device = device
        """Where it computes: `cpu` or `cuda:N`."""
        self._actor = actor
        self._actor.pid = pid

    @classmethod
    async def start(cls, cluster: RayCluster, config: IGServiceConfig, rank: int) -> RayWorker:
        """Start an actor and load both models there. Raises what loading raises, WorkerLostError."""
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        gpu = visible_gpu(rank, visible=visible) if config.num_gpus > 1 else None
        actor = cluster.launch(_Host, name=f"worker-{rank}")
        starting = asyncio.create_task(actor.call("start", replace(config, token=""), rank, gpu))
        try:
            while not starting.done():
                cluster.guard_processes()
                await asyncio.wait([starting], timeout=_POLL_S)
            device, pid = starting.result()
        except BaseException:
            starting.cancel()
            await asyncio.gather(starting, return_exceptions=True)
            actor.kill()
            raise
        return cls(actor, device=device, pid=pid)

    async def sample(self, prompt: str) -> tuple[SampledAnswer, ...]:
        """Return answers to the prompt; cancelling it stops the actor's work."""
        answers: tuple[SampledAnswer, ...] = await self._actor.call("call", "sample", prompt)
        return answers

    async def judge(self, pairs: Sequence[Pair]) -> list[float]:
        """Return P(premise entails hypothesis) of every pair."""
        scores: list[float] = await self._actor.call("call", "judge", list(pairs))
        return scores

    async def wait_lost(self) -> str:
        """Wait until the actor or its engine is gone and return the reason."""
        try:
            return str(await self._actor.call("call", "wait_lost"))
        except WorkerLostError as error:
            return str(error)

    async def aclose(self) -> None:
        """Close the actor's worker, if it still answers, and end the actor."""
        try:
            async with asyncio.timeout(_CLOSE_TIMEOUT_S):
                await self._actor.call("call", "aclose")
        except (WorkerLostError, TimeoutError):
            logger.debug("the worker of process %d could not be closed, only killed", self._actor.pid)
        finally:
            self._actor.kill()
