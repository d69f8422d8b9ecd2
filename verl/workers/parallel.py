"""Data parallelism: process group, FSDP2 sharding, reductions over ranks. gloo on CPUs, NCCL on GPUs.

A single CPU rank has no process group and no sharding; all functions but `init_distributed` then do nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

_TIMEOUT = timedelta(minutes=30)


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """Where one rank of a model runs."""

    device: str = "cpu"
    """`cpu` or `cuda`."""
    rank: int = 0
    world_size: int = 1
    rendezvous: str | None = None
    """An init_method URL; required when there are several ranks."""
    num_threads: int | None = None
    """Threads of torch; None leaves torch's default."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ParallelContext:
    """The process group of a model, seen from one rank."""

    rank: int
    world_size: int
    device: torch.device
    mesh: DeviceMesh | None
    """None for a single rank on a CPU."""


def init_distributed(placement: Placement) -> ParallelContext:
    """Join the process group at the rendezvous, which waits for all ranks."""
    rank, world_size = placement.rank, placement.world_size
    on_cuda = placement.device != "cpu"
    if not on_cuda and world_size == 1:
        return ParallelContext(rank=0, world_size=1, device=torch.device("cpu"), mesh=None)
    if world_size > 1 and placement.rendezvous is None:
        raise ValueError(f"{world_size} ranks need a rendezvous, got None")
    if on_cuda:
        torch.cuda.set_device(rank % torch.cuda.device_count())
    rendezvous = (
        {"init_method": placement.rendezvous} if placement.rendezvous else {"store": dist.HashStore()}
    )
    backend = "nccl" if on_cuda else "gloo"
    dist.init_process_group(backend, rank=rank, world_size=world_size, timeout=_TIMEOUT, **rendezvous)
    device = torch.device("cuda", torch.cuda.current_device()) if on_cuda else torch.device("cpu")
    mesh = init_device_mesh(device.type, (world_size,))
    return ParallelContext(rank=rank, world_size=world_size, device=device, mesh=mesh)


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


def wait_for_ranks(context: ParallelContext) -> None:
    """Wait until every rank has called this."""
    if context.mesh is not None:
        dist.barrier()
