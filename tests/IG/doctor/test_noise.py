from __future__ import annotations

import numpy as np
import pytest

from IG.doctor.noise import measure_noise
from IG.doctor.questions import Scenario
from tests.IG.doctor.synthetic import GOLD, bernoulli, config, reading, samples

SIZES = (1, 2, 4, 8, 16, 32)


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
    noise = measure_noise(readings, config(), rng=rng, sizes=SIZES, num_draws=25)
    assert noise is not None
    assert list(noise.levels) == [1, 2, 4, 8, 10, 16, 32, 64], "the configured number and all samples too"
    for size, error in noise.levels.items():
        assert error == pytest.approx(np.sqrt(share * (1 - share) / size), rel=0.06), size
    # The standard deviation of 0.3 and 0; of 64 samples it looks larger.
    assert noise.signal == pytest.approx(np.sqrt(share**2 / 2), rel=0.05)


def test_the_signal_is_free_of_the_noise_of_the_gains() -> None:
    rng = np.random.default_rng(1)
    readings = [
        reading({name: bernoulli(0.5, size=16, rng=rng) for name in (Scenario.none, Scenario.supporting)})
        for _ in range(400)
    ]
    noise = measure_noise(readings, config(), rng=rng, sizes=(8,), num_draws=5)
    assert noise is not None
    assert noise.signal < 0.06, "contexts that differ by chance alone carry no signal"


def test_entropy_needs_no_golds_and_a_question_without_context_has_no_noise() -> None:
    conditions = {
        Scenario.none: samples(["a", "b"] * 4, golds=()),
        Scenario.supporting: samples(["a"] * 8, golds=()),
    }
    rng = np.random.default_rng(0)
    settings = config("--gain", "entropy")
    noise = measure_noise([reading(conditions, golds=())], settings, rng=rng, num_draws=50)
    assert noise is not None
    assert noise.signal == pytest.approx(np.log(2) / np.sqrt(2), rel=0.1)
    alone = reading({Scenario.none: samples([GOLD])}, num_documents=0)
    assert measure_noise([alone], config(), rng=rng) is None
