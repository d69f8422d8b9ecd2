"""Weights in chunks of a shared buffer: on two gloo ranks, read by other processes with vLLM's own code."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.multiprocessing
from safetensors.torch import load_file
from torch import Tensor

from tests.verl.workers.episodes import launch_group, make_config
from verl.errors import WeightSyncError
from verl.utils.actors import LocalLauncher
from verl.workers import weight_ipc
from verl.workers.weight_chunks import BUFFER_BYTES, Chunk, buffer_size, plan_chunks
from verl.workers.weight_ipc import Handles, IpcTransfer, SharedWeights, describe_chunk, export_handle


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


LAYOUT = {
    "a": meta(3, 2),
    "counts": meta(5, dtype=torch.uint8),
    "empty": meta(0, 4),
    "b": meta(7),
    "wide": meta(2, 2, dtype=torch.float32),
    "c": meta(4, 2),
}
"""12, 5, 0, 14, 16 and 16 bytes."""


@pytest.mark.parametrize(
    ("buffer_bytes", "names"),
    [
        (1000, [["wide", "a", "b", "c", "counts"]]),
        (30, [["wide", "a"], ["b", "c"], ["counts"]]),
        (16, [["wide"], ["a"], ["b"], ["c"], ["counts"]]),
    ],
)
def test_chunks_fill_the_buffer_in_order_and_split_nothing(buffer_bytes: int, names: list[list[str]]) -> None:
    chunks = plan_chunks(LAYOUT, buffer_bytes=buffer_bytes)
    assert [list(chunk.names) for chunk in chunks] == names
    for chunk in chunks:
        assert sum(chunk.sizes) <= buffer_bytes
        for name, view in chunk.views(torch.zeros(buffer_bytes, dtype=torch.uint8)):
            assert (view.shape, view.dtype) == (LAYOUT[name].shape, LAYOUT[name].dtype)


def test_a_buffer_has_room_for_the_largest_tensor_and_is_no_larger_than_the_model() -> None:
    assert buffer_size(LAYOUT, preferred=4) == 16
    assert buffer_size(LAYOUT, preferred=20) == 20
    assert buffer_size(LAYOUT, preferred=BUFFER_BYTES) == 63
    with pytest.raises(ValueError, match="wide has 16 bytes, more than the buffer of 15"):
        plan_chunks(LAYOUT, buffer_bytes=15)


@pytest.fixture(scope="module")
def vllm_packing() -> ModuleType:
    """vLLM's own module that unpacks chunks, without the rest of vLLM."""
    package = importlib.util.find_spec("vllm")
    assert package is not None
    assert package.submodule_search_locations
    path = Path(package.submodule_search_locations[0], "distributed/weight_transfer/packed_tensor.py")
    spec = importlib.util.spec_from_file_location("packed_tensor", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_vllm_finds_every_tensor_of_a_chunk(vllm_packing: ModuleType) -> None:
    tensors = {
        name: torch.randn(tensor.shape).mul(50).to(tensor.dtype)
        for name, tensor in LAYOUT.items()
        if tensor.numel()
    }
    shared = SharedWeights(LAYOUT, tensors.__getitem__, buffer=torch.zeros(30, dtype=torch.uint8))
    found = {}
    for index, chunk in enumerate(shared.chunks):
        shared.fill(index)
        update = describe_chunk(chunk, {})
        dtypes = [getattr(torch, name) for name in update["dtype_names"]]  # type: ignore[attr-defined]
        packed = shared._buffer[: sum(chunk.sizes)]
        views = vllm_packing.unpack_tensor(
            packed, update["names"], update["shapes"], dtypes, update["tensor_sizes"]
        )
        found.update((name, view.clone()) for name, view in views)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=0)


def read_chunks(requests: Any, answers: Any) -> None:
    """Be an engine in another process: open the buffer of a rank, and copy the chunks that lie in it."""
    while (request := requests.get()) is not None:
        chunk, mapping = request
        views = chunk.views(torch.from_file(*mapping, dtype=torch.uint8))
        answers.put({name: view.view(torch.uint8).tolist() for name, view in views})


class OtherProcess:
    """An engine in another process."""

    def __init__(self) -> None:
        context = torch.multiprocessing.get_context("spawn")
        self.requests, self.answers = context.Queue(), context.Queue()
        arguments = (self.requests, self.answers)
        self.process = context.Process(target=read_chunks, args=arguments, daemon=True)
        self.process.start()
        self.weights: dict[str, list[int]] = {}
        self.version = -1

    async def connect(self, info: Mapping[str, object]) -> None:
        assert info == {"packed": True}

    async def start_update(self) -> None:
        self.weights.clear()

    async def update(self, chunk: Mapping[str, Any]) -> None:
        described = Chunk(
            names=chunk["names"],
            dtypes=tuple(getattr(torch, name) for name in chunk["dtype_names"]),
            shapes=chunk["shapes"],
            sizes=chunk["tensor_sizes"],
        )
        (mapping,) = chunk["ipc_handles"].values()
        self.requests.put((described, mapping))
        self.weights |= self.answers.get(timeout=120)

    async def finish_update(self, version: int) -> None:
        self.version = version

    def close(self) -> None:
        self.requests.put(None)
        self.process.join()


@pytest.mark.slow
async def test_an_engine_in_another_process_gets_every_weight_through_one_small_buffer(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weight_ipc, "BUFFER_BYTES", 5000)
    launcher = LocalLauncher()
    policy = launch_group(launcher, make_config(model_folder, dtype="bfloat16"))
    engine = OtherProcess()
    transfer = IpcTransfer(policy, [engine])
    try:
        for version in (4, 5):
            await transfer.send(version)
            (folder,) = await policy.export_weights()
            exported = load_file(Path(folder) / "model.safetensors")
            assert engine.weights == {name: t.view(torch.uint8).tolist() for name, t in exported.items()}
            assert engine.version == version
            await policy.drop_weights()
            await policy.perturb(0)
        chunks, _ = await policy.share_weights()
        assert len(chunks) > 3
        await policy.unshare_weights()
    finally:
        engine.close()
        launcher.shutdown()


class NotingEngine:
    def __init__(self, calls: list[str], *, fails: str | None = None) -> None:
        self.calls, self.fails = calls, fails

    def note(self, call: str) -> None:
        self.calls.append(call)
        if call == self.fails:
            raise WeightSyncError(f"{call} failed")

    async def connect(self, info: Mapping[str, object]) -> None:
        self.note("connect")

    async def start_update(self) -> None:
        self.note("start")

    async def update(self, chunk: Mapping[str, Any]) -> None:
        self.note(f"update {' '.join(chunk['names'])} by {' '.join(chunk['ipc_handles'])}")

    async def finish_update(self, version: int) -> None:
        self.note(f"finish {version}")


class NotingPolicy:
    def __init__(self, calls: list[str]) -> None:
        self.calls = calls

    async def share_weights(self) -> tuple[list[Chunk], Handles]:
        self.calls.append("share")
        return plan_chunks(LAYOUT, buffer_bytes=30), {"GPU-a": (1,), "GPU-b": (2,)}

    async def fill_chunk(self, index: int) -> None:
        self.calls.append(f"fill {index}")

    async def unshare_weights(self) -> None:
        self.calls.append("unshare")


async def test_a_chunk_is_filled_when_all_engines_have_copied_the_one_before() -> None:
    calls: list[str] = []
    transfer = IpcTransfer(NotingPolicy(calls), [NotingEngine(calls), NotingEngine(calls)])
    by = "by GPU-a GPU-b"
    sent = [
        "share", "start", "start",
        "fill 0", *[f"update wide a {by}"] * 2,
        "fill 1", *[f"update b c {by}"] * 2,
        "fill 2", *[f"update counts {by}"] * 2,
        "finish {0}", "finish {0}", "unshare",
    ]  # fmt: skip
    for version in (1, 2):
        await transfer.send(version)
    assert calls == ["connect"] * 2 + [call.format(version) for version in (1, 2) for call in sent]


async def test_the_buffer_is_freed_when_no_engine_reads_it_any_more() -> None:
    calls: list[str] = []
    broken = NotingEngine(calls, fails="update b c by GPU-a GPU-b")
    transfer = IpcTransfer(NotingPolicy(calls), [broken, NotingEngine(calls)])
    with pytest.raises(WeightSyncError, match="update b c"):
        await transfer.send(1)
    assert calls[-4:] == ["fill 1", *["update b c by GPU-a GPU-b"] * 2, "unshare"]


def test_where_memory_cannot_be_shared_the_error_names_the_file() -> None:
    """Torch refuses to share what has a gradient, as CUDA refuses where IPC is forbidden."""
    buffer = torch.zeros(2, requires_grad=True) * 1
    with pytest.raises(WeightSyncError, match=r"requires_grad.*weight_transfer=file"):
        export_handle(buffer)
