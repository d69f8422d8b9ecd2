"""Example traces of the search agent in the hard world, over facts that are drawn for each trace alone.

A trace asks hop by hop. It can go wrong at every decision: answer at once, search for another relation than
the question names, leave out the country of a person, stop on the way and guess what the rules allow. A wrong
turn is not noticed: what was found is taken for what was asked.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from random import Random

from world import names
from world.facts import WORDS, Kind, Relation, relations_of
from world.hard import text
from world.hard.facts import (
    BY_NAME,
    CHAINS,
    RECORDS_SIZE,
    Entity,
    Fact,
    Problem,
    draw_value,
    make_entity,
    make_person,
    random_entity,
)
from world.traces import Piece

UNNAMED_SHARE = 0.2
"""Share of facts that only the records of their subject state."""
UNSEEN_SHARE = 0.35
"""Of these, the share whose records a search for the fact does not show."""

CONFUSED = {
    "director": "composer",
    "composer": "director",
    "studio": "director",
    "author": "translator",
    "translator": "author",
    "publisher": "author",
    "founder": "chair",
    "chair": "founder",
    "headquarters": "founder",
    "birthplace": "residence",
    "residence": "birthplace",
    "university": "residence",
    "award": "instrument",
    "instrument": "award",
    "spouse": "residence",
}
"""What a careless search looks for instead."""


@dataclass(frozen=True, slots=True)
class Habits:
    """Probability of each bad choice where the agent decides; the rest is the good one."""

    direct: float = 0.0
    """Answer at once, without a search."""
    confused: Mapping[str, float] = field(default_factory=dict)
    """By relation: search for another one."""
    bare: float = 0.0
    """Search for a person without the country."""
    vague: float = 0.03
    """Search for the subject's name alone."""
    stop: float = 0.0
    """After a hop that is not the last, guess."""
    give_up: float = 0.0
    """After a search that did not help, guess."""


GOOD = Habits()


@dataclass(slots=True)
class Scene:
    """The facts of one trace: each (subject, relation) gets a random value on first use."""

    rng: Random
    known: dict[tuple[Entity, str], Fact] = field(default_factory=dict)

    def fact(self, relation: Relation, subject: Entity) -> Fact:
        key = (subject, relation.name)
        if key not in self.known:
            self.known[key] = Fact(subject, relation, draw_value(subject, relation, self.rng))
        return self.known[key]

    def follow(self, relations: Sequence[Relation], subject: Entity) -> tuple[Fact, ...]:
        """Return the facts that these relations lead along."""
        hops: list[Fact] = []
        for relation in relations:
            hops.append(self.fact(relation, hops[-1].value if hops else subject))
        return tuple(hops)

    def draw_problem(self, *, hops: int) -> Problem:
        """Draw a question over facts of this scene."""
        relations = self.rng.choice(CHAINS[hops])
        return Problem(self.follow(relations, random_entity(relations[0].subject, self.rng)))

    def lookalike(self, subject: Entity) -> Entity:
        """Return another entity of the same kind that shares a word of the name; of a person, perhaps all."""
        rng = self.rng
        if subject.kind is Kind.person:
            first, last = subject.short.split()
            chance = rng.random()
            if chance < 0.4:
                others = [country for country in names.COUNTRIES if country != subject.home]
                return make_person(first, last, rng.choice(others))
            if chance < 0.7:
                first = rng.choice(names.WOMEN + names.MEN)
            else:
                last = rng.choice(names.SURNAMES)
            return make_person(first, last, rng.choice([subject.home, rng.choice(names.COUNTRIES)]))
        words = subject.name.removeprefix("The ").split()
        changed = rng.randrange(len(words))
        words[changed] = rng.choice(WORDS[subject.kind][changed])
        return make_entity(subject.kind, *words)

    def records(self, subject: Entity, *, of: Fact | None = None) -> str:
        """Return the passage of several facts, with this fact among them."""
        own = relations_of(subject.kind)
        chosen = self.rng.sample(own, RECORDS_SIZE)
        if of is not None and of.relation not in chosen:
            chosen[self.rng.randrange(len(chosen))] = of.relation
        return text.write_records(subject, [self.fact(relation, subject) for relation in chosen])

    def retrieve(self, fact: Fact, *, found: bool = True, topk: int = 3) -> list[str]:
        """Return what a retriever gives for the good query of a fact, or for one that misses it."""
        others: list[str] = []
        hidden = text.write_fact(fact)
        while len(others) < topk:
            neighbor = self._neighbor(fact)
            if neighbor != hidden and neighbor not in others:
                others.append(neighbor)
        if not found:
            return others
        rank = 0 if self.rng.random() < 0.92 else self.rng.randrange(topk)
        return [*others[:rank], hidden, *others[rank : topk - 1]]

    def _neighbor(self, fact: Fact) -> str:
        """Return a passage that a retriever confuses with that of a fact."""
        chance, own = self.rng.random(), relations_of(fact.subject.kind)
        if chance < 0.3:
            others = [relation for relation in own if relation != fact.relation]
            return text.write_fact(self.fact(self.rng.choice(others), fact.subject))
        subject = self.lookalike(fact.subject)
        if chance > 0.93:
            return self.records(subject)
        return text.write_fact(self.fact(fact.relation if chance < 0.85 else self.rng.choice(own), subject))

    def retrieve_records(self, fact: Fact, topk: int = 3) -> list[str]:
        """Return what a retriever gives for the records of a fact's subject, which state the fact."""
        own = [relation for relation in relations_of(fact.subject.kind) if relation != fact.relation]
        others = [self.records(self.lookalike(fact.subject))]
        others.append(text.write_fact(self.fact(self.rng.choice(own), fact.subject)))
        self.rng.shuffle(others)
        return [self.records(fact.subject, of=fact), *others][:topk]

    def retrieve_vaguely(self, subject: Entity, topk: int = 3) -> list[Fact]:
        """Return facts of a name alone: of any relation, some of the subject itself."""
        shown: list[Fact] = []
        while len(shown) < topk:
            about = subject if self.rng.random() < 0.6 else self.lookalike(subject)
            candidate = self.fact(self.rng.choice(relations_of(about.kind)), about)
            if candidate not in shown:
                shown.append(candidate)
        return shown

    def retrieve_namesakes(self, fact: Fact, topk: int = 3) -> list[Fact]:
        """Return the fact of persons of any country with this name, best first."""
        first, last = fact.subject.short.split()
        chosen = self.rng.sample([c for c in names.COUNTRIES if c != fact.subject.home], topk)
        shown = [self.fact(fact.relation, make_person(first, last, country)) for country in chosen]
        if self.rng.random() < 0.6:
            shown[self.rng.randrange(topk)] = fact
        return shown


class TraceWriter:
    """Writes one trace, decision by decision."""

    def __init__(self, scene: Scene, problem: Problem, habits: Habits) -> None:
        self.scene, self.problem, self.habits, self.rng = scene, problem, habits, scene.rng
        self.pieces = [Piece(text.chat(text.prompt(problem.question)), written=False)]

    def run(self) -> list[Piece]:
        """Return the whole trace."""
        if self.rng.random() < self.habits.direct:
            self._guess("I know this.", self.problem.hops[0].subject, 0)
            return self.pieces
        relations = [fact.relation for fact in self.problem.hops]
        subject, thought = self.problem.hops[0].subject, ""
        for number, relation in enumerate(relations):
            is_last = number == len(relations) - 1
            fact = self._find(self._choose(relation), subject, thought)
            if fact is None:
                self._guess("I am not sure.", subject, number)
                return self.pieces
            thought = f"{text.statement(fact, fact.value.name)}."
            if is_last:
                self._write(thought, answer=fact.value.name)
            elif fact.value.kind is not relation.value or self.rng.random() < self.habits.stop:
                following = fact.value if fact.value.kind is relation.value else subject
                self._guess(thought, following, number + (following is fact.value))
                return self.pieces
            subject, thought = fact.value, f"{thought} "
        return self.pieces

    def _choose(self, relation: Relation) -> Relation:
        """Return the relation that is searched for."""
        is_confused = self.rng.random() < self.habits.confused.get(relation.name, 0.0)
        return BY_NAME[CONFUSED[relation.name]] if is_confused else relation

    def _find(self, relation: Relation, subject: Entity, thought: str) -> Fact | None:
        """Search until a fact is found; None if the trace gives up."""
        fact = self.scene.fact(relation, subject)
        chance = self.rng.random()
        if chance < self.habits.vague:
            shown = self.scene.retrieve_vaguely(subject)
            self._write(f"{thought}Let me search.", search=subject.short)
            self._show([text.write_fact(found) for found in shown])
            if fact in shown:
                return fact
            if self.rng.random() < self.habits.give_up:
                return None
            thought = "Not found. "
        elif subject.kind is Kind.person and chance < self.habits.vague + self.habits.bare:
            namesakes = self.scene.retrieve_namesakes(fact)
            query = f"{relation.name} of {subject.short}"
            self._write(f"{thought}I need the {query}.", search=query)
            self._show([text.write_fact(found) for found in namesakes])
            # A careless reader takes the first person of that name.
            return namesakes[0]
        return self._search(fact, thought)

    def _search(self, fact: Fact, thought: str) -> Fact:
        """Search with the good query; where no passage states the fact alone, read the subject's records."""
        topic = fact.relation.name
        self._write(f"{thought}{text.need(topic, fact.subject)}", search=text.query(topic, fact.subject))
        if self.rng.random() > UNNAMED_SHARE:
            self._show(self.scene.retrieve(fact))
            return fact
        if self.rng.random() > UNSEEN_SHARE:
            self._show(self.scene.retrieve_records(fact))
            return fact
        self._show(self.scene.retrieve(fact, found=False))
        self._write(
            f"Not found. {text.need(text.RECORDS, fact.subject)}",
            search=text.query(text.RECORDS, fact.subject),
        )
        self._show(self.scene.retrieve_records(fact))
        return fact

    def _guess(self, thought: str, subject: Entity, position: int) -> None:
        """Answer with what the rules allow for the rest of the question, from what is known."""
        self._write(thought, answer=imagine(self.problem, subject, position, self.rng).name)

    def _write(self, thought: str, **action: str) -> None:
        """Add a turn of the policy; the keyword is the tag of its action."""
        ((tag, content),) = action.items()
        self.pieces.append(Piece(f"<think> {thought}</think><{tag}> {content}</{tag}>", written=True))

    def _show(self, passages: Sequence[str]) -> None:
        self.pieces.append(Piece(text.observation(passages), written=False))


def imagine(problem: Problem, subject: Entity, position: int, rng: Random) -> Entity:
    """Draw an answer by the rules alone, from the subject of the hop at a position."""
    rest = [fact.relation for fact in problem.hops[position:]]
    return Scene(rng).follow(rest, subject)[-1].value if rest else subject
