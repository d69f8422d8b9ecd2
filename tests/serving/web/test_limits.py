from __future__ import annotations

from collections.abc import Iterator

import pytest

from serving.web.limits import Admission, QueueFullError


def test_the_time_to_come_back_follows_the_recent_rate() -> None:
    times: Iterator[float] = iter([0.0, 0.0, 10.0, 10.0])
    admission = Admission(max_things=100, things="items", clock=lambda: next(times, 10.0))
    with admission.admit(20):
        pass  # answered at 0 s: 20 items in the 10 s until now, 2 a second
    with admission.admit(100), pytest.raises(QueueFullError) as full:
        admission.admit(30).__enter__()
    assert full.value.retry_after_s == 15
    assert admission.num_held == 0
