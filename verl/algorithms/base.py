"""What a method is: what it needs, what it measures of a step, and how it credits the sampled tokens.

algorithm = ALGORITHMS["inforeasoner"](settings, services)
async with aclosing(algorithm.prefetch(questions)) as prefetch:
    ...                                                           # episodes run
    measurement = await algorithm.measure(groups, prefetch=prefetch)
credits = algorithm.credit(groups, scores)
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, ClassVar, Protocol

from IG.messages import GainRequest, GainResult
from verl.branches import Tree, TreeLogProbs
from verl.trainer.config.schema import AlgorithmConfig
from verl.types import Credit, FloatArray, Gain, Group, Question, Score, Trajectory


class Need(StrEnum):
    """What a method measures with, beyond the outcome of the answer. It is given what it names, no more."""

    IG_SERVICE = "ig_service"
    """The semantic information gain of passages: `Services.ig_service`."""
    POLICY_LOG_PROBS = "policy_log_probs"
    """Log-probs under the policy before the update: `Services.policy`."""
    FROZEN_LOG_PROBS = "frozen_log_probs"
    """Log-probs under a copy of the policy, frozen or refreshed from time to time: `Services.frozen`."""
    ENTAILMENT = "entailment"
    """Whether one text entails another: `Services.entailment`."""
    SUPPORTING_IDS = "supporting_ids"
    """Ids of the passages that support the answer, in the data: `Question.supporting_ids`."""


class IGService(Protocol):
    """The part of the IG service's client that methods use."""

    @property
    def timeout_s(self) -> float:
        """Return the longest time that a step may wait for its gains."""
        ...

    def take_work(self) -> Mapping[str, int]:
        """Return the work that the service has reported for this client since the last call."""
        ...

    async def compute(
        self, requests: Sequence[GainRequest], *, timeout_s: float | None = None
    ) -> list[GainResult]:
        """Return one result per request, in order; failures are in the results."""
        ...

    async def submit(self, request: GainRequest) -> GainResult:
        """Return the result of one request; a failure is in the result."""
        ...


class LogProbScorer(Protocol):
    """Computes log-probs under the policy before the update, or under a copy of it."""

    @property
    def scores_trajectories(self) -> bool:
        """Return whether the log-probs of the sampled tokens are needed, too, from the same pass."""
        ...

    async def score(self, trees: Sequence[Tree]) -> list[TreeLogProbs]:
        """Return the log-probs of each tree, in order."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class ScorerOptions:
    """How the log-probs of a method are computed."""

    shares_prefixes: bool = True
    """A pass computes what several sequences begin with once; False: a pass per continuation."""
    refresh_steps: int = 0
    """The copy of the policy gets its weights after every so many steps; 0: it is the initial policy."""


class TextCodec(Protocol):
    """The part of a tokenizer that answers are encoded with."""

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, without control tokens."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids."""
        ...


class Entailment(Protocol):
    """Judges whether texts entail each other."""

    async def judge(self, pairs: Sequence[tuple[str, str]]) -> list[float | None]:
        """Return P(premise entails hypothesis) of each pair (premise, hypothesis); None where it failed."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Services:
    """What methods measure with; None where the method did not name it in `needs`."""

    render_context: Callable[[Trajectory], str]
    """Return the passages of a trajectory as the text that the policy read."""
    ig_service: IGService | None = None
    codec: TextCodec | None = None
    """Encodes the answers whose log-probs are asked for."""
    answer_wrapper: str = ""
    """Text around an answer whose log-prob is asked for."""
    policy: LogProbScorer | None = None
    frozen: LogProbScorer | None = None
    entailment: Entailment | None = None


class Prefetch:
    """Requests of one step that are sent while its episodes run. This base class sends none."""

    def on_episode_end(self, trajectory: Trajectory) -> None:
        """Send what can be asked of a trajectory whose episode has just ended."""

    async def aclose(self) -> None:
        """Cancel what is under way."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Measurement:
    """The gains of one step, and what measuring them cost."""

    gains: list[list[Gain]]
    """One per trajectory, in order. A failed one has `failure` set, never a number."""
    stats: dict[str, float] = field(default_factory=dict)
    """By metric name."""
    old_log_probs: list[list[FloatArray]] | None = None
    """Log-probs of the sampled tokens under the policy, if the same pass computed them; 0 elsewhere [L]."""


class Algorithm(ABC):
    """A method. Prefetching and measuring do nothing unless a method overrides them; crediting is its own."""

    settings_class: ClassVar[type[AlgorithmConfig]] = AlgorithmConfig
    """Its keys below `algorithm.`, with their defaults and checks."""
    needs: ClassVar[frozenset[Need]] = frozenset()
    outcome: ClassVar[str] = "em"
    """What `reward.outcome=auto` stands for."""
    format: ClassVar[str] = "search_r1"
    """What `agent.format=auto` stands for: what the method was published with."""
    answer_wrapper: ClassVar[str] = ""
    """What `reward.answer_wrapper=auto` stands for; empty where the method asks for no answer's log-prob."""
    compares_outcomes_only: ClassVar[bool] = False
    """Whether a group whose outcomes are all equal gets no advantage, whatever its gains are."""

    def __init__(self, settings: AlgorithmConfig, services: Services) -> None:
        """Take settings of `settings_class` (see `verl.trainer.config.validate`)."""
        self.settings = settings
        self.services = services

    @classmethod
    def scorer_options(cls, settings: Any) -> ScorerOptions:  # noqa: ARG003 (methods read theirs)
        """Return how the log-probs that the method needs are computed, under settings of its class."""
        return ScorerOptions()

    def prefetch(self, questions: Sequence[Question]) -> Prefetch:
        """Begin a step over these questions: return what may send requests while its episodes run."""
        return Prefetch()

    async def measure(self, groups: Sequence[Group], *, prefetch: Prefetch) -> Measurement:
        """Measure the gains of all trajectories of the step that `prefetch` began."""
        return Measurement(gains=[[Gain()] * len(group.trajectories) for group in groups])

    @abstractmethod
    def credit(
        self, groups: Sequence[Group], scores: Sequence[Sequence[Score]], *, progress: float = 0.0
    ) -> list[list[Credit]]:
        """Return one credit per trajectory, in order. Pure; sees the whole batch.

        `progress` is the share of the run that is done, in [0, 1].

        Advantages are 0 outside `policy_mask` and on trajectories whose score failed. Components are named
        `reward`, what the group compares, and as the method likes; metrics, records and the report read them.
        """
