from __future__ import annotations

import itertools

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from verl.forest import Forest, ForestBuilder, merge_blocks
from verl.types import IntArray


def ids(*tokens: int) -> IntArray:
    return np.array(tokens, dtype=np.int32)


def paths_of(forest: Forest) -> list[IntArray]:
    """The columns that each token attends to, from the first of its tree to itself."""
    keys = np.arange(len(forest.ids), dtype=np.int32) if forest.keys is None else forest.keys
    paths = []
    for path, own in zip(
        np.split(keys, np.cumsum(forest.key_lengths))[:-1], forest.query_lengths, strict=True
    ):
        paths += [path[: len(path) - own + number + 1] for number in range(own)]
    return paths


def test_sequences_share_what_they_begin_with_and_see_nothing_else() -> None:
    builder = ForestBuilder()
    assert builder.add(ids(10, 11, 12, 13, 14)).tolist() == [0, 1, 2, 3, 4]
    assert builder.add(ids(10, 11, 12, 20, 21)).tolist() == [0, 1, 2, 5, 6]
    assert builder.add(ids(30), after=5).tolist() == [7]
    assert builder.add(ids(40, 41)).tolist() == [8, 9]
    assert builder.add(ids(20, 30, 50), after=2).tolist() == [5, 7, 10]
    assert builder.add(ids(10, 11)).tolist() == [0, 1]
    assert builder.add(ids(13), after=2).tolist() == [3]
    assert builder.add(ids()).tolist() == builder.add(ids(), after=4).tolist() == []
    assert builder.num_tokens == 11
    forest = builder.build([ids(4), ids(5, 7, 7)])
    assert forest.ids.tolist() == [10, 11, 12, 13, 14, 20, 21, 30, 40, 41, 50]
    assert forest.positions.tolist() == [0, 1, 2, 3, 4, 3, 4, 4, 0, 1, 5]
    assert forest.previous.tolist() == [0, 0, 1, 2, 3, 2, 5, 5, 8, 8, 7]
    assert forest.scored.tolist() == [4, 5, 7, 7]
    assert [path.tolist() for path in paths_of(forest)[5:]] == [
        [0, 1, 2, 5], [0, 1, 2, 5, 6], [0, 1, 2, 5, 7], [8], [8, 9], [0, 1, 2, 5, 7, 10]
    ]  # fmt: skip


def test_without_branches_all_keys_are_those_of_the_block_itself() -> None:
    builder = ForestBuilder()
    builder.add(ids(1, 2, 3))
    builder.add(ids(4))
    forest = builder.build([])
    assert forest.keys is None
    assert forest.query_lengths.tolist() == forest.key_lengths.tolist() == [3, 1]


def test_a_forest_of_nothing_can_still_be_computed() -> None:
    forest = ForestBuilder().build([])
    assert (len(forest.ids), len(forest.scored)) == (2, 0)


@settings(deadline=None, max_examples=200)
@given(st.lists(st.tuples(st.lists(st.integers(0, 2), max_size=6), st.integers(-3, 9)), max_size=9))
def test_a_sequence_is_found_on_the_path_of_its_columns_and_every_prefix_is_there_once(
    sequences: list[tuple[list[int], int]],
) -> None:
    """Of few different tokens; some continue a column that is there already."""
    builder = ForestBuilder()
    added = []
    whole: dict[int, list[int]] = {}
    for tokens, after in sequences:
        start = after if 0 <= after < builder.num_tokens else None
        columns = builder.add(ids(*tokens), after=start).tolist()
        expected = whole[start] + tokens if start is not None else tokens
        for number, column in enumerate(columns):
            whole[column] = expected[: len(expected) - len(tokens) + number + 1]
        added.append((columns, expected, len(tokens)))
    forest = builder.build([])
    paths = paths_of(forest)
    for columns, expected, length in added:
        for number, column in enumerate(columns):
            end = len(expected) - length + number + 1
            assert forest.ids[paths[column]].tolist() == expected[:end]
    if whole:
        assert len(forest.ids) == builder.num_tokens == len({tuple(path) for path in whole.values()})
    for column, path in enumerate(paths if whole else []):
        assert path[-1] == column
        assert forest.positions[column] == len(path) - 1
        assert forest.previous[column] == (path[-2] if len(path) > 1 else column)


def grow(blocks: list[tuple[int, int, int]]) -> Forest:
    """Blocks of (parent, start, length), made to fit: a parent that is not there begins a tree."""
    builder, added, fresh = ForestBuilder(), list[IntArray](), itertools.count()
    for parent, start, length in blocks:
        tokens = np.fromiter(fresh, dtype=np.int32, count=length)  # no two blocks begin alike
        after = int(added[parent][min(start, len(added[parent])) - 1]) if parent < len(added) else None
        added.append(builder.add(tokens, after=after))
    return builder.build([])


@settings(deadline=None, max_examples=100)
@given(
    st.lists(st.tuples(st.integers(0, 5), st.integers(1, 99), st.sampled_from([1, 3, 9, 90])), max_size=12)
)
def test_merged_blocks_attend_to_the_path_of_each_token(blocks: list[tuple[int, int, int]]) -> None:
    forest = grow(blocks)
    paths = []
    for merged in merge_blocks(forest):
        mask = np.tri(merged.num_queries, dtype=bool) if merged.mask is None else merged.mask
        assert mask.shape == (merged.num_queries, len(merged.keys))
        assert mask.any(axis=0).all()  # no key is brought for nothing
        paths += [merged.keys[row].tolist() for row in mask]
    assert paths == [path.tolist() for path in paths_of(forest)]


def test_short_answers_after_one_trunk_are_merged_and_long_rows_after_a_prompt_are_not() -> None:
    answers = merge_blocks(grow([(9, 0, 400), *((0, start, 8) for start in (200, 200, 300, 400))]))
    assert [merged.num_queries for merged in answers] == [400, 32]
    assert answers[0].mask is None
    assert len(answers[1].keys) == 400 + 32
    rows = merge_blocks(grow([(9, 0, 100), (0, 100, 400), (0, 100, 400)]))
    assert [(merged.num_queries, len(merged.keys)) for merged in rows] == [(100, 100), (400, 500), (400, 500)]
    trees = merge_blocks(grow([(9, 0, 8), (9, 0, 8)]))  # they have no key in common
    assert len(trees) == 2
