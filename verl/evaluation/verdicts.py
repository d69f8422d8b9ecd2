"""The verdicts of a judge on the answers of an evaluation, and which judge it was: beside its results."""

from __future__ import annotations

from pathlib import Path

from pydantic import TypeAdapter
from typing_extensions import TypedDict

from verl.evaluation.records import JUDGE_FILE, VERDICTS_FILE, ResultRecord, read_results
from verl.utils.files import parse_json


class VerdictRecord(TypedDict):
    """What is known of one answer; one line of the file."""

    uid: str
    sample: int
    prediction: str | None
    """The answer that was judged."""
    verdict: float | None
    """1 right, 0 wrong; None where it was not judged."""
    source: str
    """`exact_match`, `no_answer`, `cache`, `judge`, or why there is no verdict: `failed`, `capped`."""
    failure: str | None
    """`name: message`."""


class JudgeRecord(TypedDict):
    """Which judge was asked, and what that took: `judge.json`."""

    format: int
    model: str
    replied_as: list[str]
    """Names under which the endpoint replied in this start."""
    sha256: str
    """Of the file of the settings."""
    settings: dict[str, object]
    answers: int
    sources: dict[str, int]
    """Number of answers by `VerdictRecord.source`."""
    not_judged: int
    failures: dict[str, int]
    """By name."""
    calls: int
    """Of this start, like `tokens`."""
    tokens: int


_SHAPE = TypeAdapter(VerdictRecord)
_JUDGE_SHAPE = TypeAdapter(JudgeRecord)


def read_verdicts(folder: Path) -> list[VerdictRecord]:
    """Return the verdicts of an evaluation folder, none if it was not judged. Raises DataError."""
    path = folder / VERDICTS_FILE
    if not path.is_file():
        return []
    with path.open("rb") as file:
        return [
            parse_json(line, shape=_SHAPE, where=f"{path}:{number}", fix="remove the file and judge again")
            for number, line in enumerate(file, start=1)
        ]


def read_judge(folder: Path) -> JudgeRecord | None:
    """Return which judge was asked, None if none was. Raises DataError."""
    path = folder / JUDGE_FILE
    if not path.is_file():
        return None
    return parse_json(path.read_bytes(), shape=_JUDGE_SHAPE, where=str(path), fix="judge again")


def read_judged_results(folder: Path) -> list[ResultRecord]:
    """Return the results of an evaluation folder, with the metric `judge` where there is a verdict.

    A verdict on another answer than the one in the results is not used.
    """
    verdicts = {(v["uid"], v["sample"], v["prediction"]): v["verdict"] for v in read_verdicts(folder)}
    results = read_results(folder)
    for result in results:
        verdict = verdicts.get((result["uid"], result["sample"], result["prediction"]))
        if verdict is not None and result["failure"] is None:
            result["metrics"]["judge"] = verdict
    return results
