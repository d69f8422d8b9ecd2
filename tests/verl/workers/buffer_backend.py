"""A transfer backend of vLLM in which the buffer is a file that policy and engine map.

vLLM's processes find it as a plugin, see `install`.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

NAME = "buffer"
_PATH = "TEST_WEIGHT_BUFFER"
_SIZE = 450_000


def install(folder: Path) -> dict[str, str]:
    """Let a folder, on `sys.path`, offer the backend to vLLM; return what its processes need besides."""
    info = folder / "buffer_backend-0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: buffer-backend\nVersion: 0\n")
    (info / "entry_points.txt").write_text(f"[vllm.general_plugins]\nbuffer = {__name__}:register\n")
    return {_PATH: str(folder / "buffer")}


def map_buffer() -> Tensor:
    """Map the bytes of the file."""
    return torch.from_file(os.environ[_PATH], shared=True, size=_SIZE, dtype=torch.uint8)


def register() -> None:
    """Have vLLM take chunks from the file, with the steps of its IPC backend before and after them."""
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
    from vllm.distributed.weight_transfer.ipc_engine import IPCWeightTransferEngine
    from vllm.distributed.weight_transfer.packed_tensor import unpack_tensor

    class BufferEngine(IPCWeightTransferEngine):
        def update_weights(self, update_info: dict[str, Any]) -> None:
            sizes = update_info["tensor_sizes"]
            dtypes = [getattr(torch, name) for name in update_info["dtype_names"]]
            packed = map_buffer()[: sum(sizes)].clone()
            names, shapes = update_info["names"], update_info["shapes"]
            self.model.load_weights(unpack_tensor(packed, names, shapes, dtypes, sizes))

    if NAME not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(NAME, BufferEngine)
