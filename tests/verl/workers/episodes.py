"""Random episodes in token ids and single-process workers for the tests of this folder."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from tests.fakes import make_action, make_question
from verl.trainer.config.schema import (
    ActorConfig,
    ActorRolloutRefConfig,
    ModelConfig,
    OptimConfig,
    RolloutConfig,
)
from verl.types import ActionKind, FloatArray, Stop, Trajectory, Turn
from verl.workers.batch import Shard, TrainBatch, build_batch, shard_batch
from verl.workers.parallel import Placement
from verl.workers.policy import PolicyWorker

VOCAB_SIZE = 97


def random_trajectory(rng: np.random.Generator, *, index: int = 0) -> Trajectory:
    """One to three turns of random lengths; all but the last end in an observation."""
    turns = []
    num_turns = int(rng.integers(1, 4))
    for number in range(num_turns):
        outputs, observed = int(rng.integers(2, 9)), int(rng.integers(3, 12))
        last = number == num_turns - 1
        turns.append(
            Turn(
                output_ids=rng.integers(2, VOCAB_SIZE, outputs).astype(np.int32),
                output_log_probs=-rng.random(outputs).astype(np.float32) * 3,
                action=make_action(ActionKind.ANSWER if last else ActionKind.TOOL, "x"),
                observation_ids=rng.integers(2, VOCAB_SIZE, 0 if last else observed).astype(np.int32),
            )
        )
    return Trajectory(
        question=make_question(f"toy/train/{index}"),
        sample=0,
        prompt_ids=rng.integers(2, VOCAB_SIZE, int(rng.integers(3, 8))).astype(np.int32),
        turns=tuple(turns),
        stop=Stop.ANSWERED,
    )


def random_batch(count: int, *, seed: int = 0, with_old: bool = True) -> TrainBatch:
    """Episodes with random advantages; old and reference log-probs are random, near each other."""
    rng = np.random.default_rng(seed)
    trajectories = [random_trajectory(rng, index=index) for index in range(count)]
    credit: list[FloatArray] = [
        np.where(t.policy_mask, rng.normal(), 0.0).astype(np.float32) for t in trajectories
    ]
    batch = build_batch(trajectories, credit, pad_id=0)
    if not with_old:
        return batch
    noise = rng.normal(scale=0.2, size=(2, *batch.input_ids.shape)).astype(np.float32)
    return batch.with_old(-5 + noise[0]).with_reference(-5 + noise[1])


def make_actor(**changes: object) -> ActorConfig:
    """Settings under which a few updates visibly move the weights."""
    optim = OptimConfig(lr=float(changes.pop("lr", 1e-2)), weight_decay=0.01)  # type: ignore[arg-type]
    return replace(
        ActorConfig(optim=optim, kl_loss_coef=0.05, entropy_coeff=0.01, ppo_mini_batch_size=64),
        **changes,  # type: ignore[arg-type]
    )


def make_config(
    folder: Path, *, actor: ActorConfig | None = None, temperature: float = 1.0, **model: object
) -> ActorRolloutRefConfig:
    return ActorRolloutRefConfig(
        model=ModelConfig(path=str(folder), **model),  # type: ignore[arg-type]
        actor=actor or make_actor(),
        rollout=RolloutConfig(temperature=temperature),
    )


def make_worker(config: Path | ActorRolloutRefConfig, *, trainable: bool = True) -> PolicyWorker:
    """A single rank on the CPU; of a model folder with the settings of `make_config`."""
    config = make_config(config) if isinstance(config, Path) else config
    return PolicyWorker(config, Placement(), total_steps=10, seed=0, trainable=trainable)


def one_shard(batch: TrainBatch, *, mini_batch_size: int | None = None, max_tokens: int = 8192) -> Shard:
    (shard,) = shard_batch(batch, num_ranks=1, mini_batch_size=mini_batch_size, max_tokens=max_tokens)
    return shard
