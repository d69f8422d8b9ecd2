"""Tokens that ranks compute and wait for, and what an update costs on the embedded world's policy."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from verl.trainer.config.schema import ActorConfig, ActorRolloutRefConfig, ModelConfig, OptimConfig
from verl.types import Action, ActionKind, IntArray, Question, Stop, Trajectory, Turn
from verl.workers.batch import (
    TrainBatch,
    build_batch,
    count_mini_batches,
    deal_rows,
    make_mini_batches,
    pack_rows,
)
from verl.workers.parallel import Placement
from verl.workers.policy import PolicyWorker

NUM_RANKS, MAX_TOKENS, MINI_BATCH_SIZE = 8, 16_384, 64
"""As in the recipe for 8 GPUs."""
REPEATS = 5
POLICY = Path(__file__).resolve().parents[2] / "world" / "models" / "policy"


def random_batch(
    *, num_groups: int, group_size: int, prompt: int, outputs: int, observed: tuple[int, int], turns: int
) -> TrainBatch:
    """Return groups with prompts of `prompt` tokens and 1 to `turns` turns of `outputs` sampled tokens.

    Observations between the turns have `observed` tokens, from the first to the second number.
    """
    rng = np.random.default_rng(0)

    def draw(count: int) -> IntArray:
        return rng.integers(3, 1500, count).astype(np.int32)

    trajectories = []
    for group in range(num_groups):
        prompt_ids = draw(prompt)
        question = Question(uid=str(group), text="", messages=(), golds=("",), data_source="")
        for sample in range(group_size):
            num_turns = int(rng.integers(1, turns + 1))
            lengths = [*rng.integers(observed[0], observed[1] + 1, num_turns - 1), 0]
            made = tuple(
                Turn(
                    output_ids=draw(outputs),
                    output_log_probs=np.full(outputs, -1, np.float32),
                    action=Action(kind=ActionKind.ANSWER),
                    observation_ids=draw(length),
                )
                for length in lengths
            )
            trajectories.append(
                Trajectory(
                    question=question, sample=sample, prompt_ids=prompt_ids, turns=made, stop=Stop.ANSWERED
                )
            )
    credit = [np.where(t.policy_mask, rng.normal(), 0).astype(np.float32) for t in trajectories]
    return build_batch(trajectories, credit)


def without_sharing(batch: TrainBatch) -> TrainBatch:
    """Return the batch with prompts that all begin with another token."""
    numbers = np.arange(batch.num_trajectories, dtype=np.int32)
    ids = batch.token_ids.copy()
    ids[np.cumsum(batch.lengths) - batch.lengths] = numbers
    return replace(batch, token_ids=ids, prompts=numbers)


def computed_tokens(batch: TrainBatch) -> int:
    """Return the tokens of one update over all ranks, of which each waits in every pass for the slowest."""
    count = count_mini_batches(batch.num_trajectories, mini_batch_size=MINI_BATCH_SIZE)
    computed = 0
    for rows in np.array_split(np.arange(batch.num_trajectories, dtype=np.int32), count):
        mini = batch.select(rows)
        plan = deal_rows(mini, num_ranks=NUM_RANKS, max_tokens=MAX_TOKENS)
        for of_pass in zip(*plan, strict=True):
            longest = max(len(pack_rows(mini.select(of_rank)).ids) for of_rank in of_pass)
            computed += NUM_RANKS * longest
    return computed


def cpu_seconds(work: Callable[[], object]) -> float:
    """Return the processor seconds of one call, in the median."""
    work()
    seconds = []
    for _ in range(REPEATS):
        began = time.process_time()
        work()
        seconds.append(time.process_time() - began)
    return statistics.median(seconds)


def quickstart_step() -> tuple[PolicyWorker, TrainBatch]:
    """Return the embedded policy on one thread and a batch like a step of the quickstart's."""
    torch.set_num_threads(1)
    worker = PolicyWorker(
        ActorRolloutRefConfig(
            model=ModelConfig(path=str(POLICY)), actor=ActorConfig(optim=OptimConfig(lr=0.0))
        ),
        Placement(),
        total_steps=1,
        seed=0,
        trainable=True,
    )
    # 37 % of the tokens are prompts.
    batch = random_batch(num_groups=16, group_size=5, prompt=63, outputs=18, observed=(30, 110), turns=3)
    return worker, batch


def measure() -> dict[str, float]:
    """Return tokens computed per real one, the milliseconds of dealing, and seconds on one processor."""
    # 512 questions with 5 episodes of 600 to 4,100 tokens.
    recipe = random_batch(
        num_groups=512, group_size=5, prompt=250, outputs=350, observed=(300, 1000), turns=4
    )
    apart = without_sharing(recipe)
    dealing_s = cpu_seconds(
        lambda: make_mini_batches(
            recipe, num_ranks=NUM_RANKS, mini_batch_size=MINI_BATCH_SIZE, max_tokens=MAX_TOKENS
        )
    )
    worker, small = quickstart_step()

    def update(batch: TrainBatch) -> float:
        (minis,) = make_mini_batches(
            batch, num_ranks=1, mini_batch_size=batch.num_trajectories, max_tokens=4096
        )
        return cpu_seconds(lambda: worker.update(minis))

    def log_probs(batch: TrainBatch) -> float:
        (plan,) = deal_rows(batch, num_ranks=1, max_tokens=4096)
        passes = [batch.select(rows) for rows in plan]
        return cpu_seconds(lambda: worker.log_probs(passes))

    return {
        "real_tokens_mean": round(float(recipe.lengths.mean()), 1),
        "computed_per_real": round(computed_tokens(apart) / int(recipe.lengths.sum()), 3),
        "computed_per_real_shared": round(computed_tokens(recipe) / int(recipe.lengths.sum()), 3),
        "dealing_ms": round(1000 * dealing_s, 1),
        "small_computed_per_real_shared": round(len(pack_rows(small).ids) / int(small.lengths.sum()), 3),
        "small_update_s": round(update(small), 3),
        "small_update_unshared_s": round(update(without_sharing(small)), 3),
        "small_log_probs_s": round(log_probs(small), 3),
        "small_log_probs_unshared_s": round(log_probs(without_sharing(small)), 3),
    }
