"""Continuations of a token sequence whose log-probs are asked for.

A method asks how likely an answer is in several states of one trajectory: after each turn, with other
documents, for several answers. Each is a `Branch` that continues the trajectory from some token on. A
trajectory with its branches is a `Tree`; `pack` lays trees out in one sequence, in which a common prefix, of
several trees as well, is computed once, see `verl.forest`.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from verl.forest import Forest, ForestBuilder
from verl.types import BoolArray, FloatArray, IntArray


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Branch:
    """Tokens that continue the trunk after its first `start` tokens."""

    ids: IntArray
    start: int
    """Number of tokens of the trunk that come before `ids`, at least 1."""
    scored: tuple[int, int]
    """Span `[first, end)` of `ids` whose log-probs are asked for; at least one token."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Tree:
    """A token sequence and the branches that continue it."""

    trunk: IntArray
    branches: tuple[Branch, ...]
    trunk_scored: BoolArray | None = None
    """Tokens of the trunk whose log-probs are asked for, too [L]; None: none of them."""
    prompt_length: int = 1
    """Tokens of the trunk that are computed together with trees that begin with the same ones."""

    def __post_init__(self) -> None:
        """Raise ValueError for a branch that continues nothing, or scores tokens that it does not have."""
        for index, branch in enumerate(self.branches):
            if not 1 <= branch.start <= len(self.trunk):
                raise ValueError(
                    f"branch {index} must start after 1 to {len(self.trunk)} tokens, got {branch.start}"
                )
            first, end = branch.scored
            if not 0 <= first < end <= len(branch.ids):
                raise ValueError(f"branch {index} has {len(branch.ids)} tokens, scored are {branch.scored}")

    @property
    def num_scored(self) -> int:
        """Return the number of tokens whose log-probs are asked for."""
        of_trunk = 0 if self.trunk_scored is None else int(self.trunk_scored.sum())
        return of_trunk + sum(end - first for first, end in (branch.scored for branch in self.branches))

    @property
    def used_trunk(self) -> IntArray:
        """Return the part of the trunk that log-probs depend on, at least one token."""
        end = max([1, *(branch.start for branch in self.branches)])
        if self.trunk_scored is not None and self.trunk_scored.any():
            end = max(end, len(self.trunk) - int(self.trunk_scored[::-1].argmax()))
        return self.trunk[:end]

    def path(self, index: int) -> IntArray:
        """Return all tokens from the first of the trunk to the last of a branch."""
        branch = self.branches[index]
        return np.concatenate([self.trunk[: branch.start], branch.ids])


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
        scored += lay_out(tree, builder)
    return builder.build(scored)


def lay_out(tree: Tree, builder: ForestBuilder) -> list[IntArray]:
    """Add a tree; return the columns that are scored, of its trunk, if any are, and of each branch."""
    trunk = builder.add(tree.used_trunk)
    scored = [] if tree.trunk_scored is None else [trunk[tree.trunk_scored[: len(trunk)]]]
    for branch in tree.branches:
        columns = builder.add(branch.ids, after=int(trunk[branch.start - 1]))
        scored.append(columns[slice(*branch.scored)])
    return scored


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


def split(tree: Tree) -> list[Tree]:
    """Return one tree without branches per scored sequence: what `pack` computes at once, one by one.

    First that of the trunk, if it is scored, then those of the branches.
    """
    parts = []
    if tree.trunk_scored is not None:
        parts.append(replace(tree, branches=()))
    for index, branch in enumerate(tree.branches):
        first, end = branch.scored
        path = tree.path(index)
        scored = np.zeros(len(path), dtype=np.bool_)
        start = len(path) - len(branch.ids)
        scored[start + first : start + end] = True
        length = min(tree.prompt_length, tree.branches[index].start)
        parts.append(Tree(trunk=path, branches=(), trunk_scored=scored, prompt_length=length))
    return parts
