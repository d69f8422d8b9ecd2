from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from scale.plan import compose_config
from tests.fakes import make_question, make_trajectory
from verl.trainer.plan.gpus import Gpu
from verl.trainer.plan.setup import make_setup
from verl.trainer.plan.shape import ModelShape
from verl.trainer.ppo.speed import Machine, speed_metrics
from verl.types import Credit, Gain, Group, Score, ScoredGroups
from verl.workers.batch import build_batch
from verl.workers.checkpoint import Written

SHAPE = ModelShape(
    vocab=10, hidden=8, intermediate=16, layers=2, heads=2, kv_heads=1, head_dim=4, is_tied=True
)
# Two layers: attention 8 x (8 + 8 + 4 + 4), MLP 3 x 8 x 16, two norms of 8; embedding 10 x 8; last norm 8.
PARAMETERS = 2 * (8 * 24 + 3 * 8 * 16 + 16) + 80 + 8
SECONDS = {"log_probs": 2.0, "update": 8.0, "publish": 0.5, "step": 15.0}
ROLLOUT_S = 4.0


@pytest.fixture
def machine() -> Machine:
    """Four GPUs in two engines, with weights of 2 bytes."""
    overrides = ("recipe=gpu_4", "actor_rollout_ref.rollout.tensor_model_parallel_size=2")
    config = compose_config(*overrides, "actor_rollout_ref.rollout.max_num_seqs=1")
    gpu = Gpu(name="test", memory=1e9, flops=1e6, bandwidth=1e5)
    return Machine(setup=make_setup(config, SHAPE, gpu), num_epochs=2, publish_bytes=3000)


def make_step() -> ScoredGroups:
    """Return one question with two trajectories of 16 tokens: 3 of a prompt, 4 sampled, 5 read, 4 sampled."""
    question = make_question()
    group = Group(
        question=question,
        trajectories=tuple(make_trajectory(question, sample=i, queries=("q",), answer="x") for i in range(2)),
    )
    score = Score(outcome=1.0, gain=Gain(), metrics={})
    credit = Credit(advantages=np.zeros(16, np.float32), components={})
    return ScoredGroups(groups=[group], scores=[[score, score]], credits=[[credit, credit]])


def test_every_phase_is_compared_with_the_peak_of_all_gpus(machine: Machine) -> None:
    scored = make_step()
    batch = build_batch(scored.groups[0].trajectories, [np.ones(16, np.float32)] * 2)
    num = batch.num_policy_tokens
    batch = batch.with_old(np.zeros(num, np.float32)).with_reference(np.zeros(num, np.float32))
    played = (make_trajectory(make_question("other"), queries=("q",), answer="x"), scored.scores[0][0])
    metrics = speed_metrics(
        machine,
        scored=scored,
        batch=batch,
        seconds=SECONDS,
        rollout_s=ROLLOUT_S,
        left_out=[played],
        written=Written(7000, 1.5),
        computed_share=0.75,
    )
    # Attention: 2 x layers x heads x head_dim x length.
    one_pass = 0.75 * 32 * (2 * PARAMETERS + 2 * 2 * 2 * 4 * 16)
    # The prompts of two questions once, and three observations.
    assert metrics.pop("perf/prefilled_tokens_per_s") == (2 * 3 + 3 * 5) / 4
    # 24 tokens over two engines with one sequence each are 12 steps, which read all weights on each engine;
    # contexts of 3 to 6 and 12 to 15 tokens, 2 x layers x kv_heads x head_dim x 2 bytes each.
    moved = 12 * PARAMETERS * 2 * 2 + 3 * 72 * (2 * 2 * 1 * 4 * 2)
    assert metrics == pytest.approx(
        {
            "perf/rollout_bandwidth_share": moved / 4 / 4e5,
            "perf/log_probs_tokens_per_s": 2 * 32 / 2,
            "perf/log_probs_flops_per_s": 2 * one_pass / 2,
            "perf/log_probs_flops_share": 2 * one_pass / 2 / 4e6,
            "perf/update_tokens_per_s": 2 * 32 / 8,
            "perf/update_flops_per_s": 2 * 3 * one_pass / 8,
            "perf/update_flops_share": 2 * 3 * one_pass / 8 / 4e6,
            "perf/publish_bytes": 3000,
            "perf/publish_bytes_per_s": 6000,
            "perf/checkpoint_bytes": 7000,
            "perf/checkpoint_s": 1.5,
        }
    )


def test_what_is_not_known_is_absent(machine: Machine) -> None:
    """A CPU has no peak; old log-probs that the method measured are no pass of the phase log_probs."""
    scored = make_step()
    zeros = [np.zeros(16, np.float32)] * 2
    batch = build_batch(scored.groups[0].trajectories, zeros, old_log_probs=zeros)
    assert machine.setup is not None
    on_cpu = Machine(setup=replace(machine.setup, gpu=Gpu(name="cpu", memory=0.0)))
    scored = replace(scored, old_log_probs=[zeros])
    known = {"perf/prefilled_tokens_per_s", "perf/update_tokens_per_s"}
    for case, expected in ((on_cpu, {*known, "perf/update_flops_per_s"}), (Machine(), known)):
        metrics = speed_metrics(case, scored=scored, batch=batch, seconds=SECONDS, rollout_s=ROLLOUT_S)
        assert set(metrics) == expected
