"""Continuations of a token sequence whose log-probs are asked for, and the one row that computes them all.

A method asks how likely an answer is in several states of one trajectory: after each turn, with other
documents, for several answers. Each is a `Branch` that continues the trajectory, or another branch, from some
token on. `pack` lays the trajectory and all branches out in one row, in which a token attends to its own
branch and to what that branch continues, so that the common prefix is computed once:

    row        q q a o o | p g | p g g        trunk q q a o o; two branches, after a and after o
    position   0 1 2 3 4 | 3 4 | 5 6 7
    previous   - 0 1 2 3 | 2 5 | 4 7 8        row index of the token before it
    enters     0 1 2 3 4 | 7 8 | 5 6 7        of a depth-first walk: token i attends to token j
    leaves     9 9 9 7 7 | 9 9 | 7 7 8        where enters[j] <= enters[i] < leaves[j]

NumPy only; `verl/workers/policy.py` runs the model.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np

from verl.types import BoolArray, FloatArray, IntArray


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Branch:
    """Tokens that continue the trunk, or an earlier branch, after its first `start` tokens."""

    ids: IntArray
    start: int
    """Number of tokens of the parent that come before `ids`, at least 1."""
    scored: tuple[int, int] = (0, 0)
    """Span `[first, end)` of `ids` whose log-probs are asked for; empty for a branch that others continue."""
    parent: int | None = None
    """Index of the branch that this one continues, which comes before it; None: the trunk."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Tree:
    """A token sequence and the branches that continue it."""

    trunk: IntArray
    branches: tuple[Branch, ...]
    trunk_scored: BoolArray | None = None
    """Tokens of the trunk whose log-probs are asked for, too [L]; None: none of them."""

    def __post_init__(self) -> None:
        """Raise ValueError for a branch that continues nothing, or scores tokens that it does not have."""
        for index, branch in enumerate(self.branches):
            if branch.parent is not None and not 0 <= branch.parent < index:
                raise ValueError(f"branch {index} continues branch {branch.parent}, which is not before it")
            parent = self.trunk if branch.parent is None else self.branches[branch.parent].ids
            if not 1 <= branch.start <= len(parent):
                raise ValueError(
                    f"branch {index} must start after 1 to {len(parent)} tokens, got {branch.start}"
                )
            first, end = branch.scored
            if not 0 <= first <= end <= len(branch.ids):
                raise ValueError(f"branch {index} has {len(branch.ids)} tokens, scored are {branch.scored}")

    @property
    def num_scored(self) -> int:
        """Return the number of tokens whose log-probs are asked for."""
        of_trunk = 0 if self.trunk_scored is None else int(self.trunk_scored.sum())
        return of_trunk + sum(end - first for first, end in (branch.scored for branch in self.branches))

    @property
    def used_trunk(self) -> IntArray:
        """Return the part of the trunk that log-probs depend on, at least one token."""
        starts = [branch.start for branch in self.branches if branch.parent is None]
        scored = [] if self.trunk_scored is None else np.flatnonzero(self.trunk_scored).tolist()
        return self.trunk[: max([1, *starts, *(int(index) + 1 for index in scored)])]

    def path(self, index: int) -> IntArray:
        """Return all tokens from the first of the trunk to the last of a branch."""
        branch = self.branches[index]
        before = self.trunk if branch.parent is None else self.path(branch.parent)
        skipped = 0 if branch.parent is None else len(before) - len(self.branches[branch.parent].ids)
        return np.concatenate([before[: skipped + branch.start], branch.ids])


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TreeLogProbs:
    """The log-probs of one tree, at the sampling temperature."""

    branches: tuple[FloatArray, ...]
    """Of the scored tokens of each branch, in order."""
    trunk: FloatArray | None = None
    """Of the scored tokens of the trunk, 0 elsewhere [L]; None where none were asked for."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TreeRow:
    """A tree as one row of R tokens."""

    ids: IntArray
    positions: IntArray
    """Distance from the first token of the trunk along the branch [R]."""
    previous: IntArray
    """Row index of the token before each one [R]; 0 for the first, which has none."""
    enters: IntArray
    """When a depth-first walk over the tree reaches each token [R]."""
    leaves: IntArray
    """When it has seen all that follows the token, in whichever branch [R].

    Token i attends to token j, itself or one that it follows, where `enters[j] <= enters[i] < leaves[j]`.
    """
    scored: IntArray
    """Row indices of the scored tokens: those of the trunk, then those of each branch."""


def pack(tree: Tree) -> TreeRow:
    """Lay a tree out as one row: the used trunk, then the branches in order."""
    trunk = tree.used_trunk
    sizes = [len(trunk), *(len(branch.ids) for branch in tree.branches)]
    offsets = np.cumsum([0, *sizes]).tolist()  # of the trunk, then of each branch
    positions = np.arange(offsets[-1], dtype=np.int32)
    previous = np.maximum(positions - 1, 0)
    scored = [np.zeros(0, np.int32)]
    if tree.trunk_scored is not None:
        scored.append(np.flatnonzero(tree.trunk_scored).astype(np.int32))
    segments = []
    for branch, start, end in zip(tree.branches, offsets[1:], offsets[2:], strict=False):
        # The last token of the parent that the branch continues.
        before = offsets[0 if branch.parent is None else branch.parent + 1] + branch.start - 1
        positions[start:end] = positions[before] + 1 + np.arange(end - start)
        previous[start : min(start + 1, end)] = before  # an empty branch has no first token
        scored.append(np.arange(branch.scored[0], branch.scored[1], dtype=np.int32) + start)
        segments.append((before, slice(start, end)))
    enters, leaves = _walk(len(trunk), segments, length=offsets[-1])
    return TreeRow(
        ids=np.concatenate([trunk, *(branch.ids for branch in tree.branches)]).astype(np.int32),
        positions=positions,
        previous=previous,
        enters=enters,
        leaves=leaves,
        scored=np.concatenate(scored),
    )


def _walk(trunk: int, segments: list[tuple[int, slice]], *, length: int) -> tuple[IntArray, IntArray]:
    """Return when a depth-first walk enters and leaves each token of a row [R].

    `segments` are the branches: the token that each continues, and its own tokens. After a token comes the
    next one of its segment with all that follows it, then the branches that start there, in order.
    """
    hanging = np.zeros(length, dtype=np.int32)  # tokens of the branches that start at each token
    for before, own in reversed(segments):
        hanging[before] += own.stop - own.start + hanging[own].sum()
    enters = np.arange(length, dtype=np.int32)
    leaves = np.zeros(length, dtype=np.int32)
    leaves[:trunk] = enters[:trunk] + np.cumsum((1 + hanging[:trunk])[::-1])[::-1]
    for before, own in segments:
        total = own.stop - own.start + hanging[own].sum()
        first = leaves[before] - hanging[before]
        hanging[before] -= total  # the next branch here begins where this one ends
        enters[own] = first + np.arange(own.stop - own.start)
        leaves[own] = enters[own] + np.cumsum((1 + hanging[own])[::-1])[::-1]
    return enters, leaves


def unpack(tree: Tree, log_probs: FloatArray) -> TreeLogProbs:
    """Return the log-probs of `pack(tree).scored` [S] by branch."""
    trunk, start = None, 0
    if tree.trunk_scored is not None:
        start = int(tree.trunk_scored.sum())
        trunk = np.zeros(len(tree.trunk), dtype=np.float32)
        trunk[tree.trunk_scored] = log_probs[:start]
    counts = [branch.scored[1] - branch.scored[0] for branch in tree.branches]
    borders = (start + np.cumsum([0, *counts])).tolist()
    if borders[-1] != len(log_probs):
        raise ValueError(f"a tree with {borders[-1]} scored tokens got {len(log_probs)} log-probs")
    parts = [log_probs[a:b] for a, b in itertools.pairwise(borders)]
    return TreeLogProbs(branches=tuple(parts), trunk=trunk)


def row_length(tree: Tree) -> int:
    """Return the number of tokens of `pack(tree)`."""
    return len(tree.used_trunk) + sum(len(branch.ids) for branch in tree.branches)


def split(tree: Tree) -> list[Tree]:
    """Return one tree without branches per scored sequence: what `pack` computes at once, one by one.

    First that of the trunk, if it is scored, then those of the branches that have scored tokens.
    """
    parts = []
    if tree.trunk_scored is not None:
        parts.append(Tree(trunk=tree.trunk, branches=(), trunk_scored=tree.trunk_scored))
    for index, branch in enumerate(tree.branches):
        first, end = branch.scored
        if first == end:
            continue
        path = tree.path(index)
        scored = np.zeros(len(path), dtype=np.bool_)
        start = len(path) - len(branch.ids)
        scored[start + first : start + end] = True
        parts.append(Tree(trunk=path, branches=(), trunk_scored=scored))
    return parts
