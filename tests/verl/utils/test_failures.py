"""The one policy for what fails."""

from __future__ import annotations

import pytest

from verl.errors import TrainingHaltedError
from verl.utils.failures import check_failure_share, failure_name


def check(count: int, *, total: int = 20, max_share: float) -> None:
    failures = ["search_failed: HTTP 500", "generation_failed: dead", *["search_failed: late"] * 20][:count]
    check_failure_share(failures, total=total, max_share=max_share, what="episodes", fix="restart it.")


@pytest.mark.parametrize(
    ("count", "total", "max_share", "halts"),
    [
        (0, 20, 0.0, False),
        (0, 0, 0.0, False),
        (1, 20, 0.0, True),
        (1, 2, 0.1, False),
        (2, 20, 0.1, False),
        (3, 20, 0.1, True),
        (20, 20, 1.0, False),
    ],
)
def test_it_halts_above_the_share_but_not_for_a_lone_failure(
    count: int, total: int, max_share: float, halts: bool
) -> None:
    if not halts:
        check(count, total=total, max_share=max_share)
        return
    with pytest.raises(TrainingHaltedError):
        check(count, total=total, max_share=max_share)


def test_the_message_counts_causes_and_names_share_first_failure_and_fix() -> None:
    with pytest.raises(TrainingHaltedError) as halted:
        check(6, max_share=0.25)
    assert str(halted.value) == (
        "6 of 20 episodes failed (30%, reward.max_failure_share allows 25%): 5 x search_failed, "
        "1 x generation_failed. First failure: search_failed: HTTP 500. Fix: restart it. The same command "
        "continues from what is saved."
    )


def test_failures_are_named_by_what_stands_before_the_colon() -> None:
    assert failure_name("search_failed: retriever: HTTP 500") == "search_failed"
    assert failure_name("unnamed") == "unnamed"
