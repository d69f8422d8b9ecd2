from __future__ import annotations

import time

import pytest

from verl.utils.timing import Timer


def test_spans_of_one_name_add_up_and_spans_nest() -> None:
    timer = Timer()
    with timer("step"):
        for _ in range(2):
            with timer("rollout"):
                time.sleep(0.01)
    assert 0.02 <= timer.seconds["rollout"] <= timer.seconds["step"] < 5.0


def test_a_span_that_raises_is_counted() -> None:
    timer = Timer()
    with pytest.raises(RuntimeError), timer("reward"):
        raise RuntimeError
    assert "reward" in timer.seconds


def test_reset_keeps_what_was_handed_out() -> None:
    timer = Timer()
    with timer("rollout"):
        pass
    seconds = timer.seconds
    timer.reset()
    assert timer.seconds == {}
    assert "rollout" in seconds
