"""The bias table of docs/methods.md: each credit against the known gradient of a small game."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.methods import make_method
from verl.algorithms import ALGORITHMS
from verl.algorithms.bias import (
    VARIANTS,
    bias_line,
    bias_table,
    episodes,
    groups_of,
    method_gradient,
    sampled_gradient,
)
from verl.algorithms.bias import true_gradient as exact

PAGE = Path(__file__).parents[2] / "docs" / "methods.md"


def test_the_page_has_the_table_as_it_is_computed() -> None:
    printed = PAGE.read_text(encoding="utf-8").partition("<!-- bias table -->")[2]
    assert printed.partition("<!-- end of bias table -->")[0].strip() == bias_table()


@pytest.mark.parametrize("name", sorted(ALGORITHMS))
def test_the_section_of_a_method_has_the_verdict_on_it(name: str) -> None:
    section = PAGE.read_text(encoding="utf-8").partition(f"\n## {name}\n")[2].partition("\n## ")[0]
    assert bias_line(name) in section.splitlines()


def test_probabilities_sum_to_one_and_the_exact_gradient_is_known() -> None:
    played = episodes()
    assert sum(episode.probability for episode in played) == pytest.approx(1.0)
    assert sum(probability for _, probability in groups_of(played, n=3)) == pytest.approx(1.0)
    assert exact() == pytest.approx([0.1953125, 0.0453125, 0.0078125, 0.0015625])


@pytest.mark.parametrize("n", [2, 3, 4])
def test_leave_one_out_returns_give_the_exact_gradient(n: int) -> None:
    igpo = make_method("igpo", baseline="leave_one_out")
    means = (0.6, 0.3, 0.1)
    gradient = method_gradient(igpo, placement="turns", n=n, means=means)
    assert gradient == pytest.approx(exact(means), abs=1e-6)


def test_pooled_centering_of_gains_lowers_the_probability_of_searching() -> None:
    gradient = method_gradient(make_method("igpo"), placement="turns", n=3)
    assert gradient[0] == pytest.approx(0.0, abs=1e-6)
    assert all(value < -0.01 for value in gradient[1:])


def test_sampling_agrees_with_enumeration() -> None:
    igpo = make_method("igpo")
    expected = method_gradient(igpo, placement="turns", n=3)
    gradient, error = sampled_gradient(igpo, placement="turns", n=3, num_groups=2000)
    for value, true, spread in zip(gradient[1:], expected[1:], error[1:], strict=True):
        assert 0 < spread < 0.01
        assert abs(value - true) < 4 * spread


def test_every_method_is_in_the_table() -> None:
    assert {variant.name for variant in VARIANTS} == set(ALGORITHMS)
