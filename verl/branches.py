"""Continuations of a token sequence whose log-probs are asked for.

A method asks how likely an answer is in several states of one trajectory: after each turn, with other
documents, for several answers. Each is a `Branch` that continues the trajectory, or another branch, from some
token on. A trajectory with its branches is a `Tree`; `pack` lays trees out in one sequence, in which a common
prefix is computed once, see `verl.forest`.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from verl.forest import Forest, ForestBuilder
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


def pack(trees: Sequence[Tree]) -> Forest:
    """Lay trees out in one sequence: of each the used trunk, then its branches in order.

    Scored are first the tokens of the first tree: those of its trunk, then those of its branches.
    """
    builder = ForestBuilder()
    scored: list[IntArray] = []
    for tree in trees:
        trunk, column = builder.add(tree.used_trunk)
        if tree.trunk_scored is not None:
            scored.append((column + np.flatnonzero(tree.trunk_scored)).astype(np.int32))
        for branch in tree.branches:
            # Blocks of the builder are numbered over all trees: the trunk, then its branches.
            parent = trunk if branch.parent is None else trunk + 1 + branch.parent
            _, column = builder.add(branch.ids, parent=parent, start=branch.start)
            scored.append(np.arange(*branch.scored, dtype=np.int32) + column)
    return builder.build(scored)


def unpack(tree: Tree, log_probs: FloatArray) -> TreeLogProbs:
    """Return the log-probs of the tokens that `pack` scores in a tree [N] by branch."""
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


def count_tokens(tree: Tree) -> int:
    """Return the number of tokens that `pack` lays out for a tree."""
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
