from __future__ import annotations

import numpy as np
import pytest

from IG.doctor.noise import measure_noise
from IG.doctor.readings import GainRule
from IG.doctor.scenarios import Scenario
from IG.semantics import GainKind
from tests.IG.doctor.synthetic import GOLD, bernoulli, reading, samples

SIZES = (1, 2, 4, 8, 16, 32, 64)


def test_a_bernoulli_score_has_the_error_of_sampling_theory() -> None:
    rng = np.random.default_rng(0)
    share = 0.3
    readings = [
        reading(
            {
                Scenario.none: samples(["York"] * 64),  # never right: no noise of its own
                Scenario.supporting: bernoulli(share, size=64, rng=rng),
            }
        )
        for _ in range(200)
    ]
    report = measure_noise(readings, GainRule(), sizes=SIZES, rng=rng, num_draws=25)
    assert report is not None
    for level in report.levels:
        theory = np.sqrt(share * (1 - share) / level.num_samples)
        size = level.num_samples
        assert level.noise == report.noise_at(size) == pytest.approx(theory, rel=0.06), size
        assert level.error == pytest.approx(theory * np.sqrt(1 - size / 64), rel=0.06), size
        if size > 1:
            assert level.jackknife == pytest.approx(theory, rel=0.06), size
        else:
            assert level.jackknife is None
    # The standard deviation of 0.3 and 0; of 64 samples it looks larger.
    assert report.signal == pytest.approx(np.sqrt(share**2 / 2), rel=0.05)


def test_the_signal_is_free_of_the_noise_of_the_gains() -> None:
    rng = np.random.default_rng(1)
    readings = [
        reading(
            {
                Scenario.none: bernoulli(0.5, size=16, rng=rng),
                Scenario.supporting: bernoulli(0.5, size=16, rng=rng),
            }
        )
        for _ in range(400)
    ]
    report = measure_noise(readings, GainRule(), sizes=(8,), rng=rng, num_draws=5)
    assert report is not None
    assert report.signal is not None
    assert report.signal < 0.06, "contexts that differ by chance alone carry no signal"
    assert report.levels[-1].num_samples == 16, "the largest number is always there"


def test_noise_and_signal_hold_where_the_jackknife_does_not() -> None:
    # Nearly all log-ratios are at their limit of 3, whichever samples are drawn.
    rng = np.random.default_rng(4)
    rule = GainRule(gain=GainKind.log_ratio)
    readings = [
        reading(
            {
                Scenario.none: bernoulli(0.02, size=64, rng=rng),
                Scenario.supporting: bernoulli(0.95, size=64, rng=rng),
            }
        )
        for _ in range(200)
    ]
    report = measure_noise(readings, rule, sizes=(8,), rng=rng, num_draws=20)
    assert report is not None
    gains = [each.gains(rule)[Scenario.supporting] for each in readings]
    noise, reported = report.noise_at(64), report.levels[-1].jackknife
    assert noise is not None
    assert reported is not None
    assert noise < 3 * np.std(gains) < reported / 3
    assert report.signal == pytest.approx(np.mean(gains) / np.sqrt(2), rel=0.05)
    assert report.noise_at(5) is None


def test_both_conditions_add_their_noise() -> None:
    rng = np.random.default_rng(2)
    conditions = {name: samples([GOLD, "York"] * 32) for name in (Scenario.none, Scenario.supporting)}
    report = measure_noise([reading(conditions)], GainRule(), sizes=(4,), rng=rng, num_draws=4000)
    assert report is not None
    assert report.levels[0].noise == pytest.approx(np.sqrt(2 * 64 / 63 * 0.25 / 4), rel=0.05)


def test_ranking_gets_better_with_samples() -> None:
    rng = np.random.default_rng(3)
    shares = {Scenario.none: 0.1, Scenario.first: 0.3, Scenario.rest: 0.5, Scenario.supporting: 0.9}
    readings = [
        reading({name: bernoulli(p, size=64, rng=rng) for name, p in shares.items()}, num_documents=2)
        for _ in range(30)
    ]
    report = measure_noise(readings, GainRule(), sizes=SIZES, rng=rng, num_draws=20)
    assert report is not None
    agreements = [level.rank_agreement for level in report.levels]
    assert agreements.pop() is None, "all samples rank as all samples do"
    assert agreements == sorted(agreements)
    assert agreements[0] is not None
    assert 0.2 < agreements[0] < 0.8


def test_identical_samples_have_no_noise_and_no_golds_are_needed_for_entropy() -> None:
    conditions = {
        Scenario.none: samples(["a", "b"] * 4, golds=()),
        Scenario.supporting: samples(["a"] * 8, golds=()),
    }
    rule = GainRule(gain=GainKind.entropy)
    report = measure_noise(
        [reading(conditions, golds=())], rule, sizes=(2, 4), rng=np.random.default_rng(0), num_draws=50
    )
    assert report is not None
    assert report.levels[-1].error == 0.0
    assert report.signal == pytest.approx(np.log(2) / np.sqrt(2), rel=0.1)
    same = {name: samples([GOLD] * 8) for name in (Scenario.none, Scenario.supporting)}
    quiet = measure_noise([reading(same)], GainRule(), sizes=(2,), rng=np.random.default_rng(0))
    assert quiet is not None
    assert [(level.error, level.jackknife) for level in quiet.levels] == [(0.0, 0.0)] * 2


def test_questions_without_a_context_have_no_noise_to_look_at() -> None:
    alone = reading({Scenario.none: samples([GOLD])}, num_documents=0)
    assert measure_noise([alone], GainRule(), sizes=SIZES, rng=np.random.default_rng(0)) is None
