"""The rules that `numbers.yaml` names, as this project computes them: plain numbers in, plain numbers out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from verl.algorithms import cw_grpo, gigpo, ig_search, igpo, siop, stepsearch, tips
from verl.algorithms.scoring.outcome import autorefine_f1, igpo_f1
from verl.algorithms.statistics import (
    group_advantages,
    leave_one_out_returns,
    leave_one_out_turns,
    outcome_advantages,
)

Settings = Mapping[str, Any]


def igpo_returns(
    settings: Settings, beliefs: Sequence[Sequence[float] | None], outcomes: Sequence[float | None]
) -> list[list[float]]:
    config = igpo.IGPOConfig(**settings)
    group = [
        None
        if b is None or outcome is None
        else igpo.TurnRewards(gains=tuple(igpo.gains_of(b, kind=config.info_gain_type)), outcome=outcome)
        for b, outcome in zip(beliefs, outcomes, strict=True)
    ]
    return igpo.turn_returns([group], config)[0]


def ig_search_gain(
    settings: Settings, real: Sequence[float], counterfactual: Sequence[Sequence[float]]
) -> float:
    config = ig_search.IGSearchConfig(**settings)
    means = [ig_search.mean_log_prob(np.array(one, np.float32), config) for one in (real, *counterfactual)]
    return ig_search.step_gain(means[0], means[1:])


def ig_search_bonus(
    settings: Settings, gains: Sequence[float | None], num_tokens: Sequence[int]
) -> list[float]:
    config = ig_search.IGSearchConfig(**settings)
    return [
        ig_search.query_bonus(None if g is None else ig_search.stabilize(g, config), n, config)
        for g, n in zip(gains, num_tokens, strict=True)
    ]


def tips_rewards(settings: Settings, log_probs: Sequence[Sequence[float]]) -> list[float | None]:
    config = tips.TIPSConfig(**settings)
    changes = tips.shaping([tips.potential(one, config) for one in log_probs], terminal=config.terminal)
    alpha = tips.batch_scale(changes[:-1], config)
    return [None if change is None else alpha * change for change in changes]


def siop_rewards(settings: Settings, mean_log_probs: Sequence[Sequence[float]], weight: float) -> list[float]:
    beliefs = [siop.cluster_belief(one) for one in mean_log_probs]
    return siop.turn_rewards(beliefs, weight, siop.SIOPConfig(**settings))


def gigpo_step(
    settings: Settings, states: Sequence[Sequence[str]], outcomes: Sequence[float | None]
) -> list[list[float]]:
    config = gigpo.GiGPOConfig(**settings)
    read = [[gigpo.State(text, tuple(map(ord, text))) for text in of_one] for of_one in states]
    return gigpo.step_advantages(
        read,
        outcomes,
        discount=config.gamma,
        similarity=config.similarity_thresh,
        by_std=config.mode == "mean_std_norm",
    )


def stepsearch_returns(
    settings: Settings,
    similarities: Sequence[Sequence[Sequence[float]]],
    results: Sequence[Sequence[Sequence[str]]],
    outcomes: Sequence[float | None],
) -> list[list[float]]:
    config = stepsearch.StepSearchConfig(**settings)
    return leave_one_out_turns(
        [[*stepsearch.net_gains(*pair), None] for pair in zip(similarities, results, strict=True)],
        outcomes,
        gain_weight=config.gain_weight,
        discount=lambda _: config.gamma,
    )


RULES: dict[str, Callable[..., Any]] = {
    "group_advantages": lambda settings, rewards: group_advantages(rewards, **settings),
    "outcome_advantages": lambda settings, rewards, num_tokens: outcome_advantages(
        rewards, num_tokens, **settings
    ),
    "leave_one_out_returns": lambda _, returns: leave_one_out_returns(returns),
    "igpo": igpo_returns,
    "igpo_f1": lambda _, answer, golds: igpo_f1(answer, golds),
    "autorefine_f1": lambda _, answer, golds, summaries: autorefine_f1(answer, golds, summaries=summaries),
    "ig_search_gain": ig_search_gain,
    "ig_search_stabilize": lambda settings, gains: [
        ig_search.stabilize(gain, ig_search.IGSearchConfig(**settings)) for gain in gains
    ],
    "ig_search_bonus": ig_search_bonus,
    "tips_potentials": lambda settings, log_probs: [
        tips.potential(one, tips.TIPSConfig(**settings)) for one in log_probs
    ],
    "tips_rewards": tips_rewards,
    "siop_weights": lambda settings, masses, supports: siop.cluster_weights(
        masses, supports, eta=siop.SIOPConfig(**settings).eta
    ),
    "siop_rewards": siop_rewards,
    "siop_returns": lambda settings, rewards: siop.turn_returns(rewards, siop.SIOPConfig(**settings)),
    "gigpo_step": gigpo_step,
    "stepsearch_gains": lambda _, similarities: stepsearch.coverage_gains(similarities),
    "stepsearch_returns": stepsearch_returns,
    "stepsearch_redundancy": lambda _, results: stepsearch.redundancies(results),
    "cw_grpo": lambda _, advantage, contributions: cw_grpo.redistribute(advantage, contributions),
}
"""Each is called with the settings of a case and its input by name."""
