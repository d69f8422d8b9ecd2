"""Which actor is started on which node, in which environment."""

from __future__ import annotations

import asyncio
import contextlib
import copy
from collections.abc import Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.fakes import tiny_model
from verl.errors import ConfigError
from verl.protocols import Agent, Generate
from verl.rollout.host import RolloutWorker
from verl.rollout.vllm_engine import AdapterSlot
from verl.trainer.config.schema import Config
from verl.trainer.launch import (
    bind_launch,
    count_workers,
    find_tools,
    launch_engines,
    refuse_loopback,
    share_of_nodes,
)
from verl.utils.actors import Node
from verl.utils.cluster import Share
from verl.workers.parallel import Placement, Rendezvous
from verl.workers.worker_group import WorkerGroup


@dataclass
class Started:
    """An actor that was never started."""

    cls: type
    kwargs: Mapping[str, Any]
    name: str
    env: Mapping[str, str]
    node: int

    async def call(self, method: str, /, *args: object, **kwargs: object) -> Any:
        raise NotImplementedError

    def kill(self) -> None: ...


@dataclass
class FakeLauncher:
    nodes: tuple[Node, ...]
    address: str = "10.0.0.1"
    survival_s: float = 60.0
    started: list[Started] = field(default_factory=list)

    def launch(
        self,
        cls: type,
        /,
        *,
        kwargs: dict[str, object],
        name: str,
        env: Mapping[str, str] | None = None,
        max_concurrency: int = 1,
        node: int = 0,
    ) -> Started:
        self.started.append(Started(cls, kwargs, name, env or {}, node))
        return self.started[-1]

    async def watch(self) -> None: ...

    def shutdown(self) -> None: ...


def two_nodes() -> FakeLauncher:
    """The second has other GPUs free than the first, and another name of its interface."""
    return FakeLauncher(
        (
            Node(address="10.0.0.1", interface="eth0", gpus=("0", "1", "2", "3")),
            Node(address="10.0.0.2", interface="ib0", gpus=("4", "5", "6", "7"), is_here=False),
        )
    )


def no_agent(generate: Generate) -> AbstractAsyncContextManager[Agent]:
    """Opens nothing: the actors never start."""
    raise NotImplementedError


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    config = Config()
    config.actor_rollout_ref.model.path = str(tiny_model(tmp_path_factory.mktemp("model") / "tiny"))
    config.trainer.ray_address, config.trainer.nnodes = "10.0.0.1:6379", 2
    config.trainer.n_gpus_per_node = 4
    config.trainer.num_cpu_workers, config.trainer.num_cpu_engines = 2, 4
    return config


def test_a_rank_and_an_engine_of_each_gpu_are_on_its_node(config: Config, tmp_path: Path) -> None:
    config.actor_rollout_ref.rollout.tensor_model_parallel_size = 2
    launcher = two_nodes()
    launch_engines(config, launcher, device="cuda", scratch=tmp_path, open_agent=no_agent)
    assert {actor.cls for actor in launcher.started} == {RolloutWorker}
    assert not any("weight_backend" in a.kwargs["engine"].keywords for a in launcher.started), "no policy"
    assert [(a.name, a.node, a.env["CUDA_VISIBLE_DEVICES"]) for a in launcher.started] == [
        ("engine-0", 0, "0,1"),
        ("engine-1", 0, "2,3"),
        ("engine-2", 1, "4,5"),
        ("engine-3", 1, "6,7"),
    ]
    launcher.started.clear()
    launch_ranks(config, launcher, Placement(device="cuda", world_size=8))
    placements = [actor.kwargs["placement"] for actor in launcher.started]
    assert [(p.rank, p.node, p.local_rank) for p in placements] == [
        (rank, rank // 4, rank % 4) for rank in range(8)
    ]
    assert [actor.node for actor in launcher.started] == [0, 0, 0, 0, 1, 1, 1, 1]
    assert len({p.rendezvous for p in placements}) == 1
    last = launcher.started[-1].env
    assert last["CUDA_VISIBLE_DEVICES"] == "4,5,6,7"
    assert last["NCCL_SOCKET_IFNAME"] == "ib0"
    assert last["RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES"] == "1"
    assert share_of_nodes(config, device="cuda") == Share(
        address="10.0.0.1:6379", num_nodes=2, gpus=4, cpus=4
    )


def test_engines_with_gpus_of_their_own_have_the_last_of_each_node(config: Config, tmp_path: Path) -> None:
    own = copy.deepcopy(config)
    rollout = own.actor_rollout_ref.rollout
    rollout.tensor_model_parallel_size, rollout.n_gpus_per_node = 1, 2
    launcher = two_nodes()
    pool = launch_engines(
        own, launcher, device="cuda", scratch=tmp_path, open_agent=no_agent, takes_weights=True
    )
    assert [(a.name, a.node, a.env["CUDA_VISIBLE_DEVICES"]) for a in launcher.started] == [
        ("engine-0", 0, "2"),
        ("engine-1", 0, "3"),
        ("engine-2", 1, "6"),
        ("engine-3", 1, "7"),
    ]
    assert [actor.env["NCCL_SOCKET_IFNAME"] for actor in launcher.started[1:3]] == ["eth0", "ib0"]
    assert launcher.started[0].kwargs["engine"].keywords["weight_backend"] == "nccl"
    assert count_workers(own, device="cuda") == 4
    launch_ranks(own, launcher, Placement(device="cuda", world_size=4))
    assert [(a.node, a.env["CUDA_VISIBLE_DEVICES"]) for a in launcher.started[4:]] == [
        *[(0, "0,1")] * 2,
        *[(1, "4,5")] * 2,
    ]
    assert share_of_nodes(own, device="cuda").bundle == {"CPU": 4.0, "GPU": 4.0}
    asyncio.run(pool.sleep())  # calls no engine: these raise NotImplementedError


def test_engines_have_room_for_adapters_where_these_are_all_they_get(config: Config, tmp_path: Path) -> None:
    config = copy.deepcopy(config)
    model = config.actor_rollout_ref.model
    model.lora_rank, model.lora_transfer = 5, "adapter"
    layers = ("down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj")
    launcher = two_nodes()
    for targets, takes_weights, expected in (
        ("all-linear", True, AdapterSlot(rank=8, layers=layers)),
        (["q_proj"], True, AdapterSlot(rank=8, layers=("q_proj",))),
        (["q_proj"], False, None),
    ):
        model.target_modules = targets
        launch_engines(
            config,
            launcher,
            device="cuda",
            scratch=tmp_path,
            open_agent=no_agent,
            takes_weights=takes_weights,
        )
        assert launcher.started[-1].kwargs["engine"].keywords.get("weight_backend") == expected


def test_on_cpus_workers_and_engines_are_shared_out_among_the_nodes(config: Config, tmp_path: Path) -> None:
    launcher = two_nodes()
    launch_engines(config, launcher, device="cpu", scratch=tmp_path, open_agent=no_agent)
    launch_ranks(config, launcher, Placement(world_size=2))
    assert [(actor.name, actor.node) for actor in launcher.started] == [
        *[("engine-0", 0), ("engine-1", 0), ("engine-2", 1), ("engine-3", 1)],
        *[("policy-0", 0), ("policy-1", 1)],
    ]
    assert [actor.env["GLOO_SOCKET_IFNAME"] for actor in launcher.started[-2:]] == ["eth0", "ib0"]
    assert share_of_nodes(config, device="cpu") == Share(address="10.0.0.1:6379", num_nodes=2, cpus=2)


@pytest.mark.parametrize(("nodes", "workers", "threads"), [(1, 1, 8), (2, 2, 8), (1, 2, 4), (2, 4, 4)])
def test_on_cpus_the_workers_of_a_node_share_the_threads_of_the_driver_and_engines_half_of_them(
    config: Config, tmp_path: Path, nodes: int, workers: int, threads: int
) -> None:
    config.trainer.num_cpu_workers, config.trainer.num_cpu_engines = workers, 2 * nodes
    launcher = FakeLauncher(two_nodes().nodes[:nodes], address="127.0.0.1")
    before = torch.get_num_threads()
    torch.set_num_threads(8)  # as OMP_NUM_THREADS and taskset do
    try:
        launch_engines(config, launcher, device="cpu", scratch=tmp_path, open_agent=no_agent)
        bind_launch(config, launcher, device="cpu", total_steps=1)(name="policy", trainable=True)
    finally:
        torch.set_num_threads(before)
    engines, ranks = launcher.started[: 2 * nodes], launcher.started[2 * nodes :]
    assert {actor.kwargs["engine"].keywords["num_threads"] for actor in engines} == {2}
    assert [actor.kwargs["placement"].num_threads for actor in ranks] == [threads] * workers


def test_ranks_of_one_node_talk_over_loopback(config: Config) -> None:
    launcher = FakeLauncher(two_nodes().nodes[1:])
    launch_ranks(config, launcher, Placement(world_size=2))
    assert {actor.env["GLOO_SOCKET_IFNAME"] for actor in launcher.started} == {"lo"}


def launch_ranks(config: Config, launcher: FakeLauncher, placement: Placement) -> None:
    WorkerGroup.launch(
        launcher,
        config.actor_rollout_ref,
        placement,
        name="policy",
        rendezvous=Rendezvous(),
        total_steps=1,
        seed=0,
        trainable=True,
    )


def test_a_retriever_that_other_nodes_cannot_reach_is_refused() -> None:
    config = Config()
    far = two_nodes().nodes
    for host in ("127.0.0.1:8000", "localhost:8000", "[::1]:1", "0.0.0.0:8000", "me:word@127.0.0.1"):
        config.retriever.url = f"http://{host}/retrieve"
        refuse_loopback(config, far[:1], tools=["search"])
        named = r"retriever\.url=.* engines on 10\.0\.0\.2 search.*--host"
        with pytest.raises(ConfigError, match=named) as caught:
            refuse_loopback(config, far, tools=["search"])
        assert "word" not in str(caught.value)
    config.retriever.url = "http://10.0.0.1:8000/retrieve"
    refuse_loopback(config, far, tools=["search"])


@pytest.mark.parametrize(
    ("tools", "reference", "trains", "searches"),
    [
        (["python"], "none", True, False),
        (["python", "open_page"], "none", True, True),
        (["search"], "no_search", True, True),
        (["search"], "no_search", False, False),
        (["search"], "one_shot_rag", False, True),
    ],
)
def test_only_what_searches_needs_a_retriever_that_all_nodes_reach(
    tools: list[str], reference: str, trains: bool, searches: bool
) -> None:
    """A training asks no reference."""
    config = Config()
    config.agent.tools, config.evaluation.reference = tools, reference
    used = find_tools(config, trains=trains)
    with pytest.raises(ConfigError) if searches else contextlib.nullcontext():
        refuse_loopback(config, two_nodes().nodes, tools=used)
