"""Start policy, reference and engines, on the cores of this machine or together on its GPUs."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from verl.errors import ConfigError
from verl.rollout.host import OpenAgent, RolloutWorker
from verl.rollout.pool import EnginePool
from verl.rollout.vllm_engine import VllmEngine
from verl.trainer.config.schema import Config
from verl.trainer.needs import FrozenModels
from verl.utils.actors import Launcher, make_launcher
from verl.utils.shutdown import close_quietly, ended_by
from verl.workers.checkpoint import POLICY
from verl.workers.model_io import prepare_engine_model
from verl.workers.parallel import Placement
from verl.workers.scorer import PolicyCopy
from verl.workers.worker_group import WorkerGroup

logger = logging.getLogger(__name__)

_CONTROL_CALLS = 8
"""Calls of an engine, such as its shutdown, that need not wait until an episode has ended."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Models:
    """The models of a run."""

    policy: WorkerGroup
    reference: WorkerGroup | None
    """Frozen initial policy; None where neither the KL term nor the method needs it."""
    engines: EnginePool
    copy: PolicyCopy | None = None
    """The model that the method scores with, if that is refreshed; else the reference is."""


async def launch_models(
    config: Config,
    stack: AsyncExitStack,
    *,
    device: str,
    total_steps: int,
    scratch: Path,
    checkpoint: Path | None,
    frozen: FrozenModels,
    open_agent: OpenAgent,
) -> Models:
    """Return policy (as in the checkpoint), frozen models and engines, which play with an agent each.

    Raises ConfigError after `trainer.startup_timeout_s`, and what a constructor raised.
    """
    trainer = config.trainer
    logger.info("starting policy, reference and engines on %s (imports take most of it)", device)
    launcher = await open_launcher(config, stack)
    launch_group = partial(
        WorkerGroup.launch,
        launcher,
        config.actor_rollout_ref,
        Placement(
            device=device,
            world_size=count_workers(config, device=device),
            num_threads=os.cpu_count() if device == "cpu" else None,
        ),
        total_steps=total_steps,
        seed=trainer.seed,
        scratch=scratch,
    )
    async with limited_start(config):
        # The engines first: on GPUs they measure the free memory, on CPUs all start at the same time.
        engines = launch_engines(config, launcher, device=device, scratch=scratch, open_agent=open_agent)
        close_quietly(stack, engines.shutdown)
        async with alone_on_gpus(engines, device=device):
            policy = launch_group(name="policy", trainable=True)
            close_quietly(stack, policy.shutdown)
            reference = copy = None
            if frozen.refresh_steps:
                model = launch_group(name="copy", trainable=False)
                close_quietly(stack, model.shutdown)
                await model.wait_until_ready()
                copy = PolicyCopy(policy, model, every=frozen.refresh_steps, scratch=scratch)
            if frozen.has_reference:
                reference = launch_group(name="reference", trainable=False)
                close_quietly(stack, reference.shutdown)
                await reference.wait_until_ready()
            # Constructors run in the actors: what they raise shows only when they are waited for.
            num_parameters = await policy.wait_until_ready()
        await engines.wait_until_ready()
    logger.info("ready: a policy of %s parameters", f"{num_parameters:,}")
    if checkpoint is not None:
        if copy is not None:
            await copy.load(checkpoint)
        await policy.load(checkpoint / POLICY)
    return Models(policy=policy, reference=reference, engines=engines, copy=copy)


async def open_engines(
    config: Config, stack: AsyncExitStack, *, device: str, scratch: Path, open_agent: OpenAgent
) -> EnginePool:
    """Return engines alone, with the weights of the model's folder, once they are ready.

    Raises ConfigError after `trainer.startup_timeout_s`, and what a constructor raised.
    """
    logger.info("starting engines on %s (imports take most of it)", device)
    launcher = await open_launcher(config, stack)
    async with limited_start(config):
        engines = launch_engines(config, launcher, device=device, scratch=scratch, open_agent=open_agent)
        close_quietly(stack, engines.shutdown)
        await engines.wait_until_ready()
    return engines


async def open_local_engine(
    config: Config, stack: AsyncExitStack, *, device: str, scratch: Path
) -> VllmEngine:
    """Return one engine in this process, without an agent.

    Raises ConfigError after `trainer.startup_timeout_s`, and what its constructor raised.
    """
    settings = engine_settings(config, device=device, scratch=scratch, num_replicas=1)
    async with limited_start(config):
        engine = await asyncio.to_thread(partial(VllmEngine, **settings))
    close_quietly(stack, engine.shutdown)
    return engine


async def open_launcher(config: Config, stack: AsyncExitStack) -> Launcher:
    """Start the launcher, which the stack shuts down; what runs on the stack ends when the launcher dies."""
    launcher = make_launcher(config.trainer.launcher)
    close_quietly(stack, launcher.shutdown)
    await stack.enter_async_context(ended_by(launcher.watch()))
    return launcher


@asynccontextmanager
async def limited_start(config: Config) -> AsyncIterator[None]:
    """Raise ConfigError if the block takes longer than `trainer.startup_timeout_s`."""
    timeout_s = config.trainer.startup_timeout_s
    try:
        async with asyncio.timeout(timeout_s):
            yield
    except TimeoutError as error:
        raise ConfigError(
            "workers and engines did not start within "
            f"trainer.startup_timeout_s={timeout_s:g}; allow more time"
        ) from error


@asynccontextmanager
async def alone_on_gpus(engines: EnginePool, *, device: str) -> AsyncIterator[None]:
    """Start the engines first and let them sleep inside the block: they measure the free GPU memory."""
    if device == "cpu":
        yield
        return
    await engines.wait_until_ready()
    async with engines.asleep():
        yield


def launch_engines(
    config: Config, launcher: Launcher, *, device: str, scratch: Path, open_agent: OpenAgent
) -> EnginePool:
    """Start `num_cpu_engines`, or on GPUs as many as fit, each on `tensor_model_parallel_size` of them."""
    rollout = config.actor_rollout_ref.rollout
    parallel, replicas = rollout.tensor_model_parallel_size, count_replicas(config, device=device)
    settings = engine_settings(config, device=device, scratch=scratch, num_replicas=replicas)
    max_concurrent = config.trainer.max_concurrent_episodes or replicas * rollout.max_num_seqs
    actors = [
        launcher.launch(
            RolloutWorker,
            kwargs={"engine": partial(VllmEngine, **settings), "open_agent": open_agent},
            name=f"engine-{replica}",
            env=see_gpus(range(replica * parallel, (replica + 1) * parallel)) if device == "cuda" else None,
            max_concurrency=max_concurrent + _CONTROL_CALLS,
        )
        for replica in range(replicas)
    ]
    return EnginePool(
        actors,
        max_concurrent=max_concurrent,
        request_timeout_s=rollout.request_timeout_s,
        colocated=device == "cuda" and rollout.free_cache_engine,
    )


def engine_settings(config: Config, *, device: str, scratch: Path, num_replicas: int) -> dict[str, Any]:
    """Return the arguments of `VllmEngine` for one of so many replicas."""
    settings, trainer = config.actor_rollout_ref, config.trainer
    model_path = prepare_engine_model(settings.model, device=device, folder=scratch / "engine_model")
    precision = {"cpu": "float32", "cuda": "bfloat16"}[device]
    return {
        "config": settings.rollout,
        "model_path": str(model_path),
        "dtype": precision if settings.model.dtype == "auto" else settings.model.dtype,
        "max_model_len": config.data.max_model_len,
        "seed": trainer.seed,
        "device": device,
        # Half of the cores: the retriever and the agent loops work at the same time.
        "num_threads": max(1, (os.cpu_count() or 1) // 2 // num_replicas) if device == "cpu" else None,
    }


def count_replicas(config: Config, *, device: str) -> int:
    """Return the number of engines."""
    trainer, rollout = config.trainer, config.actor_rollout_ref.rollout
    if device == "cuda":
        return trainer.n_gpus_per_node // rollout.tensor_model_parallel_size
    return trainer.num_cpu_engines


def count_workers(config: Config, *, device: str) -> int:
    """Return the number of ranks of the policy."""
    return config.trainer.n_gpus_per_node if device == "cuda" else config.trainer.num_cpu_workers


def see_gpus(indices: range) -> dict[str, str]:
    """Return the environment of a process that sees these of the GPUs that this process sees."""
    visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    chosen = [visible[i] if visible else str(i) for i in indices]
    # Policy ranks and engines share GPUs, so Ray, which assigns each GPU only once, must not do it.
    return {"CUDA_VISIBLE_DEVICES": ",".join(chosen), "RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1"}


def count_gpus() -> int:
    """Return the number of CUDA devices that this process may use."""
    import torch

    return torch.cuda.device_count()
