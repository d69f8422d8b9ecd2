from __future__ import annotations

import math

import pytest

from tests.scripted_evaluation import make_result
from verl.errors import DataError
from verl.evaluation.compare import score_table
from verl.evaluation.paired import MACRO, compare_runs, pair_runs, shared_curves
from verl.evaluation.records import ResultRecord


def make_run(right: str, *, source: str = "nq", **options: int) -> list[ResultRecord]:
    """One result per character: 1 right, 0 wrong, x failed."""
    return [
        make_result(
            f"{source}/test/{k}",
            em=float(c == "1"),
            failure="search_failed: HTTP 500" if c == "x" else None,
            **options,
        )
        for k, c in enumerate(right)
    ]


def test_answers_that_failed_in_one_run_are_left_out_of_all() -> None:
    runs = {"a": make_run("11x0"), "b": make_run("1x00")}
    kept, left_out = pair_runs(runs, intersect=False)
    assert [[r["uid"] for r in results] for results in kept.values()] == [["nq/test/0", "nq/test/3"]] * 2
    assert left_out == {"failed in a": 1, "failed in b": 1}


def test_different_questions_are_refused_unless_the_intersection_is_wanted() -> None:
    runs = {"a": make_run("1100"), "b": make_run("110")[1:], "c": make_run("11111")}
    with pytest.raises(DataError, match="b lacks 2 of the 4 answers of a and has 0") as caught:
        pair_runs(runs, intersect=False)
    assert "c lacks 0 of the 4 answers of a and has 1" in str(caught.value)
    assert "--intersect to compare the 2 answers" in str(caught.value)
    kept, left_out = pair_runs(runs, intersect=True)
    assert {len(results) for results in kept.values()} == {2}
    assert left_out == {"not in all": 3}


def test_other_data_under_the_same_uid_is_refused() -> None:
    changed = make_run("11")
    changed[1]["golds"] = ["Paris"]
    with pytest.raises(DataError, match=r"nq/test/1 is another question in b"):
        pair_runs({"a": make_run("11"), "b": changed}, intersect=True)
    with pytest.raises(DataError, match="no question in common"):
        pair_runs({"a": make_run("11"), "b": make_run("11", source="popqa")}, intersect=True)


def test_exact_match_by_mcnemar_and_holm_over_all_sets_and_runs() -> None:
    first = make_run("0" * 12) + make_run("1010", source="popqa")
    better = make_run("1" * 10 + "00") + make_run("1010", source="popqa")
    worse = make_run("0" * 12) + make_run("0010", source="popqa")
    comparison = compare_runs({"first": first, "better": better, "worse": worse}, metric="em")
    found = {(d.set_name, d.run): d for d in comparison.differences}
    assert found["nq", "better"].p_value == pytest.approx(2 / 1024)
    assert found["nq", "better"].test == "McNemar"
    assert found["popqa", "worse"].p_value == 1.0  # one discordant question
    assert found[MACRO, "better"].test == "sign flip"
    assert found[MACRO, "better"].estimate.value == pytest.approx((10 / 12 + 0) / 2)
    assert comparison.scores[MACRO]["first"].value == pytest.approx((0 + 0.5) / 2)
    # Six tests: the smallest p times six, the next times five.
    ordered = sorted(d.p_value for d in comparison.differences if d.p_value is not None)
    adjusted = sorted(d.adjusted for d in comparison.differences if d.adjusted is not None)
    assert adjusted[0] == pytest.approx(6 * ordered[0])
    assert found["nq", "better"].is_significant
    assert not found["popqa", "worse"].is_significant


def test_means_over_samples_and_other_metrics_use_the_sign_flip_test() -> None:
    def sampled(right: int) -> list[ResultRecord]:
        return [
            make_result(f"nq/test/{k}", sample=s, em=float(s < (right + k) % 3))
            for k in range(12)
            for s in range(2)
        ]

    runs = {"a": sampled(0), "b": sampled(1)}
    (em,) = compare_runs(runs, metric="em").differences
    assert (em.test, em.estimate.num_questions) == ("sign flip", 12)
    assert math.isclose(em.estimate.value, 0.0, abs_tol=1e-9)  # 0 1 2 against 1 2 0 right
    (passed,) = compare_runs(runs, metric="pass@2").differences
    assert passed.test == "sign flip"


def test_a_source_without_a_question_left_leaves_the_macro_average_undefined() -> None:
    runs = {
        "a": make_run("1100") + make_run("10", source="popqa") + make_run("xx", source="musique"),
        "b": make_run("1110") + make_run("11", source="popqa") + make_run("11", source="musique"),
    }
    kept, _ = pair_runs(runs, intersect=False)
    comparison = compare_runs(kept, metric="em", asked={"nq", "popqa", "musique"})
    assert [*comparison.scores] == ["nq", "popqa"]
    assert comparison.empty_sources == ("musique",)
    assert (
        "no macro average: all questions of musique were left out" in score_table(comparison, kept, {}).note
    )
    assert MACRO in compare_runs(kept, metric="em").scores


def test_a_metric_that_answers_lack_is_refused() -> None:
    runs = {"a": make_run("11"), "b": make_run("10")}
    for record in (*runs["a"], runs["b"][0]):
        record["metrics"]["judge"] = 1.0
    with pytest.raises(DataError, match=r"b cannot be compared by judge: 1 of its 2 questions lack it"):
        compare_runs(runs, metric="judge")
    with pytest.raises(DataError, match="a has no metric bleu; compare by em, f1"):
        compare_runs(runs, metric="bleu")


def test_curves_have_the_same_bins_for_all_runs() -> None:
    runs = {"a": make_run("1100", num_searches=1), "b": make_run("1110", num_searches=3)}
    curves = shared_curves(runs)["num_searches"]
    assert [(p.low, p.estimate.value) for p in curves["a"]] == [(1, 0.5)]
    assert [(p.low, p.estimate.value) for p in curves["b"]] == [(3, 0.75)]
