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
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    *,
    clip_low: float,
    clip_high: float,
    clip_c: float | None = None,
    segments: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the clipped surrogate (Schulman et al. 2017, eq. 7, negated) and where it clipped, both [N].

    Without `segments` every token has its own ratio. With them (the number of each token's trajectory or turn
    [N]) it is the geometric mean over the segment (GSPO, arXiv 2507.18071, eq. 7 and 14): all tokens of a
    segment are clipped together. `clip_c` bounds the loss of tokens with a negative advantage by
    `clip_c * |advantage|` (dual clip, Ye et al. 2020).
    """
    log_ratio = log_probs - old_log_probs
    if segments is not None:
        # The value is the segment's mean, the gradient that of each token: their sum is the mean's gradient.
        log_ratio = segment_means(log_ratio.detach(), segments) + log_probs - log_probs.detach()
    ratio = log_ratio.clamp(-_MAX_LOG_RATIO, _MAX_LOG_RATIO).exp()
    unclipped = -advantages * ratio
    clipped = -advantages * ratio.clamp(1.0 - clip_low, 1.0 + clip_high)
    losses, was_clipped = torch.maximum(unclipped, clipped), clipped > unclipped
    if clip_c is not None:
        bound = torch.where(advantages < 0, -advantages * clip_c, torch.inf)
        losses, was_clipped = torch.minimum(losses, bound), was_clipped | (losses > bound)
    return losses, was_clipped


def segment_means(values: Tensor, segments: Tensor) -> Tensor:
    """Return for each token the mean over the tokens of its segment [N]; segments count from 0."""
    if not len(values):
        return values
    count = int(segments.max()) + 1
    sums = values.new_zeros(count).index_add(0, segments, values)
    sizes = values.new_zeros(count).index_add(0, segments, torch.ones_like(values))
    return (sums / sizes.clamp(min=1.0))[segments]


def importance_weights(old_log_probs: Tensor, sampling_log_probs: Tensor, *, cap: float) -> Tensor:
    """Return `min(p_train / p_sample, cap)` of each sampled token, without gradient [N].

    The engine samples with other kernels, and on GPUs other rounding, than the trainer computes with; these
    weights make the update unbiased up to the cap (truncated importance sampling, Yao et al. 2025).
    """
    log_ratio = (old_log_probs - sampling_log_probs).detach()
    return log_ratio.clamp(-_MAX_LOG_RATIO, _MAX_LOG_RATIO).exp().clamp(max=cap)


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


def token_weights(
    row_counts: Tensor,
    *,
    kind: str,
    num_trajectories: int,
    num_policy_tokens: int,
    scale_tokens: float = 1.0,
) -> Tensor:
    """Return the weight of each token in the loss [N].

    `row_counts` [N] is the number of policy tokens of the token's trajectory; the two counts are those of the
    whole mini-batch, over all ranks. `token-mean` (DAPO) and `seq-mean-token-mean` (GRPO) sum to 1.
    `seq-mean-token-sum` favors no length; `seq-mean-token-sum-norm` is the same over the constant
    `scale_tokens` (Dr. GRPO, arXiv 2503.20783).
    """
    ones = torch.ones_like(row_counts, dtype=torch.float32)
    if kind == "token-mean":
        return ones / num_policy_tokens
    if kind == "seq-mean-token-mean":
        return ones / (row_counts * num_trajectories)
    if kind == "seq-mean-token-sum":
        return ones / num_trajectories
    if kind == "seq-mean-token-sum-norm":
        return ones / (num_trajectories * scale_tokens)
    raise ValueError(
        "loss_agg_mode must be token-mean, seq-mean-token-mean, seq-mean-token-sum or "
        f"seq-mean-token-sum-norm, got {kind!r}"
    )


def log_probs_and_entropy(
    logits: Tensor, targets: Tensor, *, entropy_has_gradient: bool
) -> tuple[Tensor, Tensor]:
    """Return the log-prob of each target [N] and the entropy in nats [N], from float32 logits [N, V]."""
    log_sums = logits.logsumexp(-1)
    log_probs = logits.gather(-1, targets.unsqueeze(-1)).squeeze(-1) - log_sums
    with torch.set_grad_enabled(entropy_has_gradient and torch.is_grad_enabled()):
        entropy = log_sums - ((logits - log_sums.unsqueeze(-1)).exp() * logits).sum(-1)
    return log_probs, entropy
