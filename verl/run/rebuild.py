"""Rebuild the steps of a run from their records, as the policy read them: see `verl.run.records`."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np

from verl.run.records import (
    ActionRecord,
    ObservationRecord,
    PassageRecord,
    SpanRecord,
    TrajectoryRecord,
    TurnRecord,
    count_calls,
)
from verl.types import (
    Action,
    ActionKind,
    Credit,
    Finish,
    Gain,
    Group,
    IntArray,
    Observation,
    Passage,
    Question,
    Score,
    Span,
    SpanKind,
    Stop,
    ToolCall,
    Trajectory,
    Turn,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordedStep:
    """One step as the method saw it, and the credit it gave."""

    groups: tuple[Group, ...]
    scores: tuple[tuple[Score, ...], ...]
    credits: tuple[tuple[Credit | None, ...], ...]
    """None where no credit was recorded."""


def rebuild_step(records: Iterable[TrajectoryRecord]) -> RecordedStep:
    """Return groups, scores and credit in their order, without `Question.messages`."""
    by_uid: dict[str, list[TrajectoryRecord]] = {}
    for record in records:
        by_uid.setdefault(record["uid"], []).append(record)
    groups = []
    for members in by_uid.values():
        trajectories = tuple(rebuild_trajectory(record) for record in members)
        groups.append(Group(question=trajectories[0].question, trajectories=trajectories))
    return RecordedStep(
        groups=tuple(groups),
        scores=tuple(tuple(_rebuild_score(record) for record in members) for members in by_uid.values()),
        credits=tuple(tuple(_rebuild_credit(record) for record in members) for members in by_uid.values()),
    )


def rebuild_trajectory(record: TrajectoryRecord) -> Trajectory:
    """Return the trajectory of a record, without `Question.messages`."""
    question = Question(
        uid=record["uid"],
        text=record["question"],
        messages=(),
        golds=tuple(record["golds"]),
        data_source=record["data_source"],
    )
    return Trajectory(
        question=question,
        sample=record["sample"],
        prompt_ids=_ids(record["prompt_ids"]),
        turns=tuple(_rebuild_turn(turn) for turn in record["turns"]),
        stop=Stop(record["stop"]),
        failure=record["trajectory_failure"],
        seconds=record["seconds"],
    )


def _rebuild_turn(turn: TurnRecord) -> Turn:
    return Turn(
        output_ids=_ids(turn["output_ids"]),
        output_log_probs=np.asarray(turn["output_log_probs"], dtype=np.float32),
        action=_rebuild_action(turn["action"]),
        finish=Finish(turn.get("finish", Finish.STOP)),
        observations=_rebuild_observations(turn),
        observation_ids=_ids(turn["observation_ids"]),
        observation_truncated=turn["observation_truncated"],
        replacement_ids=_ids(turn.get("replacement_ids", [])),
        num_dropped=turn.get("num_dropped", 0),
        version=turn["version"],
    )


def _rebuild_observations(turn: TurnRecord) -> tuple[Observation, ...]:
    passages = map(_rebuild_passage, turn["passages"])
    # Until format 2 there was one call in a turn, and its text was not recorded.
    one: ObservationRecord = {"text": "", "num_passages": len(turn["passages"])}
    return tuple(
        Observation(text=found["text"], passages=tuple(islice(passages, found["num_passages"])))
        for found in turn.get("observations", [one] * count_calls(turn))
    )


def _rebuild_action(action: ActionRecord) -> Action:
    if "spans" not in action:
        return _rebuild_old_action(action)
    return Action(
        kind=ActionKind(action["kind"]),
        calls=tuple(ToolCall(**call) for call in action["calls"]),
        spans=tuple(_rebuild_span(span) for span in action["spans"]),
    )


def _rebuild_span(span: SpanRecord) -> Span:
    values: dict[str, Any] = {**span, "kind": SpanKind(span["kind"])}
    return Span(**values)


def _rebuild_old_action(action: ActionRecord) -> Action:
    """Return the action of a record of format 1 or 2: at most one call, and only the span of its text."""
    kind = ActionKind.TOOL if action["kind"] == "search" else ActionKind(action["kind"])
    if kind is ActionKind.INVALID:
        return Action(kind=kind)
    is_call, text = kind is ActionKind.TOOL, action["text"]
    span_kind = SpanKind.QUERY if is_call else SpanKind.ANSWER
    call = ToolCall(tool=action.get("tool", "search"), arguments=action.get("arguments", {"query": text}))
    return Action(
        kind=kind,
        calls=(call,) if is_call else (),
        spans=(Span(kind=span_kind, start=action["start"], end=action["end"], text=text),),
    )


def _rebuild_passage(passage: PassageRecord) -> Passage:
    values: dict[str, Any] = {**passage, "score": math.nan if passage["score"] is None else passage["score"]}
    return Passage(**values)


def _rebuild_score(record: TrajectoryRecord) -> Score:
    gain = Gain(
        trajectory=record["gain"],
        turns=tuple(record.get("turn_gains", ())),
        failure=record.get("gain_failure"),
    )
    return Score(
        outcome=record["outcome"], gain=gain, failure=record["failure"], metrics=dict(record["metrics"])
    )


def _rebuild_credit(record: TrajectoryRecord) -> Credit | None:
    runs = record["advantage_runs"]
    if runs is None:
        return None
    parts = [np.full(count, np.nan if value is None else value, dtype=np.float32) for value, count in runs]
    return Credit(
        advantages=np.concatenate(parts) if parts else np.zeros(0, dtype=np.float32),
        components={
            name: tuple(value) if isinstance(value, list) else value
            for name, value in record.get("components", {}).items()
        },
    )


def _ids(values: list[int]) -> IntArray:
    return np.asarray(values, dtype=np.int32)
