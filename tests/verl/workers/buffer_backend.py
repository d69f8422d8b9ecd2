"""vLLM's receiver of weights by CUDA IPC with one change: it opens a buffer in host memory.

vLLM's processes find it as a plugin, see `install`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch


def install(folder: Path) -> None:
    """Let a folder, on `sys.path`, offer the change to vLLM."""
    info = folder / "buffer_backend-0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: buffer-backend\nVersion: 0\n")
    (info / "entry_points.txt").write_text(f"[vllm.general_plugins]\nbuffer = {__name__}:register\n")


def register() -> None:
    """Have vLLM take chunks from the file that a handle names, with its own steps before and after them."""
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
    from vllm.distributed.weight_transfer.ipc_engine import IPCWeightTransferEngine
    from vllm.distributed.weight_transfer.packed_tensor import unpack_tensor

    class HostEngine(IPCWeightTransferEngine):
        def update_weights(self, update_info: dict[str, Any]) -> None:
            update = self.parse_update_info(update_info)
            assert self.packed
            (mapping,) = update.ipc_handles.values()
            packed = torch.from_file(*mapping, dtype=torch.uint8)[: sum(update.tensor_sizes)].clone()
            dtypes = [getattr(torch, name) for name in update.dtype_names]
            views = unpack_tensor(packed, update.names, update.shapes, dtypes, update.tensor_sizes)
            self.model.load_weights(views)

    WeightTransferEngineFactory._registry["ipc"] = lambda: HostEngine
