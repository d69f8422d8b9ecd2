"""What an update minimizes, and what it reports, from the log-probs of the tokens of a micro-batch."""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
from torch import Tensor

from verl.trainer.config.schema import ActorConfig
from verl.workers.batch import MiniBatch, TrainBatch, ratio_segments
from verl.workers.losses import importance_weights, kl_estimates, policy_losses, token_weights

SUMS = (
    "loss",
    "pg_loss",
    # These, up to the backward share, are means over tokens, also where the loss weighs tokens unequally.
    "kl",
    "entropy",
    "clip_fraction",
    "ratio_mean",
    "log_prob_difference_mean",
    "importance_mean",
    "backward_share",
    "computed_share",
)
"""What micro-batches and ranks report; those of a mini-batch are their sums."""
MAXIMA = ("ratio_max", "log_prob_difference_max")


def micro_batch_loss(
    log_probs: Tensor,
    entropy: Tensor,
    micro: TrainBatch,
    mini: MiniBatch,
    *,
    config: ActorConfig,
    num_computed: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return what a micro-batch adds to the loss of its mini-batch, its `SUMS` and its `MAXIMA`.

    `log_probs` and `entropy` of the N policy tokens [N], as every per-token tensor here; `num_computed`
    tokens had a forward pass.
    """
    # A copy, because arrays from Ray's object store are read-only.
    tensor = partial(torch.tensor, device=log_probs.device)
    # On-policy the ratio is 1, but its gradient is not 0: the old log-probs are these, detached.
    old = log_probs.detach() if micro.old_log_probs is None else tensor(micro.old_log_probs)
    # Weights divide by counts of the whole mini-batch, over all ranks: losses of micro-batches add up.
    weights = token_weights(
        # Policy tokens of the trajectory that each token belongs to.
        tensor(np.repeat(micro.policy_lengths, micro.policy_lengths)),
        kind=config.loss_agg_mode,
        num_trajectories=mini.num_trajectories,
        num_policy_tokens=mini.num_policy_tokens,
        scale_tokens=config.loss_scale_factor,
    )
    segments = ratio_segments(micro, mode=config.policy_loss.loss_mode)
    losses, clipped = policy_losses(
        log_probs,
        old,
        tensor(micro.advantages),
        clip_low=config.clip_ratio_low,
        clip_high=config.clip_ratio_high,
        clip_c=config.clip_ratio_c,
        segments=None if segments is None else tensor(segments),
    )
    sampling = tensor(micro.sampling_log_probs)
    importance = torch.ones_like(losses)
    if config.tis_imp_ratio_cap is not None:
        importance = importance_weights(old, sampling, cap=config.tis_imp_ratio_cap)
        losses = losses * importance
    # A weighted sum, no mean: a micro-batch adds its share of the loss of the mini-batch.
    pg_loss = (losses * weights).sum()  # scalar
    loss = pg_loss - config.entropy_coeff * (entropy * weights).sum()
    kl = torch.zeros_like(log_probs)
    if micro.ref_log_probs is not None:
        kl = kl_estimates(log_probs, tensor(micro.ref_log_probs), kind=config.kl_loss_type)
        if config.use_kl_loss:
            loss = loss + config.kl_loss_coef * (kl * weights).sum()
    with torch.no_grad():
        ratio, difference = (log_probs - old).exp(), (old - sampling).abs()
        has_gradient = torch.full_like(losses, float(loss.requires_grad))
        per_token = (kl, entropy, clipped, ratio, difference, importance, has_gradient)
        means = torch.stack([x.float().sum() for x in per_token]) / mini.num_policy_tokens
        computed = means.new_tensor([num_computed / mini.num_tokens])
        sums = torch.cat([torch.stack([loss.detach(), pg_loss.detach()]), means, computed])
        zero = ratio.new_zeros(1)  # an empty micro-batch has no maximum
        maxima = torch.stack([torch.cat([x, zero]).max() for x in (ratio, difference)])
    return loss, sums, maxima
