"""The layout of a forward pass: token sequences in one, without padding, and common prefixes computed once.

A forest consists of blocks. A block of tokens begins a tree, or continues a path of earlier tokens. A token
attends to that path and to its own block up to itself, so that sequences which begin alike share what they
have in common, and do not see each other:

    sequences        q q a o o        q q a p g               q q a o o p             z a
    block            0 (q q a o o)  | 1 continues 0 after a | 2 continues 0 after o | 3 begins a tree
    ids              q q a o o      | p g                   | p                     | z a
    positions        0 1 2 3 4      | 3 4                   | 5                     | 0 1
    previous         0 0 1 2 3      | 2 5                   | 4                     | 8 8
    query_lengths    5              | 2                     | 1                     | 2
    key_lengths      5              | 5                     | 6                     | 2
    keys             0 1 2 3 4      | 0 1 2 5 6             | 0 1 2 3 4 7           | 8 9

NumPy only; `verl/workers/attention.py` computes the attention.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from verl.types import BoolArray, IntArray

_KEY_COST = 64
"""Cost of gathering one key for a call of attention, in query-key products; measured on CPUs."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Forest:
    """One sequence of T tokens that consists of S blocks."""

    ids: IntArray
    """[T]"""
    positions: IntArray
    """Number of tokens before each one, from the first of its tree along the blocks [T]."""
    previous: IntArray
    """Column of the token before each one [T]; its own for the first of a tree, which has none."""
    scored: IntArray
    """Columns of the tokens whose log-probs are asked for [N]; a column may occur in it more than once."""
    query_lengths: IntArray
    """Tokens of each block [S]."""
    key_lengths: IntArray
    """Tokens that the last token of each block attends to: those that the block continues and its own [S]."""
    keys: IntArray | None
    """Their columns, block after block [sum of `key_lengths`]; None where no block continues another."""


def common_length(one: IntArray, other: IntArray) -> int:
    """Return the number of tokens with which both begin."""
    length = min(len(one), len(other))
    differs = np.flatnonzero(one[:length] != other[:length])
    return int(differs[0]) if len(differs) else length


class ForestBuilder:
    """Lays sequences out, one after the other; what one begins with may be there already, and is shared."""

    def __init__(self) -> None:
        self._ids: list[IntArray] = []
        """Of each block, as the three below."""
        self._first: list[int] = []
        """Column of the first token."""
        self._before: list[int] = []
        """Number of tokens on the path to the first one."""
        self._parents: list[int] = []
        """The block that has the last of these tokens; its own number where there are none."""
        self._next: dict[tuple[int | None, int], int] = {}
        """The block that continues the path to a column with a token; None: it begins a tree."""
        self.num_tokens = 0

    def add(self, ids: IntArray, *, after: int | None = None) -> IntArray:
        """Lay out a sequence, which may continue the path to the column `after`; return its columns [L]."""
        columns, last = [np.zeros(0, dtype=np.int32)], after
        if after is not None:
            columns.append(self._follow(self._block_of(after), ids, first=after + 1))
        while num_left := len(ids) - sum(map(len, columns)):
            last = int(columns[-1][-1]) if len(columns[-1]) else last
            rest = ids[-num_left:]
            block = self._next.get((last, int(rest[0])))
            if block is None:
                columns.append(self._add_block(rest, after=last))
            else:
                columns.append(self._follow(block, rest, first=self._first[block]))
        return np.concatenate(columns)

    def _follow(self, block: int, ids: IntArray, *, first: int) -> IntArray:
        """Return the columns of a block, from `first` on, that have the same tokens."""
        common = common_length(self._ids[block][first - self._first[block] :], ids)
        return np.arange(first, first + common, dtype=np.int32)

    def _block_of(self, column: int) -> int:
        return bisect_right(self._first, column) - 1

    def _add_block(self, ids: IntArray, *, after: int | None) -> IntArray:
        number, first = len(self._ids), self.num_tokens
        parent, num_before = number, 0
        if after is not None:
            parent = self._block_of(after)
            num_before = self._before[parent] + after - self._first[parent] + 1
        self._next[after, int(ids[0])] = number
        self._ids.append(ids)
        self._first.append(first)
        self._before.append(num_before)
        self._parents.append(parent)
        self.num_tokens += len(ids)
        return np.arange(first, self.num_tokens, dtype=np.int32)

    def build(self, scored: Sequence[IntArray]) -> Forest:
        """Return all as one sequence in which these columns are scored.

        Without a token it is two of which none is scored: a forward pass needs some.
        """
        if not self.num_tokens:
            self.add(np.zeros(2, dtype=np.int32))
        paths: list[IntArray] = []  # columns of each block after those of all tokens that it continues
        for number, (ids, first) in enumerate(zip(self._ids, self._first, strict=True)):
            columns = np.arange(first, first + len(ids), dtype=np.int32)
            parent, num_before = self._parents[number], self._before[number]
            paths.append(np.concatenate([paths[parent][:num_before], columns]) if num_before else columns)
        blocks = [(len(ids), path) for ids, path in zip(self._ids, paths, strict=True)]
        is_plain = all(own == len(path) for own, path in blocks)
        return Forest(
            ids=np.concatenate(self._ids).astype(np.int32),
            positions=np.concatenate(
                [np.arange(len(path) - own, len(path), dtype=np.int32) for own, path in blocks]
            ),
            # One to the left in the path; the first of a tree stays where it is.
            previous=np.concatenate([np.append(path[:1], path[:-1])[-own:] for own, path in blocks]),
            scored=np.concatenate([np.zeros(0, np.int32), *scored]).astype(np.int32),
            query_lengths=np.array([own for own, _ in blocks], dtype=np.int32),
            key_lengths=np.array([len(path) for _, path in blocks], dtype=np.int32),
            keys=None if is_plain else np.concatenate([path for _, path in blocks]),
        )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MergedBlocks:
    """Successive blocks whose attention is computed at once."""

    num_queries: int
    """Q, the tokens of all blocks."""
    keys: IntArray
    """Columns that any of them attends to, in order [K]."""
    mask: BoolArray | None
    """Which keys each query attends to [Q, K]; None where Q = K and each attends to those up to itself."""


def merge_blocks(forest: Forest) -> list[MergedBlocks]:
    """Merge successive blocks where that makes attention cheaper.

    Short blocks after one trunk attend to nearly the same keys. Merged, they gather these once, and compute
    products that the mask then leaves out.
    """
    keys = np.arange(len(forest.ids), dtype=np.int32) if forest.keys is None else forest.keys
    paths = np.split(keys, forest.key_lengths.cumsum()[:-1])
    groups: list[list[int]] = []
    is_key = np.zeros(len(forest.ids), dtype=np.bool_)  # of the last group
    cost, num_queries, num_keys = 0.0, 0, 0
    for block, (path, own) in enumerate(zip(paths, forest.query_lengths.tolist(), strict=True)):
        # A block that begins a tree is computed without its masked half.
        alone = (own / (2 if own == len(path) else 1) + _KEY_COST) * len(path)
        num_new = len(path) - int(np.count_nonzero(is_key[path]))
        together = (num_queries + own + _KEY_COST) * (num_keys + num_new)
        if groups and together < cost + alone:
            groups[-1].append(block)
            cost, num_queries, num_keys = together, num_queries + own, num_keys + num_new
        else:
            if groups:
                is_key[np.concatenate([paths[number] for number in groups[-1]])] = False
            groups.append([block])
            cost, num_queries, num_keys = alone, own, len(path)
        is_key[path] = True
    return [_merge([paths[number] for number in of_group], forest, of_group) for of_group in groups]


def _merge(paths: Sequence[IntArray], forest: Forest, blocks: Sequence[int]) -> MergedBlocks:
    sizes = forest.query_lengths[blocks].tolist()
    if len(paths) == 1 and sizes[0] == len(paths[0]):  # it begins a tree
        return MergedBlocks(num_queries=sizes[0], keys=paths[0], mask=None)
    is_key = np.zeros(len(forest.ids), dtype=np.bool_)
    is_key[np.concatenate(paths)] = True
    keys = np.flatnonzero(is_key).astype(np.int32)
    mask = np.zeros((sum(sizes), len(keys)), dtype=np.bool_)
    row = 0
    for path, own in zip(paths, sizes, strict=True):
        places = np.searchsorted(keys, path)
        mask[row : row + own, places[:-own]] = True
        mask[row : row + own, places[-own:]] = np.tri(own, dtype=np.bool_)
        row += own
    return MergedBlocks(num_queries=len(mask), keys=keys, mask=mask)
