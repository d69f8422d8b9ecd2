"""vLLM as the rollout uses it, alone on a GPU: decoding, reading, sleep and wake, weights from a policy."""

from __future__ import annotations

import asyncio
import time
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from gpu_checks.models import layout_of, shape_of_size, write_random_model, write_tokenizer
from gpu_checks.recorder import Bench
from verl.protocols import EnginePart
from verl.trainer.config.schema import RolloutConfig
from verl.trainer.plan.assumptions import ASLEEP_BYTES, GB
from verl.trainer.plan.seconds import decoding_step_s
from verl.trainer.plan.shape import ModelShape
from verl.types import Sampling
from verl.workers.weight_chunks import Chunk
from verl.workers.weight_ipc import ChunkSender, Handles, IpcTransfer

if TYPE_CHECKING:
    from verl.rollout.vllm_engine import VllmEngine

_STOP = ("</search>", "</answer>")
_FEW, _MANY = 64, 256
"""Sequences at a time: what a step takes of itself, and what for each sequence, is the line through both."""
_LENGTH, _READ_LENGTH = 200, 1000
_BYTES = 2


def check_engine(bench: Bench) -> None:
    """Measure an engine with a model of 1.5 billion parameters."""
    if find_spec("vllm") is None:
        bench.record("vllm", "not installed")
        return
    shape = shape_of_size("1.5B", is_tiny=bench.is_tiny)
    folder = bench.scratch / "model"
    write_random_model(folder, shape, device=bench.device)
    write_tokenizer(folder, num_ids=shape.vocab)
    asyncio.run(_measure(bench, folder, shape))


async def _measure(bench: Bench, folder: Path, shape: ModelShape) -> None:
    engine = _start(bench, folder)
    await _decode(bench, engine, shape)
    seconds = await _generate(bench, engine, count=_MANY, prompt=_READ_LENGTH, length=1)
    count = _size(bench, _MANY) * _size(bench, _READ_LENGTH)
    bench.record("read_tokens_per_s", count / seconds, unit="tokens/s of prompts")
    if bench.device.type == "cuda":
        await _sleep_and_publish(bench, engine, folder)
        await _decode(bench, engine, shape, prefix="published_")
    await engine.shutdown()


def _start(bench: Bench, folder: Path) -> VllmEngine:
    from verl.rollout.vllm_engine import VllmEngine

    began = time.perf_counter()
    is_cuda = bench.device.type == "cuda"
    engine = VllmEngine(
        RolloutConfig(enforce_eager=bench.is_tiny),
        model_path=str(folder),
        max_model_len=200 if bench.is_tiny else 2048,
        device=bench.device.type,
        weight_backend="ipc" if is_cuda else None,
    )
    bench.record("start_s", time.perf_counter() - began, unit="s, imports included")
    return engine


async def _decode(bench: Bench, engine: VllmEngine, shape: ModelShape, *, prefix: str = "") -> None:
    """Record milliseconds of a decoding step beside what the plan expects, and what processors had to do."""
    from serving.processes import count_processor_seconds  # of vLLM's requirements

    await _generate(bench, engine, count=_FEW, prompt=64, length=8)  # compiles what is left
    steps, step_s = _size(bench, _LENGTH), dict[int, float]()
    for count in (_FEW, _MANY):
        own, every = time.process_time(), count_processor_seconds()
        seconds = await _generate(bench, engine, count=count, prompt=64, length=_LENGTH)
        own, every = time.process_time() - own, count_processor_seconds() - every
        planned = _planned_step_s(bench, shape, count=count)
        unit = f"ms per token of {_size(bench, count)} sequences"
        name = f"{prefix}decode_{count}"
        step_s[count] = seconds / steps
        bench.record(f"{name}_ms", step_s[count] * 1000, unit=unit, planned=planned and planned * 1000)
        # A process that is busy for nearly all of a step limits it, unless several of its threads are.
        bench.record(f"{name}_requests_ms", own / steps * 1000, unit="processor ms of the requests' process")
        bench.record(f"{name}_core_ms", (every - own) / steps * 1000, unit="processor ms of vLLM's processes")
    if not bench.is_tiny:
        token_s = (step_s[_MANY] - step_s[_FEW]) / (_MANY - _FEW)
        alone_s = step_s[_FEW] - _FEW * token_s
        bench.record(
            f"{prefix}token_s", token_s, unit="s per sequence of a step", assumption="ENGINE_TOKEN_S"
        )
        bench.record(f"{prefix}step_s", alone_s, unit="s of a step beside that", assumption="ENGINE_STEP_S")


async def _generate(bench: Bench, engine: VllmEngine, *, count: int, prompt: int, length: int) -> float:
    """Return the seconds in which `count` prompts of random tokens get `length` tokens each."""
    random = np.random.default_rng()
    ids = random.integers(50, 1500, (_size(bench, count), _size(bench, prompt)), dtype=np.int32)
    began = time.perf_counter()
    sampling = [
        Sampling(temperature=1.0, max_tokens=_size(bench, length), stop=_STOP, seed=seed)
        for seed in range(len(ids))
    ]
    calls = (engine.generate(row, sampling=how) for row, how in zip(ids, sampling, strict=True))
    await asyncio.gather(*calls)
    return time.perf_counter() - began


async def _sleep_and_publish(bench: Bench, engine: VllmEngine, folder: Path) -> None:
    """Record sleep, wake, and a publish through a buffer that the engine maps."""
    began = time.perf_counter()
    await engine.sleep()
    asleep = time.perf_counter()
    free, whole = torch.cuda.mem_get_info()
    own = torch.cuda.memory_reserved()
    unit = "GB beside this process's tensors, with a context of its own"
    bench.record(
        "asleep_gb",
        (whole - free - own) / GB,
        unit=unit,
        planned=ASLEEP_BYTES / GB,
        assumption="ASLEEP_BYTES",
    )
    waking = time.perf_counter()
    await engine.wake(EnginePart.WEIGHTS)
    await engine.wake(EnginePart.CACHE)
    seconds = (asleep - began) + (time.perf_counter() - waking)
    bench.record("sleep_and_wake_s", seconds, unit="s", assumption="SLEEP_S")
    weights: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        weights |= load_file(file, device="cuda")
    transfer = IpcTransfer(_Weights(weights), [engine])
    size = sum(tensor.nbytes for tensor in weights.values())
    for version in (1, 2):  # the first one also connects
        began = time.perf_counter()
        await transfer.send(version)
        speed = size / (time.perf_counter() - began)
    bench.record("publish_bytes_per_s", speed, unit="bytes/s, one GPU", assumption="IPC_BYTES_PER_S")


class _Weights:
    """Implements `verl.workers.weight_ipc.ChunkSource` for weights of this process."""

    def __init__(self, weights: dict[str, Tensor]) -> None:
        layout = layout_of(weights)
        self._sender = ChunkSender(lambda: (layout, weights.__getitem__), device=torch.device("cuda"))

    async def share_weights(self) -> tuple[list[Chunk], Handles]:
        return self._sender.share()

    async def fill_chunk(self, index: int) -> None:
        self._sender.fill(index)

    async def unshare_weights(self) -> None:
        self._sender.unshare()


def _planned_step_s(bench: Bench, shape: ModelShape, *, count: int) -> float | None:
    """Return what the plan expects of a decoding step half-way: weights and cache are read once."""
    if bench.gpu.bandwidth is None:
        return None
    read = shape.parameters * _BYTES + count * (64 + _LENGTH / 2) * shape.kv_bytes(_BYTES)
    return decoding_step_s(read / bench.gpu.bandwidth, sequences=count)


def _size(bench: Bench, size: int) -> int:
    """Return a size, or a tiny one."""
    return min(size, 8) if bench.is_tiny else size
