"""Publishing on this machine: seconds per GB of weights to engines of vLLM, from one rank and from two."""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import numpy as np
import torch

from verl.protocols import Generate
from verl.rollout.host import RolloutWorker
from verl.rollout.pool import EnginePool
from verl.rollout.vllm_engine import VllmEngine
from verl.trainer.config.schema import ActorRolloutRefConfig, ModelConfig, RolloutConfig
from verl.utils.actors import Launcher, make_launcher
from verl.workers.model_io import build_model, engine_weights, fill_model
from verl.workers.parallel import Placement, Rendezvous
from verl.workers.weight_chunks import BUFFER_BYTES
from verl.workers.weight_file import FileTransfer
from verl.workers.weight_ipc import SharedWeights
from verl.workers.weight_sync import WeightPublisher
from verl.workers.worker_group import WorkerGroup

_GB = 1e9
_SIZES = {"vocab_size": 32_000, "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 6}
_PROBE = np.arange(2, 66, dtype=np.int32)


def measure() -> dict[str, float]:
    """Return seconds per GB of a publish with its comparison, and of packing the weights into chunks."""
    with tempfile.TemporaryDirectory(prefix="bench-publish-") as scratch:
        folder = _make_model(Path(scratch) / "model")
        figures = _pack(folder)
        return figures | asyncio.run(_publish(folder, size=figures["weights_gb"]))


def _make_model(folder: Path) -> Path:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(**_SIZES, num_attention_heads=8, num_key_value_heads=2, tie_word_embeddings=False)
    Qwen2ForCausalLM(config).save_pretrained(folder)
    return folder


def _pack(folder: Path) -> dict[str, float]:
    """Return the size of the weights in float32, and the seconds of filling a buffer with bfloat16."""
    model = build_model(ModelConfig(path=str(folder)), device="cpu", trainable=True)
    fill_model(model, model, folder=folder, device=torch.device("cpu"))
    layout, read = engine_weights(model, dtype=torch.bfloat16, with_head=False)
    shared = SharedWeights(layout, read, buffer=torch.zeros(BUFFER_BYTES // 10, dtype=torch.uint8))
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        for index in range(len(shared.chunks)):
            shared.fill(index)
        seconds.append(time.perf_counter() - start)
    sizes = [size for chunk in shared.chunks for size in chunk.sizes]
    return {"weights_gb": 2 * sum(sizes) / _GB, "pack_s_per_gb": min(seconds) / sum(sizes) * _GB}


async def _publish(folder: Path, *, size: float) -> dict[str, float]:
    """Return the seconds through the file: the best of three publishes after the first."""
    config = ActorRolloutRefConfig(
        model=ModelConfig(path=str(folder)), rollout=RolloutConfig(cpu_kv_cache_gib=0.05)
    )
    figures = {}
    launcher = make_launcher("ray")
    try:
        engines = _launch_engines(launcher, config.rollout, folder)
        for ranks in (1, 2):
            policy = WorkerGroup.launch(
                launcher,
                config,
                Placement(world_size=ranks, num_threads=1),
                name=f"policy-of-{ranks}",
                rendezvous=Rendezvous(),
                total_steps=1,
                seed=0,
                trainable=True,
            )
            await policy.wait_until_ready()
            await engines.wait_until_ready()
            for count in (1, 2):
                receivers = engines.receivers[:count]
                transfer = FileTransfer(policy, receivers)
                publisher = WeightPublisher(policy, receivers, transfer, probe_ids=_PROBE, tolerance=1e-3)
                seconds = [await _time(publisher, version=version) for version in range(4)]
                figures[f"{ranks}_ranks_{count}_engines_s_per_gb"] = min(seconds[1:]) / size
            policy.shutdown()
        await engines.shutdown()
        return figures
    finally:
        launcher.shutdown()


async def _time(publisher: WeightPublisher, *, version: int) -> float:
    start = time.perf_counter()
    await publisher.publish(version=version)
    return time.perf_counter() - start


def _launch_engines(launcher: Launcher, rollout: RolloutConfig, folder: Path) -> EnginePool:
    engine = partial(
        VllmEngine, rollout, model_path=str(folder), max_model_len=128, dtype="float32", num_threads=1
    )
    actors = [
        launcher.launch(
            RolloutWorker,
            kwargs={"engine": engine, "open_agent": _open_none},
            name=f"engine-{index}",
            max_concurrency=8,
        )
        for index in range(2)
    ]
    return EnginePool(actors, max_concurrent=1, request_timeout_s=120)


@asynccontextmanager
async def _open_none(engine: Generate) -> AsyncIterator[None]:  # noqa: ARG001
    """Play no episodes."""
    yield
