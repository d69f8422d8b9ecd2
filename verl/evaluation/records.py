"""The files of an evaluation folder: one line per question and sample, appended as episodes end.

    settings.json        what was evaluated, and with what
    results.jsonl        one `ResultRecord` per line: answer, metrics, tokens, seconds
    trajectories.jsonl   the same lines in the same order as `verl.run.records.TrajectoryRecord`
    metrics.json         means over the results, by the names of the training's evaluations
    summary.json         the same with intervals, by source, micro and macro; table.md, table.tex, report.html
    evidence.jsonl       where the evidence for each answer was to be found, see evidence.py
    judgements.jsonl     verdicts of a judge, if it was asked; judge.json says of which

Lines are appended to both files when an episode ends, and brought into the order of the questions when all
have ended. What is in both files and did not fail is not asked again.
"""

from __future__ import annotations

import json
import logging
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from io import FileIO
from pathlib import Path
from typing import NamedTuple, NotRequired, Protocol

from pydantic import ConfigDict, TypeAdapter, with_config
from typing_extensions import TypedDict

from serving.files import naming_file, replacing_file
from serving.redaction import redact_text
from verl.errors import DataError
from verl.run.records import FORMAT as TRAJECTORY_FORMAT
from verl.run.records import Decode, parse_record, to_record
from verl.types import Score, Trajectory
from verl.utils.files import parse_json

logger = logging.getLogger(__name__)

SETTINGS_FILE = "settings.json"
RESULTS_FILE = "results.jsonl"
TRAJECTORIES_FILE = "trajectories.jsonl"
METRICS_FILE = "metrics.json"
SUMMARY_FILE = "summary.json"
MARKDOWN_FILE = "table.md"
LATEX_FILE = "table.tex"
EVIDENCE_FILE = "evidence.jsonl"
VERDICTS_FILE = "judgements.jsonl"
JUDGE_FILE = "judge.json"
HOPS_FILE = "long_horizon.json"
FORMAT = 1

Key = tuple[str, int]
"""uid and sample: what makes a line of an evaluation unique."""


@with_config(ConfigDict(allow_inf_nan=False))
class ResultRecord(TypedDict):
    """One answer to a question."""

    format: int
    uid: str
    """`data_source/split/index`."""
    sample: int
    """0..n-1; 0 for the one greedy answer."""
    data_source: str
    question: str
    golds: list[str]
    prediction: str | None
    """The answer; None where there was none."""
    stop: str
    """See `verl.types.Stop`."""
    failure: str | None
    """`name: message`. Then `metrics` is empty, and the question counts as failed, never as 0."""
    metrics: dict[str, float]
    """em, sub_em (a gold answer is contained), f1."""
    num_turns: int
    num_searches: int
    """Executed calls of the tool `search`."""
    num_calls: dict[str, int]
    """Executed calls of each tool that was called."""
    output_tokens: int
    """Sampled tokens."""
    context_tokens: int
    """All tokens of the trajectory."""
    seconds: float
    """From the first request to the end of the episode, other episodes beside it."""
    passages: list[list[str]]
    """Ids of the passages that the policy read, per turn."""


class _Parse(Protocol):
    def __call__(self, line: bytes, *, where: str) -> object:
        """Raise DataError unless the line is a whole record of a known format."""


class _KeyShape(TypedDict):
    """What the lines of both files have in common; other entries are not read."""

    format: NotRequired[int]
    uid: str
    sample: int
    failure: str | None


_RESULT_SHAPE = TypeAdapter(ResultRecord)
_KEY_SHAPE = TypeAdapter(_KeyShape)


def to_result(trajectory: Trajectory, *, score: Score) -> ResultRecord:
    """Return the record of an answer. Error texts of services are redacted."""
    question = trajectory.question
    # A turn whose calls were not executed has no observations.
    executed = [c.tool for turn in trajectory.turns for c in turn.action.calls[: len(turn.observations)]]
    failure = score.failure or trajectory.failure
    return {
        "format": FORMAT,
        "uid": question.uid,
        "sample": trajectory.sample,
        "data_source": question.data_source,
        "question": question.text,
        "golds": list(question.golds),
        "prediction": trajectory.answer,
        "stop": str(trajectory.stop),
        "failure": None if failure is None else redact_text(failure),
        "metrics": {} if failure is not None else dict(score.metrics),
        "num_turns": len(trajectory.turns),
        "num_searches": executed.count("search"),
        "num_calls": dict(Counter(executed)),
        "output_tokens": trajectory.num_policy_tokens,
        "context_tokens": len(trajectory.token_ids),
        "seconds": round(trajectory.seconds, 3),
        "passages": [[passage.id for passage in turn.passages] for turn in trajectory.turns],
    }


def read_results(folder: Path) -> list[ResultRecord]:
    """Return the results of an evaluation folder, in the order of the file.

    Raises DataError that names file and line, also for a line that occurs twice.
    """
    path = folder / RESULTS_FILE
    if not path.is_file():
        raise DataError(
            f"{path} is not there; expected the folder of an evaluation (evaluation.output_dir of "
            "python -m verl.trainer.main_eval)"
        )
    records: list[ResultRecord] = []
    keys: set[Key] = set()
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            record = _parse_result(line, where=f"{path}:{number}")
            key = (record["uid"], record["sample"])
            if key in keys:
                raise DataError(f"{path}:{number}: {_name(key)} occurs twice; remove one of the two lines")
            keys.add(key)
            records.append(record)
    return records


def _parse_result(line: bytes, *, where: str) -> ResultRecord:
    fix = "was the file cut or edited? The same evaluation again asks again for damaged answers"
    record = parse_json(line, shape=_RESULT_SHAPE, where=where, fix=fix)
    if record["format"] != FORMAT:
        raise DataError(
            f"{where}: format {record['format']} was found, format {FORMAT} is read; "
            "read the file with the version that wrote it"
        )
    return record


class ResultWriter:
    """Appends results and trajectories to an evaluation folder, and continues what an earlier start left.

    A line that has no partner in the other file, records a failure, or is damaged is moved to
    `previous-<time>/`, so that its question is asked again. The key may be damaged only in the last line.
    """

    def __init__(self, folder: Path, *, decode: Decode) -> None:
        """Open or create the files. Raises DataError for a line without key that is not the last one."""
        folder.mkdir(parents=True, exist_ok=True)
        self._decode = decode
        self._evidence = folder / EVIDENCE_FILE
        self._results = _IndexedFile(folder / RESULTS_FILE, parse=_parse_result, newest=FORMAT)
        self._trajectories = _IndexedFile(
            folder / TRAJECTORIES_FILE, parse=parse_record, newest=TRAJECTORY_FORMAT
        )
        kept = self._results.whole & self._trajectories.whole
        aside = folder / f"previous-{datetime.now(UTC):%Y%m%dT%H%M%S.%f}"
        for file in (self._results, self._trajectories):
            file.keep(kept, aside=aside)

    @property
    def done(self) -> frozenset[Key]:
        """Return the questions and samples that are recorded."""
        return frozenset(self._results.lines)

    def write(self, trajectory: Trajectory, *, score: Score) -> None:
        """Append one answer to both files, and remove the evidence of earlier ones.

        Raises ValueError if it was recorded.
        """
        key = (trajectory.question.uid, trajectory.sample)
        if key in self._results.lines:
            raise ValueError(f"{_name(key)} is recorded already: every question is scored exactly once")
        # It is of an earlier answer, and must not stay beside this one if this start is stopped.
        self._evidence.unlink(missing_ok=True)
        record = to_record(trajectory, score=score, credit=None, step=0, kind="val", decode=self._decode)
        # The result last: it counts as done, so its trajectory must be there.
        self._trajectories.append(key, record)
        self._results.append(key, to_result(trajectory, score=score))

    def sort(self, keys: Sequence[Key]) -> None:
        """Bring both files into this order. Raises ValueError if a key is missing, doubled or unknown."""
        if Counter(keys) != Counter(self._results.lines.keys()):
            raise ValueError(
                f"an evaluation must answer every question exactly once: {len(keys)} answers "
                f"({len(set(keys))} distinct) were expected, {len(self._results.lines)} are recorded"
            )
        for file in (self._trajectories, self._results):
            file.rewrite(keys)

    def close(self) -> None:
        """Close both files."""
        for file in (self._results, self._trajectories):
            file.close()


class _Line(NamedTuple):
    start: int
    length: int


class _IndexedFile:
    """A JSONL file that is appended to, and the place of each line by its key."""

    def __init__(self, path: Path, *, parse: _Parse, newest: int) -> None:
        self.path = path
        self.lines: dict[Key, _Line] = {}
        self.whole: set[Key] = set()
        """Lines that were found when the file was opened, are not damaged and record no failure."""
        self._parse = parse
        self._newest = newest
        self._damaged: _Line | None = None
        self._file = self._open()
        self._index()

    def append(self, key: Key, record: Mapping[str, object]) -> None:
        """Write one line through to the operating system, where it outlives this process."""
        text = json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n"
        content = text.encode("utf-8", errors="backslashreplace")
        start, written = self._file.seek(0, os.SEEK_END), 0
        with naming_file(self.path):
            try:
                while written < len(content):
                    written += self._file.write(content[written:]) or 0
            except OSError:
                self._file.truncate(start)  # the line of another episode must not follow half a line
                raise
        self.lines[key] = _Line(start, len(content))

    def keep(self, keys: set[Key], *, aside: Path) -> None:
        """Move all lines but those of the keys to the file of the same name in the folder `aside`."""
        moved = [line for key, line in self.lines.items() if key not in keys]
        moved += [self._damaged] if self._damaged is not None else []
        if not moved:
            return
        aside.mkdir(exist_ok=True)
        (aside / self.path.name).write_bytes(b"".join(map(self._read, moved)))
        logger.warning(
            "%s: %d lines are failures, damaged or incomplete; they were moved to %s and are asked again",
            self.path,
            len(moved),
            aside,
        )
        self._damaged = None
        self.rewrite([key for key in self.lines if key in keys])

    def rewrite(self, keys: Sequence[Key]) -> None:
        """Replace the file by the lines of these keys in this order."""
        lines: dict[Key, _Line] = {}
        position = 0
        with replacing_file(self.path) as partial, partial.open("wb") as target:
            for key in keys:
                lines[key] = _Line(position, self.lines[key].length)
                position += target.write(self._read(self.lines[key]))
        self._file.close()
        self._file = self._open()
        self.lines = lines

    def close(self) -> None:
        self._file.close()

    def _open(self) -> FileIO:
        return self.path.open("a+b", buffering=0)

    def _read(self, line: _Line) -> bytes:
        self._file.seek(line.start)
        return self._file.read(line.length)

    def _index(self) -> None:
        """Find every line.

        Raises DataError for a line without key before the last one, a repeated key, or a newer format.
        """
        problem = ""
        start = 0
        with self.path.open("rb") as file:
            for number, content in enumerate(file, start=1):
                if problem:
                    raise DataError(problem)
                line, where = _Line(start, len(content)), f"{self.path}:{number}"
                start += line.length
                try:
                    record = _parse_key(content, where=where)
                except DataError as error:
                    # A damaged last line is expected: the process was killed while it wrote it.
                    problem, self._damaged = str(error), line
                    continue
                key = (record["uid"], record["sample"])
                if key in self.lines:
                    raise DataError(f"{where}: {_name(key)} occurs twice; remove one of the two lines")
                if record.get("format", 1) > self._newest:
                    self._parse(
                        content, where=where
                    )  # raises DataError: it is whole, but not ours to replace
                self.lines[key] = line
                if record["failure"] is None and self._is_whole(content, where=where):
                    self.whole.add(key)

    def _is_whole(self, content: bytes, *, where: str) -> bool:
        try:
            self._parse(content, where=where)
        except DataError as error:
            logger.warning("%s", error)
            return False
        return True


def _parse_key(line: bytes, *, where: str) -> _KeyShape:
    fix = "restore the file, or set evaluation.resume=false, which moves all of it aside"
    record = parse_json(line, shape=_KEY_SHAPE, where=where, fix=fix)
    if not line.endswith(b"\n"):
        raise DataError(f"{where}: the line has no end; {fix}")
    return record


def _name(key: Key) -> str:
    uid, sample = key
    return f"{uid} (sample {sample})"
