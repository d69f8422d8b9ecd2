"""The file format of recorded trajectories: one JSON object per line.

A step is rebuilt from its file as the policy read it (token ids, masks, scores), so that any method
can credit it again:

    step = rebuild_step(read_records(path))
    credits = algorithm.credit(step.groups, step.scores)

Format 2 added `turn_gains`, `components` and `format` itself, and of turns `finish`, `is_executed` and the
action's `tool` and `arguments` (a search was an action of the kind `search`). Format 3 has the `spans` and
`calls` of an action instead of one `start`, `end`, `tool` and `arguments`, and the text of each observation.
Files of all formats are read.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, NotRequired, cast

import numpy as np
from pydantic import TypeAdapter
from typing_extensions import TypedDict

from serving.redaction import redact_text
from verl.agent.spans import DecodedText
from verl.errors import DataError
from verl.types import (
    Action,
    ActionKind,
    Credit,
    FloatArray,
    Passage,
    Score,
    Trajectory,
    Turn,
)
from verl.utils.files import parse_json

Decode = Callable[[Sequence[int]], str]
TRAJECTORIES = "trajectories"
"""Folder of the training steps in a run folder."""
EVALUATION = "evaluation"
FORMAT = 3
_STEP_FILE = re.compile(r"step_(\d+)\.jsonl")
SCORE_DIGITS = 6
LOG_PROB_DIGITS = 6
ADVANTAGE_DIGITS = 8


class PassageRecord(TypedDict):
    """One search result."""

    id: str
    title: str
    text: str
    score: float | None
    is_cut: NotRequired[bool]
    """Whether the observation had no room for all of it."""


class CallRecord(TypedDict):
    """A tool call."""

    tool: str
    arguments: dict[str, object]


class SpanRecord(TypedDict):
    """A part of a completion: see `verl.types.Span`."""

    kind: str
    start: int
    end: int
    text: str
    num_closing: NotRequired[int]
    """Absent in older files of format 3: 0."""


class ActionRecord(TypedDict):
    """What the policy asked for in a turn."""

    kind: str
    """tool, answer or invalid; in format 1 search for a call of that tool."""
    text: str
    """The answer, or one line per query."""
    calls: NotRequired[list[CallRecord]]
    spans: NotRequired[list[SpanRecord]]
    start: NotRequired[int]
    """Of `text`, like `end`, until format 2."""
    end: NotRequired[int]
    tool: NotRequired[str]
    """Like `arguments` of the call, in format 2."""
    arguments: NotRequired[dict[str, object]]


class ObservationRecord(TypedDict):
    """What one call returned, cut to fit."""

    text: str
    num_passages: int
    """How many of the turn's `passages` are its own, in order."""


class TurnRecord(TypedDict):
    """One completion and the reply to it."""

    output_text: str
    text_cuts: NotRequired[list[tuple[int, int]]]
    """(token of `output_ids`, character of `output_text`) at both ends and wherever the advantage changes or
    a span begins or ends; empty in an evaluation, absent in older files."""
    output_ids: list[int]
    output_log_probs: list[float | None]
    """None where it was not finite."""
    finish: NotRequired[str]
    """stop or length."""
    action: ActionRecord
    is_executed: NotRequired[bool]
    """Whether a tool was called; without the entry, a call with an observation was."""
    passages: list[PassageRecord]
    """Those that the policy read."""
    observations: NotRequired[list[ObservationRecord]]
    """One per executed call."""
    observation_text: str
    """All that the environment appended, decoded."""
    observation_ids: list[int]
    observation_truncated: bool
    num_dropped: NotRequired[int]
    """The policy wrote this turn without the observations of the first `num_dropped` turns: it read the
    `replacement_ids` of those that have some. Absent: nothing was dropped."""
    replacement_ids: NotRequired[list[int]]
    """What later turns read instead of the observation; absent if that was never dropped."""
    version: int


class RecordVersion(TypedDict):
    """What a line of every format has."""

    format: NotRequired[int]
    """1 if absent."""


class TrajectoryRecord(RecordVersion):
    """One line of a file."""

    step: int
    kind: str
    uid: str
    data_source: str
    sample: int
    question: str
    golds: list[str]
    prompt_text: str
    prompt_ids: list[int]
    turns: list[TurnRecord]
    mask_runs: list[int]
    """Lengths of alternating stretches, not sampled first: prompt, output, observation, output, ..."""
    answer: str | None
    stop: str
    seconds: float
    outcome: float | None
    gain: float | None
    """Of the whole trajectory."""
    turn_gains: NotRequired[list[float | None]]
    """One per turn; empty where the method measures no turns."""
    gain_failure: NotRequired[str | None]
    components: NotRequired[dict[str, float | list[float | None] | None]]
    """Of the credit, by name; empty in an evaluation."""
    metrics: dict[str, float]
    failure: str | None
    """Why the trajectory is left out of training: its episode or its reward failed."""
    trajectory_failure: str | None
    advantage: float | None
    """Mean over the sampled tokens; None in an evaluation."""
    advantage_runs: list[tuple[float | None, int]] | None
    """(value, number of tokens) over the whole trajectory."""


def to_record(
    trajectory: Trajectory,
    *,
    score: Score,
    credit: Credit | None,
    step: int,
    kind: str,
    decode: Decode,
) -> TrajectoryRecord:
    """Return the record of a trajectory; its texts are decoded from its ids."""
    question = trajectory.question
    # The mean over sampled tokens: the others have advantage 0 and would only dilute it.
    sampled = credit.advantages[trajectory.policy_mask] if credit is not None else np.zeros(0)
    # Short facts first and token ids last: a reader of the raw file sees at once what happened.
    return {
        "format": FORMAT,
        "step": step,
        "kind": kind,
        "uid": question.uid,
        "data_source": question.data_source,
        "sample": trajectory.sample,
        "question": question.text,
        "golds": list(question.golds),
        "answer": trajectory.answer,
        "stop": str(trajectory.stop),
        "outcome": score.outcome,
        "gain": score.gain.trajectory,
        "turn_gains": list(score.gain.turns),
        "gain_failure": _redacted(score.gain.failure),
        "components": {} if credit is None else cast(dict[str, Any], dict(credit.components)),
        "advantage": _number(sampled.mean(), ADVANTAGE_DIGITS) if len(sampled) else None,
        # Error texts of services may quote URLs with credentials.
        "failure": _redacted(score.failure or trajectory.failure),
        "trajectory_failure": _redacted(trajectory.failure),
        "metrics": dict(score.metrics),
        "seconds": round(trajectory.seconds, 3),
        "prompt_text": decode(trajectory.prompt_ids.tolist()),
        "turns": [
            _turn_record(turn, advantages=advantages, decode=decode)
            for turn, advantages in zip(trajectory.turns, _split_turns(trajectory, credit), strict=True)
        ],
        "prompt_ids": trajectory.prompt_ids.tolist(),
        "mask_runs": _mask_runs(trajectory),
        "advantage_runs": None if credit is None else _runs(credit.advantages),
    }


def _split_turns(trajectory: Trajectory, credit: Credit | None) -> list[FloatArray | None]:
    """Return the advantages of the output of each turn, None without a credit."""
    if credit is None:
        return [None] * len(trajectory.turns)
    parts: list[FloatArray | None] = []
    start = len(trajectory.prompt_ids)
    for turn in trajectory.turns:
        parts.append(credit.advantages[start : start + len(turn.output_ids)])
        start += len(turn.output_ids) + len(turn.observation_ids)
    return parts


def _text_cuts(turn: Turn, advantages: FloatArray | None, *, text: DecodedText) -> list[tuple[int, int]]:
    if advantages is None:
        return []
    changes = np.flatnonzero(advantages[1:] != advantages[:-1]) + 1
    spans = (edge for span in turn.action.spans for edge in (span.start, span.end))
    tokens = sorted({0, len(turn.output_ids), *changes.tolist(), *spans})
    return [(token, text.count_characters(token)) for token in tokens]


def _passage_record(passage: Passage) -> PassageRecord:
    record: PassageRecord = {
        "id": passage.id,
        "title": passage.title,
        "text": passage.text,
        "score": _number(passage.score, SCORE_DIGITS),
    }
    if passage.is_cut:
        record["is_cut"] = True
    return record


def _action_record(action: Action) -> ActionRecord:
    spans: list[SpanRecord] = [
        {"kind": str(s.kind), "start": s.start, "end": s.end, "text": s.text, "num_closing": s.num_closing}
        for s in action.spans
    ]
    calls: list[CallRecord] = [{"tool": c.tool, "arguments": dict(c.arguments)} for c in action.calls]
    return {"kind": str(action.kind), "calls": calls, "spans": spans, "text": action.text}


def _turn_record(turn: Turn, *, advantages: FloatArray | None, decode: Decode) -> TurnRecord:
    output_ids, observation_ids = turn.output_ids.tolist(), turn.observation_ids.tolist()
    text = DecodedText(output_ids, decode=decode)
    record: TurnRecord = {
        "output_text": text.text,
        "action": _action_record(turn.action),
        "finish": str(turn.finish),
        "is_executed": bool(turn.observations),
        "observations": [
            {"text": found.text, "num_passages": len(found.passages) if len(turn.observation_ids) else 0}
            for found in turn.observations
        ],
        "passages": [_passage_record(passage) for passage in turn.passages],
        "observation_text": decode(observation_ids),
        "observation_truncated": turn.observation_truncated,
        "version": turn.version,
        "text_cuts": _text_cuts(turn, advantages, text=text),
        "output_ids": output_ids,
        "output_log_probs": _numbers(turn.output_log_probs, LOG_PROB_DIGITS),
        "observation_ids": observation_ids,
    }
    if turn.num_dropped:
        record["num_dropped"] = turn.num_dropped
    if len(turn.replacement_ids):
        record["replacement_ids"] = turn.replacement_ids.tolist()
    return record


def _number(value: float | np.floating, digits: int) -> float | None:
    number = float(value)
    return round(number, digits) if math.isfinite(number) else None


def _numbers(values: FloatArray, digits: int) -> list[float | None]:
    """Return what `_number` returns of each value.

    They are equal because float32 times such a power of ten is exact in float64.
    """
    numbers: list[float] = values.astype(np.float64).round(digits).tolist()
    if np.isfinite(values).all():
        return [*numbers]
    return [number if math.isfinite(number) else None for number in numbers]


def _mask_runs(trajectory: Trajectory) -> list[int]:
    runs = [len(trajectory.prompt_ids)]
    for turn in trajectory.turns:
        runs += [len(turn.output_ids), len(turn.observation_ids)]
    return runs


def _runs(values: FloatArray) -> list[tuple[float | None, int]]:
    if not len(values):
        return []
    starts = [0, *(np.flatnonzero(values[1:] != values[:-1]) + 1).tolist()]
    numbers = _numbers(values[starts], ADVANTAGE_DIGITS)
    return [
        (x, end - start) for x, (start, end) in zip(numbers, pairwise([*starts, len(values)]), strict=True)
    ]


def _redacted(text: str | None) -> str | None:
    return None if text is None else redact_text(text)


def step_file(run_dir: Path, folder: str, step: int) -> Path:
    """Return the path of the file of a step."""
    return run_dir / folder / f"step_{step:06d}.jsonl"


def step_files(run_dir: Path, folder: str = TRAJECTORIES) -> dict[int, Path]:
    """Return the files of the recorded steps of a run, in order."""
    found = ((_STEP_FILE.fullmatch(path.name), path) for path in (run_dir / folder).glob("step_*.jsonl"))
    return dict(sorted((int(match.group(1)), path) for match, path in found if match is not None))


def read_records(path: Path) -> list[TrajectoryRecord]:
    """Return all trajectories of a file. Raises DataError that names file and line."""
    return list(iterate_records(path))


def iterate_records(path: Path) -> Iterator[TrajectoryRecord]:
    """Yield the trajectories of a file. Raises DataError that names file and line."""
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                yield parse_record(line, where=f"{path}:{number}")
    except FileNotFoundError as error:
        raise DataError(f"{path} is not there; expected a JSONL file of recorded trajectories") from error


def parse_record(line: bytes, *, where: str) -> TrajectoryRecord:
    """Return the trajectory of a line. Raises DataError that names where it is."""
    fix = "was the file cut or edited? Restore it"
    # First the version alone: a newer format may have another shape.
    version = parse_json(line, shape=_version_shape(), where=where, fix=fix).get("format", 1)
    if not 1 <= version <= FORMAT:
        raise DataError(
            f"{where}: format {version} was found, formats 1 to {FORMAT} are read; "
            "read the file with the version that wrote it"
        )
    record = parse_json(line, shape=_shape(), where=where, fix=fix)
    if len(record["mask_runs"]) != 1 + 2 * len(record["turns"]):
        raise DataError(f"{where}: mask_runs does not fit the turns; {fix}")
    if len(record.get("turn_gains", ())) not in (0, len(record["turns"])):
        raise DataError(f"{where}: turn_gains does not fit the turns; {fix}")
    return record


@cache
def _version_shape() -> TypeAdapter[RecordVersion]:
    return TypeAdapter(RecordVersion)


@cache
def _shape() -> TypeAdapter[TrajectoryRecord]:
    return TypeAdapter(TrajectoryRecord)


def count_calls(turn: TurnRecord) -> int:
    """Return the number of executed tool calls of a turn."""
    if "observations" in turn:
        return len(turn["observations"])
    is_call = turn["action"]["kind"] not in (ActionKind.ANSWER, ActionKind.INVALID)
    return int(turn.get("is_executed", is_call and bool(turn["observation_ids"])))
