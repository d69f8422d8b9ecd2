"""Start policy, reference and engines, on the cores or the GPUs of one or more nodes."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from serving.machine import is_loopback
from serving.redaction import redact_text
from verl.agent.reference import NO_SEARCH
from verl.agent.tools import TOOLS
from verl.errors import ConfigError
from verl.rollout.host import OpenAgent, RolloutWorker
from verl.rollout.pool import EnginePool
from verl.rollout.vllm_engine import AdapterSlot, VllmEngine
from verl.trainer.config.pools import engine_gpus, has_own_gpus, policy_gpus, slot_rank, transfer_kind
from verl.trainer.config.schema import ActorRolloutRefConfig, Config
from verl.trainer.needs import find_frozen_models
from verl.utils.actors import Launcher, Node, interface_of, make_launcher
from verl.utils.cluster import Share, join_cluster
from verl.utils.shutdown import close_quietly, ended_by
from verl.workers.checkpoint import POLICY
from verl.workers.model import resolve_model_folder
from verl.workers.model_io import list_targets, prepare_engine_model
from verl.workers.parallel import Placement, Rendezvous
from verl.workers.scorer import InitialPolicy, PolicyCopy, ScoringModel
from verl.workers.worker_group import WorkerGroup

logger = logging.getLogger(__name__)

_CONTROL_CALLS = 8
"""Calls of an engine, such as its shutdown, that need not wait until an episode has ended."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Models:
    """The models of a run."""

    policy: WorkerGroup
    reference: ScoringModel | None
    """Frozen initial policy; None where neither the KL term nor the method needs it."""
    engines: EnginePool
    copy: PolicyCopy | None = None
    """The model that the method scores with, if that is refreshed; else the reference is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Host:
    """What runs that follow one another share: a launcher, and engines, which get the weights of each."""

    launcher: Launcher
    engines: EnginePool


async def launch_models(
    config: Config,
    stack: AsyncExitStack,
    *,
    device: str,
    total_steps: int,
    scratch: Path,
    checkpoint: Path | None,
    open_agent: OpenAgent,
    host: Host | None = None,
) -> Models:
    """Return policy (as in the checkpoint), frozen models and engines, which play with an agent each.

    Engines of a `host` stay when the stack closes. Raises ConfigError after `trainer.startup_timeout_s`, and
    what a constructor raised.
    """
    frozen = find_frozen_models(config)
    logger.info("starting policy, reference and engines on %s (imports take most of it)", device)
    # The engines first: on GPUs they measure the free memory, on CPUs all start at the same time.
    host = host or await start_host(
        config, stack, device=device, scratch=scratch, open_agent=open_agent, trains=True
    )
    engines = host.engines
    launch_group = bind_launch(config, host.launcher, device=device, total_steps=total_steps)
    async with limited_start(config):
        if device == "cuda":
            await engines.wait_until_ready()
            await engines.sleep()  # until the first publish
        policy = launch_group(name="policy", trainable=True)
        close_quietly(stack, policy.shutdown)
        reference: ScoringModel | None = InitialPolicy(policy) if frozen.has_reference else None
        copy = None
        if frozen.refresh_steps:
            model = launch_group(name="copy", trainable=False)
            close_quietly(stack, model.shutdown)
            await model.wait_until_ready()
            copy = PolicyCopy(policy, model, every=frozen.refresh_steps, scratch=scratch)
        if frozen.loads_reference:
            model = launch_group(name="reference", trainable=False)
            close_quietly(stack, model.shutdown)
            await model.wait_until_ready()
            reference = model
        # Constructors run in the actors: what they raise shows only when they are waited for.
        num_parameters = await policy.wait_until_ready()
        await engines.wait_until_ready()
    logger.info("ready: a policy of %s parameters", f"{num_parameters:,}")
    if checkpoint is not None:
        if copy is not None:
            await copy.load(checkpoint)
        await policy.load(checkpoint / POLICY)
    return Models(policy=policy, reference=reference, engines=engines, copy=copy)


def bind_launch(
    config: Config, launcher: Launcher, *, device: str, total_steps: int
) -> Callable[..., WorkerGroup]:
    """Return what starts the ranks of a model, by its `name` and whether it is `trainable`."""
    num_ranks = count_workers(config, device=device)
    threads = max(1, count_threads() * len(launcher.nodes) // num_ranks)  # of each rank on a node
    return partial(
        WorkerGroup.launch,
        launcher,
        config.actor_rollout_ref,
        Placement(device=device, world_size=num_ranks, num_threads=threads if device == "cpu" else None),
        rendezvous=Rendezvous(launcher.address),
        total_steps=total_steps,
        seed=config.trainer.seed,
    )


async def start_host(
    config: Config,
    stack: AsyncExitStack,
    *,
    device: str,
    scratch: Path,
    open_agent: OpenAgent,
    trains: bool,
) -> Host:
    """Start a launcher and engines without waiting for these; the stack shuts both down."""
    launcher = await open_launcher(
        config, stack, device=device, scratch=scratch, tools=find_tools(config, trains=trains)
    )
    engines = launch_engines(
        config, launcher, device=device, scratch=scratch, open_agent=open_agent, takes_weights=trains
    )
    close_quietly(stack, engines.shutdown)
    return Host(launcher=launcher, engines=engines)


async def open_host(
    config: Config,
    stack: AsyncExitStack,
    *,
    device: str,
    scratch: Path,
    open_agent: OpenAgent,
    trains: bool,
) -> Host:
    """Return engines alone, with the weights of the model's folder, once they are ready.

    `trains`: runs that train will give them their weights. Raises ConfigError after
    `trainer.startup_timeout_s`, and what a constructor raised.
    """
    logger.info("starting engines on %s (imports take most of it)", device)
    host = await start_host(
        config, stack, device=device, scratch=scratch, open_agent=open_agent, trains=trains
    )
    async with limited_start(config):
        await host.engines.wait_until_ready()
    return host


async def open_local_engine(
    config: Config, stack: AsyncExitStack, *, device: str, scratch: Path
) -> VllmEngine:
    """Return one engine in this process, without an agent.

    Raises ConfigError after `trainer.startup_timeout_s`, and what its constructor raised.
    """
    settings = engine_settings(config, device=device, scratch=scratch, num_replicas=1)
    async with limited_start(config):
        engine = await asyncio.to_thread(VllmEngine, **settings)
    close_quietly(stack, engine.shutdown)
    return engine


async def open_launcher(
    config: Config, stack: AsyncExitStack, *, device: str, scratch: Path, tools: Sequence[str]
) -> Launcher:
    """Start the launcher, which the stack shuts down; what runs on the stack ends when the launcher dies.

    `scratch` must be on a disk that all nodes share; `tools` are those that engines call. Raises ConfigError
    if the nodes cannot be had.
    """
    trainer = config.trainer
    launcher: Launcher
    if trainer.ray_address is None:
        launcher = make_launcher(trainer.launcher)
    else:
        # Engines get this path, also that of a model of the hub in the cache of this machine.
        model = resolve_model_folder(config.actor_rollout_ref.model.path)
        launcher = await join_cluster(
            share_of_nodes(config, device=device),
            paths=[Path.cwd(), model.absolute()],
            shared=scratch,
            timeout_s=trainer.node_wait_s,
        )
    close_quietly(stack, launcher.shutdown)
    refuse_loopback(config, launcher.nodes, tools=tools)
    await stack.enter_async_context(ended_by(launcher.watch(), cleanup_s=launcher.survival_s))
    return launcher


def share_of_nodes(config: Config, *, device: str) -> Share:
    """Return what the run reserves of a cluster: GPUs, and a core for each process."""
    trainer = config.trainer
    on_gpus = device == "cuda"
    workers, replicas = count_workers(config, device=device), count_replicas(config, device=device)
    # Ranks and engines that share GPUs take turns.
    at_once = workers + replicas if has_own_gpus(config.actor_rollout_ref.rollout) else max(workers, replicas)
    return Share(
        address=str(trainer.ray_address),
        num_nodes=trainer.nnodes,
        gpus=trainer.n_gpus_per_node if on_gpus else 0,
        cpus=at_once // trainer.nnodes,
    )


def find_tools(config: Config, *, trains: bool) -> Sequence[str]:
    """Return the names of the tools that engines call, none in an evaluation of the model without them."""
    return [] if not trains and config.evaluation.reference == NO_SEARCH else config.agent.tools


def refuse_loopback(config: Config, nodes: Sequence[Node], *, tools: Sequence[str]) -> None:
    """Raise ConfigError if a tool on another machine would look for the retriever on itself."""
    url = redact_text(config.retriever.url)
    host = urlsplit(url).hostname or ""
    far = [node.address for node in nodes if not node.is_here]
    searches = any(TOOLS[name].searches for name in tools)
    if searches and far and (is_loopback(host) or host in ("0.0.0.0", "::")):
        raise ConfigError(
            f"retriever.url={url} is an address of this machine alone, and engines on {', '.join(far)} "
            "search, too; start the retriever with a token (RETRIEVER_TOKEN) and --host ADDRESS, an address "
            "that all nodes reach, and set retriever.url to it"
        )


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
            f"trainer.startup_timeout_s={timeout_s:g}; allow more time, and let "
            "several nodes reach each other on all ports"
        ) from error


def launch_engines(
    config: Config,
    launcher: Launcher,
    *,
    device: str,
    scratch: Path,
    open_agent: OpenAgent,
    takes_weights: bool = False,
) -> EnginePool:
    """Start `num_cpu_engines`, or on GPUs as many as fit, each on `tensor_model_parallel_size` of a node.

    `takes_weights`: a policy publishes to them.
    """
    rollout = config.actor_rollout_ref.rollout
    parallel, replicas = rollout.tensor_model_parallel_size, count_replicas(config, device=device)
    per_node = replicas // len(launcher.nodes)
    settings = engine_settings(config, device=device, scratch=scratch, num_replicas=per_node)
    if takes_weights:
        settings["weight_backend"] = find_backend(config.actor_rollout_ref, device=device)
    max_concurrent = config.trainer.max_concurrent_episodes or replicas * rollout.max_num_seqs
    separate = has_own_gpus(rollout)
    first = engine_gpus(config).start

    def see(node: int, local: int) -> dict[str, str]:
        begin = first + local * parallel
        gpus = launcher.nodes[node].gpu_environment(range(begin, begin + parallel))
        # The ranks of the policy talk over it, too, see `WorkerGroup.launch`.
        return gpus | ({"NCCL_SOCKET_IFNAME": interface_of(launcher.nodes, node)} if separate else {})

    actors = [
        launcher.launch(
            RolloutWorker,
            kwargs={"engine": partial(VllmEngine, **settings), "open_agent": open_agent},
            name=f"engine-{node * per_node + local}",
            env=see(node, local) if device == "cuda" else None,
            max_concurrency=max_concurrent + _CONTROL_CALLS,
            node=node,
        )
        for node in range(len(launcher.nodes))
        for local in range(per_node)
    ]
    return EnginePool(
        actors,
        max_concurrent=max_concurrent,
        request_timeout_s=rollout.request_timeout_s,
        colocated=device == "cuda" and rollout.free_cache_engine and not separate,
    )


def find_backend(settings: ActorRolloutRefConfig, *, device: str) -> str | AdapterSlot | None:
    """Return how engines receive what a policy publishes, see `VllmEngine`."""
    rank = slot_rank(settings.model)
    if rank is not None:
        return AdapterSlot(rank=rank, layers=list_targets(settings.model))
    kind = transfer_kind(settings, device=device)
    return None if kind == "file" else kind


def engine_settings(config: Config, *, device: str, scratch: Path, num_replicas: int) -> dict[str, Any]:
    """Return the arguments of `VllmEngine` for one of so many replicas on a node."""
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
        # Half of them: the retriever and the agent loops work at the same time.
        "num_threads": max(1, count_threads() // 2 // num_replicas) if device == "cpu" else None,
    }


def count_replicas(config: Config, *, device: str) -> int:
    """Return the number of engines, on all nodes."""
    trainer, rollout = config.trainer, config.actor_rollout_ref.rollout
    if device == "cuda":
        return len(engine_gpus(config)) // rollout.tensor_model_parallel_size * trainer.nnodes
    return trainer.num_cpu_engines


def count_workers(config: Config, *, device: str) -> int:
    """Return the number of ranks of the policy, on all nodes."""
    trainer = config.trainer
    return len(policy_gpus(config)) * trainer.nnodes if device == "cuda" else trainer.num_cpu_workers


def count_threads() -> int:
    """Return what torch starts here: OMP_NUM_THREADS, or a thread for each core that this process may use."""
    import torch

    return torch.get_num_threads()


def count_gpus() -> int:
    """Return the number of CUDA devices that this process may use."""
    import torch

    return torch.cuda.device_count()
