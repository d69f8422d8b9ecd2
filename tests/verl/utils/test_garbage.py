"""The heap is frozen inside the block only."""

from __future__ import annotations

import gc

from verl.utils.garbage import frozen_heap


def test_what_exists_is_left_out_of_collections_inside_the_block() -> None:
    before: list[object] = []
    with frozen_heap():
        made: list[object] = []
        known = {id(visited) for visited in gc.get_objects()}
        assert id(before) not in known
        assert id(made) in known
    assert gc.get_freeze_count() == 0
