from __future__ import annotations

import json
from pathlib import Path

import pytest

from IG.doctor.rollouts import have_gains, observed_groups, read_rollouts, with_gains
from serving.questions import QuestionError

PASSAGES = [{"id": "1", "title": '"A"', "text": "is a", "score": 1.0}, {"title": "B", "text": "is b"}]


def line(**changed: object) -> dict[str, object]:
    return {
        "step": 1,
        "uid": "world/train/1",
        "question": "Where?",
        "golds": ["Bolton"],
        "answer": "Bolton",
        "turns": [{"passages": PASSAGES}, {"passages": []}, {"passages": PASSAGES[1:]}],
        "outcome": 1.0,
        "gain": 0.5,
        "failure": None,
    } | changed


def write(path: Path, *lines: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(each) + "\n" for each in lines), encoding="utf-8")
    return path


def test_rollouts_are_read_from_a_file_a_folder_and_a_run(tmp_path: Path) -> None:
    first = write(
        tmp_path / "run" / "trajectories" / "step_000001.jsonl", line(), line(answer=None, gain=None)
    )
    write(tmp_path / "run" / "trajectories" / "step_000002.jsonl", line(step=2))
    assert len(read_rollouts(first)) == 2
    assert len(read_rollouts(first.parent)) == len(read_rollouts(tmp_path / "run")) == 3
    rollouts = read_rollouts(tmp_path / "run")
    assert rollouts[0].context == 'Doc 1(Title: "A") is a\nDoc 2(Title: B) is b\nDoc 1(Title: B) is b'
    assert [rollout.group for rollout in rollouts] == ["1/world/train/1"] * 2 + ["2/world/train/1"]
    assert [rollout.is_measurable for rollout in rollouts] == [True, False, True]


def test_failed_rollouts_are_left_out_and_missing_gains_count_as_in_training(tmp_path: Path) -> None:
    path = write(
        tmp_path / "t.jsonl",
        line(),
        line(turns=[], gain=None, outcome=0.0),
        line(failure="search_failed", outcome=None),
        line(failure="gain_failed"),
    )
    (group,) = observed_groups(read_rollouts(path))
    assert group.outcomes.tolist() == [1.0, 0.0]
    assert group.gains is not None
    assert group.gains.tolist() == [[0.5, 0.0]]


def test_gains_that_nobody_measured_can_be_filled_in(tmp_path: Path) -> None:
    path = write(
        tmp_path / "t.jsonl", line(gain=None), line(turns=[], gain=None), line(gain=None, question="Who?")
    )
    rollouts = read_rollouts(path)
    assert not have_gains(rollouts)
    assert observed_groups(rollouts)[0].gains is None
    filled = with_gains(rollouts, {("Where?", rollouts[0].context): 0.7})
    assert [(rollout.question, rollout.gain) for rollout in filled] == [("Where?", 0.7), ("Where?", None)]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([line(), line(uid=None)], "t.jsonl:2: uid is None"),
        ([line(outcome="good")], "t.jsonl:1: outcome is 'good', expected a number"),
        ([line(outcome=10**400)], "expected a finite number"),
        ([line(gain=float("nan"))], "t.jsonl:1: gain is nan, expected a finite number"),
        ([line(turns=[{"passages": [{"title": "\ud800"}]}])], "t.jsonl:1: character 13 of passages is"),
        ([line(gain=True)], "t.jsonl:1: gain is True, expected a number"),
        ([line(turns="x")], "t.jsonl:1: turns is 'x', expected a list of objects"),
        ([line(turns=[{"passages": ["x"]}])], "t.jsonl:1: passages is ['x']"),
        ([line(failure="broken")], "t.jsonl: no rollout has an outcome"),
    ],
)
def test_what_is_no_rollout_is_named(tmp_path: Path, lines: list[object], message: str) -> None:
    with pytest.raises(QuestionError) as raised:
        read_rollouts(write(tmp_path / "t.jsonl", *lines))
    assert message in str(raised.value)
