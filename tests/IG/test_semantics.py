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


def test_worked_example_of_the_hard_score_and_its_three_gains() -> None:
    with_context, entropy_with = hard_reading([-0.2, -0.5, -0.3, -1.2, -2.0], [(0, 1), (1, 2)], match=0)
    no_context, entropy_without = hard_reading([-1.0, -1.0, -1.5, -0.8, -2.5], [(0, 3)], match=1)
    assert with_context == pytest.approx(0.832272, abs=TOLERANCE)
    assert no_context == pytest.approx(0.246849, abs=TOLERANCE)
    assert entropy_with == pytest.approx(0.556108, abs=TOLERANCE)
    assert entropy_without == pytest.approx(1.118799, abs=TOLERANCE)
    assert semantics.difference_gain(with_context, no_context) == pytest.approx(0.585424, abs=TOLERANCE)
    assert semantics.log_ratio_gain(with_context, no_context, floor=0.01) == pytest.approx(1.215384, abs=2e-6)
    assert semantics.entropy_gain(entropy_with, entropy_without) == pytest.approx(0.562691, abs=TOLERANCE)


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
    gain = semantics.difference_gain(float(with_context), float(no_context))
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
    assert semantics.log_ratio_gain(0.5, 0.0, floor=0.01) == 3.0
    assert semantics.log_ratio_gain(0.0, 0.0, floor=0.01) == 0.0
    assert semantics.log_ratio_gain(0.0, 0.1, floor=0.01) == pytest.approx(math.log(0.1))


@pytest.mark.parametrize("values", [[], [0.0, math.nan], [-math.inf]])
def test_weights_of_unmeasured_samples_are_refused(values: list[float]) -> None:
    with pytest.raises(ValueError, match="finite"):
        semantics.sample_weights(np.asarray(values))


@st.composite
def graphs(draw: st.DrawFn) -> tuple[list[float], list[tuple[int, int]], list[list[bool]]]:
    size = draw(st.integers(1, 7))
    mean_log_probs = draw(st.lists(st.floats(-20, 0), min_size=size, max_size=size))
    pairs = draw(st.lists(st.sampled_from(list(itertools.product(range(size), repeat=2))), max_size=8))
    num_golds = draw(st.integers(1, 3))
    row = st.lists(st.booleans(), min_size=num_golds, max_size=num_golds)
    return mean_log_probs, pairs, draw(st.lists(row, min_size=size, max_size=size))


@settings(deadline=None)
@given(graphs())
def test_hard_score_and_entropy_are_those_of_the_definition(
    graph: tuple[list[float], list[tuple[int, int]], list[list[bool]]],
) -> None:
    mean_log_probs, pairs, matches = graph
    size = len(mean_log_probs)
    total = math.fsum(math.exp(value) for value in mean_log_probs)
    weights = [math.exp(value) / total for value in mean_log_probs]
    classes = [{node} for node in range(size)]
    for one, other in pairs:
        first = next(group for group in classes if one in group)
        second = next(group for group in classes if other in group)
        if first is not second:
            first |= second
            classes.remove(second)
    masses = [math.fsum(weights[node] for node in group) for group in classes]
    right = [any(any(matches[node]) for node in group) for group in classes]

    computed = semantics.sample_weights(np.asarray(mean_log_probs))
    clusters = semantics.connected_components(adjacency(size, pairs))
    correct = semantics.correct_responses(clusters, np.asarray(matches))
    score = semantics.hard_score(computed, correct=correct)
    assert score == pytest.approx(
        math.fsum(mass for mass, ok in zip(masses, right, strict=True) if ok), abs=1e-9
    )
    entropy = -math.fsum(mass * math.log(mass) for mass in masses if mass > 0)
    assert semantics.semantic_entropy(computed, clusters) == pytest.approx(entropy, abs=1e-9)
    first_members = [
        int(np.flatnonzero(clusters == cluster)[0]) for cluster in range(int(clusters.max()) + 1)
    ]
    assert first_members == sorted(first_members)


@settings(deadline=None)
@given(st.integers(1, 5), st.integers(1, 4), st.randoms(use_true_random=False))
def test_soft_score_is_that_of_the_definition(num_responses: int, num_golds: int, random: object) -> None:
    rng = np.random.default_rng(random.randint(0, 2**32))  # type: ignore[attr-defined]
    weights = semantics.sample_weights(rng.normal(size=num_responses))
    forward, backward = rng.uniform(size=(2, num_responses, num_golds))
    expected = max(
        sum(weights[r] * max(forward[r, g], backward[r, g]) for r in range(num_responses))
        for g in range(num_golds)
    )
    score = semantics.soft_score(weights, response_entails_gold=forward, gold_entails_response=backward)
    assert score == pytest.approx(expected)


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
