"""The seams between the parts of the trainer, on one page; methods have theirs in `verl.algorithms.base`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import ClassVar, Protocol

from verl.types import (
    Action,
    Completion,
    IntArray,
    Message,
    Observation,
    Passage,
    Question,
    Sampling,
    ToolCall,
    ToolSpec,
    Trajectory,
    Turn,
)


class EnginePart(StrEnum):
    """What of an engine sleeps while the trainer has the GPU: the tags of vLLM."""

    WEIGHTS = "weights"
    CACHE = "kv_cache"


class Generate(Protocol):
    """Sample one completion."""

    async def generate(self, prompt_ids: IntArray, *, sampling: Sampling) -> Completion:
        """Return one completion. Raises RolloutError."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    """A part of a document of the search engine, as the pieces of its passages that lie in it."""

    title: str
    part: int
    """From 1."""
    num_parts: int
    passages: tuple[Passage, ...]
    """In order; empty where the document has no such part."""


class Search(Protocol):
    """Ask the search engine."""

    async def search(self, query: str) -> tuple[Passage, ...]:
        """Return passages, best first; none when nothing was found. Raises ServiceError when it failed."""
        ...

    async def open_page(self, page_id: str, *, part: int, part_chars: int, timeout_s: float) -> Page | None:
        """Return a part of the document with this passage; None for an unknown id. Raises ServiceError."""
        ...

    async def wait_ready(self, timeout_s: float) -> None:
        """Return once the search engine answers. Raises ServiceError when that takes longer."""
        ...

    async def describe(self) -> Mapping[str, object] | None:
        """Return what the passages depend on; None where that is unknown. Raises ServiceError."""
        ...

    async def aclose(self) -> None:
        """Close all connections."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolResources:
    """What tools may open."""

    open_search: Callable[[], Search] = field(repr=False)
    """Make a client of the search engine that the section `retriever` describes; its owner closes it."""
    tools: tuple[str, ...] = ()
    """Names of all tools that the policy can call."""
    num_replicas: int = 1
    """Engines, each with tools of its own: a tool divides by it what it may use at the same time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FixedText:
    """An entry of the prompt file: the placeholders that it must and may contain."""

    required: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()


class Tool(ABC):
    """Something that the policy can call: one class, one line in `verl.agent.tools.TOOLS`."""

    section: ClassVar[str] = ""
    """The section of the configuration with its settings; empty for a tool without settings."""
    settings_class: ClassVar[type[object]] = object
    """The dataclass of this section."""
    searches: ClassVar[bool] = False
    """Whether it calls the search engine of the section `retriever`."""
    texts: ClassVar[Mapping[str, FixedText]] = {}
    """The entries that the tool needs in its section `tools.NAME` of the prompt file."""
    spec: ToolSpec

    def __init__(  # noqa: B027 (most tools need nothing of it)
        self, settings: object, *, texts: Mapping[str, str], resources: ToolResources
    ) -> None:
        """Take `settings`, an instance of `settings_class`. Nothing is reached before `connect`."""

    async def connect(self, timeout_s: float) -> Mapping[str, object]:  # noqa: ARG002
        """Wait at most `timeout_s` until what the tool calls answers; return what its results depend on.

        Called once, before models are loaded. Raises ServiceError.
        """
        return {}

    @abstractmethod
    async def call(self, arguments: Mapping[str, object], *, deadline: float) -> Observation:
        """Return the result, by `deadline` on the clock of `time.monotonic`.

        A mistake of the policy, such as code with an error, is a text that the policy reads. What is not the
        policy's doing, such as a service that is down, is a `failure`.
        """

    def shorten(self, observation: Observation, max_chars: int) -> Observation:
        """Return the start of an observation, its facts cut like its text, with about `max_chars` characters.

        Fewer characters never give a longer text, and 0 gives at most `spec.shortest_text`.
        """
        return replace(observation, text=observation.text[:max_chars])

    async def aclose(self) -> None:  # noqa: B027
        """Close what the tool has opened. Called once, at the end of the run."""


class PromptFormat(Protocol):
    """How policy and environment write to each other: one class, one line in `verl.agent.formats.FORMATS`."""

    tags: ClassVar[tuple[str, ...]]
    """Markup that stays single tokens where a tokenizer has it as special tokens."""
    texts: ClassVar[Mapping[str, FixedText]]
    """The entries that the format needs in its section of the prompt file."""

    def __init__(self, *, tokenizer: Tokenizer, texts: Mapping[str, str], tools: Sequence[ToolSpec]) -> None:
        """Raise ConfigError for tools that cannot be called in this format."""
        ...

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """Return the texts that end a completion and stay part of it."""
        ...

    @property
    def max_calls(self) -> int:
        """Return the most calls of one completion."""
        ...

    @property
    def ends_when_invalid(self) -> bool:
        """Return whether an invalid action ends the episode; else the policy reads a reply to it."""
        ...

    @property
    def reply_length(self) -> int:
        """Return the number of tokens of the longest reply to an invalid action."""
        ...

    def write_prompt(self, question: str) -> tuple[Message, ...]:
        """Return the instruction, with the list of tools where it has one, and the question."""
        ...

    def check_prompt(self, messages: Sequence[Message]) -> str | None:
        """Return what a prompt from a data file lacks for this format; None if nothing."""
        ...

    def render_prompt(self, question: Question) -> list[int]:
        """Return the ids of the first prompt. Raises ConfigError."""
        ...

    def write_call(self, call: ToolCall) -> str:
        """Return how the policy writes a call: `parse` reads it."""
        ...

    def parse(self, ids: Sequence[int]) -> Action:
        """Return the action of a completion, with its spans. Calls only tools that there are."""
        ...

    def neutralize(self, text: str) -> str:
        """Return a text from outside in which nothing can be taken for markup of the format."""
        ...

    def render_observations(
        self, calls: Sequence[ToolCall], observations: Sequence[Observation]
    ) -> list[int]:
        """Return the ids that the policy reads after the calls of a turn, one observation per call."""
        ...

    def render_retry(self, turn: Turn) -> list[int]:
        """Return the ids that the policy reads after an invalid action."""
        ...


class Tokenizer(Protocol):
    """The part of a tokenizer that prompt formats need."""

    def encode(self, text: str) -> list[int]:
        """Return the ids of a piece of text from outside: no special token is added or made of it."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids, special tokens and spaces kept."""
        ...

    @property
    def control(self) -> Mapping[int, str]:
        """Return the text of every control token by id: only the chat template may write them."""
        ...

    def render_prompt(self, question: Question) -> list[int]:
        """Return the ids of the question's chat prompt with the generation prompt."""
        ...

    def render_next_turn(
        self, text: str, *, role: str = "user", after: Sequence[int] = ()
    ) -> list[int] | None:
        """Return the ids that end a turn of the assistant, hold `text` as a message and begin the next turn.

        The first one is the token that ends a turn, left out where `after`, the ids of that turn, ends with
        it. None where no message of this `role` can follow.
        """
        ...


class Agent(Protocol):
    """Play one episode."""

    async def run(self, question: Question, *, sample: int, seed: int, greedy: bool) -> Trajectory:
        """Return the trajectory; after a failed tool call or completion, one with `stop` FAILED."""
        ...


OnEpisodeEnd = Callable[[Trajectory], None]
"""Called with every trajectory as soon as its episode has ended."""

OnTurn = Callable[[int, Turn], None]
"""Called with the number of a turn (from 0) and the turn: once it is sampled, and again with its reply."""
