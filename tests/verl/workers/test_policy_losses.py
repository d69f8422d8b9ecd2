"""The loss of two trajectories of two turns, worked by hand, through the worker that computes it."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.fakes import make_question, make_turn
from tests.verl.workers.episodes import make_actor, make_config, make_worker, one_rank
from verl.trainer.config.schema import PolicyLossConfig
from verl.types import ActionKind, Stop, Trajectory
from verl.workers.batch import TrainBatch, build_batch, ratio_segments
from verl.workers.policy import PolicyWorker

EXP = math.exp
TURNS = ((2, 2), (1, 1))
"""Sampled tokens of the turns of each trajectory; their advantages are 1 and -1."""
LOG_RATIOS = [0.3, -0.1, 0.4, 0.0, -0.4, 0.1]
"""Of new to old probability, of all sampled tokens in order."""
IMPORTANCE = [3.0, 0.5, 1.0, 1.0, 1.0, 0.25]
"""Old probability over that of the engine."""


def make_batch(worker: PolicyWorker) -> TrainBatch:
    """Return a batch whose old log-probs and those of the engine lie these ratios from the worker's own."""
    trajectories = [
        Trajectory(
            question=make_question(),
            sample=sample,
            prompt_ids=np.arange(3, 6, dtype=np.int32),
            turns=(
                make_turn(ActionKind.TOOL, "q", outputs=first, observed=3),
                make_turn(ActionKind.ANSWER, "x", outputs=last),
            ),
            stop=Stop.ANSWERED,
        )
        for sample, (first, last) in enumerate(TURNS)
    ]
    credit = [
        np.where(t.policy_mask, np.float32(a), np.float32(0))
        for t, a in zip(trajectories, (1, -1), strict=True)
    ]
    batch = build_batch(trajectories, credit)
    (log_probs,) = worker.log_probs([batch])
    old = log_probs - np.array(LOG_RATIOS, np.float32)
    sampling = old - np.log(np.array(IMPORTANCE, np.float32))
    return replace(batch.with_old(old), sampling_log_probs=sampling)


RATIOS = [-1.2, -EXP(-0.1), -1.2, -1.0, 0.8, EXP(0.1)]
"""Losses of the tokens where each has its own ratio, clipped to [0.8, 1.2]."""


@pytest.mark.parametrize(
    ("changes", "losses", "num_clipped"),
    [
        ({}, RATIOS, 3),
        # Clip-higher: e^0.3 and e^0.4 rise to 1.28 only, nothing changes below 1.
        ({"clip_ratio_high": 0.28}, [-1.28, -EXP(-0.1), -1.28, -1.0, 0.8, EXP(0.1)], 3),
        ({"clip_ratio_high": 0.4}, [-EXP(0.3), -EXP(-0.1), -1.4, -1.0, 0.8, EXP(0.1)], 2),
        # Weights 3 (capped at 2), 0.5, 1, 1, 1, 0.25.
        ({"tis_imp_ratio_cap": 2.0}, [-2.4, -0.5 * EXP(-0.1), -1.2, -1.0, 0.8, 0.25 * EXP(0.1)], 3),
        # One ratio for each trajectory: mean log-ratios 0.6 / 4 and -0.3 / 2.
        ({"policy_loss": PolicyLossConfig(loss_mode="gspo")}, [-EXP(0.15)] * 4 + [EXP(-0.15)] * 2, 0),
        (
            {"policy_loss": PolicyLossConfig(loss_mode="gspo"), "clip_ratio_high": 0.1},
            [-1.1] * 4 + [EXP(-0.15)] * 2,
            4,
        ),
        # One for each turn: 0.2 / 2, 0.4 / 2, -0.4, 0.1.
        (
            {"policy_loss": PolicyLossConfig(loss_mode="gspo_turn")},
            [-EXP(0.1)] * 2 + [-1.2] * 2 + [0.8, EXP(0.1)],
            3,
        ),
    ],
)
@pytest.mark.parametrize("max_tokens", [8192, 1])
def test_the_loss_of_two_trajectories(
    model_folder: Path, changes: dict[str, object], losses: list[float], num_clipped: int, max_tokens: int
) -> None:
    """Whether they share a forward pass or not."""
    settings = {"lr": 0.0, "entropy_coeff": 0.0, "tis_imp_ratio_cap": None, **changes}
    worker = make_worker(make_config(model_folder, actor=make_actor(**settings)))
    metrics = worker.update(one_rank(make_batch(worker), max_tokens=max_tokens))
    assert metrics["loss"] == pytest.approx(math.fsum(losses) / 6, abs=1e-5)
    assert metrics["clip_fraction"] == pytest.approx(num_clipped / 6)


def test_a_single_update_of_episodes_from_older_weights(model_folder: Path) -> None:
    """No ratio is clipped; each token weighs p / p_sampled = e^log_ratio * importance, at most 2."""
    worker = make_worker(make_config(model_folder, actor=make_actor(lr=0.0, entropy_coeff=0.0)))
    batch = replace(make_batch(worker), old_log_probs=None)
    metrics = worker.update(one_rank(batch))
    weights = [2.0, 0.5 * EXP(-0.1), EXP(0.4), 1.0, EXP(-0.4), 0.25 * EXP(0.1)]  # the first is 3 e^0.3 = 4.05
    assert metrics["importance_mean"] == pytest.approx(math.fsum(weights) / 6, abs=1e-5)
    assert metrics["loss"] == pytest.approx((-math.fsum(weights[:4]) + math.fsum(weights[4:])) / 6, abs=1e-5)
    assert metrics["clip_fraction"] == 0


@pytest.mark.parametrize(
    ("mode", "segments"),
    [("vanilla", None), ("gspo", [0, 0, 0, 0, 1, 1]), ("gspo_turn", [0, 0, 1, 1, 2, 3])],
)
def test_what_shares_a_ratio(model_folder: Path, mode: str, segments: list[int] | None) -> None:
    found = ratio_segments(make_batch(make_worker(model_folder)), mode=mode)
    assert (None if found is None else found.tolist()) == segments
