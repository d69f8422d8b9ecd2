"""The seams between the parts of the trainer, on one page; methods have theirs in `verl.algorithms.base`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from verl.types import (
    Completion,
    IntArray,
    Passage,
    Question,
    Sampling,
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
"""Called with every trajectory as soon as its episode has ended."""
