"""The vocabulary of the trainer: immutable facts in token ids, as sampled; no tensors, no padding.

A `Question` is asked `n` times; each attempt is a `Trajectory`, a prompt followed by `Turn`s. A turn is what
the policy sampled (`output_ids`) and what the environment appended to it (`observation_ids`).
`Trajectory.token_ids` is their concatenation and `Trajectory.policy_mask` says which of them the policy
sampled; no other mask exists.

    tokens       prompt | thought, tool call | observation | thought, answer
    part of             | output             | observation | output
    policy_mask  False  | True               | False       | True
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int32]
FloatArray = npt.NDArray[np.float32]
BoolArray = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """A chat message of a question's prompt."""

    role: str
    content: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """One row of the data set."""

    uid: str
    """`data_source/split/index`: unique over merged data sets, the key of a GRPO group."""
    text: str
    """As sent to the IG service: see `serving.answers.complete_question`."""
    messages: tuple[Message, ...]
    """The chat prompt the policy sees."""
    golds: tuple[str, ...]
    """Accepted answers (aliases), at least one."""
    data_source: str
    supporting_ids: tuple[str, ...] = ()
    """Ids of the passages that support the answer, or titles where those are all that the data has."""
    supporting_texts: tuple[str, ...] = ()
    """Their texts in the same order, where the data has them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Passage:
    """One search result as the policy read it: as retrieved, but cut to fit and with tags neutralized."""

    id: str
    title: str
    """First line of `contents`, quotes kept; empty when `contents` has no line break."""
    text: str
    """The rest of `contents`; only its start where an observation had no room for more."""
    score: float
    is_cut: bool = False
    """Whether the observation had no room for all of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Observation:
    """What a tool returned for one call."""

    text: str = ""
    """For the policy to read, without what the prompt format puts around it; empty when there is nothing."""
    passages: tuple[Passage, ...] = ()
    """The search results that `text` consists of, if it does."""
    failure: str | None = None
    """Why the tool could not do its work. Never shown to the policy: the trajectory is masked and counted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolSpec:
    """Name, description and limits of a tool, for the prompt and the parser of a prompt format."""

    name: str
    description: str
    """What it does, in one line that begins with a verb."""
    parameters: Mapping[str, str]
    """Description of each argument by its name; all of them are required."""
    timeout_s: float = 30.0
    """Longest time of one call."""
    shortest_text: str = ""
    """Shortest text of an observation that is not empty: `data.max_obs_length` must have room for it."""
    empty_text: str = ""
    """What the policy reads instead of an empty result."""


class ActionKind(StrEnum):
    TOOL = "tool"
    ANSWER = "answer"
    INVALID = "invalid"


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolCall:
    """A call that the policy asked for."""

    tool: str
    arguments: Mapping[str, object]
    """By name."""


class SpanKind(StrEnum):
    THINK = "think"
    QUERY = "query"
    """The argument of a tool call."""
    REFINE = "refine"
    """The policy's own summary of what it read."""
    ANSWER = "answer"


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """A part of a completion that the prompt format distinguishes, markup excluded."""

    kind: SpanKind
    start: int
    end: int
    """Its tokens are `[start, end)` of `Turn.output_ids`."""
    text: str
    """What the policy meant, stripped: without the escapes that the markup of a format may need."""
    num_closing: int = 0
    """Number of tokens after `end` up to the end of the markup that closes the part."""

    @property
    def outer_end(self) -> int:
        """Return the end of the part with its closing markup."""
        return self.end + self.num_closing


@dataclass(frozen=True, slots=True, kw_only=True)
class Action:
    """What the policy asked for in one turn, and the parts of its completion."""

    kind: ActionKind
    calls: tuple[ToolCall, ...] = ()
    """In order, at least one if `kind` is TOOL; the k-th span of kind QUERY is the query of the k-th call."""
    spans: tuple[Span, ...] = ()
    """In order, without overlaps."""

    @property
    def text(self) -> str:
        """Return the answer, or one line per query; empty when invalid."""
        return "\n".join(s.text for s in self.spans if s.kind in (SpanKind.QUERY, SpanKind.ANSWER))


class Finish(StrEnum):
    STOP = "stop"
    """A stop string or the end-of-sequence token."""
    LENGTH = "length"


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How one completion is drawn."""

    temperature: float
    max_tokens: int
    stop: tuple[str, ...]
    seed: int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Completion:
    """What an engine sampled for one request."""

    ids: IntArray
    """Sampled tokens [n], stop tokens included."""
    log_probs: FloatArray
    """Log-probability of each sampled token under the sampling distribution [n]."""
    finish: Finish
    version: int
    """Version of the weights that produced it."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Turn:
    """One completion of the policy and the environment's reply to it."""

    output_ids: IntArray
    output_log_probs: FloatArray
    action: Action
    finish: Finish = Finish.STOP
    observations: tuple[Observation, ...] = ()
    """Result of each call as the policy reads it; empty when none was executed or one failed."""
    observation_ids: IntArray = field(default_factory=lambda: np.zeros(0, dtype=np.int32))
    """What the environment appended; empty on the last turn."""
    observation_truncated: bool = False
    """Whether the observations were cut to `data.max_obs_length`."""
    replacement_ids: IntArray = field(default_factory=lambda: np.zeros(0, dtype=np.int32))
    """What later turns read instead of `observation_ids` once these were dropped; empty if they were not."""
    num_dropped: int = 0
    """This turn was sampled from a context in which the first `num_dropped` turns were replaced."""
    version: int = 0

    @property
    def observation_overflowed(self) -> bool:
        """Return whether the context had no room for what the calls gave, which ended the episode."""
        return bool(self.observations) and not len(self.observation_ids)

    @property
    def passages(self) -> tuple[Passage, ...]:
        """Return the search results that the policy read: from the tool, never parsed from text."""
        return tuple(p for o in self.observations for p in o.passages) if len(self.observation_ids) else ()


class Stop(StrEnum):
    ANSWERED = "answered"
    BUDGET = "budget"
    """No further turn may follow, and there is no answer."""
    LENGTH = "length"
    """The token budget was used up."""
    FAILED = "failed"
    """A tool or the engine failed: the trajectory is neither rewarded nor punished."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Trajectory:
    """One attempt at a question."""

    question: Question
    sample: int
    """0..n-1 inside its group."""
    prompt_ids: IntArray
    turns: tuple[Turn, ...]
    stop: Stop
    failure: str | None = None
    """Name and message of what failed; set exactly when `stop` is FAILED."""
    seconds: float = 0.0

    @property
    def token_ids(self) -> IntArray:
        """Return the prompt, then output and observation of every turn, dropped ones included [L]."""
        return join_context(self.prompt_ids, self.turns)

    @property
    def is_one_sequence(self) -> bool:
        """Return whether every completion was sampled from the tokens before it in `token_ids`."""
        return not any(turn.num_dropped for turn in self.turns)

    def context_ids(self, number: int) -> IntArray:
        """Return the tokens that turn `number` was sampled from."""
        return join_context(self.prompt_ids, self.turns[:number], num_dropped=self.turns[number].num_dropped)

    @property
    def policy_mask(self) -> BoolArray:
        """Return True exactly on sampled tokens [L]: the one mask of loss, KL, entropy and credit."""
        flags = [np.zeros(len(self.prompt_ids), dtype=np.bool_)]
        for turn in self.turns:
            flags += [np.ones(len(turn.output_ids), np.bool_), np.zeros(len(turn.observation_ids), np.bool_)]
        return np.concatenate(flags)

    @property
    def sampling_log_probs(self) -> FloatArray:
        """Return the log-probs at sampling time on policy tokens, 0 elsewhere [L]."""
        parts = [np.zeros(len(self.prompt_ids), dtype=np.float32)]
        for turn in self.turns:
            parts += [turn.output_log_probs, np.zeros(len(turn.observation_ids), np.float32)]
        return np.concatenate(parts)

    @property
    def num_policy_tokens(self) -> int:
        """Return the number of sampled tokens."""
        return sum(len(turn.output_ids) for turn in self.turns)

    @property
    def answer(self) -> str | None:
        """Return the text of the answer action of the last turn, or None."""
        if self.turns and self.turns[-1].action.kind is ActionKind.ANSWER:
            return self.turns[-1].action.text
        return None

    @property
    def observations(self) -> tuple[Observation, ...]:
        """Return the result of every executed tool call, also of those whose observation overflowed."""
        return tuple(observation for turn in self.turns for observation in turn.observations)

    @property
    def passages(self) -> tuple[Passage, ...]:
        """Return all search results that the policy read, in order."""
        return tuple(p for turn in self.turns for p in turn.passages)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Group:
    """All attempts at one question."""

    question: Question
    trajectories: tuple[Trajectory, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Gain:
    """What a method measured of one trajectory. Neither value nor failure: there was nothing to measure."""

    trajectory: float | None = None
    turns: tuple[float | None, ...] = ()
    """One per turn, None where there was nothing to measure; empty where a method measures no turns."""
    failure: str | None = None

    @property
    def values(self) -> tuple[float, ...]:
        """Return all numbers that were measured, those of the turns first."""
        return tuple(value for value in (*self.turns, self.trajectory) if value is not None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """What was measured of one trajectory."""

    outcome: float | None
    """Reward of the final answer; None when the trajectory failed."""
    gain: Gain = Gain()
    failure: str | None = None
    """Set: excluded from the group's statistics, masked from the loss, counted."""
    metrics: dict[str, float] = field(default_factory=dict)
    """Further measures of the answer (em, sub_em, f1, set_f1, math), for logs only."""

    @property
    def valid_outcome(self) -> float | None:
        """Return the outcome; None where the trajectory or its measurement failed."""
        return None if self.failure is not None else self.outcome


def find_rightness(metrics: Mapping[str, float]) -> float | None:
    """Return the measure that says if an answer is right: math where it was graded so, else exact match."""
    return metrics.get("math", metrics.get("em"))


Component = float | tuple[float | None, ...] | None
"""A named part of a credit: one number per trajectory, or one per turn; None where it was not measured."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Credit:
    """What one trajectory is trained with."""

    advantages: FloatArray
    """One per token of `Trajectory.token_ids`, 0 outside `policy_mask` [L]."""
    components: Mapping[str, Component]
    """`reward`, what the group compares, and what else the method made it of, by name."""


class Sample(NamedTuple):
    """One trajectory of a step with all that is known of it."""

    trajectory: Trajectory
    score: Score
    credit: Credit


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ScoredGroups:
    """All groups of one step with a score and a credit per trajectory, in the same order."""

    groups: Sequence[Group]
    scores: Sequence[Sequence[Score]]
    credits: Sequence[Sequence[Credit]]
    stats: Mapping[str, float] = field(default_factory=dict)
    """What measuring the gains cost, by metric name."""
    old_log_probs: Sequence[Sequence[FloatArray]] | None = None
    """Log-probs of the sampled tokens before the update, where measuring computed them; 0 elsewhere [L]."""

    def by_group(self) -> Iterator[list[Sample]]:
        """Yield the samples of each group."""
        for group, scores, credits in zip(self.groups, self.scores, self.credits, strict=True):
            yield [Sample(*parts) for parts in zip(group.trajectories, scores, credits, strict=True)]

    def samples(self) -> list[Sample]:
        """Return all samples, in order."""
        return [sample for of_group in self.by_group() for sample in of_group]


def join_context(prompt_ids: IntArray, turns: Sequence[Turn], *, num_dropped: int = 0) -> IntArray:
    """Return the prompt, then output and observation of every turn, the first `num_dropped` replaced [L].

    A turn without replacement keeps its observation.
    """
    parts = [prompt_ids]
    for number, turn in enumerate(turns):
        is_dropped = number < num_dropped and len(turn.replacement_ids) > 0
        parts += [turn.output_ids, turn.replacement_ids if is_dropped else turn.observation_ids]
    return np.concatenate(parts)


def count_policy_tokens(trajectories: Sequence[Trajectory]) -> int:
    """Return the number of tokens that the policy sampled over all trajectories."""
    return sum(t.num_policy_tokens for t in trajectories)
