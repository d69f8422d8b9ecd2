"""The equations in NumPy, a few lines each, written apart from the trainer's code.

Rewards are arrays; a group of n trajectories of at most T turns is a matrix [n, T] with a mask.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def grpo(rewards: Array) -> Array:
    """Return A_i = (r_i - mean r) / (std r + 1e-6), with the sample standard deviation [n]."""
    return (rewards - rewards.mean()) / (rewards.std(ddof=1) + 1e-6)


def rloo(rewards: Array) -> Array:
    """Return A_i = r_i - mean of r_j over j != i [n]."""
    n = len(rewards)
    others = (rewards.sum() - rewards) / (n - 1)
    return rewards - others


def reinforce_plus_plus(rewards: Array, num_tokens: Array) -> Array:
    """Return A = (r - mean r) / (std r + 1e-6), mean and std over all tokens of the batch [n]."""
    per_token = np.repeat(rewards, num_tokens.astype(int))
    return (rewards - per_token.mean()) / (per_token.std(ddof=1) + 1e-6)


def returns(rewards: Array, discount: float) -> Array:
    """Return G_t = sum over k >= t of discount^(k - t) r_k; rows are trajectories, padded with 0 [n, T]."""
    steps = np.arange(rewards.shape[1])
    powers = np.triu(discount ** np.maximum(steps[None] - steps[:, None], 0))  # [t, k]
    return rewards @ powers.T


def leave_one_out_returns(rewards: Array, mask: NDArray[np.bool_], discount: float) -> Array:
    """Return A_{i,t} = G_{i,t} - mean of G_{j,t} over j != i; G is 0 after the end of a trajectory [n, T]."""
    total = returns(rewards * mask, discount)
    others = (total.sum(0) - total) / (len(total) - 1)
    return (total - others) * mask


def igpo_separate(gains: Array, mask: NDArray[np.bool_], outcomes: Array, discount: float) -> Array:
    """Return the returns of gains [n, T] and outcomes [n], z-scored apart, outcomes last [n, T + 1]."""

    def z(values: Array) -> Array:
        if not len(values):
            return values
        std = np.sqrt(values.var() + 1e-8) if len(values) > 1 else 1.0
        return (values - values.mean()) / (std + 1e-6)

    rewards = np.zeros((len(gains), gains.shape[1] + 1))
    rewards[:, :-1][mask] = z(gains[mask])
    rewards[np.arange(len(gains)), mask.sum(1)] = z(outcomes)
    return returns(rewards, discount)


def tips_potential(log_probs: Array, tau: float) -> float:
    """Return Phi = tau log sum exp(L / tau)."""
    return float(tau * np.log(np.exp(log_probs / tau).sum()))


def ig_search_gain(real: Array, counterfactual: Array) -> float:
    """Return the mean of the real log-probs [L] minus that of the counterfactual ones [N, L]."""
    return float(real.mean() - counterfactual.mean(axis=1).mean())


def siop_weights(masses: Array, supports: Array, eta: float) -> Array:
    """Return q_c = m_c exp(eta r_c) / Z per cluster."""
    raw = masses * np.exp(eta * supports)
    return raw / raw.sum()


def stepsearch_gains(similarities: Array) -> Array:
    """Return gain_k = mean over d of max(c_k(d) - max over j < k of c_j(d), 0), from c [K, D]."""
    best = np.zeros(similarities.shape[1])
    gains = []
    for row in similarities:
        gains.append(np.maximum(row - best, 0).mean())
        best = np.maximum(best, row)
    return np.array(gains)


def cw_grpo(advantage: float, contributions: Array) -> Array:
    """Return A_t = A n c_t / sum c for A >= 0, else A."""
    if advantage < 0 or contributions.sum() <= 0:
        return np.full(len(contributions), advantage)
    return advantage * len(contributions) * contributions / contributions.sum()
