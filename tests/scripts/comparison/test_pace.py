"""The pace of a machine."""

from __future__ import annotations

import time

import torch

from comparison.pace import measure_pace


def test_the_pace_is_one_pass_of_six_and_leaves_random_numbers_as_they_were() -> None:
    state, began = torch.get_rng_state(), time.process_time()
    pace = measure_pace()
    spent = time.process_time() - began
    assert 0 < 3 * pace <= spent  # at least three of the passes took as long as the median
    assert torch.equal(torch.get_rng_state(), state)
