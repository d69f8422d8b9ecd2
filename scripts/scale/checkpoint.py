"""Checkpoints and loading, of a random model on this machine: seconds per GB, and memory on the host."""

from __future__ import annotations

import multiprocessing
import tempfile
import threading
import time
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TypeVar

import torch

from verl.trainer.config.schema import ModelConfig, OptimConfig
from verl.workers.model import PolicyNetwork
from verl.workers.model_io import build_model, fill_model, sharding_units
from verl.workers.optimizer import make_optimizer
from verl.workers.parallel import Placement, Rendezvous, init_distributed, shard_model
from verl.workers.rank_state import export_state, read_state, stage_state, write_state

_Result = TypeVar("_Result")
_GB = 1e9
_RANKS = 2
_SIZES = {"vocab_size": 32_000, "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8}


def measure() -> dict[str, float]:
    """Return seconds per GB of the whole state, and the host memory of a rank that loads its part.

    `blocking_share`: of the time of a checkpoint, what training waits for. `export_peak_gb`: what the export
    takes beside the state; its largest tensor has 0.066 GB.
    """
    with tempfile.TemporaryDirectory(prefix="bench-checkpoint-") as scratch:
        folder = _make_model(Path(scratch))
        # First, and in processes of their own: what follows uses threads, after which none may be forked.
        memory = _load_on_ranks(folder)
        return memory | _save(folder, Path(scratch))


def _make_model(scratch: Path) -> Path:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(**_SIZES, num_attention_heads=8, num_key_value_heads=2, tie_word_embeddings=False)
    Qwen2ForCausalLM(config).save_pretrained(scratch / "model")
    return scratch / "model"


def _load_on_ranks(folder: Path) -> dict[str, float]:
    """Return the peak of host memory over ranks while they load, and the size of the weights."""
    context = multiprocessing.get_context("fork")
    server, receivers = Rendezvous(), []
    rendezvous = server.new_group()
    for rank in range(_RANKS):
        placement = Placement(rank=rank, world_size=_RANKS, rendezvous=rendezvous, num_threads=1)
        receiver, sender = context.Pipe(duplex=False)
        context.Process(target=_load_on_rank, args=(sender, folder, placement)).start()
        sender.close()
        receivers.append(receiver)
    results: list[tuple[float, float]] = [receiver.recv() for receiver in receivers]
    return {
        "weights_gb": results[0][1] / _GB,
        "load_peak_gb_per_rank_of_2": max(peak for peak, _ in results) / _GB,
    }


def _load_on_rank(sender: Connection, folder: Path, placement: Placement) -> None:
    torch.set_num_threads(1)
    context = init_distributed(placement)

    def load() -> int:
        model = build_model(ModelConfig(path=str(folder)), device="cpu", trainable=True)
        network = PolicyNetwork(model)
        shard_model(network, context=context, units=sharding_units(model), dtype=torch.float32)
        fill_model(network, model, folder=folder, device=context.device)
        return 4 * sum(parameter.numel() for parameter in network.parameters())

    sender.send(_watch_memory(load))


def _watch_memory(action: Callable[[], _Result]) -> tuple[float, _Result]:
    """Return the bytes by which this process grew at most, without mapped files, and the result."""
    before = peak = _anonymous_bytes()
    is_done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not is_done.wait(0.002):
            peak = max(peak, _anonymous_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    result = action()
    is_done.set()
    watcher.join()
    return max(peak, _anonymous_bytes()) - before, result


def _anonymous_bytes() -> int:
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return 1024 * int(status.partition("RssAnon:")[2].split()[0])


def _save(folder: Path, scratch: Path) -> dict[str, float]:
    """Return the seconds of one rank that holds the whole state."""
    context = init_distributed(Placement())
    model = build_model(ModelConfig(path=str(folder)), device="cpu", trainable=True)
    fill_model(model, model, folder=folder, device=context.device)
    optimizer = make_optimizer(model.parameters(), config=OptimConfig())
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    state = scratch / "state"
    seconds: dict[str, float] = {}

    def timed(name: str, action: Callable[[], object]) -> None:
        start = time.perf_counter()
        action()
        seconds[name] = time.perf_counter() - start

    stage = partial(stage_state, model, optimizer=optimizer, step=1, source=folder, context=context)
    staged = stage()  # the first one finds no memory
    timed("stage", stage)
    timed("write", lambda: write_state(state, staged, context=context))
    peak, _ = _watch_memory(
        lambda: timed(
            "export",
            lambda: export_state(
                state, scratch / "export", source=folder, dtype=torch.bfloat16, config=ModelConfig()
            ),
        )
    )
    timed(
        "load",
        lambda: read_state(state, model, optimizer=optimizer, source=folder, context=context, seed=0),
    )
    size = sum(file.stat().st_size for file in state.iterdir()) / _GB
    blocking = seconds["stage"] / (seconds["stage"] + seconds["write"] + seconds["export"])
    per_gb = {f"{name}_s_per_gb_of_state": value / size for name, value in seconds.items()}
    return {"state_gb": size, **per_gb, "blocking_share": blocking, "export_peak_gb": peak / _GB}
