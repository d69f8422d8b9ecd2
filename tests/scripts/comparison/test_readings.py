"""Readings of results that were made up, with answers worked out by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from comparison.pace import STANDARD_S
from comparison.readings import (
    Reading,
    Verdict,
    band,
    compare,
    compare_pairs,
    cost_to,
    has_collapsed,
    has_stopped_searching,
    last_mean,
    mean_over_seeds,
    pair_seeds,
    rank_correlation,
    smooth,
)
from comparison.results import Result
from tests.scripts.comparison.made_up import make_result


def test_a_level_is_reached_by_the_mean_of_five_steps() -> None:
    result = make_result(em=[0.0, 1.0, 0.0, 1.0, 0.0, 1.0, 1.0], searches=[0.5] * 7)
    assert smooth(result.em)[:4] == [None] * 4
    assert smooth(result.em)[4:] == pytest.approx([0.4, 0.6, 0.6])
    cost = cost_to(result, 0.5)
    assert cost is not None
    assert (cost.step, cost.tokens, cost.searches) == (6, 6000.0, 6 * 80 * 0.5)
    assert cost.processor_s == 15.0 * 12.0 / 10.0  # of 10 s, the six steps took 12
    assert cost_to(result, 0.7) is None
    half_as_fast = cost_to(replace(result, pace_s=2 * STANDARD_S), 0.5)
    assert half_as_fast is not None
    assert half_as_fast.processor_s == cost.processor_s / 2
    unknown = cost_to(replace(result, pace_s=None), 0.5)
    assert unknown is not None
    assert (unknown.step, unknown.processor_s) == (6, None)


def test_what_was_not_measured_is_left_out_of_means_and_is_not_0() -> None:
    assert smooth([None, 0.5], 2) == [None, 0.5]
    assert last_mean([0.2, None, 0.4], 2) == 0.4
    assert last_mean([None]) is None
    results = [make_result(), make_result(outcomes=())]
    assert mean_over_seeds(results, lambda r: r.evaluations[-1].em if r.evaluations else None) is None


@pytest.mark.parametrize(
    ("em", "expected"),
    [
        ([0.2] * 10 + [0.8] * 10, False),
        ([0.8] * 10 + [0.3] * 10, True),
        ([0.8] * 10 + [0.5] * 10, False),
        ([0.8] * 3, False),
    ],
)
def test_a_run_has_collapsed_when_it_ends_below_half_of_its_best_ten_steps(
    em: list[float], expected: bool
) -> None:
    assert has_collapsed(make_result(em=em)) is expected


def test_a_run_has_stopped_searching_when_its_last_ten_steps_hardly_search() -> None:
    assert has_stopped_searching(make_result(em=[0.5] * 20, searches=[1.0] * 10 + [0.05] * 10))
    assert not has_stopped_searching(make_result(em=[0.5] * 20, searches=[0.05] * 10 + [1.0] * 10))


def test_seeds_are_paired_and_a_method_that_is_right_on_other_questions_is_better() -> None:
    right, wrong = "1" * 40 + "0" * 10, "0" * 50
    runs = {
        "base": [make_result(outcomes=((2, wrong),), seed=seed) for seed in range(3)],
        "good": [make_result(outcomes=((2, right),), seed=seed) for seed in (2, 0, 1)],
        "same": [make_result(outcomes=((2, wrong),), seed=seed) for seed in range(3)],
    }
    good, same = compare(runs, base="base", readings=(Reading.ROLLOUTS,))
    assert (good.value, good.num_seeds, good.num_questions) == (pytest.approx(0.8), 3, 50)
    assert good.interval is not None
    assert good.interval[0] < 0.8 < good.interval[1]
    assert good.verdict is Verdict.BETTER
    assert (same.value, same.interval, same.adjusted) == (0.0, (0.0, 0.0), 1.0)
    assert same.verdict is Verdict.NOT_SHOWN
    (worse,) = compare(
        {"good": runs["good"], "base": runs["base"]}, base="good", readings=(Reading.ROLLOUTS,)
    )
    assert worse.verdict is Verdict.WORSE
    assert [(a.settings["config"]["trainer.seed"]) for a, _ in pair_seeds(runs["good"], runs["base"])] == [
        2,
        0,
        1,
    ]


def test_one_seed_gives_a_difference_without_a_verdict() -> None:
    runs = {
        "base": [make_result(outcomes=((2, "0" * 50),))],
        "one": [make_result(outcomes=((2, "1" * 50),))],
    }
    (one,) = compare(runs, base="base", readings=(Reading.ROLLOUTS,))
    assert (one.value, one.interval, one.verdict) == (1.0, None, Verdict.ONE_SEED)


def test_intervals_are_without_0_exactly_where_the_verdict_says_so() -> None:
    def seeds(*numbers: int) -> list[Result]:
        texts = ("1" * number + "0" * (100 - number) for number in numbers)
        return [make_result(outcomes=((2, text),), seed=seed) for seed, text in enumerate(texts)]

    runs = {"base": seeds(20, 24, 28), "far": seeds(70, 74, 78), "near": seeds(35, 39, 43)}
    runs |= {"same": seeds(21, 24, 27)}
    found = {d.method: d for d in compare(runs, base="base", readings=(Reading.ROLLOUTS,))}
    assert [found[name].verdict for name in ("far", "near", "same")] == [
        Verdict.BETTER,
        Verdict.BETTER,
        Verdict.NOT_SHOWN,
    ]
    for d in found.values():
        assert d.interval is not None
        assert (d.verdict is Verdict.NOT_SHOWN) == (d.interval[0] <= 0 <= d.interval[1])
    alone = compare_pairs(runs, [("near", "base")], readings=(Reading.ROLLOUTS,))[0]
    assert alone.adjusted is not None
    assert found["near"].adjusted == pytest.approx(2 * alone.adjusted)  # of three, "far" comes first


def test_one_seed_of_two_does_not_make_a_method_better() -> None:
    runs = {
        "base": [make_result(outcomes=((2, "0" * 50),), seed=seed) for seed in range(2)],
        "lucky": [make_result(outcomes=((2, text),), seed=k) for k, text in enumerate(("1" * 50, "0" * 50))],
    }
    (lucky,) = compare(runs, base="base", readings=(Reading.ROLLOUTS,))
    assert lucky.value == 0.5
    assert lucky.verdict is Verdict.NOT_SHOWN


def test_a_question_that_failed_is_left_out_of_both() -> None:
    runs = {
        "base": [make_result(outcomes=((2, "0.00"),))],
        "one": [make_result(outcomes=((2, "111."),))],
    }
    (one,) = compare(runs, base="base", readings=(Reading.ROLLOUTS,))
    assert (one.num_questions, one.value) == (2, 1.0)


def test_at_equal_searches_the_one_that_searches_more_is_read_earlier() -> None:
    evaluations = ((0, "0000"), (1, "1000"), (4, "1111"))
    greedy = make_result(em=[0.5] * 4, searches=[2.0] * 4, outcomes=evaluations)
    frugal = make_result(em=[0.5] * 4, searches=[1.0] * 4, outcomes=((0, "0000"), (4, "0011")))
    rollouts, searches = compare({"frugal": [frugal], "greedy": [greedy]}, base="frugal")
    assert rollouts.value == 0.5  # 4 right against 2
    # After 2 steps the greedy one had made as many searches, a third of the way from 1 right answer to 4.
    assert searches.value == pytest.approx((2 - 2) / 4)
    late = make_result(em=[0.5] * 4, searches=[0.5] * 4, outcomes=((0, "0000"), (4, "0011")))
    _, searches = compare({"late": [late], "greedy": [greedy]}, base="late")
    assert searches.value == (1 - 2) / 4  # after 1 step, at an evaluation
    silent = make_result(
        em=[0.5] * 4, searches=[2.0, 0.0, 0.0, 0.0], outcomes=((0, "0000"), (1, "1111"), (4, "1000"))
    )
    _, searches = compare({"silent": [silent], "greedy": [greedy]}, base="silent")
    assert searches.value == (1 - 1) / 4  # as it ended, not when it stopped searching


def test_without_the_runs_of_the_base_nothing_is_measured() -> None:
    (found,) = compare({"one": [make_result()], "base": []}, base="base", readings=(Reading.ROLLOUTS,))
    assert (found.value, found.verdict) == (None, Verdict.OPEN)


def test_rankings_agree_or_invert() -> None:
    ranking = {"a": 0.1, "b": 0.2, "c": 0.3}
    # Of the 6 orders of three, one agrees and one inverts.
    assert rank_correlation(ranking, {"a": 1, "b": 2, "c": 3, "d": 0}) == (1.0, pytest.approx(2 / 6), 3)
    assert rank_correlation(ranking, {"a": 3, "b": 2, "c": 1}) == (-1.0, pytest.approx(2 / 6), 3)
    assert rank_correlation(ranking, {"a": 1, "b": 2}) is None


def test_a_band_has_mean_and_ends_of_the_seeds_where_something_was_measured() -> None:
    results = [make_result(em=[0.0, None, 0.2]), make_result(em=[0.4, None, 0.6, 0.9])]
    steps, values = band(results, lambda result: result.em)
    assert steps == [1, 3]
    assert values.T.tolist() == [pytest.approx([0.2, 0.0, 0.4]), pytest.approx([0.4, 0.2, 0.6])]
