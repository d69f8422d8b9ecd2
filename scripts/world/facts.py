"""Entities, relations and facts of the closed world, and how a world is drawn from a seed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from random import Random

from world import names


class Kind(StrEnum):
    person = "person"
    town = "town"
    university = "university"
    award = "award"
    instrument = "instrument"
    film = "film"
    book = "book"
    firm = "firm"


@dataclass(frozen=True, slots=True)
class Entity:
    kind: Kind
    name: str
    """The short form, which a good answer uses."""
    aliases: tuple[str, ...]
    """Other accepted forms; the first one is what passages print for towns."""

    @property
    def golds(self) -> list[str]:
        return [self.name, *self.aliases]

    @property
    def printed(self) -> str:
        """The form that passages use."""
        return self.aliases[0] if self.kind is Kind.town else self.name


@dataclass(frozen=True, slots=True)
class Relation:
    name: str
    subject: Kind
    value: Kind
    wordings: tuple[str, str]
    """Questions with `{x}` for the subject: a natural one and one that names the relation."""


@dataclass(frozen=True, slots=True)
class Fact:
    subject: Entity
    relation: Relation
    value: Entity


def _relation(name: str, subject: Kind, value: Kind, question: str, *, pronoun: str = "What") -> Relation:
    return Relation(name, subject, value, (question, f"{pronoun} is the {name} of {{x}}?"))


RELATIONS: tuple[Relation, ...] = (
    _relation("birthplace", Kind.person, Kind.town, "Where was {x} born?"),
    _relation("residence", Kind.person, Kind.town, "Where did {x} live?"),
    _relation("university", Kind.person, Kind.university, "Where did {x} study?"),
    _relation("award", Kind.person, Kind.award, "Which award did {x} win?"),
    _relation("instrument", Kind.person, Kind.instrument, "Which instrument did {x} play?"),
    _relation("spouse", Kind.person, Kind.person, "Who married {x}?", pronoun="Who"),
    _relation("director", Kind.film, Kind.person, "Who directed {x}?", pronoun="Who"),
    _relation("composer", Kind.film, Kind.person, "Who wrote the music of {x}?", pronoun="Who"),
    _relation("studio", Kind.film, Kind.firm, "Which company filmed {x}?"),
    _relation("author", Kind.book, Kind.person, "Who wrote {x}?", pronoun="Who"),
    _relation("translator", Kind.book, Kind.person, "Who translated {x}?", pronoun="Who"),
    _relation("publisher", Kind.book, Kind.firm, "Which company published {x}?"),
    _relation("founder", Kind.firm, Kind.person, "Who founded {x}?", pronoun="Who"),
    _relation("chair", Kind.firm, Kind.person, "Who leads {x}?", pronoun="Who"),
    _relation("headquarters", Kind.firm, Kind.town, "Where is {x} based?"),
)

BRIDGES = tuple(r for r in RELATIONS if r.value is Kind.person and r.subject is not Kind.person)
"""First hops of a two-hop question: from a work or a firm to a person."""


def relations_of(kind: Kind) -> tuple[Relation, ...]:
    return tuple(r for r in RELATIONS if r.subject is kind)


def person(first: str, last: str) -> Entity:
    title = "Dame" if first in names.WOMEN else "Sir"
    return Entity(Kind.person, f"{first} {last}", (f"{title} {first} {last}",))


def town(name: str) -> Entity:
    country = names.COUNTRIES[names.TOWNS.index(name) * 7 % len(names.COUNTRIES)]
    return Entity(Kind.town, name, (f"{name}, {country}",))


def university(name: str) -> Entity:
    return Entity(Kind.university, f"{name} University", (f"University of {name}",))


def award(name: str, kind: str) -> Entity:
    return Entity(Kind.award, f"{name} {kind}", (f"The {name} {kind}",))


def instrument(name: str) -> Entity:
    return Entity(Kind.instrument, name, (f"the {name}",))


def work(kind: Kind, adjective: str, noun: str) -> Entity:
    return Entity(kind, f"The {adjective} {noun}", (f"{adjective} {noun}",))


def firm(name: str, kind: str) -> Entity:
    return Entity(Kind.firm, f"{name} {kind}", (f"{name} {kind} Ltd",))


def random_entity(kind: Kind, rng: Random) -> Entity:
    """Any entity of a kind, whether or not it is in a particular world."""
    makers: dict[Kind, Callable[[], Entity]] = {
        Kind.person: lambda: person(rng.choice(names.WOMEN + names.MEN), rng.choice(names.SURNAMES)),
        Kind.town: lambda: town(rng.choice(names.TOWNS)),
        Kind.university: lambda: university(rng.choice(names.UNIVERSITIES)),
        Kind.award: lambda: award(rng.choice(names.AWARDS), rng.choice(names.AWARD_KINDS)),
        Kind.instrument: lambda: instrument(rng.choice(names.INSTRUMENTS)),
        Kind.film: lambda: work(Kind.film, rng.choice(names.ADJECTIVES), rng.choice(names.NOUNS)),
        Kind.book: lambda: work(Kind.book, rng.choice(names.ADJECTIVES), rng.choice(names.NOUNS)),
        Kind.firm: lambda: firm(rng.choice(names.FIRMS), rng.choice(names.FIRM_KINDS)),
    }
    return makers[kind]()


@dataclass(frozen=True, slots=True)
class WorldSize:
    persons: int = 300
    films: int = 100
    books: int = 100
    firms: int = 60
    train_questions: int = 2000
    test_questions: int = 300
    examined_questions: int = 200
    """Test questions that come with their passages, for `python -m IG doctor`."""
    test_share: float = 0.18
    """Share of each kind's entities that only test questions ask about."""


@dataclass(frozen=True, slots=True)
class World:
    facts: tuple[Fact, ...]
    test_subjects: frozenset[str]
    """Names of the entities that only test questions ask about."""

    def about(self, subject: Entity) -> dict[str, Fact]:
        return {f.relation.name: f for f in self.facts if f.subject == subject}


def _split(entities: Sequence[Entity], share: float) -> tuple[list[Entity], list[Entity]]:
    """(train, test); the entities come in random order already."""
    held_out = max(2, round(share * len(entities)))
    return list(entities[held_out:]), list(entities[:held_out])


def _pairs(first: Sequence[str], second: Sequence[str], count: int, rng: Random) -> list[tuple[str, str]]:
    pairs = [(a, b) for a in first for b in second]
    if count > len(pairs):
        raise ValueError(
            f"{count} names are wanted, but there are only {len(pairs)} like {' '.join(pairs[0])!r}"
        )
    return rng.sample(pairs, count)


def draw_world(size: WorldSize, *, seed: int) -> World:
    """Draw names, then values; subjects of the test split are only linked to persons of the test split.

    Raises ValueError when there are not names enough.
    """
    rng = Random(seed)
    persons = [person(*pair) for pair in _pairs(names.WOMEN + names.MEN, names.SURNAMES, size.persons, rng)]
    titles = _pairs(names.ADJECTIVES, names.NOUNS, size.films + size.books, rng)
    films = [work(Kind.film, *title) for title in titles[: size.films]]
    books = [work(Kind.book, *title) for title in titles[size.films :]]
    firms = [firm(*pair) for pair in _pairs(names.FIRMS, names.FIRM_KINDS, size.firms, rng)]
    facts: list[Fact] = []
    test_subjects: set[str] = set()
    splits = {
        k: _split(e, size.test_share)
        for k, e in ((Kind.person, persons), (Kind.film, films), (Kind.book, books), (Kind.firm, firms))
    }
    for side in (0, 1):
        pools = {kind: split[side] for kind, split in splits.items()}
        for subject in (entity for pool in pools.values() for entity in pool):
            if side == 1:
                test_subjects.add(subject.name)
            for relation in relations_of(subject.kind):
                facts.append(Fact(subject, relation, _draw_value(subject, relation, pools, rng)))
    return World(tuple(facts), frozenset(test_subjects))


def _draw_value(subject: Entity, relation: Relation, pools: dict[Kind, list[Entity]], rng: Random) -> Entity:
    if relation.value not in pools:
        return random_entity(relation.value, rng)
    return rng.choice([entity for entity in pools[relation.value] if entity != subject])
