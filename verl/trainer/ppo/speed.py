"""Compute how fast a step was (`perf/...`), phase by phase: pure functions.

Tokens, model FLOP and bytes, per second and as a share of what the GPUs can do. Model FLOP are what the model
needs, without what checkpointing computes again. Only known GPUs have a peak: elsewhere, as on CPUs, no share
is measured.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from verl.trainer.plan.setup import Setup
from verl.trainer.ppo.metrics import Metrics, Played, finite
from verl.types import ScoredGroups, Trajectory, count_policy_tokens
from verl.workers.batch import TrainBatch
from verl.workers.checkpoint import Written


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What the speed of a step is compared with; it is the same in all steps of a run."""

    setup: Setup | None = None
    """None: a model of unknown kind, whose FLOP are not counted. On CPUs its GPU has no speed."""
    num_epochs: int = 1
    """How often an update computes its batch."""
    publish_bytes: int | None = None
    """Weights that a publish sends, over all engines; None: not known."""


def speed_metrics(
    machine: Machine,
    *,
    scored: ScoredGroups,
    batch: TrainBatch,
    seconds: Mapping[str, float],
    rollout_s: float,
    backward_share: float = 1.0,
    computed_share: float = 1.0,
    left_out: Sequence[Played] = (),
    written: Written | None = None,
) -> Metrics:
    """Return the speed of each phase of a step.

    `batch` is what was trained on, with a backward pass for `backward_share` of it, and `computed_share` of
    its tokens, as those that trajectories share are computed once; `left_out` was sampled as well, in
    `rollout_s`; `written`: a checkpoint that was completed since the step before.
    """
    trajectories = [sample.trajectory for sample in scored.samples()] + [t for t, _ in left_out]
    sent = machine.publish_bytes
    metrics: dict[str, float | None] = {
        **_rollout_metrics(machine.setup, trajectories, rollout_s),
        "perf/publish_bytes": sent,
        "perf/publish_bytes_per_s": _per_second(sent, seconds.get("publish")),
    }
    if written is not None:
        metrics |= {"perf/checkpoint_bytes": written.num_bytes, "perf/checkpoint_s": written.seconds}
    # The method may have measured the old log-probs before, in another phase.
    has_old = batch.old_log_probs is not None and scored.old_log_probs is None
    num_passes = int(has_old) + int(batch.ref_log_probs is not None)
    return finite(
        metrics
        | _pass_metrics(
            machine,
            batch,
            phase="log_probs",
            repeats=num_passes,
            seconds=seconds,
            computed_share=computed_share,
        )
        | _pass_metrics(
            machine,
            batch,
            phase="update",
            repeats=machine.num_epochs,
            seconds=seconds,
            backward_share=backward_share,
            computed_share=computed_share,
        )
    )


def _pass_metrics(
    machine: Machine,
    batch: TrainBatch,
    *,
    phase: str,
    repeats: int,
    seconds: Mapping[str, float],
    backward_share: float = 0.0,
    computed_share: float,
) -> dict[str, float | None]:
    """Return the speed of a phase that computed `computed_share` of the tokens of the batch `repeats` times.

    `backward_share` of the sampled tokens also had backward passes, and about as large a share of all. The
    computed share is that of the update; other passes are dealt alike.
    """
    if not repeats:
        return {}
    lengths, setup, elapsed = batch.lengths.tolist(), machine.setup, seconds.get(phase)
    rate = peak = None
    if setup is not None:
        passes = repeats * computed_share * (1 + backward_share * (setup.update_passes - 1))
        rate = _per_second(passes * math.fsum(n * setup.shape.pass_flops(n) for n in lengths), elapsed)
        peak = None if setup.gpu.flops is None else setup.gpu.flops * setup.world_size
    return {
        f"perf/{phase}_tokens_per_s": _per_second(repeats * sum(lengths), elapsed),
        f"perf/{phase}_flops_per_s": rate,
        f"perf/{phase}_flops_share": None if rate is None or peak is None else rate / peak,
    }


def _rollout_metrics(
    setup: Setup | None, trajectories: Sequence[Trajectory], seconds: float
) -> dict[str, float | None]:
    """Return what the engines read per second, and the share of the memory bandwidth that decoding takes.

    Read are the prompt of a group once, then every observation: what a prefix cache cannot save.
    """
    prompts = {t.question.uid: len(t.prompt_ids) for t in trajectories}
    read = sum(prompts.values()) + sum(len(turn.observation_ids) for t in trajectories for turn in t.turns)
    share = None
    if setup is not None and setup.gpu.bandwidth is not None:
        moved = _per_second(_decoded_bytes(setup, trajectories), seconds)
        share = None if moved is None else moved / (setup.gpu.bandwidth * setup.engine_world_size)
    return {
        "perf/prefilled_tokens_per_s": _per_second(read, seconds),
        "perf/rollout_bandwidth_share": share,
    }


def _decoded_bytes(setup: Setup, trajectories: Sequence[Trajectory]) -> float:
    """Return the bytes that decoding reads at the least, over all engines.

    Every token reads the keys and values of its context, every step of an engine its weights; the longest
    trajectory, or the sequences that an engine takes at once, give the number of steps.
    """
    contexts = sum(int(np.flatnonzero(trajectory.policy_mask).sum()) for trajectory in trajectories)
    sampled = count_policy_tokens(trajectories)
    longest = max((trajectory.num_policy_tokens for trajectory in trajectories), default=0)
    steps = max(longest, sampled / (setup.replicas * setup.max_num_seqs))
    weights = setup.engine_weight_bytes * setup.engine_world_size
    return steps * weights + contexts * setup.shape.kv_bytes(setup.number_bytes)


def _per_second(amount: float | None, seconds: float | None) -> float | None:
    return amount / seconds if amount is not None and seconds else None
