"""Join a Ray cluster that the user started with `ray start`, and reserve the same share of several nodes.

    share = Share(address="10.0.0.1:6379", num_nodes=2, gpus=8, cpus=8)
    launcher = await join_cluster(share, paths=[model_path], shared=run_dir, timeout_s=60.0)
    launcher.launch(PolicyWorker, kwargs={}, name="policy-8", node=1)
    launcher.shutdown()     # ends the actors; the cluster stays

The cluster is never shut down. Its actors end with this process, also when it is killed.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from serving.ray_start import death_reason, read_stderr_end
from verl.errors import ConfigError
from verl.utils.actors import ActorError, Node
from verl.utils.cluster_watch import ClusterWatch, check_connection
from verl.utils.node_facts import (
    SAME,
    NodeFacts,
    NodeKeeper,
    read_versions,
    refuse_differences,
    select_environment,
)
from verl.utils.ray_actors import RayLauncher, keep_sigterm_handler

logger = logging.getLogger(__name__)

_Answer = TypeVar("_Answer")

_POLL_S = 1.0
_DESCRIBE_TIMEOUT_S = 300.0
"""For a process to start on a node and import this program from a slow disk."""
_NODE_SURVIVAL_S = 60.0
"""After which nodes end without the head, and all actors with them: Ray's default."""
_OWN_SURVIVAL_S = 600
"""After which Ray ends this process without the head: later, so that the run ends by itself."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """What a run takes of a cluster: so many nodes, and as much of each."""

    address: str
    """HOST:PORT of the head, or `auto`."""
    num_nodes: int
    cpus: int
    gpus: int = 0

    @property
    def bundle(self) -> dict[str, float]:
        """Return what is reserved of each node."""
        return {"CPU": float(self.cpus)} | ({"GPU": float(self.gpus)} if self.gpus else {})


async def join_cluster(share: Share, *, paths: Sequence[Path], shared: Path, timeout_s: float) -> RayLauncher:
    """Return a launcher for `share`. Call it on the main thread.

    `paths` must exist on every node; `shared` is a folder that must be the same one. Raises ConfigError if
    the cluster cannot be joined, lacks nodes for `timeout_s`, or differs from this machine.
    """
    cluster = _JoinedRay(share)
    try:
        await cluster.reserve(timeout_s=timeout_s)
        with _marked(shared) as mark:
            facts = await cluster.describe([*map(str, paths), str(mark)])
        refuse_differences(facts, own=read_versions(), mark=str(mark))
    except BaseException:
        cluster.close()
        raise
    nodes = [
        Node(
            address=each.address,
            interface=each.interface,
            gpus=each.gpus,
            is_here=each.address == cluster.address,
        )
        for each in facts
    ]
    logger.info("joined the Ray cluster at %s: %s", share.address, ", ".join(node.address for node in nodes))
    return RayLauncher(
        cluster,
        nodes=nodes,
        address=cluster.address,
        options=cluster.options,
        env=select_environment(os.environ),
        survival_s=_NODE_SURVIVAL_S,
        fix="start the cluster again (ray start), and repeat the command to resume",
    )


class _JoinedRay:
    """A connection to a cluster, with a part of it reserved in a placement group."""

    def __init__(self, share: Share) -> None:
        self._share = share
        self._group: Any = None
        self._keepers: list[Any] = []
        self._node_ids: list[str] = []
        self._session, node_id, head = _connect(share.address)
        self.address = next(n["NodeManagerAddress"] for n in _list_nodes() if n["NodeID"] == node_id)
        self._watch = ClusterWatch(head, find_gone=self._find_gone)

    @property
    def options(self) -> list[dict[str, object]]:
        """Return the options of Ray that place an actor on each node."""
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        return [
            {
                "scheduling_strategy": PlacementGroupSchedulingStrategy(
                    self._group, placement_group_bundle_index=bundle
                )
            }
            for bundle in range(self._share.num_nodes)
        ]

    async def reserve(self, *, timeout_s: float) -> None:
        """Reserve the share, one bundle per node. Raises ConfigError after `timeout_s`."""
        from ray.util.placement_group import placement_group

        deadline = time.monotonic() + timeout_s
        # Checked first, because a placement group that can never be made only waits.
        while problem := find_shortage(self._ask(_list_nodes), share=self._share):
            if time.monotonic() > deadline:
                raise ConfigError(problem)
            await asyncio.sleep(_POLL_S)
        bundles = [self._share.bundle] * self._share.num_nodes
        self._group = placement_group(bundles, strategy="STRICT_SPREAD")
        while not self._ask(partial(self._group.wait, timeout_seconds=0)):
            if time.monotonic() > deadline:
                raise ConfigError(
                    f"the Ray cluster at {self._share.address} has {describe_share(self._share)}, but "
                    "other jobs use them; end those (ray status lists what is in use) or take fewer"
                )
            await asyncio.sleep(_POLL_S)

    async def describe(self, paths: Sequence[str]) -> list[NodeFacts]:
        """Return the facts about each node, in the order of the bundles."""
        import ray
        from ray.util.placement_group import placement_group_table

        where = placement_group_table(self._group)["bundles_to_node_id"]
        addresses = {node["NodeID"]: node["NodeManagerAddress"] for node in _list_nodes()}
        self._node_ids = [where[bundle] for bundle in range(self._share.num_nodes)]
        self._keepers = [
            ray.remote(NodeKeeper).options(num_cpus=0, num_gpus=self._share.gpus, **options).remote()
            for options in self.options
        ]
        facts = []
        for keeper, node_id in zip(self._keepers, self._node_ids, strict=True):
            address = addresses[node_id]
            try:
                async with asyncio.timeout(_DESCRIBE_TIMEOUT_S):
                    facts.append(await keeper.describe.remote(address, list(paths)))
            except TimeoutError as error:  # Ray itself sets no limit
                raise ConfigError(
                    f"node {address} of the Ray cluster at {self._share.address} started no process within "
                    f"{_DESCRIBE_TIMEOUT_S:g} s; ray status shows whether it still runs, and its logs are in "
                    "/tmp/ray/session_latest/logs there"
                ) from error
            except Exception as error:  # what a node cannot import or start shares no class
                raise ConfigError(
                    f"node {address} of the Ray cluster at {self._share.address} cannot run this program "
                    f"({death_reason(error)}); {SAME}"
                ) from error
        return facts

    def guard_processes(self) -> None:
        """Do nothing: Ray ends the actors of a driver that has ended."""

    def find_dead(self) -> str | None:
        """Return `head at ...`, or the node of the share that has left the cluster, if any."""
        return self._watch.find_dead()

    def describe_death(self, error: Exception, *, pid: int | None) -> str:
        """Return Ray's reason for the loss of an actor, and the end of its stderr if it ran here."""
        return death_reason(error) + self.read_stderr_end(pid)

    def read_stderr_end(self, pid: int | None) -> str:
        """Return the last lines of stderr of an actor that runs here, under a heading; empty if none."""
        return read_stderr_end(self._session, pid)

    def close(self) -> None:
        """Leave the cluster: its actors for this process end, and their share is free again."""
        import ray
        from ray.util.placement_group import remove_placement_group

        self._watch.close()
        if not ray.is_initialized():
            return
        try:
            if self._group is not None and self._watch.has_head():  # without it this call never returns
                remove_placement_group(self._group)
        finally:
            ray.shutdown()

    def _ask(self, question: Callable[[], _Answer]) -> _Answer:
        """Return what the head answers. Raises ConfigError without one, where Ray would block."""
        if not self._watch.has_head():
            raise ConfigError(
                f"trainer.ray_address={self._share.address!r}: the head of the cluster ended while the run "
                "waited for nodes; start the cluster again and repeat the command"
            )
        return question()

    def _find_gone(self) -> str | None:
        """Ask the head which node of the share has left."""
        for node in _list_nodes(alive=False):
            if node["NodeID"] in self._node_ids:
                return f"raylet of node {node['NodeManagerAddress']}"
        return None


def _connect(address: str) -> tuple[Path, str, str]:
    """Join the cluster; return its folder on this machine, the id of this node, the address of the head."""
    # Ray reads them when it is imported. Without the second one it ends a process whose parent is process 1
    # (nohup, a container) at once when the raylet of its machine ends, see `serving.ray_start`.
    os.environ.setdefault("RAY_gcs_rpc_server_reconnect_timeout_s", str(_OWN_SURVIVAL_S))
    os.environ["RAY_RAYLET_PID"] = str(os.getpid())
    import ray

    if ray.is_initialized():
        raise ActorError("Ray already runs in this process; shut it down first")
    _check_reachable(address)
    try:
        with keep_sigterm_handler():
            context = ray.init(address=address, log_to_driver=False, logging_level="error")
    except Exception as error:  # Ray raises the bare class
        raise ConfigError(
            f"trainer.ray_address={address!r}: cannot join this cluster ({type(error).__name__}: "
            f"{str(error).strip()}). This machine must be one of its nodes (ray start --address={address}; "
            "--num-gpus=0 where it only runs the trainer), with equal versions of Ray and Python, and with "
            "the cluster's token if it has one (RAY_AUTH_MODE=token, RAY_AUTH_TOKEN_PATH)"
        ) from error
    session = Path(str(context.address_info["session_dir"]))
    runtime = ray.get_runtime_context()
    return session, runtime.get_node_id(), runtime.gcs_address


def _check_reachable(address: str) -> None:
    """Raise ConfigError unless something listens there: Ray itself would wait for minutes."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        return  # "auto"
    try:
        check_connection(address)
    except OSError as error:
        raise ConfigError(
            f"trainer.ray_address={address!r}: nothing answers there ({error}); start the head with "
            "ray start --head --port=PORT, or set trainer.ray_address=null to use this machine alone"
        ) from error


def _list_nodes(*, alive: bool = True) -> list[dict[str, Any]]:
    import ray

    return [node for node in ray.nodes() if node["Alive"] == alive]


def describe_share(share: Share) -> str:
    """Return the share in words."""
    gpus = f"{share.gpus} GPUs and " if share.gpus else ""
    return f"{share.num_nodes} nodes with {gpus}{share.cpus} CPUs each"


def find_shortage(nodes: Sequence[Mapping[str, Any]], *, share: Share) -> str | None:
    """Return what the cluster lacks, with advice; None if enough of its nodes are large enough."""
    fitting = [
        node
        for node in nodes
        if all(node["Resources"].get(name, 0) >= amount for name, amount in share.bundle.items())
    ]
    if len(fitting) >= share.num_nodes:
        return None
    found = ", ".join(
        f"{node['NodeManagerAddress']} ({node['Resources'].get('GPU', 0):g} GPUs, "
        f"{node['Resources'].get('CPU', 0):g} CPUs)"
        for node in nodes
    )
    keys = "trainer.n_gpus_per_node" if share.gpus else "trainer.num_cpu_workers and trainer.num_cpu_engines"
    return (
        f"trainer.nnodes={share.num_nodes} needs {describe_share(share)}; the Ray cluster at {share.address} "
        f"has {found or 'no node'}. Add nodes with ray start --address=..., or lower trainer.nnodes, {keys}"
    )


@contextmanager
def _marked(folder: Path) -> Iterator[Path]:
    """Give a new file in the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    mark = folder.resolve() / f".seen-by-all-{secrets.token_hex(8)}"
    mark.touch()
    try:
        yield mark
    finally:
        mark.unlink(missing_ok=True)
