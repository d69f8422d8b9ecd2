"""Losses as pure functions of per-token tensors [N], one entry per policy token.

Tokens that the policy did not sample are masked out before. A loss is the sum of its per-token values times
`token_weights`, which divide by counts of the whole mini-batch, so that the sums over micro-batches and ranks
do not depend on the split.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MAX_LOG_RATIO = 20.0
_MAX_LOW_VAR_KL = 10.0


def policy_losses(
    log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, *, clip_low: float, clip_high: float
) -> tuple[Tensor, Tensor]:
    """Return the clipped surrogate (Schulman et al. 2017, eq. 7, negated) and where it clipped, both [N]."""
    ratio = (log_probs - old_log_probs).clamp(-_MAX_LOG_RATIO, _MAX_LOG_RATIO).exp()
    unclipped = -advantages * ratio
    clipped = -advantages * ratio.clamp(1.0 - clip_low, 1.0 + clip_high)
    return torch.maximum(unclipped, clipped), clipped > unclipped


def kl_estimates(log_probs: Tensor, ref_log_probs: Tensor, *, kind: str) -> Tensor:
    """Estimate KL(policy || reference) on each sampled token [N].

    `low_var_kl` is k3 of Schulman, "Approximating KL divergence" (2020), clamped to [-10, 10]; `kl` is k1,
    `mse` is k2, `abs` the absolute k1.
    """
    difference = log_probs - ref_log_probs
    if kind == "low_var_kl":
        log_ratio = (-difference).clamp(-_MAX_LOG_RATIO, _MAX_LOG_RATIO)
        return (log_ratio.exp() - log_ratio - 1.0).clamp(-_MAX_LOW_VAR_KL, _MAX_LOW_VAR_KL)
    if kind == "kl":
        return difference
    if kind == "abs":
        return difference.abs()
    if kind == "mse":
        return 0.5 * difference.square()
    raise ValueError(f"kl_loss_type must be one of low_var_kl, kl, abs, mse, got {kind!r}")


def token_weights(row_counts: Tensor, *, kind: str, num_trajectories: int, num_policy_tokens: int) -> Tensor:
    """Return the weight of each token in the loss [N]; except for `seq-mean-token-sum` they sum to 1.

    `row_counts` [N] is the number of policy tokens of the token's trajectory; the two counts are those of the
    whole mini-batch, over all ranks.
    """
    ones = torch.ones_like(row_counts, dtype=torch.float32)
    if kind == "token-mean":
        return ones / num_policy_tokens
    if kind == "seq-mean-token-mean":
        return ones / (row_counts * num_trajectories)
    if kind == "seq-mean-token-sum":
        return ones / num_trajectories
    raise ValueError(f"loss_agg_mode must be token-mean, seq-mean-token-mean or -sum, got {kind!r}")


def log_probs_and_entropy(
    logits: Tensor, targets: Tensor, *, entropy_has_gradient: bool
) -> tuple[Tensor, Tensor]:
    """Return the log-prob of each target [N] and the entropy in nats [N], from float32 logits [N, V]."""
    log_sums = logits.logsumexp(-1)
    log_probs = logits.gather(-1, targets.unsqueeze(-1)).squeeze(-1) - log_sums
    with torch.set_grad_enabled(entropy_has_gradient and torch.is_grad_enabled()):
        entropy = log_sums - ((logits - log_sums.unsqueeze(-1)).exp() * logits).sum(-1)
    return log_probs, entropy
