"""The losses as pure functions of per-token tensors [N], one entry per policy token of a mini-batch.

Masking happens before: tokens that the policy did not sample never get here. A loss is the sum of its
per-token values times `token_weights`, which divide by counts of the whole mini-batch; so sums over
micro-batches and ranks add up to the same number however the mini-batch was cut.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MAX_LOG_RATIO = 20.0
_MAX_LOW_VAR_KL = 10.0


def policy_losses(
    log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, *, clip_low: float, clip_high: float
) -> tuple[Tensor, Tensor]:
    """Clipped surrogate (Schulman et al. 2017, eq. 7, negated) per token, and where the clip acted [N]."""
    ratio = (log_probs - old_log_probs).clamp(-_MAX_LOG_RATIO, _MAX_LOG_RATIO).exp()
    unclipped = -advantages * ratio
    clipped = -advantages * ratio.clamp(1.0 - clip_low, 1.0 + clip_high)
    return torch.maximum(unclipped, clipped), clipped > unclipped


def kl_estimates(log_probs: Tensor, ref_log_probs: Tensor, *, kind: str) -> Tensor:
    """KL(policy || reference) per token, estimated on sampled tokens [N].

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
    """Weight of each token in the loss [N]; they sum to 1 over a mini-batch, but for `seq-mean-token-sum`.

    `row_counts` [N] holds the number of policy tokens of the trajectory that the token belongs to; the other
    two count over the whole mini-batch, all ranks together.
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
    """Log-prob of each target [N] and entropy in nats there [N], from float32 logits [N, V]."""
    log_sums = logits.logsumexp(-1)
    log_probs = logits.gather(-1, targets.unsqueeze(-1)).squeeze(-1) - log_sums
    with torch.set_grad_enabled(entropy_has_gradient and torch.is_grad_enabled()):
        entropy = log_sums - ((logits - log_sums.unsqueeze(-1)).exp() * logits).sum(-1)
    return log_probs, entropy
