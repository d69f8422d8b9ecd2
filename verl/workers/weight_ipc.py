"""Hand weights to engines that run on the GPUs of the ranks, through a buffer that both processes map.

A rank gathers the weights chunk by chunk into its buffer, whose CUDA handle its engine has opened; the engine
copies the chunk before the next one is gathered. Nothing passes through the memory of the host.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from typing import Any, Protocol

import torch
from torch import Tensor

from verl.errors import WeightSyncError
from verl.utils.shutdown import close_quietly
from verl.workers.tensor_files import Layout, Readable
from verl.workers.weight_chunks import BUFFER_BYTES, Chunk, buffer_size, plan_chunks
from verl.workers.weight_folder import WeightFolder

Handles = dict[str, tuple[Any, ...]]
"""What opens each buffer in another process, by the UUID of its GPU; for one in host memory, by its file."""


class ChunkSource(Protocol):
    """The part of the policy that sends chunks. Each call returns when all ranks are done."""

    async def share_weights(self) -> tuple[list[Chunk], Handles]:
        """Allocate a buffer on every rank; return what will lie in it, and how to open all of them."""
        ...

    async def fill_chunk(self, index: int) -> None:
        """Gather the tensors of a chunk into the buffers."""
        ...

    async def unshare_weights(self) -> None:
        """Free the buffers."""
        ...


class ChunkReceiver(Protocol):
    """The part of an engine that takes chunks. Each method raises WeightSyncError."""

    async def connect(self, info: Mapping[str, object]) -> None:
        """Prepare once for the weights of `update`."""
        ...

    async def start_update(self) -> None:
        """Prepare for new weights; the engine has none until `finish_update`."""
        ...

    async def update(self, chunk: Mapping[str, object]) -> None:
        """Load the tensors of a chunk; they are copied when this returns."""
        ...

    async def finish_update(self, version: int) -> None:
        """Use the new weights; completions carry `version` from then on."""
        ...


class IpcTransfer:
    """Implements `verl.workers.weight_sync.WeightTransfer` by CUDA IPC."""

    def __init__(self, policy: ChunkSource, receivers: Sequence[ChunkReceiver]) -> None:
        self._policy = policy
        self._receivers = tuple(receivers)
        self._is_connected = False

    async def send(self, version: int) -> None:
        """Send all weights. A failure leaves engines without weights."""
        async with AsyncExitStack() as stack:
            close_quietly(stack, self._policy.unshare_weights)
            if not self._is_connected:
                await self._on_all(lambda receiver: receiver.connect({"packed": True}))
                self._is_connected = True
            chunks, handles = await self._policy.share_weights()
            await self._on_all(lambda receiver: receiver.start_update())
            for index, chunk in enumerate(chunks):
                await self._policy.fill_chunk(index)
                update = describe_chunk(chunk, handles)
                await self._on_all(lambda receiver, update=update: receiver.update(update))
            await self._on_all(lambda receiver: receiver.finish_update(version))

    async def _on_all(self, call: Callable[..., Any]) -> None:
        """Wait for all engines also after an error: one may still read the buffer."""
        results = await asyncio.gather(*map(call, self._receivers), return_exceptions=True)
        for result in results:
            if isinstance(result, BaseException):
                raise result


def describe_chunk(chunk: Chunk, handles: Handles) -> dict[str, object]:
    """Return a chunk in the terms of vLLM's `IPCWeightTransferUpdateInfo`."""
    return {
        "names": list(chunk.names),
        "dtype_names": [str(dtype).removeprefix("torch.") for dtype in chunk.dtypes],
        "shapes": [list(shape) for shape in chunk.shapes],
        "tensor_sizes": list(chunk.sizes),
        "ipc_handles": handles,
    }


class SharedWeights:
    """The buffer of one rank, and what is gathered into it."""

    def __init__(self, layout: Layout, read: Callable[[str], Tensor], *, buffer: Tensor) -> None:
        """Take `read`, which gathers one weight over the ranks."""
        self.chunks = plan_chunks(layout, buffer_bytes=len(buffer))
        self._read = read
        self._buffer = buffer

    def fill(self, index: int) -> None:
        """Gather the tensors of a chunk. Collective: every rank must call it."""
        for name, view in self.chunks[index].views(self._buffer):
            view.copy_(self._read(name))
        wait_for_copies(self._buffer)


class ChunkSender:
    """One rank's side of a publish: its buffer, from `share` to `unshare`."""

    def __init__(self, weights: Readable, *, device: torch.device) -> None:
        """Read `weights` by gathering them over the ranks."""
        self._weights = weights
        self._device = device
        self._shared: SharedWeights | None = None
        self._folder: WeightFolder | None = None

    def share(self) -> tuple[list[Chunk], Handles]:
        """Allocate the buffer; return its chunks, and how the engine opens it, once."""
        layout, read = self._weights()
        size = buffer_size(layout, preferred=BUFFER_BYTES)
        if self._device.type == "cpu":
            self._folder = WeightFolder(size)
            mapping = (str(self._folder.path / "buffer"), True, size)
            buffer = torch.from_file(*mapping, dtype=torch.uint8)
            handles: Handles = {mapping[0]: mapping}
        else:
            buffer = torch.empty(size, dtype=torch.uint8, device=self._device)
            handles = export_handle(buffer)
        self._shared = SharedWeights(layout, read, buffer=buffer)
        return self._shared.chunks, handles

    def fill(self, index: int) -> None:
        """Gather the tensors of a chunk into the buffer. Collective: every rank must call it."""
        assert self._shared is not None
        self._shared.fill(index)

    def unshare(self) -> None:
        """Free the buffer, once the engine has closed it."""
        self._shared = None
        free_shared(self._device)
        if self._folder is not None:
            self._folder.remove()
            self._folder = None


def export_handle(buffer: Tensor) -> Handles:
    """Return the CUDA handle of a buffer by the UUID of its GPU. Raises WeightSyncError."""
    from torch.multiprocessing.reductions import reduce_tensor

    try:
        _, arguments = reduce_tensor(buffer)
    except RuntimeError as error:  # of CUDA
        raise WeightSyncError(
            f"the policy cannot share memory of its GPU with an engine: {error}; repeat the command to "
            "resume, with actor_rollout_ref.rollout.weight_transfer=file if CUDA IPC is forbidden here"
        ) from error
    return {str(torch.cuda.get_device_properties(buffer.device).uuid): arguments}


def wait_for_copies(buffer: Tensor) -> None:
    """Wait until what was copied into a buffer can be read by another process."""
    if buffer.device.type == "cuda":
        torch.cuda.synchronize(buffer.device)


def free_shared(device: torch.device) -> None:
    """Free the memory of buffers that other processes have closed."""
    if device.type == "cuda":
        torch.cuda.ipc_collect()
        torch.cuda.empty_cache()
