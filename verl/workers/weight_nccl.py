"""Hand weights to engines on other GPUs than those of the policy, also on other nodes, by NCCL broadcasts.

All ranks of the policy gather weight after weight. The first one, rank 0 of a group with all workers of all
engines, packs them and broadcasts; vLLM's workers receive, each loading its part.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from verl.errors import WeightSyncError
from verl.workers.parallel import ParallelContext
from verl.workers.tensor_files import Readable
from verl.workers.weight_chunks import order_weights
from verl.workers.weight_ipc import ChunkReceiver

logger = logging.getLogger(__name__)

PACKED_BYTES = 500_000_000
"""A broadcast ends with the weight that exceeds this."""
PACKED_BUFFERS = 2
"""Broadcasts under way at the same time."""
_CONNECT_TIMEOUT_S = 330.0
"""A little more than that of vLLM's rendezvous, 300 s, whose error says more."""
_SEND_TIMEOUT_S = 600.0
"""16 GB at 0.03 GB/s: a slower transfer counts as hung."""
_GRACE_S = 10.0
"""For the policy, after an engine has failed."""
_COLLECTIVE = ("connect", "broadcast")
"""In which the policy waits for the engines."""


class BroadcastSource(Protocol):
    """The part of the policy that broadcasts. Each call returns when all ranks are done."""

    async def find_endpoint(self) -> tuple[str, int]:
        """Return address and port on which rank 0 listens."""
        ...

    async def connect_engines(self, info: Mapping[str, object]) -> None:
        """Join the group as rank 0; returns when all of its members have joined."""
        ...

    async def describe_weights(self) -> dict[str, object]:
        """Return what is broadcast, in the terms of vLLM's `NCCLWeightTransferUpdateInfo`."""
        ...

    async def broadcast_weights(self) -> None:
        """Gather and broadcast all weights; returns when all engines have them."""
        ...

    def shutdown(self) -> None:
        """Kill the ranks."""
        ...


class NcclTransfer:
    """Implements `verl.workers.weight_sync.WeightTransfer` by NCCL."""

    def __init__(
        self,
        policy: BroadcastSource,
        receivers: Sequence[ChunkReceiver],
        *,
        engine_size: int,
        connect_timeout_s: float = _CONNECT_TIMEOUT_S,
        grace_s: float = _GRACE_S,
    ) -> None:
        """Take `engine_size`, the workers of an engine."""
        self._policy = policy
        self._receivers = tuple(receivers)
        self._engine_size = engine_size
        self._connect_timeout_s = connect_timeout_s
        self._grace_s = grace_s
        self._update: dict[str, object] | None = None
        """None until the group is connected."""

    async def send(self, version: int) -> None:
        """Send all weights.

        After a failure engines have no weights. Where the policy waits for a broadcast that never ends, it is
        killed: no checkpoint could be got from it.
        """
        update = self._update or await self._connect()
        await self._together([receiver.start_update() for receiver in self._receivers], "prepare")
        # Both sides take part in the same broadcasts.
        await self._together(
            [
                self._policy.broadcast_weights(),
                *(receiver.update(update) for receiver in self._receivers),
            ],
            "broadcast",
        )
        await self._together([receiver.finish_update(version) for receiver in self._receivers], "finish")

    async def _connect(self) -> dict[str, object]:
        """Form the group, once; return the description of what is sent."""
        address, port = await self._policy.find_endpoint()
        offsets, world_size = rank_offsets(len(self._receivers), engine_size=self._engine_size)
        info = {
            "master_address": address,
            "master_port": port,
            "world_size": world_size,
            "packed": True,
            "packed_buffer_size_bytes": PACKED_BYTES,
            "packed_num_buffers": PACKED_BUFFERS,
        }
        logger.info("connecting policy and engines over NCCL at %s:%d, %d ranks", address, port, world_size)
        await self._together(
            [
                self._policy.connect_engines(info),
                *(
                    receiver.connect({**info, "rank_offset": offset})
                    for receiver, offset in zip(self._receivers, offsets, strict=True)
                ),
            ],
            "connect",
        )
        self._update = await self._policy.describe_weights()
        return self._update

    async def _together(self, calls: Sequence[Coroutine[Any, Any, None]], what: str) -> None:
        """Wait for all calls, or for the first error: the others may then never return."""
        timeout_s = self._connect_timeout_s if what == "connect" else _SEND_TIMEOUT_S
        tasks = [asyncio.ensure_future(call) for call in calls]
        try:
            done, pending = await asyncio.wait(tasks, timeout=timeout_s, return_when=asyncio.FIRST_EXCEPTION)
            # The first one is that of the policy, whose last broadcast may be about to end.
            if what in _COLLECTIVE and tasks[0] in pending:
                await asyncio.wait(tasks[:1], timeout=self._grace_s)
                if not tasks[0].done():
                    self._policy.shutdown()
        finally:
            for task in tasks:
                task.cancel()
        errors = [error for task in done if (error := task.exception())]
        if errors:
            raise errors[0]
        if pending:
            raise WeightSyncError(
                f"{len(pending)} of {len(tasks)} parts of the transfer of weights did not {what} over NCCL "
                f"within {timeout_s:g} s: a process hangs, or the GPUs do not reach each other "
                "(NCCL_DEBUG=INFO shows where; NCCL_SOCKET_IFNAME names the network); repeat the command to "
                "resume, with actor_rollout_ref.rollout.weight_transfer=file to do without NCCL"
            )


def rank_offsets(num_engines: int, *, engine_size: int) -> tuple[list[int], int]:
    """Return the rank of each engine's first worker, and the size of the group; the policy is rank 0."""
    return [1 + engine * engine_size for engine in range(num_engines)], 1 + num_engines * engine_size


class BroadcastSender:
    """One rank's side of a publish: rank 0 broadcasts, the others only take part in gathering."""

    def __init__(
        self,
        weights: Readable,
        *,
        context: ParallelContext,
        join: Callable[..., Any] | None = None,
        broadcast: Callable[..., None] | None = None,
    ) -> None:
        """Read `weights` by gathering them over the ranks; `join` and `broadcast`: those of NCCL."""
        self._weights = weights
        self._context = context
        self._join: Callable[..., Any] = join or join_group
        self._broadcast = broadcast or broadcast_packed
        self._listener: socket.socket | None = None
        self._group: Any = None

    def listen(self, address: str) -> int:
        """Listen on this machine's address for those that will join; return the port."""
        self._listener = socket.create_server((address, 0))
        return int(self._listener.getsockname()[1])

    def connect(self, info: Mapping[str, object]) -> None:
        """Join the group, on rank 0. Raises WeightSyncError."""
        if self._context.rank != 0:
            return
        try:
            self._group = self._join(info, listener=self._listener, device=self._context.device)
        except RuntimeError as error:  # of NCCL, and of torch's rendezvous
            raise WeightSyncError(
                f"the policy cannot connect to the engines over NCCL: {error}; repeat the command to resume, "
                "with actor_rollout_ref.rollout.weight_transfer=file if NCCL does not connect these GPUs"
            ) from error

    def describe(self) -> dict[str, object]:
        """Return names, types and shapes in the order of the broadcast."""
        layout, _ = self._weights()
        names = order_weights(layout)
        return {
            "names": names,
            "dtype_names": [str(layout[name].dtype).removeprefix("torch.") for name in names],
            "shapes": [list(layout[name].shape) for name in names],
        }

    def send(self) -> None:
        """Gather and broadcast all weights. Collective: every rank must call it."""
        gathered = self._gather()
        if self._context.rank == 0:
            self._broadcast(gathered, group=self._group, device=self._context.device)
        else:
            for _ in gathered:
                pass

    def _gather(self) -> Iterator[tuple[str, Tensor]]:
        layout, read = self._weights()
        for name in order_weights(layout):
            yield name, read(name).detach()


def join_group(info: Mapping[str, Any], *, listener: socket.socket, device: torch.device) -> Any:
    """Open the group as its rank 0, with vLLM's code; returns when all have joined, at most after 300 s."""
    from vllm.distributed.device_communicators.pynccl import PyNcclCommunicator
    from vllm.utils.nccl import unpinned_nccl_env

    store = open_store(info, listener=listener)
    with torch.cuda.device(device), unpinned_nccl_env():
        return PyNcclCommunicator(store, device=device)


def open_store(info: Mapping[str, Any], *, listener: socket.socket) -> Any:
    """Serve on `listener` what the members of the group find each other by; return when all have come."""
    from vllm.distributed.utils import StatelessProcessGroup

    return StatelessProcessGroup.create(
        info["master_address"],
        info["master_port"],
        rank=0,
        world_size=info["world_size"],
        listen_socket=listener,
    )


def broadcast_packed(weights: Iterator[tuple[str, Tensor]], *, group: Any, device: torch.device) -> None:
    """Pack and broadcast weights to the other ranks of the group, with vLLM's code."""
    from vllm.distributed.weight_transfer.packed_tensor import packed_nccl_broadcast_producer

    with torch.cuda.device(device):
        torch.cuda.synchronize()  # vLLM packs on streams of its own, which do not wait for the update
        packed_nccl_broadcast_producer(
            weights,
            group,
            src=0,
            post_iter_func=lambda item: item[1],
            buffer_size_bytes=PACKED_BYTES,
            num_buffers=PACKED_BUFFERS,
        )
