"""What a person or a program sees of an episode: the JSON of `--json` and of the endpoint."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import cast

from typing_extensions import TypedDict

from serving.redaction import redact_text
from verl.types import ActionKind, Gain, Observation, Passage, SpanKind, ToolCall, Trajectory, Turn

Decode = Callable[[Sequence[int]], str]

_PARTS = (SpanKind.THINK, SpanKind.REFINE)
_NO_ROOM = "the context had no room for the result, which was not read"


class PassageStep(TypedDict):
    """A search result as the policy read it."""

    id: str
    title: str
    text: str
    score: float | None


class CallStep(TypedDict):
    """A tool call and its result."""

    tool: str
    arguments: dict[str, object]
    passages: list[PassageStep] | None
    """None as long as no result was read; empty where nothing was found, or the result is a text."""
    text: str | None
    """The result as the policy read it; None as long as none was, as where the context had no room for it."""


class PartStep(TypedDict):
    """A part of a completion before its action."""

    kind: str
    """think or refine."""
    text: str


class Step(TypedDict):
    """One turn; a later step of the same `turn` replaces an earlier one."""

    turn: int
    """From 0."""
    kind: str
    """tool, answer or invalid."""
    text: str
    """All that was sampled."""
    parts: list[PartStep]
    calls: list[CallStep]
    note: str | None
    """What else the environment did: its reply to an invalid action, a result that was cut or not read."""
    num_dropped: int
    """When this turn was sampled, later texts stood for the results of so many first turns."""
    replacement_ids: list[int]
    """What later turns read in place of the results, once these were dropped; empty if they were not."""
    gain: float | None
    """None where none was measured."""


def make_step(number: int, turn: Turn, *, decode: Decode, gain: float | None = None) -> Step:
    """Describe a turn that was sampled, and what it was answered."""
    action = turn.action
    read = () if turn.observation_overflowed else turn.observations
    return {
        "turn": number,
        "kind": str(action.kind),
        "text": decode(turn.output_ids.tolist()),
        "parts": [{"kind": str(s.kind), "text": s.text} for s in action.spans if s.kind in _PARTS],
        "calls": [
            _call_step(cast(ToolCall, call), observation)
            for call, observation in zip_longest(action.calls, read)
        ],
        "note": _note(turn, decode=decode),
        "num_dropped": turn.num_dropped,
        "replacement_ids": turn.replacement_ids.tolist(),
        "gain": gain,
    }


def _call_step(call: ToolCall, observation: Observation | None) -> CallStep:
    return {
        "tool": call.tool,
        "arguments": dict(call.arguments),
        "passages": None if observation is None else [_passage_step(p) for p in observation.passages],
        "text": None if observation is None else observation.text,
    }


def _passage_step(passage: Passage) -> PassageStep:
    score = passage.score if math.isfinite(passage.score) else None
    return {"id": passage.id, "title": passage.title, "text": passage.text, "score": score}


def _note(turn: Turn, *, decode: Decode) -> str | None:
    if turn.observation_overflowed:
        return _NO_ROOM
    if turn.action.kind is ActionKind.INVALID and len(turn.observation_ids):
        return decode(turn.observation_ids.tolist()).strip()
    return "the result was cut to fit" if turn.observation_truncated else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Episode:
    """The answer to a question and how it came about."""

    trajectory: Trajectory
    steps: tuple[Step, ...]
    gain: Gain
    """Of the answer that was given, or of the gold answers of the question."""


class Usage(TypedDict):
    """Tokens of an episode, by the names of OpenAI's API."""

    prompt_tokens: int
    """What the policy read and did not write: the prompt and all results of tools."""
    completion_tokens: int
    """What it sampled in all turns."""
    total_tokens: int


class EpisodeRecord(TypedDict):
    """An answer and how it came about."""

    question: str
    answer: str | None
    stop: str
    """answered, budget, length or failed: see `verl.types.Stop`."""
    failure: str | None
    seconds: float
    usage: Usage
    gain_unit: str | None
    """What the gains of the trace are; None where none were asked for."""
    gain_failure: str | None
    trace: list[Step]
    token_ids: list[int]
    """The prompt, then what was sampled and what was answered in each turn."""


def count_usage(trajectory: Trajectory) -> Usage:
    """Count the tokens of an episode."""
    total, sampled = len(trajectory.token_ids), trajectory.num_policy_tokens
    return {"prompt_tokens": total - sampled, "completion_tokens": sampled, "total_tokens": total}


def episode_record(episode: Episode, *, gain_unit: str | None) -> EpisodeRecord:
    """Describe an episode; failures without secrets."""
    trajectory = episode.trajectory
    return {
        "question": trajectory.question.text,
        "answer": trajectory.answer,
        "stop": str(trajectory.stop),
        "failure": None if trajectory.failure is None else redact_text(trajectory.failure),
        "seconds": round(trajectory.seconds, 3),
        "usage": count_usage(trajectory),
        "gain_unit": gain_unit,
        "gain_failure": None if episode.gain.failure is None else redact_text(episode.gain.failure),
        "trace": list(episode.steps),
        "token_ids": trajectory.token_ids.tolist(),
    }
