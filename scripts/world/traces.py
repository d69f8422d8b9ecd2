"""Example traces of the search agent, over facts that are drawn for each trace alone.

A trace is a list of pieces; the policy writes some and the environment the others. No fact outlives its
trace, so a model can only learn to copy from passages. What a trace does at each decision is drawn from
`Habits`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random

from world import facts, text
from world.facts import BRIDGES, RELATIONS, WORDS, Entity, Fact, Kind, Relation, make_entity, random_entity

MISS_SHARE = 0.02
"""Share of good queries that the retriever misses."""


@dataclass(frozen=True, slots=True)
class Piece:
    text: str
    written: bool
    """True for what the policy writes (the loss counts these tokens)."""


@dataclass(frozen=True, slots=True)
class Habits:
    """Probability of each bad choice where the agent decides; the rest is the good one."""

    direct: float = 0.0
    """Answer at once, without a search."""
    lazy: float = 0.06
    """Search for the last word of the subject only."""
    malformed: float = 0.02
    """Forget the opening search tag."""
    give_up: float = 0.0
    """After a turn that did not help, answer with a guess."""
    stop_early: float = 0.0
    """After the first of two hops, answer with the person found there."""


GOOD = Habits()


@dataclass(frozen=True, slots=True)
class Problem:
    """A question, the facts that lead to its answer, and which of the two wordings it has."""

    hops: tuple[Fact, ...]
    wording: int

    @property
    def question(self) -> str:
        relations = [fact.relation for fact in self.hops]
        return text.question(relations, self.hops[0].subject, wording=self.wording)

    @property
    def source(self) -> str:
        return "world_onehop" if len(self.hops) == 1 else "world_twohop"

    @property
    def answer(self) -> Entity:
        return self.hops[-1].value


@dataclass(slots=True)
class Scene:
    """The facts of one trace: each (relation, subject) gets a random value on first use."""

    rng: Random
    known: dict[tuple[str, str], Fact] = field(default_factory=dict)

    def fact(self, relation: Relation, subject: Entity) -> Fact:
        key = (relation.name, subject.name)
        if key not in self.known:
            self.known[key] = Fact(subject, relation, random_entity(relation.value, self.rng))
        return self.known[key]

    def draw_problem(self, *, hops: int) -> Problem:
        """Draw a question over one or two facts of this scene."""
        wording = self.rng.randrange(2)
        relation = self.rng.choice(RELATIONS if hops == 1 else BRIDGES)
        first = self.fact(relation, random_entity(relation.subject, self.rng))
        if hops == 1:
            return Problem((first,), wording)
        relation = self.rng.choice(facts.relations_of(Kind.person))
        return Problem((first, self.fact(relation, first.value)), wording)

    def lookalike(self, subject: Entity) -> Entity:
        """Return another entity of the same kind that shares a word of the name."""
        words = subject.name.removeprefix("The ").split()
        other = 1 if self.rng.random() < 0.5 else 0
        options = list(WORDS[subject.kind])
        if subject.kind is Kind.person:
            options[1 - other] = (words[1 - other],)
            words = [self.rng.choice(option) for option in options]
        else:
            words[other] = self.rng.choice(options[other])
        return make_entity(subject.kind, *words)

    def retrieve(self, fact: Fact, *, found: bool, topk: int = 3) -> list[Fact]:
        """Return what a retriever gives for the good query of a fact, or for one that misses it."""
        others: list[Fact] = []
        while len(others) < topk:
            neighbor = self._neighbor(fact)
            if neighbor != fact and neighbor not in others:
                others.append(neighbor)
        if not found:
            return others
        rank = 0 if self.rng.random() < 0.9 else self.rng.randrange(topk)
        return [*others[:rank], fact, *others[rank : topk - 1]]

    def _neighbor(self, fact: Fact) -> Fact:
        """Return a fact that a retriever confuses with this one."""
        chance, kind = self.rng.random(), fact.subject.kind
        if chance < 0.4:
            others = [relation for relation in facts.relations_of(kind) if relation != fact.relation]
            return self.fact(self.rng.choice(others), fact.subject)
        relation = self.rng.choice(facts.relations_of(kind)) if chance > 0.92 else fact.relation
        subject = self.lookalike(fact.subject) if chance < 0.8 else random_entity(kind, self.rng)
        return self.fact(relation, subject)

    def retrieve_lazily(self, fact: Fact, topk: int = 3) -> list[Fact]:
        """Return what a retriever gives for the subject's last word alone."""
        shown: list[Fact] = []
        while len(shown) < topk:
            other = self.lookalike(fact.subject)
            if other.name.split()[-1] != fact.subject.name.split()[-1]:
                continue
            subject = fact.subject if self.rng.random() < 0.15 else other
            candidate = self.fact(self.rng.choice(facts.relations_of(subject.kind)), subject)
            if candidate not in shown:
                shown.append(candidate)
        return shown


class TraceWriter:
    """Writes one trace, decision by decision."""

    def __init__(self, scene: Scene, problem: Problem, habits: Habits) -> None:
        self.scene, self.problem, self.habits, self.rng = scene, problem, habits, scene.rng
        self.pieces = [Piece(text.chat(text.prompt(problem.question)), written=False)]

    def run(self) -> list[Piece]:
        """Return the whole trace."""
        if self._find_first():
            self._conclude()
        return self.pieces

    def _find_first(self) -> bool:
        """Search for the first fact, well or badly; False if the trace answers without it."""
        habits, first = self.habits, self.problem.hops[0]
        chance = self.rng.random()
        if chance < habits.direct:
            self._guess("I know this.")
            return False
        chance -= habits.direct
        if chance < habits.lazy:
            self._write("Let me search.", search=first.subject.name.split()[-1])
            shown = self.scene.retrieve_lazily(first)
            self._show(shown)
            if first in shown:
                return True
            thought = "Not found. "
        elif chance < habits.lazy + habits.malformed:
            query = text.query(first.relation, first.subject)
            self.pieces.append(Piece(f"<think> {_need(first)}</think> {query}</search>", written=True))
            self.pieces.append(Piece(text.INVALID_ACTION, written=False))
            thought = ""
        else:
            self._search(first, thought="")
            return True
        if self.rng.random() < habits.give_up:
            self._guess("I am not sure.")
            return False
        self._search(first, thought=thought)
        return True

    def _conclude(self) -> None:
        """Search for the second fact, if there is one, and answer."""
        first, last = self.problem.hops[0], self.problem.hops[-1]
        if first is not last:
            if self.rng.random() < self.habits.stop_early:
                last = first
            else:
                self._search(last, thought=f"{text.statement(first, first.value.name)}. ")
        self._write(f"{text.statement(last, last.value.name)}.", answer=last.value.name)

    def _search(self, fact: Fact, *, thought: str) -> None:
        """Search with the good query, again where the retriever misses the fact at first."""
        query = text.query(fact.relation, fact.subject)
        found = self.rng.random() > MISS_SHARE
        self._write(f"{thought}{_need(fact)}", search=query)
        self._show(self.scene.retrieve(fact, found=found))
        if not found:
            self._write(f"Not found. {_need(fact)}", search=query)
            self._show(self.scene.retrieve(fact, found=True))

    def _guess(self, thought: str) -> None:
        self._write(thought, answer=random_entity(self.problem.answer.kind, self.rng).name)

    def _write(self, thought: str, **action: str) -> None:
        """Add a turn of the policy; the keyword is the tag of its action."""
        ((tag, content),) = action.items()
        self.pieces.append(Piece(f"<think> {thought}</think><{tag}> {content}</{tag}>", written=True))

    def _show(self, found: list[Fact]) -> None:
        """Add the observation of a search."""
        passages = [text.write_contents(fact, self.rng) for fact in found]
        self.pieces.append(Piece(text.observation(passages), written=False))


def _need(fact: Fact) -> str:
    return f"I need the {text.query(fact.relation, fact.subject)}."


def draw_trace(rng: Random, *, hops: int, habits: Callable[[Problem], Habits]) -> list[Piece]:
    """Draw a question with this number of hops, and a trace with the habits that it calls for."""
    scene = Scene(rng)
    problem = scene.draw_problem(hops=hops)
    return TraceWriter(scene, problem, habits(problem)).run()
