"""Data parallelism: process group, FSDP2 sharding, reductions over ranks. gloo on CPUs, NCCL on GPUs.

A single CPU rank in float32 has no process group and no sharding; all functions but `init_distributed` then
do nothing.
On several nodes each node holds the whole model, sharded over its ranks, and gradients are summed over the
nodes (HSDP): the many small collectives of FSDP stay inside a node.
"""

from __future__ import annotations

import secrets
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from urllib.parse import urlsplit

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

_TIMEOUT = timedelta(minutes=30)


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """Where one rank of a model runs."""

    device: str = "cpu"
    """`cpu` or `cuda`."""
    rank: int = 0
    world_size: int = 1
    ranks_per_node: int | None = None
    """Ranks are numbered node by node; None: all are on one node."""
    rendezvous: str | None = None
    """What `Rendezvous.new_group` returned; required when there are several ranks."""
    num_threads: int | None = None
    """Threads of torch; None leaves torch's default."""

    @property
    def node_size(self) -> int:
        """Return the number of ranks on each node."""
        return self.ranks_per_node or self.world_size

    @property
    def node(self) -> int:
        """Return the index of the node that the rank is on."""
        return self.rank // self.node_size

    @property
    def local_rank(self) -> int:
        """Return the index of the rank among those of its node."""
        return self.rank % self.node_size


@dataclass(frozen=True, slots=True, kw_only=True)
class ParallelContext:
    """The process group of a model, seen from one rank."""

    rank: int
    world_size: int
    device: torch.device
    mesh: DeviceMesh | None
    """(shard) or (replicate, shard); None for a single rank on a CPU in float32."""
    leads_node: bool = True
    """Whether this is the first rank of its node."""


class Rendezvous:
    """The server over which the ranks of every group find each other; it ends with this object.

    It listens on `host` alone: on loopback unless ranks are on other nodes. It asks for no password, as gloo
    and NCCL do not: a program that reaches `host` can disturb the training, but run no code.
    """

    def __init__(self, host: str = "127.0.0.1") -> None:
        # The socket is bound here, because by itself the server would listen on every interface.
        with socket.create_server((host, 0)) as listener:
            port = listener.getsockname()[1]
            self._store = dist.TCPStore(
                host, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach()
            )
        self._address = f"tcp://{host}:{port}"

    def new_group(self) -> str:
        """Return the address for one group of ranks, whose keys have a prefix of their own."""
        return f"{self._address}/{secrets.token_hex(16)}"


def init_distributed(
    placement: Placement, *, fsdp_size: int | None = None, dtype: torch.dtype = torch.float32
) -> ParallelContext:
    """Join the process group at the rendezvous, which waits for all ranks.

    `fsdp_size` ranks share one copy of the model; -1: all, None: those of a node. `dtype` is that of forward
    passes: FSDP casts the float32 weights, so that a single rank needs it for another one, too.
    """
    rank, world_size = placement.rank, placement.world_size
    on_cuda = placement.device != "cpu"
    if not on_cuda and world_size == 1 and dtype == torch.float32:
        return ParallelContext(rank=0, world_size=1, device=torch.device("cpu"), mesh=None)
    if world_size > 1 and placement.rendezvous is None:
        raise ValueError(f"{world_size} ranks need a rendezvous, got None")
    if on_cuda:
        torch.cuda.set_device(placement.local_rank)
    if not dist.is_initialized():  # policy and reference of the launcher "local" share one process
        store = _join(placement.rendezvous) if placement.rendezvous else dist.HashStore()
        backend = "nccl" if on_cuda else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=_TIMEOUT)
    device = torch.device("cuda", torch.cuda.current_device()) if on_cuda else torch.device("cpu")
    return ParallelContext(
        rank=rank,
        world_size=world_size,
        device=device,
        mesh=_make_mesh(device.type, placement, fsdp_size=fsdp_size),
        leads_node=placement.local_rank == 0,
    )


def _join(rendezvous: str) -> dist.Store:
    address = urlsplit(rendezvous)
    server = dist.TCPStore(address.hostname, address.port, is_master=False, timeout=_TIMEOUT)
    return dist.PrefixStore(address.path, server)


def _make_mesh(device_type: str, placement: Placement, *, fsdp_size: int | None) -> DeviceMesh:
    world_size = placement.world_size
    shard = world_size if fsdp_size == -1 else fsdp_size or placement.node_size
    if shard == world_size:
        return init_device_mesh(device_type, (world_size,), mesh_dim_names=("shard",))
    return init_device_mesh(device_type, (world_size // shard, shard), mesh_dim_names=("replicate", "shard"))


def shard_model(
    network: nn.Module, *, context: ParallelContext, units: Sequence[nn.Module], dtype: torch.dtype
) -> None:
    """Shard a model that has no memory yet; the weights of a unit are gathered together.

    Gradients are summed over ranks, not averaged.
    """
    if context.mesh is None:
        return
    policy = MixedPrecisionPolicy(
        param_dtype=None if dtype == torch.float32 else dtype, reduce_dtype=torch.float32
    )
    for module in (*units, network):
        fully_shard(module, mesh=context.mesh, mp_policy=policy)
    for module in network.modules():
        if isinstance(module, FSDPModule):
            # The loss is already divided by global counts. Without both settings the reduction is an average
            # or a scaled sum, which gloo does not support.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def reshard_model(network: nn.Module) -> None:
    """Drop the weights that a forward pass alone leaves gathered; they would hide later changes."""
    if isinstance(network, FSDPModule):
        network.reshard()


def reduce_over_ranks(values: Tensor, *, context: ParallelContext, maximum: bool = False) -> Tensor:
    """Sum each element over the ranks in place, or take its maximum."""
    if context.mesh is not None:
        dist.all_reduce(values, dist.ReduceOp.MAX if maximum else dist.ReduceOp.SUM)
    return values


def gather_tensor(tensor: Tensor) -> Tensor:
    """Return the whole of a tensor that may be sharded. Collective: every rank must call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local_part(tensor: Tensor) -> Tensor:
    """Return this rank's part of a tensor that may be sharded; it shares the memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def copy_part(whole: Tensor, tensor: Tensor) -> None:
    """Copy this rank's part of `whole`, which every rank has, into a tensor that may be sharded."""
    part = whole.to(tensor.device)
    if isinstance(tensor, DTensor):
        sharded = distribute_tensor(part, tensor.device_mesh, tensor.placements, src_data_rank=None)
        part = sharded.to_local()
    local_part(tensor.detach()).copy_(part)


def wait_for_ranks(context: ParallelContext) -> None:
    """Wait until every rank has called this."""
    if context.mesh is not None:
        dist.barrier()
