"""Settings that run, but hardly do what is wanted: warnings at the start of a run."""

from __future__ import annotations

from verl.algorithms import ALGORITHMS
from verl.trainer.config.pools import has_own_gpus
from verl.trainer.config.schema import Config

_TOKEN_CLIP = 0.1
"""Clip ranges from here on are made for the ratio of a single token."""
_OWN_GPU_SHARE = 0.9
"""Of a GPU for an engine that has it alone: what is left takes CUDA and the weights of a publish."""


def list_advice(config: Config) -> list[str]:
    """Return one warning with key, value and fix for each such setting. Expects a valid configuration."""
    return [
        *_advise_format(config),
        *_advise_wrapper(config),
        *_advise_filter(config),
        *_advise_clip(config),
        *_advise_engine_share(config),
    ]


def _advise_format(config: Config) -> list[str]:
    name, chosen = config.algorithm.name, config.agent.format
    published = ALGORITHMS[name].format
    if chosen == published:
        return []
    return [
        f"agent.format={chosen}: {name} was published with {published}; set agent.format={published} for a "
        "policy that can write it (the embedded world's writes search_r1 only)"
    ]


def _advise_wrapper(config: Config) -> list[str]:
    name, chosen = config.algorithm.name, config.reward.answer_wrapper
    published = ALGORITHMS[name].answer_wrapper
    if chosen == published or not published:
        return []
    return [
        f"reward.answer_wrapper={chosen!r}: {name} was published with {published!r}; it should be how your "
        "policy writes an answer (the recipes of the embedded world set what its policy writes)"
    ]


def _advise_filter(config: Config) -> list[str]:
    name = config.algorithm.name
    if not config.algorithm.filter_groups.enable or ALGORITHMS[name].compares_outcomes_only:
        return []
    return [
        f"algorithm.filter_groups.enable=true leaves out groups whose outcomes are all equal, and {name} can "
        "learn from those, too; set algorithm.filter_groups.enable=false"
    ]


def _advise_clip(config: Config) -> list[str]:
    actor = config.actor_rollout_ref.actor
    mode, low, high = actor.policy_loss.loss_mode, actor.clip_ratio_low, actor.clip_ratio_high
    if mode == "vanilla" or max(low, high) < _TOKEN_CLIP:
        return []
    return [
        f"actor_rollout_ref.actor.policy_loss.loss_mode={mode} with clip_ratio_low={low:g} and "
        f"clip_ratio_high={high:g} clips hardly anything: means over many tokens stay near 1. GSPO "
        "was published with actor_rollout_ref.actor.clip_ratio_low=3e-4 "
        "actor_rollout_ref.actor.clip_ratio_high=4e-4"
    ]


def _advise_engine_share(config: Config) -> list[str]:
    rollout = config.actor_rollout_ref.rollout
    share = rollout.gpu_memory_utilization
    # The IG service may share these GPUs, too.
    if not has_own_gpus(rollout) or config.placement.ig_service_gpus or share >= _OWN_GPU_SHARE:
        return []
    return [
        f"actor_rollout_ref.rollout.gpu_memory_utilization={share:g} leaves a part of GPUs unused that "
        f"engines have alone (actor_rollout_ref.rollout.n_gpus_per_node={rollout.n_gpus_per_node}); "
        f"set it to {_OWN_GPU_SHARE:g}"
    ]
