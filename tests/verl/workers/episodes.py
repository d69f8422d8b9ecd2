"""Random episodes in token ids and single-process workers for the tests of this folder."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
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
from verl.types import ActionKind, FloatArray, IntArray, Stop, Trajectory, Turn
from verl.utils.actors import Launcher
from verl.workers.batch import MiniBatch, TrainBatch, build_batch, make_mini_batches
from verl.workers.parallel import Placement, Rendezvous
from verl.workers.policy import PolicyWorker
from verl.workers.worker_group import WorkerGroup

VOCAB_SIZE = 97


def random_ids(rng: np.random.Generator, count: int) -> IntArray:
    return rng.integers(2, VOCAB_SIZE, count).astype(np.int32)


def random_trajectory(
    rng: np.random.Generator, *, index: int = 0, prompt: IntArray | None = None
) -> Trajectory:
    """One to three turns of random lengths; all but the last end in an observation."""
    turns = []
    num_turns = int(rng.integers(1, 4))
    for number in range(num_turns):
        outputs, observed = int(rng.integers(2, 9)), int(rng.integers(3, 12))
        last = number == num_turns - 1
        turns.append(
            Turn(
                output_ids=random_ids(rng, outputs),
                output_log_probs=-rng.random(outputs).astype(np.float32) * 3,
                action=make_action(ActionKind.ANSWER if last else ActionKind.TOOL, "x"),
                observation_ids=random_ids(rng, 0 if last else observed),
            )
        )
    return Trajectory(
        question=make_question(f"toy/train/{index}"),
        sample=0,
        prompt_ids=random_ids(rng, int(rng.integers(3, 8))) if prompt is None else prompt,
        turns=tuple(turns),
        stop=Stop.ANSWERED,
    )


def _begin_like(first: Trajectory, second: Trajectory) -> Trajectory:
    last, end = first.turns[-1], second.turns[-1]
    ids = np.concatenate([last.output_ids[:1], end.output_ids[1:]])
    return replace(second, turns=(*first.turns[:-1], replace(end, output_ids=ids)))


def random_batch(count: int, *, seed: int = 0, with_old: bool = True) -> TrainBatch:
    """Episodes, three a prompt, with random advantages; old and reference log-probs lie near each other.

    The second of a prompt begins with all turns of the first but the last, and that one's first token.
    """
    rng = np.random.default_rng(seed)
    prompts = [random_ids(rng, int(rng.integers(3, 8))) for _ in range(0, count, 3)]
    trajectories = [random_trajectory(rng, index=i, prompt=prompts[i // 3]) for i in range(count)]
    for first, second in zip(range(0, count, 3), range(1, count, 3), strict=False):
        trajectories[second] = _begin_like(trajectories[first], trajectories[second])
    credit: list[FloatArray] = [
        np.where(t.policy_mask, rng.normal(), 0.0).astype(np.float32) for t in trajectories
    ]
    batch = build_batch(trajectories, credit)
    if not with_old:
        return batch
    noise = rng.normal(scale=0.2, size=(2, batch.num_policy_tokens)).astype(np.float32)
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


def launch_group(
    launcher: Launcher,
    config: ActorRolloutRefConfig,
    placement: Placement | None = None,
    *,
    name: str = "policy",
    trainable: bool = True,
) -> WorkerGroup:
    """Launch the ranks of a model; None: a single one on the CPU."""
    return WorkerGroup.launch(
        launcher,
        config,
        placement or Placement(),
        name=name,
        rendezvous=Rendezvous(),
        total_steps=10,
        seed=0,
        trainable=trainable,
    )


def one_rank(
    batch: TrainBatch,
    *,
    mini_batch_size: int | None = None,
    max_tokens: int = 8192,
    only_advantages: bool = False,
) -> list[MiniBatch]:
    """Return what a single rank does in an update; None: one mini-batch."""
    size = batch.num_trajectories if mini_batch_size is None else mini_batch_size
    (minis,) = make_mini_batches(
        batch,
        num_ranks=1,
        mini_batch_size=size,
        max_tokens=max_tokens,
        only_advantages=only_advantages,
    )
    return minis


def row_ids(batch: TrainBatch, row: int) -> IntArray:
    """Return the tokens of a trajectory."""
    return batch.select(np.array([row], np.int32)).token_ids


def save(worker: PolicyWorker, folder: str) -> None:
    """Write the state of a worker as the trainer does."""
    worker.stage(folder)
    asyncio.run(worker.write(folder, folder))


@contextmanager
def exported(worker: PolicyWorker) -> Iterator[Path]:
    """Give the file of weights that the worker wrote for the engines."""
    folder = worker.export_weights()
    assert folder is not None
    yield Path(folder) / "model.safetensors"
    worker.drop_weights()
    assert not Path(folder).exists()
