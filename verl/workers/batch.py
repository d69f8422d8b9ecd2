"""Pad trajectories and their advantages into arrays, and split these over updates, ranks and passes.

The only file that pads. Padding is on the right and attention is causal, so real tokens never attend to it
and no attention mask is needed; `policy_mask` alone decides what counts in the loss. A batch is split three
times: into mini-batches (an optimizer step each), over ranks, and into micro-batches (a forward pass each).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from verl.branches import Tree, pack, row_length
from verl.types import BoolArray, FloatArray, IntArray, Trajectory


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TrainBatch:
    """Trajectories as the workers get them: one row each, arrays [B, L]."""

    input_ids: IntArray
    lengths: IntArray
    """Tokens of each row, without padding [B]."""
    policy_mask: BoolArray
    advantages: FloatArray
    sampling_log_probs: FloatArray
    """Log-probs that the engine reported."""
    old_log_probs: FloatArray | None = None
    """Log-probs under the policy before the update. None: the only update computes them itself."""
    ref_log_probs: FloatArray | None = None
    """Log-probs under the frozen reference; None without a KL term."""

    @property
    def num_trajectories(self) -> int:
        return len(self.lengths)

    @property
    def num_policy_tokens(self) -> int:
        return int(self.policy_mask.sum())

    def with_old(self, log_probs: FloatArray) -> TrainBatch:
        """Return a copy with old log-probs [B, L]."""
        return replace(self, old_log_probs=self._check_shape(log_probs))

    def with_reference(self, log_probs: FloatArray) -> TrainBatch:
        """Return a copy with reference log-probs [B, L]."""
        return replace(self, ref_log_probs=self._check_shape(log_probs))

    def select(self, rows: IntArray) -> TrainBatch:
        """Return a copy of some rows, cut to the longest of them."""
        width = int(self.lengths[rows].max(initial=0))
        return TrainBatch(
            input_ids=self.input_ids[rows, :width],
            lengths=self.lengths[rows],
            policy_mask=self.policy_mask[rows, :width],
            advantages=self.advantages[rows, :width],
            sampling_log_probs=self.sampling_log_probs[rows, :width],
            old_log_probs=None if self.old_log_probs is None else self.old_log_probs[rows, :width],
            ref_log_probs=None if self.ref_log_probs is None else self.ref_log_probs[rows, :width],
        )

    def _check_shape(self, log_probs: FloatArray) -> FloatArray:
        if log_probs.shape != self.input_ids.shape:
            raise ValueError(f"log_probs must have shape {self.input_ids.shape}, got {log_probs.shape}")
        return log_probs


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MiniBatch:
    """What one rank does in one optimizer step."""

    micro_batches: tuple[IntArray, ...]
    """Rows of the shard per forward pass. Every rank has the same number of passes, so some may be empty."""
    num_trajectories: int
    """Over all ranks, as `num_policy_tokens`: the loss divides by global counts."""
    num_policy_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Shard:
    """The part of a batch that one rank gets."""

    batch: TrainBatch
    rows: IntArray
    """Index of each row of `batch` in the whole batch."""
    mini_batches: tuple[MiniBatch, ...]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TreeShard:
    """The trees that one rank computes log-probs of."""

    trees: tuple[Tree, ...]
    index: tuple[int, ...]
    """Index of each tree in the whole list."""
    micro_batches: tuple[IntArray, ...]
    """Trees of the shard per forward pass; equally many on every rank, so some may be empty."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TreeBatch:
    """Trees as rows of one forward pass, padded on the right [B, L]; see `TreeRow` for the columns."""

    input_ids: IntArray
    positions: IntArray
    previous: IntArray
    enters: IntArray
    leaves: IntArray
    """Padding attends to padding, because a softmax over nothing is not a number."""
    rows: IntArray
    """Row of each scored token [N]; row by row."""
    columns: IntArray


def build_batch(
    trajectories: Sequence[Trajectory],
    credit: Sequence[FloatArray],
    *,
    pad_id: int,
    old_log_probs: Sequence[FloatArray] | None = None,
) -> TrainBatch:
    """Pad trajectories, their per-token advantages and, if known, their old log-probs on the right.

    Raises ValueError for an empty batch, a trajectory without sampled tokens, and advantages of another
    length or that are not finite.
    """
    if not trajectories:
        raise ValueError("cannot build a batch of no trajectories: all failed or none were collected")
    for trajectory, advantages in zip(trajectories, credit, strict=True):
        _check_row(trajectory, advantages)
    ids = [t.token_ids for t in trajectories]
    return TrainBatch(
        input_ids=_pad(ids, fill=pad_id, dtype=np.int32),
        lengths=np.array([len(row) for row in ids], dtype=np.int32),
        policy_mask=_pad([t.policy_mask for t in trajectories], fill=False, dtype=np.bool_),
        advantages=_pad(credit, fill=0.0, dtype=np.float32),
        sampling_log_probs=_pad([t.sampling_log_probs for t in trajectories], fill=0.0, dtype=np.float32),
        old_log_probs=None if old_log_probs is None else _pad(old_log_probs, fill=0.0, dtype=np.float32),
    )


def shard_batch(
    batch: TrainBatch, *, num_ranks: int, mini_batch_size: int | None, max_tokens: int
) -> list[Shard]:
    """Split a batch into equal mini-batches of about `mini_batch_size` rows (None: one), then over ranks.

    A micro-batch has at most `max_tokens` tokens, padding included, but at least one row. The split over
    ranks and micro-batches does not change the gradient of a mini-batch.
    """
    # Mini-batches first, over all ranks: the optimizer steps must not depend on the number of ranks.
    count = (
        1
        if mini_batch_size is None
        else count_mini_batches(batch.num_trajectories, mini_batch_size=mini_batch_size)
    )
    minis = np.array_split(np.arange(batch.num_trajectories), count)  # rows of the whole batch
    # plans[mini][rank] is a list of micro-batches, each an array of rows of the whole batch.
    plans = [
        _plan_micro_batches(rows, batch.lengths, num_ranks=num_ranks, max_tokens=max_tokens) for rows in minis
    ]
    # Turned from mini-batches of all ranks into all mini-batches of one rank, which gets its own rows only.
    return [_make_shard(batch, minis, [plan[rank] for plan in plans]) for rank in range(num_ranks)]


def shard_trees(trees: Sequence[Tree], *, num_ranks: int, max_tokens: int) -> list[TreeShard]:
    """Split trees over ranks and forward passes of at most `max_tokens` tokens, padding included."""
    lengths = np.array([row_length(tree) for tree in trees], dtype=np.int32)
    plan = _plan_micro_batches(np.arange(len(trees)), lengths, num_ranks=num_ranks, max_tokens=max_tokens)
    shards = []
    for micros in plan:
        index = np.sort(np.concatenate([np.empty(0, np.int32), *micros])).astype(np.int32)
        shards.append(
            TreeShard(
                trees=tuple(trees[i] for i in index),
                index=tuple(index.tolist()),
                micro_batches=tuple(np.searchsorted(index, micro).astype(np.int32) for micro in micros),
            )
        )
    return shards


def build_tree_batch(trees: Sequence[Tree]) -> TreeBatch:
    """Pack each tree in a row and pad the rows."""
    packed = [pack(tree) for tree in trees]
    end = max(len(row.ids) for row in packed)  # a walk of that many tokens has left all of them
    return TreeBatch(
        input_ids=_pad([row.ids for row in packed], fill=0, dtype=np.int32),
        positions=_pad([row.positions for row in packed], fill=0, dtype=np.int32),
        previous=_pad([row.previous for row in packed], fill=0, dtype=np.int32),
        enters=_pad([row.enters for row in packed], fill=end, dtype=np.int32),
        leaves=_pad([row.leaves for row in packed], fill=end + 1, dtype=np.int32),
        rows=np.repeat(np.arange(len(packed), dtype=np.int32), [len(row.scored) for row in packed]),
        columns=np.concatenate([row.scored for row in packed]),
    )


def count_mini_batches(num_trajectories: int, *, mini_batch_size: int) -> int:
    """Return the number of mini-batches, rounded: one extra trajectory gets no optimizer step of its own."""
    return max(1, round(num_trajectories / mini_batch_size))


def _make_shard(batch: TrainBatch, minis: list[npt.NDArray[np.intp]], plan: list[list[IntArray]]) -> Shard:
    # `rows` is sorted, so that searchsorted turns rows of the whole batch into rows of this shard.
    rows = np.sort(np.concatenate([micro for micros in plan for micro in micros])).astype(np.int32)
    return Shard(
        batch=batch.select(rows),
        rows=rows,
        mini_batches=tuple(
            MiniBatch(
                micro_batches=tuple(np.searchsorted(rows, micro).astype(np.int32) for micro in micros),
                num_trajectories=len(mini),
                num_policy_tokens=int(batch.policy_mask[mini].sum()),
            )
            for mini, micros in zip(minis, plan, strict=True)
        ),
    )


def _plan_micro_batches(
    rows: npt.NDArray[np.intp], lengths: IntArray, *, num_ranks: int, max_tokens: int
) -> list[list[IntArray]]:
    """Return the micro-batches of each rank, equally many, as collectives need; balanced by length."""
    # Longest first, dealt round robin: ranks get about the same number of tokens.
    by_length = rows[np.argsort(-lengths[rows], kind="stable")]
    packs = [_pack(by_length[rank::num_ranks], lengths, max_tokens=max_tokens) for rank in range(num_ranks)]
    most = max(len(of_rank) for of_rank in packs)
    return [of_rank + [np.empty(0, dtype=np.int32)] * (most - len(of_rank)) for of_rank in packs]


def _pack(rows: npt.NDArray[np.intp], lengths: IntArray, *, max_tokens: int) -> list[IntArray]:
    packs: list[list[int]] = []
    for row in rows:  # longest first, so the first row of a pack sets its padded length
        if packs and (len(packs[-1]) + 1) * int(lengths[packs[-1][0]]) <= max_tokens:
            packs[-1].append(int(row))
        else:
            packs.append([int(row)])
    return [np.array(pack, dtype=np.int32) for pack in packs]


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


def _pad(rows: Sequence[npt.NDArray[np.generic]], *, fill: float, dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    padded = np.full((len(rows), max(len(row) for row in rows)), fill, dtype=dtype)
    for line, row in zip(padded, rows, strict=True):
        line[: len(row)] = row
    return padded
