"""The policy worker alone on a GPU: loading, log-probs, update, and attention without padding."""

from __future__ import annotations

import inspect
import resource
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import varlen

from gpu_checks.models import recipe_config, shape_of_size, write_random_model
from gpu_checks.recorder import Bench
from scale.packing import random_batch
from verl.forest import Forest
from verl.trainer.config.schema import ModelConfig
from verl.trainer.plan.assumptions import GB
from verl.trainer.plan.memory import Phase, list_items, total
from verl.trainer.plan.setup import Setup, make_setup
from verl.trainer.plan.shape import ModelShape
from verl.workers.attention import AttentionBlocks, attend_by_flash, attend_by_sdpa
from verl.workers.batch import TrainBatch, deal_rows, make_mini_batches, pack_rows
from verl.workers.model import PolicyNetwork
from verl.workers.model_io import build_model, fill_model
from verl.workers.parallel import Placement
from verl.workers.policy import PolicyWorker

_WEIGHTS, _ADAM = "policy: ", "optimizer: Adam"
_NOT_IN_TORCH = ("CUDA contexts", "reference", "engine")
"""Planned items of a rank that are not among the tensors of the policy's own process."""
_SPEED_LAYERS = 4
_TOLERANCE = 0.02
"""Between kernels in bfloat16, which has 8 significant bits."""


def check_policy(bench: Bench, size: str, *, lora_rank: int = 0) -> None:
    """Measure a policy of a size: memory beside the plan, tokens per second, share of peak FLOP/s."""
    accept_older_torch()
    shape = shape_of_size(size, is_tiny=bench.is_tiny)
    folder = bench.scratch / "model"
    bench.record("write_s", bench.seconds(lambda: write_random_model(folder, shape, device=bench.device)))
    setup = make_setup(recipe_config(folder, lora_rank=lora_rank), shape, bench.gpu)
    worker = _load(bench, setup, lora_rank=lora_rank)
    batch = _batch(bench, num_groups=2 if bench.is_tiny else 16)
    batch = _measure_log_probs(bench, worker, batch, setup=setup)
    _measure_update(bench, worker, batch, setup=setup)


def check_attention(bench: Bench) -> None:
    """Compare attention over packed rows with SDPA, and its speed with that of padded rows."""
    accept_older_torch()
    shape = shape_of_size("3B", is_tiny=bench.is_tiny)
    batch = _batch(bench, num_groups=1 if bench.is_tiny else 2)
    if bench.device.type == "cuda":
        _compare_kernels(bench, pack_rows(batch), shape=shape)
    folder = bench.scratch / "model"
    write_random_model(folder, shape, device=bench.device, layers=min(_SPEED_LAYERS, shape.layers))
    device = bench.device.type
    model = build_model(ModelConfig(path=str(folder)), device=device, trainable=False)
    fill_model(PolicyNetwork(model), model, folder=folder, device=bench.device)
    decoder = model.requires_grad_(True).get_decoder()
    forest = pack_rows(batch)
    ids, positions = (torch.tensor(x, device=device).long()[None] for x in (forest.ids, forest.positions))

    def packed() -> None:
        blocks = AttentionBlocks(forest, device=bench.device)
        result = decoder(input_ids=ids, position_ids=positions, blocks=blocks, use_cache=False)
        result.last_hidden_state.float().square().mean().backward()

    rows, mask = _padded(batch, device=device)
    model.set_attn_implementation("sdpa")

    def padded() -> None:
        result = decoder(input_ids=rows, attention_mask=mask, use_cache=False)
        result.last_hidden_state.float().square().mean().backward()

    padded()
    padded_s = bench.seconds(padded, repeats=1 if bench.is_tiny else 5)
    model.set_attn_implementation("packed_sdpa" if device == "cpu" else "packed_varlen")
    packed()
    packed_s = bench.seconds(packed, repeats=1 if bench.is_tiny else 5)
    real = int(batch.lengths.sum())
    bench.record("padded_tokens_per_s", real / padded_s, unit="real tokens/s, 4 layers, forward and backward")
    bench.record("packed_tokens_per_s", real / packed_s, unit="the same")
    bench.record("padded_per_real", rows.numel() / real, unit="tokens")
    bench.record("packed_per_real", ids.numel() / real, unit="tokens")


def accept_older_torch() -> None:
    """Let `varlen_attn` of torch before 2.13, which a borrowed machine may have, take fewer heads of keys."""
    found = varlen.varlen_attn
    if "enable_gqa" not in inspect.signature(found).parameters:
        varlen.varlen_attn = partial(_attend_with_copied_heads, found)


def _attend_with_copied_heads(
    attend: Callable[..., Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    enable_gqa: bool,
    **others: Any,
) -> Tensor:
    """Call `attend` with as many heads of keys and values as of queries; all are [T, heads, D]."""
    copies = query.shape[1] // key.shape[1] if enable_gqa else 1
    return attend(query, key.repeat_interleave(copies, 1), value.repeat_interleave(copies, 1), **others)


def _compare_kernels(bench: Bench, forest: Forest, *, shape: ModelShape) -> None:
    """Raise AssertionError unless both kernels give the same attention and gradients."""
    blocks = AttentionBlocks(forest, device=bench.device)
    counts = (shape.heads, shape.kv_heads, shape.kv_heads)
    heads = [
        torch.randn(1, count, len(forest.ids), shape.head_dim, device=bench.device, dtype=torch.bfloat16)
        for count in counts
    ]
    for tensor in heads:
        tensor.requires_grad_()
    results, gradients = [], []
    query, key, value = heads
    for attend in (attend_by_flash, attend_by_sdpa):
        result, _ = attend(torch.nn.Identity(), query, key, value, None, blocks=blocks)
        results.append(result)
        gradients.append(torch.autograd.grad(result.float().square().sum(), heads))
    differences = {
        "attention_difference": _difference(results[0], results[1]),
        "gradient_difference": max(map(_difference, *gradients)),
    }
    for name, difference in differences.items():
        bench.record(name, difference, unit=f"of the norm; at most {_TOLERANCE}")
    if not max(differences.values()) <= _TOLERANCE:
        raise AssertionError(f"varlen_attn and SDPA differ: {differences}")


def _difference(value: Tensor, expected: Tensor) -> float:
    """Return the norm of the difference, as a share of that of the expected value."""
    value, expected = value.detach().float(), expected.detach().float()
    return float((value - expected).norm() / expected.norm())


def _padded(batch: TrainBatch, *, device: str) -> tuple[Tensor, Tensor]:
    """Return ids and mask [B, longest] of the rows, padded at the end."""
    rows = np.split(batch.token_ids, np.cumsum(batch.lengths))[:-1]
    mask = np.arange(max(map(len, rows)))[None] < np.array(batch.lengths)[:, None]
    ids = np.zeros(mask.shape, dtype=np.int64)
    ids[mask] = np.concatenate(rows)
    return torch.tensor(ids, device=device), torch.tensor(mask.astype(np.int64), device=device)


def _batch(bench: Bench, *, num_groups: int) -> TrainBatch:
    """Return 4 trajectories per group, of 600 to 4,474 tokens."""
    if bench.is_tiny:
        sizes = {"prompt": 20, "outputs": 10, "observed": (10, 20), "turns": 2}
    else:
        sizes = {"prompt": 250, "outputs": 350, "observed": (300, 1000), "turns": 4}
    return random_batch(num_groups=num_groups, group_size=4, **sizes)  # type: ignore[arg-type]


def _load(bench: Bench, setup: Setup, *, lora_rank: int) -> PolicyWorker:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    workers: list[PolicyWorker] = []

    def load() -> None:
        config = recipe_config(bench.scratch / "model", lora_rank=lora_rank).actor_rollout_ref
        placement = Placement(device=bench.device.type)
        workers.append(PolicyWorker(config, placement, total_steps=10, seed=0, trainable=True))

    bench.forget_peak()
    bench.record("load_s", bench.seconds(load), unit="s, from files in bfloat16 to float32 on the device")
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    bench.record("load_host_gb", grown * 1024 / GB, unit="GB more of host memory, at the peak")
    planned = _planned_gb(setup, Phase.UPDATE, only=(_WEIGHTS,))
    bench.record("weights_gb", bench.peak_gb(), unit="GB", planned=planned)
    return workers[0]


def _max_tokens(bench: Bench) -> int:
    return (
        200
        if bench.is_tiny
        else recipe_config(bench.scratch).actor_rollout_ref.actor.ppo_max_token_len_per_gpu
    )


def _measure_log_probs(bench: Bench, worker: PolicyWorker, batch: TrainBatch, *, setup: Setup) -> TrainBatch:
    """Return the batch with its log-probs as those of the old policy and of the reference."""
    (plan,) = deal_rows(batch, num_ranks=1, max_tokens=_max_tokens(bench))
    passes = [batch.select(rows) for rows in plan]
    worker.log_probs(passes[:1])  # compiles and fills caches
    bench.forget_peak()
    results: list[list[np.ndarray]] = []
    seconds = bench.seconds(lambda: results.append(worker.log_probs(passes)))
    gigabytes = _planned_gb(setup, Phase.LOG_PROBS, without=(*_NOT_IN_TORCH, _ADAM))
    bench.record("log_probs_peak_gb", bench.peak_gb(), unit="GB", planned=gigabytes)
    _record_speed(bench, "log_probs", batch, seconds=seconds, setup=setup, passes=1)
    ordered = np.empty(batch.num_trajectories, dtype=object)
    for rows, of_pass, log_probs in zip(plan, passes, results[0], strict=True):
        ordered[rows] = of_pass.split(log_probs)
    log_probs = np.concatenate(list(ordered))
    return replace(batch, old_log_probs=log_probs, ref_log_probs=log_probs)


def _measure_update(bench: Bench, worker: PolicyWorker, batch: TrainBatch, *, setup: Setup) -> None:
    def update(part: TrainBatch) -> None:
        (minis,) = make_mini_batches(
            part, num_ranks=1, mini_batch_size=part.num_trajectories, max_tokens=_max_tokens(bench)
        )
        if worker.update(minis)["skipped_updates"]:
            raise AssertionError("the update was skipped: its loss or gradient is not finite")

    update(batch.select(np.arange(4, dtype=np.int32)))  # makes Adam's state
    bench.forget_peak()
    seconds = bench.seconds(lambda: update(batch))
    gigabytes = _planned_gb(setup, Phase.UPDATE, without=_NOT_IN_TORCH)
    bench.record("update_peak_gb", bench.peak_gb(), unit="GB", planned=gigabytes)
    if bench.device.type == "cuda":
        reserved = torch.cuda.max_memory_reserved() / GB
        bench.record("update_reserved_gb", reserved, unit="GB, with blocks that torch's allocator keeps")
        resident = torch.cuda.memory_allocated() / GB
        planned = _planned_gb(setup, Phase.UPDATE, only=(_WEIGHTS, _ADAM))
        bench.record("weights_and_adam_gb", resident, unit="GB", planned=planned)
    passes = setup.update_passes + setup.recomputed_share
    _record_speed(bench, "update", batch, seconds=seconds, setup=setup, passes=passes)


def _planned_gb(
    setup: Setup, phase: Phase, *, only: tuple[str, ...] = ("",), without: tuple[str, ...] = ()
) -> float:
    """Return what planned items take of a GPU in a phase, chosen by the beginnings of their names."""
    items = list_items(setup)
    chosen = [item for item in items if item.name.startswith(only) and not item.name.startswith(without)]
    return total(chosen, phase, gpu=0) / GB


def _record_speed(
    bench: Bench, name: str, batch: TrainBatch, *, seconds: float, setup: Setup, passes: float
) -> None:
    """Record tokens per second, and the FLOP of `passes` forward passes as a share of the peak."""
    real = int(batch.lengths.sum())
    (plan,) = deal_rows(batch, num_ranks=1, max_tokens=_max_tokens(bench))
    computed = sum(len(pack_rows(batch.select(rows)).ids) for rows in plan)
    bench.record(f"{name}_tokens_per_s", real / seconds, unit="real tokens/s")
    flops = setup.shape.pass_flops(float(batch.lengths.mean())) * computed * passes
    share = bench.share_of_peak(flops / seconds)
    assumption = "LORA_TRAIN_SHARE" if setup.lora_rank else "TRAIN_SHARE"
    bench.record(f"{name}_share", share, unit="of peak FLOP/s, computed tokens", assumption=assumption)
