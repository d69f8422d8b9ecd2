"""What the questions of both worlds have in common."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from world.facts import Kind, Relation


class Named(Protocol):
    @property
    def name(self) -> str: ...


class Answer(Named, Protocol):
    @property
    def kind(self) -> Kind: ...
    @property
    def golds(self) -> Sequence[str]: ...


class Hop(Protocol):
    """A fact that leads on."""

    @property
    def relation(self) -> Relation: ...
    @property
    def subject(self) -> Named: ...


class Asked(Protocol):
    """A question with the facts that lead to its answer."""

    @property
    def question(self) -> str: ...
    @property
    def source(self) -> str: ...
    @property
    def hops(self) -> Sequence[Hop]: ...
    @property
    def answer(self) -> Answer: ...
