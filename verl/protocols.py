"""Every seam on one page: what the parts of the trainer ask of each other, and nothing about who answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Protocol

from verl.types import (
    Completion,
    FloatArray,
    Gain,
    Group,
    IntArray,
    Passage,
    Question,
    Sampling,
    Score,
    Trajectory,
)


class Generate(Protocol):
    """Sample one completion."""

    async def generate(self, prompt_ids: IntArray, *, sampling: Sampling, session: str) -> Completion:
        """`session` keeps the requests of one group on one replica. Raises RolloutError."""
        ...


class Search(Protocol):
    """Ask the search engine."""

    async def search(self, query: str) -> tuple[Passage, ...]:
        """Best first; empty when nothing was found. Raises ServiceError when the search itself failed."""
        ...


class Tokenizer(Protocol):
    """The part of a tokenizer the agent loop needs."""

    def encode(self, text: str) -> list[int]:
        """Ids of a piece of text from outside: no special token is added or made of it."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, special tokens and spaces kept."""
        ...

    def render_prompt(self, question: Question) -> list[int]:
        """Ids of the question's chat prompt with the generation prompt."""
        ...

    def render_next_turn(self, text: str) -> list[int] | None:
        """Ids that end a turn of the assistant, hold `text` of the user and begin the next turn.

        The first one is the token that ends a turn. None where there are no turns.
        """
        ...


class Agent(Protocol):
    """Play one episode."""

    async def run(self, question: Question, *, sample: int, seed: int, greedy: bool) -> Trajectory:
        """Never raises for a failed search or completion: that is a trajectory with `stop` FAILED."""
        ...


OnEpisodeEnd = Callable[[Trajectory], None]
"""Told of every trajectory as soon as its episode has ended."""


class GainEstimator(Protocol):
    """Measure how much the searches of each trajectory informed the model."""

    @property
    def figures(self) -> Mapping[str, float]:
        """What the last `measure` cost, by metric name."""
        ...

    def asking_early(self, questions: Sequence[Question]) -> AbstractAsyncContextManager[OnEpisodeEnd]:
        """Inside, what can be asked before all episodes have ended is asked; told of each episode's end.

        Changes when gains are asked for, not what they are. Nothing of it is left on the way out.
        """
        ...

    async def measure(self, groups: Sequence[Group]) -> list[list[Gain]]:
        """One gain per trajectory, in order. A failed one is a `Gain` with `failure` set, never a number."""
        ...


class CreditRule(Protocol):
    """Turn the scores of one group into per-token advantages."""

    def __call__(self, trajectories: Sequence[Trajectory], scores: Sequence[Score]) -> list[FloatArray]:
        """One array per trajectory, as long as its `token_ids`; 0 outside `policy_mask` and if failed."""
        ...
