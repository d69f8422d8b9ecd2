"""Trainer and a real engine: what is published is what is sampled from, tied embeddings or not."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from tests.fakes import make_tied_model
from tests.verl.workers import buffer_backend
from tests.verl.workers.episodes import launch_group, make_actor, make_config, random_batch
from verl.errors import WeightSyncError
from verl.trainer.config.pools import SLOT_RANKS, slot_rank
from verl.trainer.config.schema import RolloutConfig
from verl.types import Sampling
from verl.utils.actors import make_launcher
from verl.workers import weight_ipc
from verl.workers.model_io import list_targets, prepare_engine_model
from verl.workers.weight_file import FileTransfer
from verl.workers.weight_ipc import IpcTransfer, describe_chunk
from verl.workers.weight_sync import WeightPublisher

PROBE = np.arange(2, 60, dtype=np.int32)


@pytest.fixture
def tied_model(tmp_path: Path) -> Path:
    return make_tied_model(tmp_path / "tied")


@pytest.mark.slow
@pytest.mark.vllm
@pytest.mark.timeout(900)
async def test_a_tied_model_reaches_the_cpu_engine(
    tied_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through a file, and in chunks of a shared buffer."""
    from verl.rollout.vllm_engine import VllmEngine

    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("VLLM_ALLOW_INSECURE_SERIALIZATION", "0")  # the engine sets it
    monkeypatch.setattr(weight_ipc, "BUFFER_BYTES", 450_000)
    buffer_backend.install(tmp_path)
    launcher = make_launcher("local")
    config = make_config(tied_model, actor=make_actor(lr=5e-2))
    policy = launch_group(launcher, config)
    engine = VllmEngine(
        RolloutConfig(cpu_kv_cache_gib=0.05),
        model_path=str(prepare_engine_model(config.model, device="cpu", folder=tmp_path / "engine")),
        dtype="float32",
        max_model_len=256,
        num_threads=1,
        weight_backend="ipc",
    )
    engine.node = 0  # type: ignore[attr-defined]  # its actor has one
    file, ipc = (
        WeightPublisher(policy, [engine], transfer, probe_ids=PROBE, tolerance=1e-3)
        for transfer in (FileTransfer(policy, [engine]), IpcTransfer(policy, [engine]))
    )
    try:
        for version, publisher in enumerate((file, ipc)):
            await publisher.verify(version=2 * version)
            before = await engine.score(PROBE)
            for _ in range(3):
                await policy.update(random_batch(6, seed=version))
            assert await publisher.publish(version=2 * version + 1) < 1e-4
            assert np.abs(await engine.score(PROBE) - before).mean() > 0.1
            assert await engine.version() == 2 * version + 1
        chunks, handles = await policy.share_weights()
        assert len(chunks) > 2
        with pytest.raises(WeightSyncError, match="none to sample with"):  # nothing was started
            await engine.update(describe_chunk(chunks[0], handles))
        await policy.unshare_weights()
        assert await engine.version() == -1
        load_weights = engine.load_weights
        for left_out in (
            "model.embed_tokens.weight",
            "model.layers.1.self_attn.o_proj.weight",
            "model.layers.0.mlp.down_proj.weight",
            "model.layers.1.post_attention_layernorm.weight",
        ):
            await file.publish(version=4)
            engine.load_weights = partial(load_without, load_weights, left_out)  # type: ignore[method-assign]
            with pytest.raises(WeightSyncError, match=r"engine 0 does not sample from the policy.*lock"):
                await file.verify(version=4)
            engine.load_weights = load_weights  # type: ignore[method-assign]
        assert await file.publish(version=5) < 1e-4
    finally:
        await engine.shutdown()
        launcher.shutdown()


async def load_without(
    load_weights: Callable[[str, int], Awaitable[None]], name: str, folder: str, version: int
) -> None:
    """Load weights as an engine that keeps one of them as it was."""
    path = Path(folder) / "model.safetensors"
    weights = load_file(path)
    del weights[name]
    save_file(weights, path)
    await load_weights(folder, version)


async def _ignore(folder: str, version: int) -> None:
    """Keep stale weights."""


@pytest.mark.slow
@pytest.mark.vllm
@pytest.mark.timeout(900)
async def test_adapters_alone_reach_the_engine(tied_model: Path, tmp_path: Path) -> None:
    """Version after version, beside weights that the engine keeps."""
    from vllm.config.lora import MaxLoRARanks

    from verl.rollout.vllm_engine import AdapterSlot, VllmEngine

    assert get_args(MaxLoRARanks) == SLOT_RANKS
    config = make_config(
        tied_model, actor=make_actor(lr=5e-2), lora_rank=4, lora_alpha=8.0, lora_transfer="adapter"
    )
    launcher = make_launcher("local")
    policy = launch_group(launcher, config)
    rank = slot_rank(config.model)
    assert rank is not None
    engine = VllmEngine(
        RolloutConfig(cpu_kv_cache_gib=0.05),
        model_path=str(tied_model),
        dtype="float32",
        max_model_len=256,
        num_threads=1,
        weight_backend=AdapterSlot(rank=rank, layers=list_targets(config.model)),
    )
    engine.node = 0  # type: ignore[attr-defined]  # its actor has one
    publisher = WeightPublisher(
        policy, [engine], FileTransfer(policy, [engine]), probe_ids=np.arange(2, 60), tolerance=1e-3
    )
    # Longer than a block of the prefix cache, which a version must not take over from the one before.
    prompt = np.arange(2, 90, dtype=np.int32)
    greedy = Sampling(temperature=0.0, max_tokens=4, stop=(), seed=0)
    try:
        await publisher.verify(version=0)
        before = await engine.score(prompt)
        np.testing.assert_allclose(before, await policy.probe(prompt), atol=1e-4)
        for version in (1, 2):
            await engine.generate(prompt, sampling=greedy)
            await policy.update(random_batch(6, seed=version))
            assert await publisher.publish(version=version) < 1e-4
            sampled = await engine.generate(prompt, sampling=greedy)
            expected = await policy.probe(np.concatenate([prompt, sampled.ids]))
            np.testing.assert_allclose(sampled.log_probs, expected[len(prompt) :], atol=1e-4)
            assert sampled.version == version
            after = await engine.score(prompt)
            assert np.abs(after - before).mean() > 0.01
            before = after
        with pytest.raises(WeightSyncError, match=r"lora_transfer=merged if vLLM cannot load"):
            await engine.load_weights(str(tied_model), 3)
        assert await engine.version() == -1
        engine.load_weights = _ignore  # type: ignore[method-assign]
        await policy.update(random_batch(6, seed=3))
        with pytest.raises(WeightSyncError, match="engine 0 does not sample from the policy"):
            await publisher.publish(version=3)
        with pytest.raises(WeightSyncError, match="engine 0 does not sample from the policy"):
            await publisher.verify(version=3)
    finally:
        await engine.shutdown()
        launcher.shutdown()
