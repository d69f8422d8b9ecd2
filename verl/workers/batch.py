"""Trajectories as arrays, without padding, and how they are dealt to updates, ranks and forward passes.

A batch is split three times: into mini-batches (an optimizer step each), over ranks, and into micro-batches
(a forward pass each); `verl.workers.dealing` does the last two.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from verl.branches import Tree, lay_out
from verl.forest import Forest, ForestBuilder, common_length
from verl.types import BoolArray, FloatArray, IntArray, Trajectory
from verl.workers.dealing import deal


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TrainBatch:
    """B trajectories of T tokens, one after the other; N of the tokens were sampled by the policy."""

    token_ids: IntArray
    """[T]"""
    policy_mask: BoolArray
    """[T]"""
    lengths: IntArray
    """Tokens of each trajectory [B]."""
    policy_lengths: IntArray
    """Policy tokens of each trajectory [B]."""
    prompt_lengths: IntArray
    """[B]"""
    prompts: IntArray
    """Number of the prompt: trajectories with the same number begin with the same tokens [B]."""
    advantages: FloatArray
    """Of the policy tokens, as all below [N]."""
    sampling_log_probs: FloatArray
    """Log-probs that the engine reported."""
    old_log_probs: FloatArray | None = None
    """Log-probs under the policy before the update. None: the only update computes them itself."""
    ref_log_probs: FloatArray | None = None
    """Log-probs under the frozen reference; None without a KL term."""

    @property
    def num_trajectories(self) -> int:
        """Return B."""
        return len(self.lengths)

    @property
    def num_policy_tokens(self) -> int:
        """Return N."""
        return len(self.advantages)

    def with_old(self, log_probs: FloatArray) -> TrainBatch:
        """Return a copy with old log-probs [N]."""
        return replace(self, old_log_probs=self._check_length(log_probs))

    def with_reference(self, log_probs: FloatArray) -> TrainBatch:
        """Return a copy with reference log-probs [N]."""
        return replace(self, ref_log_probs=self._check_length(log_probs))

    def select(self, rows: IntArray) -> TrainBatch:
        """Return a copy of some trajectories, in this order."""
        tokens = _elements(rows, self.lengths)
        policy = _elements(rows, self.policy_lengths)
        return TrainBatch(
            token_ids=self.token_ids[tokens],
            policy_mask=self.policy_mask[tokens],
            lengths=self.lengths[rows],
            policy_lengths=self.policy_lengths[rows],
            prompt_lengths=self.prompt_lengths[rows],
            prompts=self.prompts[rows],
            advantages=self.advantages[policy],
            sampling_log_probs=self.sampling_log_probs[policy],
            old_log_probs=None if self.old_log_probs is None else self.old_log_probs[policy],
            ref_log_probs=None if self.ref_log_probs is None else self.ref_log_probs[policy],
        )

    def split(self, values: FloatArray) -> list[FloatArray]:
        """Return values of the policy tokens [N] by trajectory."""
        return np.split(values, np.cumsum(self.policy_lengths))[:-1]

    def _check_length(self, log_probs: FloatArray) -> FloatArray:
        if log_probs.shape != self.advantages.shape:
            raise ValueError(f"log_probs must have shape {self.advantages.shape}, got {log_probs.shape}")
        return log_probs


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MiniBatch:
    """What one rank does in one optimizer step."""

    micro_batches: tuple[TrainBatch, ...]
    """One per pass. Every rank has the same number of passes, so some may be empty."""
    uncredited: tuple[TrainBatch, ...] = ()
    """The same of trajectories without any advantage. They add nothing to the gradient, so that a forward
    pass, for the metrics, is enough."""
    num_trajectories: int
    """Over all ranks, as the two below: the loss and metrics divide by global counts."""
    num_policy_tokens: int
    num_tokens: int


def build_batch(
    trajectories: Sequence[Trajectory],
    credit: Sequence[FloatArray],
    *,
    old_log_probs: Sequence[FloatArray] | None = None,
) -> TrainBatch:
    """Return trajectories with their advantages and, if known, their old log-probs, both per token [L].

    Each ends at its last sampled token: nothing depends on what follows. Raises ValueError for an empty
    batch, a trajectory without sampled tokens, and advantages of another length or that are not finite.
    """
    if not trajectories:
        raise ValueError("cannot build a batch of no trajectories: all failed or none were collected")
    for trajectory, advantages in zip(trajectories, credit, strict=True):
        _check_row(trajectory, advantages)
    masks = [t.policy_mask for t in trajectories]
    lengths = [int(np.flatnonzero(mask)[-1]) + 1 for mask in masks]
    prompts: dict[bytes, int] = {}

    def of_policy(per_token: Sequence[FloatArray]) -> FloatArray:
        return np.concatenate([x[mask] for x, mask in zip(per_token, masks, strict=True)]).astype(np.float32)

    return TrainBatch(
        token_ids=np.concatenate([t.token_ids[:end] for t, end in zip(trajectories, lengths, strict=True)]),
        policy_mask=np.concatenate([mask[:end] for mask, end in zip(masks, lengths, strict=True)]),
        lengths=np.array(lengths, dtype=np.int32),
        policy_lengths=np.array([mask.sum() for mask in masks], dtype=np.int32),
        prompt_lengths=np.array([len(t.prompt_ids) for t in trajectories], dtype=np.int32),
        prompts=np.array(
            [prompts.setdefault(t.prompt_ids.tobytes(), len(prompts)) for t in trajectories], dtype=np.int32
        ),
        advantages=of_policy(credit),
        sampling_log_probs=of_policy([t.sampling_log_probs for t in trajectories]),
        old_log_probs=None if old_log_probs is None else of_policy(old_log_probs),
    )


def pack_rows(batch: TrainBatch) -> Forest:
    """Lay trajectories out so that their policy tokens are scored, in the order of the batch.

    What several trajectories begin with, their prompt and often more, is computed once.
    """
    builder = ForestBuilder()
    return builder.build(_lay_out(batch, builder))


def _lay_out(batch: TrainBatch, builder: ForestBuilder) -> list[IntArray]:
    """Add the trajectories; return the columns of the policy tokens of each."""
    scored = []
    for begin, end in itertools.pairwise(_borders(batch.lengths).tolist()):
        columns = builder.add(batch.token_ids[begin:end])
        scored.append(columns[batch.policy_mask[begin:end]])
    return scored


def pack_whole(ids: IntArray) -> Forest:
    """Lay one sequence out and score all its tokens but the first [L]."""
    builder = ForestBuilder()
    return builder.build([builder.add(ids)[1:]])


def make_mini_batches(
    batch: TrainBatch,
    *,
    num_ranks: int,
    mini_batch_size: int,
    max_tokens: int,
    only_advantages: bool = False,
) -> list[list[MiniBatch]]:
    """Split a batch into equal mini-batches of about `mini_batch_size` rows; return those of each rank.

    The split over ranks and micro-batches does not change the gradient of a mini-batch. With
    `only_advantages` the loss has no other term, so that trajectories without any get no backward pass.
    """
    # Mini-batches first, over all ranks: the optimizer steps must not depend on the number of ranks.
    count = count_mini_batches(batch.num_trajectories, mini_batch_size=mini_batch_size)
    shards: list[list[MiniBatch]] = [[] for _ in range(num_ranks)]
    for rows in np.array_split(np.arange(batch.num_trajectories, dtype=np.int32), count):
        mini = batch.select(rows)
        credited, uncredited = mini, None
        if only_advantages:
            credited, uncredited = _split_by_credit(mini, min_tokens=num_ranks * max_tokens)
        passes = _make_passes(credited, num_ranks=num_ranks, max_tokens=max_tokens)
        others = _make_passes(uncredited, num_ranks=num_ranks, max_tokens=max_tokens)
        for shard, of_rank, others_of_rank in zip(shards, passes, others, strict=True):
            shard.append(
                MiniBatch(
                    micro_batches=of_rank,
                    uncredited=others_of_rank,
                    num_trajectories=mini.num_trajectories,
                    num_policy_tokens=mini.num_policy_tokens,
                    num_tokens=int(mini.lengths.sum()),
                )
            )
    return shards


def count_mini_batches(num_trajectories: int, *, mini_batch_size: int) -> int:
    """Return the number of mini-batches, rounded: one extra trajectory gets no optimizer step of its own."""
    return max(1, round(num_trajectories / mini_batch_size))


def _split_by_credit(batch: TrainBatch, *, min_tokens: int) -> tuple[TrainBatch, TrainBatch | None]:
    """Return the trajectories of prompts with an advantage, and those of prompts without any.

    All stay together where none has one, as the optimizer steps all the same, and where those without
    compute fewer tokens than `min_tokens`: a pass more would cost more than it saves.
    """
    first = _borders(batch.policy_lengths)[:-1]
    has_advantage = np.maximum.reduceat(np.abs(batch.advantages), first) > 0
    # With all others of its prompt, which is then computed in one kind of pass alone.
    is_credited = np.isin(batch.prompts, batch.prompts[has_advantage])
    if not is_credited.any():
        return batch, None
    credited, others = (
        batch.select(np.flatnonzero(kind).astype(np.int32)) for kind in (is_credited, ~is_credited)
    )
    builder = ForestBuilder()
    _lay_out(others, builder)
    return (batch, None) if builder.num_tokens < min_tokens else (credited, others)


def _make_passes(
    batch: TrainBatch | None, *, num_ranks: int, max_tokens: int
) -> list[tuple[TrainBatch, ...]]:
    """Return the forward passes of each rank."""
    if batch is None:
        return [()] * num_ranks
    plan = deal_rows(batch, num_ranks=num_ranks, max_tokens=max_tokens)
    return [tuple(batch.select(of_pass) for of_pass in of_rank) for of_rank in plan]


def deal_rows(batch: TrainBatch, *, num_ranks: int, max_tokens: int) -> list[list[IntArray]]:
    """Deal trajectories, see `deal`; those with the same prompt are a group."""
    tokens = [
        batch.token_ids[begin:end] for begin, end in itertools.pairwise(_borders(batch.lengths).tolist())
    ]
    order = _content_order(tokens)
    prefixes, groups = batch.prompt_lengths[order], batch.prompts[order]
    common = [0, *(common_length(tokens[a], tokens[b]) for a, b in itertools.pairwise(order))]
    plan = deal(
        batch.lengths[order] - prefixes,
        overlaps=np.maximum(0, np.array(common, dtype=np.int32) - prefixes),
        prefixes=prefixes,
        groups=groups,
        num_ranks=num_ranks,
        max_tokens=max_tokens,
    )
    return [[order[rows] for rows in of_rank] for of_rank in plan]


def deal_trees(trees: Sequence[Tree], *, num_ranks: int, max_tokens: int) -> list[list[IntArray]]:
    """Deal trees, see `deal`; those with the same prompt are a group."""
    order = _content_order([tree.used_trunk for tree in trees])
    prompts: dict[bytes, int] = {}
    lengths, overlaps, prefixes, groups = (np.zeros(len(trees), dtype=np.int32) for _ in range(4))
    before = ForestBuilder()  # has the tree before alone
    for place, tree in enumerate(trees[i] for i in order):
        prompt = tree.used_trunk[: tree.prompt_length]
        prefixes[place], groups[place] = len(prompt), prompts.setdefault(prompt.tobytes(), len(prompts))
        alone = ForestBuilder()
        lay_out(tree, alone)
        lengths[place] = alone.num_tokens - len(prompt)
        if place and groups[place] == groups[place - 1]:
            num_before = before.num_tokens
            lay_out(tree, before)
            overlaps[place] = alone.num_tokens - (before.num_tokens - num_before) - len(prompt)
        before = alone
    plan = deal(
        lengths,
        overlaps=overlaps,
        prefixes=prefixes,
        groups=groups,
        num_ranks=num_ranks,
        max_tokens=max_tokens,
    )
    return [[order[rows] for rows in of_rank] for of_rank in plan]


def _content_order(sequences: Sequence[IntArray]) -> IntArray:
    """Return an order in which no sequence begins more like an earlier one than like that before it.

    That is the order of their tokens; bytes have it where the most significant one comes first.
    """
    keys = [sequence.astype(">i4").tobytes() for sequence in sequences]
    return np.array(sorted(range(len(keys)), key=keys.__getitem__), dtype=np.int32)


def _borders(lengths: IntArray) -> IntArray:
    """Return where each of consecutive runs begins and the last one ends [B + 1]."""
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)


def _elements(rows: IntArray, lengths: IntArray) -> IntArray:
    """Return the indices of the elements of some of consecutive runs."""
    counts = lengths[rows]
    shifts = _borders(lengths)[rows] - _borders(counts)[:-1]
    return np.repeat(shifts, counts) + np.arange(counts.sum(), dtype=np.int32)


def _check_row(trajectory: Trajectory, advantages: FloatArray) -> None:
    name = f"trajectory {trajectory.question.uid}#{trajectory.sample}"
    if not trajectory.num_policy_tokens or not len(trajectory.prompt_ids):
        raise ValueError(f"{name} needs a prompt and at least one sampled token to be trained on")
    if not trajectory.is_one_sequence:
        raise ValueError(
            f"{name}: observations were dropped from its context, so that its completions were not sampled "
            "from its tokens; agent.context=drop_observations is for evaluation"
        )
    if advantages.shape != trajectory.token_ids.shape:
        raise ValueError(f"{name}: {advantages.shape} advantages for {trajectory.token_ids.shape} tokens")
    if not np.isfinite(advantages).all():
        raise ValueError(f"{name}: advantages must be finite")


def ratio_segments(batch: TrainBatch, *, mode: str) -> IntArray | None:
    """Return what shares a ratio: the trajectory or turn of each policy token [N]; None: nothing."""
    if mode == "vanilla":
        return None
    if mode == "gspo":
        lengths = batch.policy_lengths
        return np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)
    # A turn begins at a policy token after one that is not; a trajectory begins with a prompt.
    begins = np.diff(batch.policy_mask.astype(np.int8), prepend=np.int8(0)) == 1
    return np.cumsum(begins, dtype=np.int32)[batch.policy_mask] - 1
