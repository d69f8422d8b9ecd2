"""Weights for engines on GPUs of their own: ranks, order of calls, failures, and what vLLM unpacks."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.verl.workers.test_weight_ipc import LAYOUT, vllm_packing
from verl.errors import WeightSyncError
from verl.utils.actors import ActorError
from verl.workers.parallel import ParallelContext
from verl.workers.weight_nccl import BroadcastSender, NcclTransfer, open_store, rank_offsets

__all__ = ["vllm_packing"]  # a fixture


class Group:
    """A policy and engines that note their calls and meet, as in a collective of so many members."""

    def __init__(self, members: int) -> None:
        self.calls: list[str] = []
        self.barrier = asyncio.Barrier(members)

    async def meet(self, call: str) -> None:
        self.calls.append(call)
        await self.barrier.wait()


class Policy:
    def __init__(self, group: Group) -> None:
        self.group = group

    async def find_endpoint(self) -> tuple[str, int]:
        return "10.0.0.1", 5000

    async def connect_engines(self, info: Mapping[str, object]) -> None:
        await self.group.meet(f"policy of {info['world_size']} at {info['master_address']}")

    async def describe_weights(self) -> dict[str, object]:
        return {"names": ["a", "b"]}

    async def broadcast_weights(self) -> None:
        await self.group.meet("broadcast")

    def shutdown(self) -> None:
        self.group.calls.append("killed")


class Engine:
    def __init__(self, group: Group, *, fails: str | None = None, error: Exception | None = None) -> None:
        self.group, self.fails, self.error = group, fails, error

    async def note(self, call: str, *, meets: bool = False) -> None:
        if self.error is not None and call.startswith(self.fails or "never"):
            raise self.error
        if meets:
            await self.group.meet(call)
        else:
            self.group.calls.append(call)

    async def connect(self, info: Mapping[str, object]) -> None:
        await self.note(f"engine {info['rank_offset']} at {info['master_port']}", meets=True)

    async def start_update(self) -> None:
        await self.note("start")

    async def update(self, chunk: Mapping[str, Any]) -> None:
        await self.note(f"update {' '.join(chunk['names'])}", meets=True)

    async def finish_update(self, version: int) -> None:
        await self.note(f"finish {version}")


@pytest.mark.parametrize(
    ("num_engines", "engine_size", "expected"),
    [(1, 1, ([1], 2)), (3, 1, ([1, 2, 3], 4)), (3, 2, ([1, 3, 5], 7))],
)
def test_every_worker_of_every_engine_has_a_rank_of_its_own(
    num_engines: int, engine_size: int, expected: tuple[list[int], int]
) -> None:
    assert rank_offsets(num_engines, engine_size=engine_size) == expected


async def test_the_group_is_formed_once_and_both_sides_meet_in_every_broadcast() -> None:
    group = Group(3)
    transfer = NcclTransfer(Policy(group), [Engine(group), Engine(group)], engine_size=2)
    for version in (1, 2):
        await transfer.send(version)
    connected = ["policy of 5 at 10.0.0.1", "engine 1 at 5000", "engine 3 at 5000"]
    sent = ["start"] * 2 + ["broadcast"] + ["update a b"] * 2
    assert group.calls == connected + sent + ["finish 1"] * 2 + sent + ["finish 2"] * 2


@pytest.mark.parametrize(
    ("fails", "is_killed"), [("engine", True), ("start", False), ("update", True), ("finish", False)]
)
async def test_an_engine_that_ends_is_named_and_the_policy_is_killed_only_where_it_waits(
    fails: str, is_killed: bool
) -> None:
    group = Group(2)
    engine = Engine(group, fails=fails, error=ActorError("engine-0 has ended"))
    transfer = NcclTransfer(Policy(group), [engine], engine_size=1, grace_s=0.01)
    with pytest.raises(ActorError, match="engine-0 has ended"):
        await transfer.send(1)
    assert ("killed" in group.calls) is is_killed


async def test_what_never_ends_is_given_up() -> None:
    group = Group(3)
    transfer = NcclTransfer(
        Policy(group), [Engine(group)], engine_size=1, connect_timeout_s=0.01, grace_s=0.01
    )
    with pytest.raises(WeightSyncError, match=r"2 of 2 parts .* did not connect over NCCL within 0\.01 s"):
        await transfer.send(1)
    assert group.calls[-1] == "killed"


def test_where_the_policy_cannot_join_the_error_names_the_file() -> None:
    def refuse(info: Mapping[str, object], **_: object) -> None:
        raise RuntimeError("NCCL error: unhandled system error")

    context = ParallelContext(rank=0, world_size=1, device=torch.device("cpu"), mesh=None)
    sender = BroadcastSender(lambda: (LAYOUT, LAYOUT.__getitem__), context=context, join=refuse)
    with pytest.raises(WeightSyncError, match=r"unhandled system error.*weight_transfer=file"):
        sender.connect({})


def test_all_ranks_gather_in_one_order_and_vllm_unpacks_what_the_first_sends(vllm_packing: Any) -> None:
    weights = {name: torch.randn(meta.shape).mul(50).to(meta.dtype) for name, meta in LAYOUT.items()}
    gathered: dict[int, list[str]] = {0: [], 1: []}
    packed: list[Any] = []

    def broadcast(tensors: Iterator[tuple[str, Tensor]], *, group: Any, device: torch.device) -> None:
        assert (group, device.type) == ("group", "cpu")
        while (chunk := vllm_packing.pack_tensors(tensors, lambda item: item[1], 20)) is not None:
            packed.append(chunk)

    def make_sender(rank: int) -> BroadcastSender:
        def read(name: str) -> Tensor:
            gathered[rank].append(name)
            return weights[name]

        context = ParallelContext(rank=rank, world_size=2, device=torch.device("cpu"), mesh=None)
        return BroadcastSender(
            lambda: (LAYOUT, read), context=context, join=lambda *_, **__: "group", broadcast=broadcast
        )

    senders = [make_sender(rank) for rank in (0, 1)]
    for sender in senders:
        sender.connect({})
        sender.send()
    assert gathered[0] == gathered[1] == senders[0].describe()["names"] == ["wide", "a", "b", "c", "counts"]
    assert len(packed) > 1
    found = {}
    for chunk in packed:
        found |= dict(
            vllm_packing.unpack_tensor(
                chunk.packed_tensor, chunk.names, chunk.shapes, chunk.dtypes, chunk.tensor_sizes
            )
        )
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, weights[name], rtol=0, atol=0)


@pytest.mark.slow
@pytest.mark.vllm
async def test_the_members_of_a_group_meet_at_the_port_on_which_its_first_rank_listens() -> None:
    """The store of vLLM; NCCL itself needs GPUs."""
    from vllm.distributed.utils import StatelessProcessGroup

    groups: list[Any] = []

    def join(info: Mapping[str, Any], *, listener: socket.socket, device: torch.device) -> Any:
        groups.append(open_store(info, listener=listener))
        return groups[0]

    context = ParallelContext(rank=0, world_size=1, device=torch.device("cpu"), mesh=None)
    sender = BroadcastSender(lambda: (LAYOUT, LAYOUT.__getitem__), context=context, join=join)
    port = sender.listen("127.0.0.1")
    with pytest.raises(OSError, match="in use"):
        socket.create_server(("127.0.0.1", port))
    member = asyncio.to_thread(StatelessProcessGroup.create, "127.0.0.1", port, rank=1, world_size=2)
    info = {"master_address": "127.0.0.1", "master_port": port, "world_size": 2}
    _, other = await asyncio.gather(asyncio.to_thread(sender.connect, info), member)
    groups[0].broadcast_obj("unique id", src=0)
    assert other.broadcast_obj(None, src=0) == "unique id"


@pytest.mark.slow
@pytest.mark.vllm
async def test_vllm_takes_what_is_sent_to_its_engines() -> None:
    """The names of the fields; the GPUs themselves are not here."""
    from vllm.distributed.weight_transfer.nccl_engine import (
        NCCLWeightTransferInitInfo,
        NCCLWeightTransferUpdateInfo,
    )

    class Parsing(Engine):
        async def connect(self, info: Mapping[str, Any]) -> None:
            assert NCCLWeightTransferInitInfo(**info).packed
            await super().connect(info)

    group = Group(2)
    await NcclTransfer(Policy(group), [Parsing(group)], engine_size=1).send(1)
    context = ParallelContext(rank=0, world_size=1, device=torch.device("cpu"), mesh=None)
    described: dict[str, Any] = BroadcastSender(
        lambda: (LAYOUT, LAYOUT.__getitem__), context=context
    ).describe()
    NCCLWeightTransferUpdateInfo(**described)
