from __future__ import annotations

import itertools
import math
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from IG import semantics
from IG.semantics import GainKind

TOLERANCE = 1e-6


def adjacency(size: int, pairs: list[tuple[int, int]]) -> np.ndarray:
    matrix = np.zeros((size, size), dtype=np.bool_)
    for one, other in pairs:
        matrix[one, other] = True
    return matrix


def hard_reading(
    mean_log_probs: list[float], pairs: list[tuple[int, int]], *, match: int
) -> tuple[float, float]:
    """Hard score and entropy when one response matches the only gold."""
    weights = semantics.sample_weights(np.asarray(mean_log_probs))
    clusters = semantics.connected_components(adjacency(len(mean_log_probs), pairs))
    matches = np.zeros((len(mean_log_probs), 1), dtype=np.bool_)
    matches[match] = True
    score = semantics.hard_score(weights, correct=semantics.correct_responses(clusters, matches))
    return float(score), float(semantics.semantic_entropy(weights, clusters))


def log_ratio(with_context: float, no_context: float) -> float:
    before, after = semantics.log_score(np.asarray([no_context, with_context]), floor=0.01)
    return semantics.gain(GainKind.log_ratio, after, before)


def test_worked_example_of_the_hard_score_and_its_three_gains() -> None:
    with_context, entropy_with = hard_reading([-0.2, -0.5, -0.3, -1.2, -2.0], [(0, 1), (1, 2)], match=0)
    no_context, entropy_without = hard_reading([-1.0, -1.0, -1.5, -0.8, -2.5], [(0, 3)], match=1)
    assert with_context == pytest.approx(0.832272, abs=TOLERANCE)
    assert no_context == pytest.approx(0.246849, abs=TOLERANCE)
    assert entropy_with == pytest.approx(0.556108, abs=TOLERANCE)
    assert entropy_without == pytest.approx(1.118799, abs=TOLERANCE)
    assert semantics.gain(GainKind.difference, with_context, no_context) == pytest.approx(
        0.585424, abs=TOLERANCE
    )
    assert log_ratio(with_context, no_context) == pytest.approx(1.215384, abs=2e-6)
    assert semantics.gain(GainKind.entropy, entropy_with, entropy_without) == pytest.approx(
        0.562691, abs=TOLERANCE
    )


def test_worked_example_of_clusters_and_weights() -> None:
    weights = semantics.sample_weights(np.asarray([-0.2, -0.5, -0.3, -1.2, -2.0]))
    clusters = semantics.connected_components(adjacency(5, [(0, 1), (1, 2)]))
    assert weights == pytest.approx([0.314581, 0.233047, 0.284644, 0.115728, 0.052000], abs=TOLERANCE)
    assert clusters.tolist() == [0, 0, 0, 1, 2]
    assert semantics.cluster_probabilities(weights, clusters) == pytest.approx(
        [0.832272, 0.115728, 0.052000], abs=TOLERANCE
    )


def test_worked_example_of_the_soft_score_keeps_golds_and_responses_apart() -> None:
    with_context = semantics.soft_score(
        semantics.sample_weights(np.asarray([-0.1, -0.4, -1.6])),
        response_entails_gold=np.asarray([[0.95, 0.10], [0.90, 0.05], [0.02, 0.85]]),
        gold_entails_response=np.asarray([[0.92, 0.30], [0.40, 0.02], [0.01, 0.88]]),
    )
    no_context = semantics.soft_score(
        semantics.sample_weights(np.asarray([-1.0, -1.0, -1.0])),
        response_entails_gold=np.asarray([[0.05, 0.02], [0.90, 0.10], [0.01, 0.03]]),
        gold_entails_response=np.asarray([[0.10, 0.01], [0.80, 0.20], [0.02, 0.02]]),
    )
    gain = semantics.gain(GainKind.difference, float(with_context), float(no_context))
    assert with_context == pytest.approx(0.825479, abs=TOLERANCE)
    assert no_context == pytest.approx(0.340000, abs=TOLERANCE)
    assert gain == pytest.approx(0.485479, abs=TOLERANCE)
    assert gain != pytest.approx(0.354736, abs=1e-3), "the matrix was read with its axes exchanged"


def test_soft_score_refuses_exchanged_axes() -> None:
    exchanged = np.zeros((2, 3))
    with pytest.raises(ValueError, match=r"\[3, at least 1\], got \(2, 3\)"):
        semantics.soft_score(
            np.full(3, 1 / 3), response_entails_gold=exchanged, gold_entails_response=exchanged
        )


def test_a_gain_from_nothing_is_floored_and_clipped() -> None:
    assert log_ratio(0.5, 0.0) == 3.0
    assert log_ratio(0.0, 0.0) == 0.0
    assert log_ratio(0.0, 0.1) == pytest.approx(math.log(0.1))


@pytest.mark.parametrize("values", [[], [0.0, math.nan], [-math.inf]])
def test_weights_of_unmeasured_samples_are_refused(values: list[float]) -> None:
    with pytest.raises(ValueError, match="finite"):
        semantics.sample_weights(np.asarray(values))


@pytest.mark.parametrize(("module", "ours"), [("IG.semantics", []), ("tests.fakes", ["verl"])])
def test_formulas_and_fakes_need_numpy_alone(module: str, ours: list[str]) -> None:
    program = (
        f"import sys, {module}; "
        "print(sorted({'torch', 'vllm', 'transformers', 'fastapi', 'pydantic', 'verl'} & set(sys.modules)))"
    )
    printed = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    ).stdout
    assert printed.strip() == str(ours)


def test_one_sample_has_no_error_and_samples_that_agree_have_none_to_speak_of() -> None:
    alone = semantics.leave_one_out_weights(np.asarray([-1.0]))
    assert alone.shape == (0, 1)
    assert semantics.jackknife_error(semantics.hard_score(alone, correct=np.asarray([True]))) is None
    likely = np.asarray([-0.1, -1.3, -0.7, -900.0])
    agreeing = semantics.leave_one_out_weights(likely)
    assert semantics.jackknife_error(semantics.hard_score(agreeing, correct=np.full(4, True))) == 0.0
    assert semantics.jackknife_error(semantics.semantic_entropy(agreeing, np.zeros(4, dtype=np.int64))) == 0.0
    assert semantics.gain_error(None, 0.1) is None
    assert semantics.gain_error(0.3, 0.4) == pytest.approx(0.5)


def test_scores_stay_within_their_bounds_to_the_last_bit() -> None:
    rng = np.random.default_rng(0)
    for size in range(1, 40):
        weights = semantics.sample_weights(rng.normal(size=size))
        ones = np.ones((size, 2))
        assert semantics.hard_score(weights, correct=np.full(size, True)) == 1.0
        assert semantics.soft_score(weights, response_entails_gold=ones, gold_entails_response=ones) == 1.0
        entropy = semantics.semantic_entropy(weights, np.zeros(size, dtype=np.int64))
        assert math.copysign(1.0, entropy) == 1.0
        assert entropy == 0.0


@pytest.mark.parametrize("gain", ["difference", "log_ratio", "entropy"])
def test_the_jackknife_error_is_the_spread_of_many_draws(gain: str) -> None:
    """Four answers of different likelihood, two of them right; 60 samples, drawn 400 times."""
    rng = np.random.default_rng(1)
    means = np.asarray([-0.3, -0.9, -0.5, -1.5])
    values, errors = [], []
    for _ in range(400):
        drawn = rng.choice(4, size=60, p=[0.4, 0.2, 0.3, 0.1])
        likely = means[drawn] + rng.normal(scale=0.2, size=60)
        cases = np.vstack([semantics.sample_weights(likely), semantics.leave_one_out_weights(likely)])
        if gain == "entropy":
            statistic = semantics.semantic_entropy(cases, drawn)
        else:
            statistic = semantics.hard_score(cases, correct=drawn < 2)
        if gain == "log_ratio":
            statistic = semantics.log_score(statistic, floor=0.01)
        values.append(float(statistic[0]))
        errors.append(semantics.jackknife_error(statistic[1:]))
    assert np.mean(errors) == pytest.approx(np.std(values), rel=0.1)


@settings(deadline=None)
@given(st.lists(st.floats(0, 1), min_size=2, max_size=6))
def test_differences_and_drops_of_entropy_telescope_and_log_ratios_do_inside_their_limits(
    scores: list[float],
) -> None:
    steps = list(itertools.pairwise(scores))
    for kind in (GainKind.difference, GainKind.entropy):
        total = math.fsum(semantics.gain(kind, after, before) for before, after in steps)
        assert total == pytest.approx(semantics.gain(kind, scores[-1], scores[0]), abs=1e-12)
    logs = semantics.log_score(np.asarray([0.1 + 0.9 * score for score in scores]), floor=0.01).tolist()
    total = math.fsum(
        semantics.gain(GainKind.log_ratio, after, before) for before, after in itertools.pairwise(logs)
    )
    assert total == pytest.approx(semantics.gain(GainKind.log_ratio, logs[-1], logs[0]), abs=1e-12)
