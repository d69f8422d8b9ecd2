from __future__ import annotations

import pytest
import torch
from torch import Tensor

from verl.workers.losses import (
    importance_weights,
    kl_estimates,
    log_probs_and_entropy,
    policy_losses,
    token_weights,
)


@pytest.mark.parametrize(
    ("log_prob", "ref_log_prob", "expected"),
    [(-1, -1, 0.0), (-1, -1.5, 0.106531), (-1.5, -1, 0.148721), (-0.1, -4, 2.920242), (-8, -1, 10.0)],
)
def test_low_var_kl_has_the_worked_values(log_prob: float, ref_log_prob: float, expected: float) -> None:
    kl = kl_estimates(torch.tensor([log_prob]), torch.tensor([ref_log_prob]), kind="low_var_kl")
    assert kl.item() == pytest.approx(expected, abs=1e-6)


def test_other_kl_estimators() -> None:
    log_probs, ref = torch.tensor([-1.0, -2.0]), torch.tensor([-1.5, -1.0])
    assert kl_estimates(log_probs, ref, kind="kl").tolist() == [0.5, -1.0]
    assert kl_estimates(log_probs, ref, kind="abs").tolist() == [0.5, 1.0]
    assert kl_estimates(log_probs, ref, kind="mse").tolist() == [0.125, 0.5]
    with pytest.raises(ValueError, match="low_var_kl, kl, abs, mse, got 'k9'"):
        kl_estimates(log_probs, ref, kind="k9")


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "clipped"),
    [
        (1.0, 2.0, -2.0, False),
        (1.5, 2.0, -2.6, True),  # gains end at 1 + 0.3
        (0.5, 2.0, -1.0, False),  # losses are never cut
        (1.5, -2.0, 3.0, False),
        (0.5, -2.0, 1.6, True),  # gains end at 1 - 0.2
    ],
)
def test_the_policy_loss_clips_only_improvements(
    ratio: float, advantage: float, loss: float, clipped: bool
) -> None:
    log_probs = torch.tensor([ratio]).log().requires_grad_()
    losses, was_clipped = policy_losses(
        log_probs, torch.zeros(1), torch.tensor([advantage]), clip_low=0.2, clip_high=0.3
    )
    assert losses.item() == pytest.approx(loss, abs=1e-6)
    assert was_clipped.item() is clipped
    losses.sum().backward()
    assert log_probs.grad is not None
    assert (log_probs.grad.item() == 0) is clipped


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("token-mean", (1 + 2 + 3 + 10) / 4),
        ("seq-mean-token-mean", ((1 + 2 + 3) / 3 + 10) / 2),
        ("seq-mean-token-sum", (1 + 2 + 3 + 10) / 2),
        ("seq-mean-token-sum-norm", (1 + 2 + 3 + 10) / 2 / 8),
    ],
)
def test_aggregation_of_two_trajectories_with_three_tokens_and_one(kind: str, expected: float) -> None:
    row_counts = torch.tensor([3, 3, 3, 1])
    weights = token_weights(row_counts, kind=kind, num_trajectories=2, num_policy_tokens=4, scale_tokens=8)
    assert (torch.tensor([1.0, 2.0, 3.0, 10.0]) * weights).sum().item() == pytest.approx(expected)


def test_log_probs_and_entropy_agree_with_softmax() -> None:
    logits = torch.randn(6, 11, generator=torch.Generator().manual_seed(0), requires_grad=True)
    targets = torch.arange(6)
    log_probs, entropy = log_probs_and_entropy(logits, targets, entropy_has_gradient=True)
    expected = logits.log_softmax(-1)
    torch.testing.assert_close(log_probs, expected[torch.arange(6), targets])
    torch.testing.assert_close(entropy, -(expected.exp() * expected).sum(-1))

    def gradient(value: Tensor) -> Tensor:
        return torch.autograd.grad(value.sum(), logits, retain_graph=True)[0]

    torch.testing.assert_close(gradient(entropy), gradient(-(expected.exp() * expected).sum(-1)))
    _, detached = log_probs_and_entropy(logits, targets, entropy_has_gradient=False)
    assert not detached.requires_grad


def test_a_segment_shares_the_geometric_mean_of_its_ratios_and_is_clipped_as_one() -> None:
    old = torch.zeros(5)
    log_probs = torch.tensor([0.3, -0.1, 0.1, 1.0, 0.0]).requires_grad_()  # means 0.1 and 0.5
    segments = torch.tensor([0, 0, 0, 1, 1])
    losses, clipped = policy_losses(
        log_probs, old, torch.ones(5), clip_low=0.2, clip_high=0.2, segments=segments
    )
    torch.testing.assert_close(losses.detach(), -torch.tensor([1.105171] * 3 + [1.2] * 2))
    assert clipped.tolist() == [False] * 3 + [True] * 2
    # d/d log p_t of (sum over the segment of its ratio) is the ratio, for every token of it.
    losses.sum().backward()
    assert log_probs.grad is not None
    torch.testing.assert_close(log_probs.grad, -torch.tensor([1.105171] * 3 + [0.0] * 2))


@pytest.mark.parametrize(("ratio", "loss"), [(2.0, 4.0), (3.0, 6.0), (10.0, 6.0)])
def test_the_dual_clip_bounds_the_loss_of_a_negative_advantage(ratio: float, loss: float) -> None:
    losses, clipped = policy_losses(
        torch.tensor([ratio]).log(),
        torch.zeros(1),
        torch.tensor([-2.0]),
        clip_low=0.2,
        clip_high=0.2,
        clip_c=3.0,
    )
    assert losses.item() == pytest.approx(loss, abs=1e-5)
    assert clipped.item() is (ratio > 3.0)


def test_importance_weights_are_the_ratio_to_the_sampler_up_to_the_cap() -> None:
    old = torch.tensor([-1.0, -1.0, -1.0]).requires_grad_()
    weights = importance_weights(old, torch.tensor([-1.0, -0.5, -3.0]), cap=2.0)
    torch.testing.assert_close(weights, torch.tensor([1.0, 0.606531, 2.0]))
    assert not weights.requires_grad
