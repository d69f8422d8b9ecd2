from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.fakes import make_question, make_trajectory
from tests.scripted_run import decode
from verl.errors import DataError
from verl.evaluation.records import (
    EVIDENCE_FILE,
    RESULTS_FILE,
    TRAJECTORIES_FILE,
    ResultWriter,
    read_results,
    to_result,
)
from verl.run.records import read_records
from verl.types import Score, Trajectory

QUESTIONS = [make_question(f"nq/test/{i}") for i in range(3)]
KEYS = [(question.uid, sample) for question in QUESTIONS for sample in range(2)]
RIGHT = Score(outcome=1.0, metrics={"em": 1.0})


def play(number: int) -> Trajectory:
    """Return the trajectory of one of the keys."""
    question, sample = QUESTIONS[number // 2], number % 2
    return make_trajectory(question, sample=sample, queries=("where",), answer="Bolton")


def write(folder: Path, *numbers: int) -> None:
    writer = ResultWriter(folder, decode=decode)
    for number in numbers:
        writer.write(play(number), score=RIGHT)
    writer.close()


def test_a_result_has_what_was_answered_read_and_spent() -> None:
    trajectory = make_trajectory(QUESTIONS[0], queries=("a", "b"), answer="Bolton", outputs=4, observed=5)
    result = to_result(trajectory, score=RIGHT)
    assert (result["prediction"], result["metrics"], result["failure"]) == ("Bolton", {"em": 1.0}, None)
    assert (result["num_turns"], result["num_searches"], result["num_calls"]) == (3, 2, {"search": 2})
    assert (result["output_tokens"], result["context_tokens"]) == (12, 3 + 12 + 10)
    assert result["passages"] == [["a"], ["b"], []]


def test_a_failure_has_a_name_and_no_metrics_and_its_text_no_secret() -> None:
    failure = "search_failed: http://me:geheim@host"
    trajectory = make_trajectory(QUESTIONS[0], failure=failure)
    result = to_result(trajectory, score=Score(outcome=None, failure=failure, metrics={"em": 0.0}))
    assert result["failure"] == "search_failed: http://***@host"
    assert (result["metrics"], result["prediction"]) == ({}, None)


def test_both_files_end_in_the_order_of_the_questions(tmp_path: Path) -> None:
    write(tmp_path, 3, 0)
    writer = ResultWriter(tmp_path, decode=decode)
    assert writer.done == {KEYS[3], KEYS[0]}
    for number in (5, 1, 2):
        writer.write(play(number), score=RIGHT)
    with pytest.raises(ValueError, match=r"exactly once: 6 answers .* 5 are recorded"):
        writer.sort(KEYS)
    writer.write(play(4), score=RIGHT)
    with pytest.raises(ValueError, match="recorded already"):
        writer.write(play(4), score=RIGHT)
    writer.sort(KEYS)
    writer.close()
    assert [(r["uid"], r["sample"]) for r in read_results(tmp_path)] == KEYS
    records = read_records(tmp_path / TRAJECTORIES_FILE)
    assert [(r["uid"], r["sample"]) for r in records] == KEYS
    assert records[0]["answer"] == "Bolton"


def test_what_failed_is_asked_again_by_the_next_start(tmp_path: Path) -> None:
    write(tmp_path, 0)
    writer = ResultWriter(tmp_path, decode=decode)
    failed = make_trajectory(QUESTIONS[0], sample=1, failure="search_failed: no answer")
    writer.write(failed, score=Score(outcome=None, failure=failed.failure))
    writer.sort(KEYS[:2])
    writer.close()
    assert [record["failure"] for record in read_results(tmp_path)] == [None, "search_failed: no answer"]
    writer = ResultWriter(tmp_path, decode=decode)
    assert writer.done == {KEYS[0]}
    writer.close()


def test_a_new_answer_removes_the_evidence_of_the_earlier_one(tmp_path: Path) -> None:
    write(tmp_path, 0)
    (tmp_path / EVIDENCE_FILE).write_text("{}\n")
    write(tmp_path)  # a start that asks nothing
    assert (tmp_path / EVIDENCE_FILE).is_file()
    write(tmp_path, 1)
    assert not (tmp_path / EVIDENCE_FILE).exists()


def cut(folder: Path, name: str, num_bytes: int) -> None:
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[:-num_bytes])


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: cut(folder, RESULTS_FILE, 9),
        lambda folder: cut(folder, RESULTS_FILE, 1),
        lambda folder: cut(folder, TRAJECTORIES_FILE, 9),
        lambda folder: (folder / RESULTS_FILE).write_bytes(
            b"".join((folder / RESULTS_FILE).read_bytes().splitlines(keepends=True)[:1]) + b"\0" * 40
        ),
    ],
    ids=["cut", "only_its_end_is_missing", "cut_trajectory", "zeros"],
)
def test_a_damaged_last_line_is_set_aside_and_asked_again(
    tmp_path: Path, damage: Callable[[Path], object]
) -> None:
    write(tmp_path, 0, 1)
    whole = [(tmp_path / name).read_bytes() for name in (RESULTS_FILE, TRAJECTORIES_FILE)]
    damage(tmp_path)
    damaged = [(tmp_path / name).read_bytes() for name in (RESULTS_FILE, TRAJECTORIES_FILE)]
    writer = ResultWriter(tmp_path, decode=decode)
    assert writer.done == {KEYS[0]}
    writer.write(play(1), score=RIGHT)
    writer.close()
    assert [(tmp_path / name).read_bytes() for name in (RESULTS_FILE, TRAJECTORIES_FILE)] == whole
    (aside,) = tmp_path.glob("previous-*")
    for name, content in zip((RESULTS_FILE, TRAJECTORIES_FILE), damaged, strict=True):
        assert content.endswith((aside / name).read_bytes())


@pytest.mark.parametrize(("name", "entry"), [(RESULTS_FILE, "metrics"), (TRAJECTORIES_FILE, "turns")])
def test_a_line_that_lacks_an_entry_is_set_aside_and_asked_again(
    tmp_path: Path, name: str, entry: str
) -> None:
    write(tmp_path, 0, 1)
    whole = (tmp_path / name).read_bytes()
    first, second = whole.decode().splitlines()
    damaged = json.loads(first)
    del damaged[entry]
    (tmp_path / name).write_text(f"{json.dumps(damaged)}\n{second}\n")
    writer = ResultWriter(tmp_path, decode=decode)
    assert writer.done == {KEYS[1]}
    writer.write(play(0), score=RIGHT)
    writer.sort(KEYS[:2])
    writer.close()
    assert (tmp_path / name).read_bytes() == whole
    (aside,) = tmp_path.glob("previous-*")
    assert json.loads((aside / name).read_text()) == damaged


@pytest.mark.parametrize("name", [RESULTS_FILE, TRAJECTORIES_FILE])
def test_a_newer_format_is_refused_and_not_replaced(tmp_path: Path, name: str) -> None:
    write(tmp_path, 0)
    newer = json.loads((tmp_path / name).read_text()) | {"format": 99}
    (tmp_path / name).write_text(json.dumps(newer) + "\n")
    with pytest.raises(DataError, match=rf"{name}:1: format 99 was found"):
        ResultWriter(tmp_path, decode=decode)


def test_a_trajectory_without_its_result_is_asked_again(tmp_path: Path) -> None:
    """The process was killed between the two lines."""
    write(tmp_path, 0)
    trajectories = (tmp_path / TRAJECTORIES_FILE).read_bytes()
    write(tmp_path, 1)
    cut(tmp_path, RESULTS_FILE, len((tmp_path / RESULTS_FILE).read_bytes().splitlines(keepends=True)[1]))
    writer = ResultWriter(tmp_path, decode=decode)
    writer.close()
    assert writer.done == {KEYS[0]}
    assert (tmp_path / TRAJECTORIES_FILE).read_bytes() == trajectories


@pytest.mark.parametrize(
    ("lines", "problem"),
    [
        (['{"uid": 1', None, None], r"results\.jsonl:1: .*evaluation\.resume=false"),
        ([None, None], r"results\.jsonl:2: nq/test/0 \(sample 0\) occurs twice"),
    ],
    ids=["in_the_middle", "twice"],
)
def test_other_damages_name_file_and_line(tmp_path: Path, lines: list[str | None], problem: str) -> None:
    write(tmp_path, 0)
    path = tmp_path / RESULTS_FILE
    line = path.read_text().strip()
    path.write_text("".join(f"{other or line}\n" for other in lines))
    with pytest.raises(DataError, match=problem):
        ResultWriter(tmp_path, decode=decode)


def test_readers_refuse_what_they_cannot_read(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="expected the folder of an evaluation"):
        read_results(tmp_path)
    write(tmp_path, 0)
    path = tmp_path / RESULTS_FILE
    newer = json.loads(path.read_text()) | {"format": 2}
    path.write_text(json.dumps(newer) + "\n")
    with pytest.raises(DataError, match=r"results\.jsonl:1: format 2 was found, format 1 is read"):
        read_results(tmp_path)
    damaged = json.loads(path.read_text()) | {"metrics": {"em": float("nan")}}
    path.write_text(json.dumps(damaged) + "\n")
    with pytest.raises(DataError, match=r"results\.jsonl:1: metrics\.em: .*finite number"):
        read_results(tmp_path)
