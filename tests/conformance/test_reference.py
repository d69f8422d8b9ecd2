"""The trainer's rules against the equations in NumPy, and what no rule may depend on."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.conformance import reference
from tests.conformance.test_measuring import with_documents
from tests.fakes import make_question, make_trajectory
from tests.methods import make_method
from verl.algorithms import ALGORITHMS, cw_grpo, ig_search, igpo, siop, stepsearch, tips
from verl.algorithms.statistics import (
    group_advantages,
    leave_one_out_returns,
    outcome_advantages,
    returns_to_go,
)
from verl.types import FloatArray, Gain, Group, Score

VALUES = st.floats(-3, 3).map(lambda value: round(value, 3))
EXACT = settings(deadline=None, max_examples=80)


@st.composite
def groups(draw: st.DrawFn) -> tuple[list[list[float]], list[float]]:
    """Draw gains per turn but the last, and outcomes, of 2 to 6 trajectories with 1 to 5 turns."""
    n = draw(st.integers(2, 6))
    gains = [draw(st.lists(VALUES, max_size=4)) for _ in range(n)]
    return gains, draw(st.lists(VALUES, min_size=n, max_size=n))


def padded(rows: list[list[float]]) -> tuple[np.ndarray, np.ndarray]:
    width = max(1, *(len(row) for row in rows))
    values, mask = np.zeros((len(rows), width)), np.zeros((len(rows), width), np.bool_)
    for i, row in enumerate(rows):
        values[i, : len(row)], mask[i, : len(row)] = row, True
    return values, mask


@EXACT
@given(st.lists(VALUES, min_size=2, max_size=8))
def test_outcome_rules(rewards: list[float]) -> None:
    array, tokens = np.array(rewards), np.arange(1, len(rewards) + 1)
    np.testing.assert_allclose(group_advantages(rewards), reference.grpo(array), atol=1e-9)
    counts = [tokens.tolist()]
    np.testing.assert_allclose(
        outcome_advantages([rewards], counts, estimator="rloo")[0], reference.rloo(array), atol=1e-9
    )
    np.testing.assert_allclose(
        outcome_advantages([rewards], counts, estimator="reinforce_plus_plus")[0],
        reference.reinforce_plus_plus(array, tokens),
        atol=1e-9,
    )


@EXACT
@given(groups(), st.floats(0, 1))
def test_leave_one_out_returns(group: tuple[list[list[float]], list[float]], discount: float) -> None:
    rows = [[*gains, outcome] for gains, outcome in zip(*group, strict=True)]
    values, mask = padded(rows)
    expected = reference.leave_one_out_returns(values, mask, discount)
    # Returns that spread less than 1e-6 are equal to the rule.
    got = leave_one_out_returns([returns_to_go(row, discount=discount) for row in rows])
    for row, of_one, length in zip(expected, got, map(len, rows), strict=True):
        np.testing.assert_allclose(of_one, row[:length], atol=5e-6)


@EXACT
@given(groups(), st.floats(0, 1), st.sampled_from([1.0, 1e-2, 1e-4]))
def test_igpo(group: tuple[list[list[float]], list[float]], discount: float, size: float) -> None:
    plain, outcomes = group
    gains = [[size * gain for gain in row] for row in plain]
    values, mask = padded(gains)
    expected = reference.igpo_separate(values, mask, np.array(outcomes), discount)
    rewards = [
        igpo.TurnRewards(gains=tuple(g), outcome=outcome) for g, outcome in zip(gains, outcomes, strict=True)
    ]
    got = igpo.turn_returns([rewards], igpo.IGPOConfig(gamma=discount))[0]
    for row, of_one in zip(expected, got, strict=True):
        np.testing.assert_allclose(of_one, row[: len(of_one)], atol=1e-6)


@EXACT
@given(st.lists(st.floats(-40, 0), min_size=1, max_size=4), st.floats(0.5, 3))
def test_tips_potential(log_probs: list[float], tau: float) -> None:
    got = tips.potential(log_probs, tips.TIPSConfig(tau=tau))
    assert got == pytest.approx(reference.tips_potential(np.array(log_probs), tau), abs=1e-9)


@EXACT
@given(st.integers(1, 6), st.integers(1, 4), st.randoms())
def test_ig_search_gain(num_tokens: int, num_documents: int, rng: random.Random) -> None:
    draw = np.array([[-5 * rng.random() for _ in range(num_tokens)] for _ in range(num_documents + 1)])
    config = ig_search.IGSearchConfig()
    means = [ig_search.mean_log_prob(row.astype(np.float32), config) for row in draw]
    got = ig_search.step_gain(means[0], means[1:])
    assert got == pytest.approx(reference.ig_search_gain(draw[0], draw[1:]), abs=1e-5)


@EXACT
@given(st.lists(st.tuples(st.floats(0.01, 1), st.floats(0, 1)), min_size=1, max_size=5), st.floats(0, 3))
def test_siop_weights(clusters: list[tuple[float, float]], eta: float) -> None:
    masses, supports = (list(part) for part in zip(*clusters, strict=True))
    got = siop.cluster_weights(masses, supports, eta=eta)
    np.testing.assert_allclose(got, reference.siop_weights(np.array(masses), np.array(supports), eta))


@EXACT
@given(st.lists(st.lists(st.floats(0, 1), min_size=3, max_size=3), min_size=1, max_size=6))
def test_stepsearch_gains(similarities: list[list[float]]) -> None:
    expected = reference.stepsearch_gains(np.array(similarities))
    np.testing.assert_allclose(stepsearch.coverage_gains(similarities), expected, atol=1e-12)
    assert expected.sum() <= 1.0 + 1e-9  # a passage that is covered adds nothing again


@EXACT
@given(VALUES, st.lists(st.floats(0, 2), min_size=1, max_size=5))
def test_cw_grpo(advantage: float, contributions: list[float]) -> None:
    got = cw_grpo.redistribute(advantage, contributions)
    np.testing.assert_allclose(got, reference.cw_grpo(advantage, np.array(contributions)), atol=1e-9)
    assert sum(got) == pytest.approx(advantage * len(contributions), abs=1e-6)  # only redistributed


# A is as similar to B as B to C, with which A has less in common.
SIMILAR = ("1" * 8 + "-" * 63 + "3" * 8, "2" * 8 + "-" * 63 + "3" * 8, "2" * 8 + "-" * 63 + "4" * 8)


def credits_of(
    name: str, gains: list[list[float]], outcomes: list[float | None], **chosen: object
) -> list[FloatArray]:
    """Return the advantages of trajectories that read something else after every gain."""
    question = make_question()
    trajectories = [
        with_documents(make_trajectory(question, sample=i, queries=tuple(map(query_of, row)), answer="x"))
        for i, row in enumerate(gains)
    ]
    scores = [
        Score(
            outcome=outcome,
            gain=Gain(turns=(*row, None), trajectory=sum(row)),
            failure="gain_failed: x" if outcome is None else None,
        )
        for row, outcome in zip(gains, outcomes, strict=True)
    ]
    group = Group(question=question, trajectories=tuple(trajectories))
    return [credit.advantages for credit in make_method(name, **chosen).credit([group], [scores])[0]]


def query_of(gain: float) -> str:
    return SIMILAR[round(abs(gain) * 1000) % len(SIMILAR)]


@pytest.mark.parametrize("name", sorted(ALGORITHMS))
@settings(deadline=None, max_examples=15)
@given(groups(), st.randoms())
def test_credit_does_not_depend_on_the_order_of_a_group(
    name: str, group: tuple[list[list[float]], list[float]], rng: random.Random
) -> None:
    gains, outcomes = group
    order = list(range(len(gains)))
    rng.shuffle(order)
    plain = credits_of(name, gains, [*outcomes])
    moved = credits_of(name, [gains[i] for i in order], [outcomes[i] for i in order])
    for i, credit in zip(order, moved, strict=True):
        np.testing.assert_allclose(credit, plain[i], atol=1e-5)


@pytest.mark.parametrize("name", sorted(ALGORITHMS))
@settings(deadline=None, max_examples=15)
@given(groups())
def test_a_failed_trajectory_changes_nothing_and_gets_nothing(
    name: str, group: tuple[list[list[float]], list[float]]
) -> None:
    gains, outcomes = group
    plain = credits_of(name, gains, [*outcomes])
    *with_failed, failed = credits_of(name, [*gains, [9.0, -9.0]], [*outcomes, None])
    assert not failed.any()
    for one, other in zip(plain, with_failed, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)


@pytest.mark.parametrize("name", sorted(set(ALGORITHMS) - {"siop"}))  # siop does not read outcomes
@settings(deadline=None, max_examples=15)
@given(groups(), st.floats(-1, 1))
def test_a_constant_on_all_outcomes_of_a_group_changes_nothing(
    name: str, group: tuple[list[list[float]], list[float]], constant: float
) -> None:
    chosen = {"gamma": 1.0} if name == "gigpo" else {}  # a discounted constant differs from turn to turn
    gains, outcomes = group
    plain = credits_of(name, gains, [*outcomes], **chosen)
    shifted = credits_of(name, gains, [outcome + constant for outcome in outcomes], **chosen)
    for one, other in zip(plain, shifted, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4)


# gigpo compares outcomes that are discounted per turn: equal ones differ between a short and a long way.
@pytest.mark.parametrize("name", sorted(set(ALGORITHMS) - {"gigpo"}))
def test_groups_of_one_and_equal_groups_without_gains_get_no_advantage(name: str) -> None:
    lone = credits_of(name, [[0.0, 0.0]], [1.0])
    equal = credits_of(name, [[0.0], [0.0], [0.0]], [1.0, 1.0, 1.0])
    for credit in (*lone, *equal):
        np.testing.assert_allclose(credit, 0.0, atol=1e-6)
