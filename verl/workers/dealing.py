"""Deal rows to ranks and forward passes so that ranks wait little for each other."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from verl.types import IntArray

_ATTENTION_SCALE = 32_768
"""Context at which attention costs about as much per token as the rest of a 3B model, in tokens."""


def deal(
    lengths: IntArray,
    *,
    overlaps: IntArray,
    prefixes: IntArray,
    groups: IntArray,
    num_ranks: int,
    max_tokens: int,
) -> list[list[IntArray]]:
    """Return the rows of each forward pass of each rank; every rank has as many passes, some may be empty.

    A row computes `lengths` tokens after `prefixes` others, which all rows of a group share, and of these
    tokens `overlaps` are also those of the row of its group before it; a pass computes both once. It has at
    most `max_tokens` tokens, but at least one row while there are any. Groups are kept whole, halved, ..., or
    dealt row by row: what is cheapest with the time that ranks wait for each other.
    """
    _, numbers, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    size = int(sizes.max())
    plans = []
    while True:
        members = (np.flatnonzero(numbers == number) for number in range(len(sizes)))
        parts = [part for rows in members for part in np.array_split(rows, math.ceil(len(rows) / size))]
        costs = _Costs(
            parts,
            lengths=lengths,
            overlaps=overlaps,
            prefixes=prefixes,
            groups=numbers.astype(np.int32),
        )
        if size == 1 or (costs.shared_tokens + costs.own_tokens).max() <= max_tokens:
            plans.append(_deal_parts(parts, costs, num_ranks=num_ranks, max_tokens=max_tokens))
        if size == 1:
            break
        size = (size + 1) // 2
    _, passes = min(plans, key=lambda plan: plan[0])
    return [[of_pass[rank] for of_pass in passes] for rank in range(num_ranks)]


class _Costs:
    """What parts of groups cost in a pass: what is their own, and the prefix of the group, which is shared.

    A token costs more the more tokens it attends to.
    """

    def __init__(
        self,
        parts: Sequence[npt.NDArray[np.intp]],
        *,
        lengths: IntArray,
        overlaps: IntArray,
        prefixes: IntArray,
        groups: IntArray,
    ) -> None:
        first = np.array([part[0] for part in parts])
        known = overlaps.copy()
        known[first] = 0  # of the row before it, which is in another part
        ends = prefixes + lengths
        self.group = groups[first]
        self.num_groups = int(groups.max()) + 1
        own = _cost(ends) - _cost(prefixes + known)
        self.own = np.array([own[part].sum() for part in parts])
        self.shared = _cost(prefixes[first])
        self.own_tokens = np.array([(lengths - known)[part].sum() for part in parts])
        self.shared_tokens = prefixes[first]


def _cost(num_tokens: IntArray) -> npt.NDArray[np.float64]:
    return num_tokens * (1 + num_tokens / (2 * _ATTENTION_SCALE))


def _deal_parts(
    parts: Sequence[npt.NDArray[np.intp]], costs: _Costs, *, num_ranks: int, max_tokens: int
) -> tuple[float, list[list[IntArray]]]:
    """Return the rows of each rank in each pass, and what they cost where all wait for the slowest.

    The most expensive part comes first, and each goes to where the sum is smallest with it.
    """
    order = np.argsort(-(costs.own + costs.shared), kind="stable").tolist()
    most = math.ceil(len(parts) / num_ranks)  # passes, with one part in each
    count = max(1, math.ceil(costs.own_tokens.sum() / (num_ranks * max_tokens)))
    while True:
        count = min(count, most)
        loads, tokens = np.zeros(num_ranks * count), np.zeros(num_ranks * count, np.int64)
        lacks = np.ones((costs.num_groups, len(loads)), np.int8)  # 0: the pass has the group's prefix
        bins: list[list[int]] = [[] for _ in loads]
        for part in order:
            lacks_it = lacks[costs.group[part]]
            number = int(np.argmin(loads + lacks_it * costs.shared[part]))
            loads[number] += costs.own[part] + lacks_it[number] * costs.shared[part]
            tokens[number] += costs.own_tokens[part] + lacks_it[number] * costs.shared_tokens[part]
            lacks_it[number] = 0
            bins[number].append(part)
        if count == most or all(tokens[i] <= max_tokens for i, of_bin in enumerate(bins) if len(of_bin) > 1):
            break
        count += max(1, count // 16)
    # Ranks run their passes at the same time: those of about equal cost, every second time in reverse.
    by_load = np.argsort(-loads, kind="stable").reshape(count, num_ranks)
    by_load[1::2] = by_load[1::2, ::-1]
    none = np.zeros(0, dtype=np.intp)
    rows = [np.concatenate([none, *(parts[i] for i in of_bin)]).astype(np.int32) for of_bin in bins]
    return float(loads[by_load].max(axis=1).sum()), [[rows[i] for i in of_pass] for of_pass in by_load]
