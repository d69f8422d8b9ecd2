"""The group size and the number of samples that the figures speak for, in one sentence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from IG.doctor.groups import ZeroVariance
from IG.doctor.noise import NoiseReport

MAX_ZERO_VARIANCE = 0.10
MAX_NOISE_SHARE = 1 / 3
"""Of the signal."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Advice:
    """What to train with; None where no figure that was looked at is good enough, or none is known."""

    group_size: int | None
    num_samples: int | None
    sentence: str


def advise(zero_variance: Sequence[ZeroVariance], noise: NoiseReport | None, *, gain_weight: float) -> Advice:
    """The smallest of both that keep within the limits above.

    A group whose rewards differ by the noise of the gain alone counts as one without variance: an advantage
    that is normalised by the spread of its group would blow that noise up.
    """
    group_size, groups = _advise_group(zero_variance, gain_weight=gain_weight)
    num_samples, samples = _advise_samples(noise)
    return Advice(group_size=group_size, num_samples=num_samples, sentence=f"{groups}; {samples}.")


def _advise_group(zero_variance: Sequence[ZeroVariance], *, gain_weight: float) -> tuple[int | None, str]:
    if not zero_variance:
        return None, "No group size can be named without outcomes"
    for level in zero_variance:
        known = (level.within_noise, level.with_gain, level.outcome)
        if next(share for share in known if share is not None) < MAX_ZERO_VARIANCE:
            return level.group_size, f"Take groups of {level.group_size}: {_reason(level, gain_weight)}"
    last = zero_variance[-1]
    return None, f"No group size up to {last.group_size} is large enough: {_reason(last, gain_weight)}"


def _reason(level: ZeroVariance, gain_weight: float) -> str:
    alone = f"{level.outcome:.0%} of them have zero variance with the outcome alone"
    if level.with_gain is None:
        return alone
    gain = f"with the gain at weight {gain_weight:g}"
    if level.within_noise is None:
        return f"{level.with_gain:.1%} of them have zero variance {gain} ({level.outcome:.0%} without)"
    return (
        f"{level.within_noise:.1%} of them have no variance beyond the noise {gain} "
        f"({level.with_gain:.1%} have none at all with it, {level.outcome:.0%} with the outcome alone)"
    )


def _advise_samples(noise: NoiseReport | None) -> tuple[int | None, str]:
    if noise is None:
        return None, "no number of samples can be named without contexts to tell apart"
    limit = noise.signal * MAX_NOISE_SHARE
    for level in noise.levels:
        if level.noise < limit:
            return level.num_samples, (
                f"take {level.num_samples} samples per condition, whose noise of {level.noise:.3f} is below "
                f"a third of the signal of {noise.signal:.3f}"
            )
    return None, (
        f"no number of samples up to {noise.max_samples} brings the noise below a third of the signal of "
        f"{noise.signal:.3f}"
    )
