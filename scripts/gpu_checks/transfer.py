"""How weights reach another process of the same GPU, and wait in host memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.multiprocessing
from safetensors.torch import load_file
from torch import Tensor
from torch.multiprocessing.reductions import rebuild_cuda_tensor

from gpu_checks.models import layout_of, random_weights, shape_of_size
from gpu_checks.recorder import Bench
from verl.trainer.plan.assumptions import GB
from verl.workers.offload import HostCopy
from verl.workers.tensor_files import write_weights
from verl.workers.weight_folder import WeightFolder
from verl.workers.weight_ipc import ChunkSender

_ROUNDS = 3
"""The first one also allocates the memory of the receiver."""
_WAIT_S = 60
_FLOAT32, _ADAM = 4, 8


def check_publish(bench: Bench) -> None:
    """Send the weights of 3 billion parameters to another process, through a shared buffer and a file."""
    # Forked before this process uses CUDA, which a fork would break.
    context = torch.multiprocessing.get_context("fork")
    orders, answers = context.Queue(), context.Queue()
    receiver = context.Process(target=_receive, args=(orders, answers, bench.device), daemon=True)
    receiver.start()
    weights = random_weights(shape_of_size("3B", is_tiny=bench.is_tiny), device=bench.device)
    layout = layout_of(weights)
    size = sum(tensor.nbytes for tensor in weights.values())
    bench.record("weights_gb", size / GB, unit="GB")

    def ask(*order: Any) -> Any:
        orders.put(order)
        answer = answers.get(timeout=_WAIT_S)
        if isinstance(answer, str):
            raise RuntimeError(f"the receiving process failed: {answer}")
        return answer

    sender = ChunkSender(lambda: (layout, weights.__getitem__), device=bench.device)
    chunks, handles = sender.share()
    (handle,) = handles.values()
    ask("open", handle)

    def send() -> None:
        for index, chunk in enumerate(chunks):
            sender.fill(index)
            ask("take", chunk)

    for _ in range(_ROUNDS):
        seconds = bench.seconds(send)
    _check_sum(ask("sum"), weights)
    unit = "bytes/s, copied in and out"
    bench.record("ipc_bytes_per_s", size / seconds, unit=unit, assumption="IPC_BYTES_PER_S")
    folder = WeightFolder(size)
    try:
        written_s = bench.seconds(
            lambda: write_weights(folder.path, layout, lambda name: weights[name].cpu(), max_bytes=2 * size)
        )
        read_s = bench.seconds(lambda: ask("read", str(folder.path / "model.safetensors")))
        _check_sum(ask("sum"), weights)
    finally:
        folder.remove()
    bench.record("file_write_s", written_s, unit="s, copied to the host, hashed and written")
    bench.record("file_read_s", read_s, unit="s, read to the device")
    speed = size / (written_s + read_s)
    bench.record("file_bytes_per_s", speed, unit="bytes/s", assumption="FILE_BYTES_PER_S")
    orders.put(("end",))
    receiver.join(_WAIT_S)
    sender.unshare()


def _receive(orders: Any, answers: Any, device: torch.device) -> None:
    """Take weights as an engine does: each is copied out of the buffer before the next chunk is filled."""
    kept: dict[str, Tensor] = {}
    buffer = torch.empty(0)

    def open_buffer(handle: tuple[Any, ...]) -> bool:
        nonlocal buffer
        is_mapped = device.type == "cpu"
        buffer = torch.from_file(*handle, dtype=torch.uint8) if is_mapped else rebuild_cuda_tensor(*handle)
        return True

    def take(chunk: Any) -> bool:
        for name, view in chunk.views(buffer):
            kept.setdefault(name, torch.empty_like(view)).copy_(view)
        return _finish(device)

    def read(path: str) -> bool:
        for name, tensor in load_file(path, device=str(device)).items():
            kept[name].copy_(tensor)
        return _finish(device)

    acts: dict[str, Callable[..., Any]] = {
        "open": open_buffer,
        "take": take,
        "read": read,
        "sum": lambda: _sum(kept),
    }
    while (order := orders.get())[0] != "end":
        try:
            answers.put(acts[order[0]](*order[1:]))
        except Exception as error:
            answers.put(f"{type(error).__name__}: {error}")


def _finish(device: torch.device) -> bool:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return True


def _sum(weights: dict[str, Tensor]) -> float:
    return sum(float(tensor.double().abs().sum()) for tensor in weights.values())


def _check_sum(received: float, weights: dict[str, Tensor]) -> None:
    sent = _sum(weights)
    if abs(received - sent) > 1e-9 * sent:
        raise AssertionError(f"other weights arrived: their sum is {received}, not {sent}")


def check_offload(bench: Bench) -> None:
    """Move weights and optimizer state of 1.5 billion parameters to page-locked host memory and back."""
    shape = shape_of_size("1.5B", is_tiny=bench.is_tiny)
    tensors = [
        torch.empty(
            tensor.numel() * bytes_per_number // 4, dtype=torch.float32, device=bench.device
        ).normal_()
        for bytes_per_number in (_FLOAT32, _ADAM)
        for tensor in random_weights(shape, device=bench.device).values()
    ]
    size = sum(tensor.nbytes for tensor in tensors)
    expected = float(tensors[-1].double().sum())
    copy = HostCopy(lambda: tensors)
    bench.record("state_gb", size / GB, unit="GB")
    first_s = bench.seconds(copy.release)
    bench.record("first_release_s", first_s, unit="s, page-locks the memory of the host")
    back_s = bench.seconds(lambda: copy.load(changes=True))
    out_s = bench.seconds(copy.release)
    copy.load(changes=False)
    if float(tensors[-1].double().sum()) != expected:
        raise AssertionError("other numbers came back from the host")
    for name, seconds in (("to_device", back_s), ("to_host", out_s)):
        unit = "bytes/s, one GPU alone"
        bench.record(f"{name}_bytes_per_s", size / seconds, unit=unit, assumption="HOST_BYTES_PER_S")
