"""Ranks that act as one: process group, FSDP2 sharding, sums over ranks. gloo on CPUs, NCCL on GPUs.

One CPU rank needs none of it: no process group, no sharding. All functions but `join_ranks` then do nothing.
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
class Ranks:
    """Where this process stands among those that hold the model together."""

    rank: int
    world_size: int
    device: torch.device
    mesh: DeviceMesh | None
    """None: alone on a CPU."""


def join_ranks(*, rank: int, world_size: int, device: str, rendezvous: str | None) -> Ranks:
    """Meet the other ranks at `rendezvous` (an init_method URL, needed when there are any)."""
    if device == "cpu" and world_size == 1:
        return Ranks(rank=0, world_size=1, device=torch.device("cpu"), mesh=None)
    if world_size > 1 and rendezvous is None:
        raise ValueError(f"{world_size} ranks need a rendezvous, got None")
    on_cuda = device != "cpu"
    if on_cuda:
        torch.cuda.set_device(rank % torch.cuda.device_count())
    meeting = {"init_method": rendezvous} if rendezvous else {"store": dist.HashStore()}
    dist.init_process_group(
        "nccl" if on_cuda else "gloo", rank=rank, world_size=world_size, timeout=_TIMEOUT, **meeting
    )
    here = torch.device("cuda", torch.cuda.current_device()) if on_cuda else torch.device("cpu")
    return Ranks(
        rank=rank, world_size=world_size, device=here, mesh=init_device_mesh(here.type, (world_size,))
    )


def shard_model(network: nn.Module, *, ranks: Ranks, layers: Sequence[nn.Module], dtype: torch.dtype) -> None:
    """Shard in place, each layer a unit of its own; gradients are summed over ranks, not averaged."""
    if ranks.mesh is None:
        network.to(ranks.device)
        return
    policy = MixedPrecisionPolicy(
        param_dtype=None if dtype == torch.float32 else dtype, reduce_dtype=torch.float32
    )
    for module in (*layers, network):
        fully_shard(module, mesh=ranks.mesh, mp_policy=policy)
    for module in network.modules():
        if isinstance(module, FSDPModule):
            # The loss is divided by global counts already. Without both settings the reduction is an average
            # or a scaled sum, which gloo does not have.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def reshard_model(network: nn.Module) -> None:
    """Drop what a forward pass without a backward pass left gathered: weights set later would not be seen."""
    if isinstance(network, FSDPModule):
        network.reshard()


def reduce_over_ranks(values: Tensor, *, ranks: Ranks, maximum: bool = False) -> Tensor:
    """Sum, or maximum, of each element over the ranks."""
    if ranks.mesh is not None:
        dist.all_reduce(values, dist.ReduceOp.MAX if maximum else dist.ReduceOp.SUM)
    return values


def gather_tensor(tensor: Tensor) -> Tensor:
    """The whole of a tensor that may be sharded. Every rank must call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local_part(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor that may be sharded; shares its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def wait_for_ranks(ranks: Ranks) -> None:
    if ranks.mesh is not None:
        dist.barrier()
