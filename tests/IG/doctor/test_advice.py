from __future__ import annotations

from IG.doctor.advice import advise
from IG.doctor.groups import ZeroVariance
from IG.doctor.noise import NoiseLevel, NoiseReport


def level(
    size: int, outcome: float, with_gain: float | None, within_noise: float | None = None
) -> ZeroVariance:
    return ZeroVariance(
        group_size=size, num_groups=10, outcome=outcome, with_gain=with_gain, within_noise=within_noise
    )


def noise(*noises: float, signal: float = 0.3) -> NoiseReport:
    levels = [
        NoiseLevel(num_samples=2**k, error=0.0, noise=value, jackknife=0.05, rank_agreement=None)
        for k, value in enumerate(noises)
    ]
    return NoiseReport(
        num_questions=1, num_gains=1, max_samples=2 ** (len(noises) - 1), signal=signal, levels=tuple(levels)
    )


def test_the_smallest_that_is_good_enough_is_recommended() -> None:
    levels = [level(2, 0.6, 0.3), level(3, 0.5, 0.09), level(4, 0.4, 0.05)]
    advice = advise(levels, noise(0.4, 0.2, 0.09, 0.05), gain_weight=0.6)
    assert (advice.group_size, advice.num_samples) == (3, 4)
    assert advice.sentence == (
        "Take groups of 3: 9.0% of them have zero variance with the gain at weight 0.6 (50% without); "
        "take 4 samples per condition, whose noise of 0.090 is below a third of the signal of 0.300."
    )


def test_rewards_that_differ_by_noise_alone_do_not_make_a_group_large_enough() -> None:
    levels = [level(2, 0.6, 0.05, 0.4), level(3, 0.5, 0.01, 0.2), level(5, 0.4, 0.001, 0.08)]
    advice = advise(levels, None, gain_weight=0.6)
    assert advice.group_size == 5
    assert "8.0% of them have no variance beyond the noise with the gain at weight 0.6" in advice.sentence


def test_nothing_is_recommended_where_nothing_is_good_enough() -> None:
    advice = advise([level(2, 0.6, 0.3), level(16, 0.5, 0.2)], noise(0.4, 0.2), gain_weight=0.6)
    assert (advice.group_size, advice.num_samples) == (None, None)
    assert "No group size up to 16 is large enough: 20.0% of them" in advice.sentence
    assert "no number of samples up to 2 brings the noise below a third" in advice.sentence


def test_without_a_gain_the_outcome_decides() -> None:
    advice = advise([level(2, 0.05, None)], noise(0.4, 0.05), gain_weight=0.6)
    assert (advice.group_size, advice.num_samples) == (2, 2)


def test_without_figures_it_says_so() -> None:
    advice = advise([], None, gain_weight=0.6)
    assert (advice.group_size, advice.num_samples) == (None, None)
    assert "without outcomes" in advice.sentence
