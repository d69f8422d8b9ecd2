"""Name and count what failed, and halt the run with the causes when a share of it is exceeded."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from verl.errors import TrainingHaltedError

_MAX_MESSAGE_CHARS = 300


def failure_name(failure: str) -> str:
    """Return the name in `name: message`, by which failures are counted."""
    return failure.partition(":")[0].strip()


def check_failure_share(
    failures: Sequence[str], *, total: int, max_share: float, what: str, fix: str
) -> None:
    """Raise TrainingHaltedError when more than `max_share` of `total` failed.

    A single failure never halts, because in a small batch it exceeds any share, unless `max_share` is 0.
    `failures` are messages in the order in which they came; `what` names the items and `fix` is a sentence.
    """
    failed = len(failures)
    if failed <= max_share * total or (failed == 1 and max_share > 0):
        return
    causes = Counter(map(failure_name, failures))
    counts = ", ".join(f"{count} x {name}" for name, count in causes.most_common())
    raise TrainingHaltedError(
        f"{failed} of {total} {what} failed ({failed / total:.0%}, reward.max_failure_share allows "
        f"{max_share:.0%}): {counts}. First failure: {failures[0][:_MAX_MESSAGE_CHARS]}. Fix: {fix} The "
        "same command continues from what is saved."
    )
