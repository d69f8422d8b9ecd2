from __future__ import annotations

import time

import pytest

from verl.utils.timing import Timer


def test_spans_add_up_nest_and_count_when_they_raise() -> None:
    timer = Timer()
    with timer("step"):
        for _ in range(2):
            with timer("rollout"):
                time.sleep(0.01)
    assert 0.02 <= timer.seconds["rollout"] <= timer.seconds["step"]
    with pytest.raises(RuntimeError), timer("reward"):
        raise RuntimeError
    assert "reward" in timer.seconds


def test_reset_leaves_earlier_results_alone() -> None:
    timer = Timer()
    with timer("rollout"):
        pass
    seconds = timer.seconds
    timer.reset()
    assert timer.seconds == {}
    assert "rollout" in seconds
