"""Supervised traces of the search agent, over facts that are drawn afresh for every trace.

A trace is a list of pieces; the policy writes some and the environment the others. Facts are fresh so that a
model can only learn to copy from passages. What a trace does at each decision is drawn from `Habits`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random

from world import facts, names, text
from world.facts import BRIDGES, RELATIONS, Entity, Fact, Kind, Relation, random_entity


@dataclass(frozen=True, slots=True)
class Piece:
    text: str
    written: bool
    """True for what the policy writes (the loss counts these tokens)."""


@dataclass(frozen=True, slots=True)
class Habits:
    """Chances of each behaviour where the agent decides; what is left over is the good one."""

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


@dataclass(slots=True)
class Scene:
    """The fresh facts of one trace: each (relation, subject) gets a random value on first use."""

    rng: Random
    known: dict[tuple[str, str], Fact] = field(default_factory=dict)

    def fact(self, relation: Relation, subject: Entity) -> Fact:
        key = (relation.name, subject.name)
        if key not in self.known:
            value = random_entity(relation.value, self.rng)
            self.known[key] = Fact(subject, relation, value)
        return self.known[key]

    def neighbour(self, fact: Fact) -> Fact:
        """A fact that a retriever confuses with this one."""
        chance = self.rng.random()
        if chance < 0.4:
            others = [r for r in facts.relations_of(fact.subject.kind) if r != fact.relation]
            return self.fact(self.rng.choice(others), fact.subject)
        relation = fact.relation
        if chance > 0.92:
            relation = self.rng.choice(facts.relations_of(fact.subject.kind))
        return self.fact(
            relation,
            self.lookalike(fact.subject) if chance < 0.8 else random_entity(fact.subject.kind, self.rng),
        )

    def lookalike(self, subject: Entity) -> Entity:
        """Another entity of the same kind that shares a word of the name."""
        left, right = subject.name.removeprefix("The ").split()
        keep_left = self.rng.random() < 0.5
        if subject.kind is Kind.person:
            firsts = (left,) if keep_left else names.WOMEN + names.MEN
            lasts = names.SURNAMES if keep_left else (right,)
            return facts.person(self.rng.choice(firsts), self.rng.choice(lasts))
        if subject.kind is Kind.firm:
            return facts.firm(
                left if keep_left else self.rng.choice(names.FIRMS),
                self.rng.choice(names.FIRM_KINDS) if keep_left else right,
            )
        return facts.work(
            subject.kind,
            left if keep_left else self.rng.choice(names.ADJECTIVES),
            self.rng.choice(names.NOUNS) if keep_left else right,
        )

    def retrieve(self, fact: Fact, *, found: bool, topk: int = 3) -> list[Fact]:
        """What a retriever gives for the good query of a fact (or for one that misses it)."""
        others: list[Fact] = []
        while len(others) < topk:
            neighbour = self.neighbour(fact)
            if neighbour != fact and neighbour not in others:
                others.append(neighbour)
        if not found:
            return others
        rank = 0 if self.rng.random() < 0.9 else self.rng.randrange(topk)
        return [*others[:rank], fact, *others[rank : topk - 1]]

    def retrieve_lazily(self, fact: Fact, topk: int = 3) -> list[Fact]:
        """What a retriever gives for the subject's last word alone."""
        shown: list[Fact] = []
        while len(shown) < topk:
            last = fact.subject.name.split()[-1]
            other = self.lookalike(fact.subject)
            if other.name.split()[-1] != last:
                continue
            subject = fact.subject if self.rng.random() < 0.15 else other
            candidate = self.fact(self.rng.choice(facts.relations_of(subject.kind)), subject)
            if candidate not in shown:
                shown.append(candidate)
        return shown


@dataclass(frozen=True, slots=True)
class Problem:
    question: str
    hops: tuple[Fact, ...]
    wording: int

    @property
    def source(self) -> str:
        return "world_onehop" if len(self.hops) == 1 else "world_twohop"

    @property
    def answer(self) -> Entity:
        return self.hops[-1].value


def draw_problem(scene: Scene, *, hops: int) -> Problem:
    rng = scene.rng
    wording = rng.randrange(2)
    if hops == 1:
        relation = rng.choice(RELATIONS)
        fact = scene.fact(relation, random_entity(relation.subject, rng))
        return Problem(text.one_hop_question(relation, fact.subject, wording=wording), (fact,), wording)
    bridge = rng.choice(BRIDGES)
    first = scene.fact(bridge, random_entity(bridge.subject, rng))
    relation = rng.choice(facts.relations_of(Kind.person))
    question = text.two_hop_question(bridge, first.subject, relation, wording=wording)
    return Problem(question, (first, scene.fact(relation, first.value)), wording)


def need(fact: Fact) -> str:
    return f"I need the {text.query(fact.relation, fact.subject)}."


class TraceWriter:
    """Writes one trace, decision by decision."""

    def __init__(self, scene: Scene, problem: Problem, habits: Habits) -> None:
        self.scene, self.problem, self.habits = scene, problem, habits
        self.rng = scene.rng
        self.pieces = [Piece(text.chat(text.prompt(problem.question)), written=False)]

    def write(self, words: str) -> None:
        self.pieces.append(Piece(words, written=True))

    def see(self, shown: list[Fact]) -> None:
        passages = [text.passage(fact, self.rng) for fact in shown]
        self.pieces.append(Piece(text.observation(passages), written=False))

    def answer(self, thought: str, entity: Entity) -> None:
        self.write(f"<think> {thought}</think><answer> {entity.name}</answer>")

    def run(self) -> list[Piece]:
        habits, first = self.habits, self.problem.hops[0]
        chance = self.rng.random()
        if chance < habits.direct:
            self.answer("I know this.", random_entity(self.problem.answer.kind, self.rng))
            return self.pieces
        chance -= habits.direct
        if chance < habits.lazy:
            if not self._search_lazily(first):
                return self.pieces
        elif chance < habits.lazy + habits.malformed:
            query = text.query(first.relation, first.subject)
            self.write(f"<think> {need(first)}</think> {query}</search>")
            self.pieces.append(Piece(text.INVALID_ACTION, written=False))
            if self._gives_up():
                return self.pieces
            self._search(first, thought="")
        else:
            self._search(first, thought="")
        self._conclude()
        return self.pieces

    def _search(self, fact: Fact, *, thought: str) -> None:
        query = text.query(fact.relation, fact.subject)
        found = self.rng.random() > 0.02
        self.write(f"<think> {thought}{need(fact)}</think><search> {query}</search>")
        self.see(self.scene.retrieve(fact, found=found))
        if not found:
            self.write(f"<think> Not found. {need(fact)}</think><search> {query}</search>")
            self.see(self.scene.retrieve(fact, found=True))

    def _search_lazily(self, fact: Fact) -> bool:
        """Search for the last word; True if the trace goes on well from there."""
        self.write(f"<think> Let me search.</think><search> {fact.subject.name.split()[-1]}</search>")
        shown = self.scene.retrieve_lazily(fact)
        self.see(shown)
        if fact in shown:
            return True
        if self._gives_up():
            return False
        self._search(fact, thought="Not found. ")
        return True

    def _gives_up(self) -> bool:
        if self.rng.random() >= self.habits.give_up:
            return False
        self.answer("I am not sure.", random_entity(self.problem.answer.kind, self.rng))
        return True

    def _conclude(self) -> None:
        first, last = self.problem.hops[0], self.problem.hops[-1]
        if first is not last:
            if self.rng.random() < self.habits.stop_early:
                self.answer(f"{text.statement(first)}.", first.value)
                return
            self._search(last, thought=f"{text.statement(first)}. ")
        self.answer(f"{text.statement(last)}.", last.value)


def draw_trace(rng: Random, *, hops: int, habits: Callable[[Problem], Habits]) -> list[Piece]:
    scene = Scene(rng)
    problem = draw_problem(scene, hops=hops)
    return TraceWriter(scene, problem, habits(problem)).run()
