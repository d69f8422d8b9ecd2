from __future__ import annotations

import pytest

from tests.scripted_run import write_run
from verl.run.report.examples import evenly_spaced, pick_extremes, pick_pairs, pick_steps
from verl.run.report.run_data import RunData, compare_evaluations, read_run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunData:
    return read_run(
        write_run(tmp_path_factory.mktemp("examples") / "run", steps=9, num_questions=10, num_samples=3)
    )


def test_groups_are_shown_whole(run: RunData) -> None:
    steps = pick_steps(run)
    assert [(s.label, s.step) for s in steps] == [("First step", 1), ("Middle step", 5), ("Last step", 9)]
    for step in steps:
        assert (len(step.groups), step.num_groups, step.num_attempts) == (8, 10, 30)
        assert all([t["sample"] for t in group] == [0, 1, 2] for group in step.groups)


def test_of_long_trajectories_fewer_groups_are_shown_but_whole(run: RunData) -> None:
    for max_bytes, least, most in ((0, 1, 1), (30_000, 2, 7)):
        for step in pick_steps(run, max_bytes=max_bytes):
            assert least <= len(step.groups) <= most
            assert all([t["sample"] for t in group] == [0, 1, 2] for group in step.groups)


def test_extremes_are_the_extremes(run: RunData) -> None:
    extremes = pick_extremes(run)
    gains = [t["gain"] or 0.0 for t in (*extremes.best, *reversed(extremes.worst))]
    assert gains == sorted(gains, reverse=True)
    assert gains[0] > 0.7
    assert gains[-1] < -0.1


def test_pairs_are_the_same_question_and_say_what_changed(run: RunData) -> None:
    pairs = pick_pairs(run)
    assert {"won", "still right"} <= {pair.change for pair in pairs}
    for pair in pairs:
        assert pair.before["uid"] == pair.after["uid"]
        assert (pair.before["step"], pair.after["step"]) == (0, 9)
        if pair.change == "won":
            assert (pair.before["metrics"]["em"], pair.after["metrics"]["em"]) == (0.0, 1.0)


def test_before_and_after_are_compared_by_source(run: RunData) -> None:
    total, *sources = compare_evaluations(run)
    assert (total.before["em"], total.after["em"]) == run.series("val/em", kind="val").values
    assert [row.source for row in sources] == ["world_one_hop", "world_two_hop"]
    assert sum(row.before["questions"] for row in sources) == total.before["questions"] == 30


def test_evenly_spaced() -> None:
    assert evenly_spaced([1, 2, 3], 5) == [1, 2, 3]
    assert evenly_spaced(list(range(1, 101)), 4) == [1, 34, 67, 100]
