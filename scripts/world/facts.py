"""Entities, relations and facts of the closed world, and how a world is drawn from a seed."""

from __future__ import annotations

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


WORDS: dict[Kind, tuple[tuple[str, ...], ...]] = {
    Kind.person: (names.WOMEN + names.MEN, names.SURNAMES),
    Kind.town: (names.TOWNS,),
    Kind.university: (names.UNIVERSITIES,),
    Kind.award: (names.AWARDS, names.AWARD_KINDS),
    Kind.instrument: (names.INSTRUMENTS,),
    Kind.film: (names.ADJECTIVES, names.NOUNS),
    Kind.book: (names.ADJECTIVES, names.NOUNS),
    Kind.firm: (names.FIRMS, names.FIRM_KINDS),
}
"""The words that a name of each kind is made of, one list per word."""


@dataclass(frozen=True, slots=True)
class Entity:
    """Something with a name (the short form, which a good answer uses) and one other accepted form."""

    kind: Kind
    name: str
    alias: str

    @property
    def golds(self) -> list[str]:
        return [self.name, self.alias]

    @property
    def printed(self) -> str:
        """The form that passages use."""
        return self.alias if self.kind is Kind.town else self.name


def make_entity(kind: Kind, *words: str) -> Entity:
    """Return the entity of a kind that is named with these words of `WORDS`."""
    name = " ".join(words)
    match kind:
        case Kind.person:
            return Entity(kind, name, f"{'Dame' if words[0] in names.WOMEN else 'Sir'} {name}")
        case Kind.town:
            country = names.COUNTRIES[names.TOWNS.index(name) * 7 % len(names.COUNTRIES)]
            return Entity(kind, name, f"{name}, {country}")
        case Kind.university:
            return Entity(kind, f"{name} University", f"University of {name}")
        case Kind.award:
            return Entity(kind, name, f"The {name}")
        case Kind.instrument:
            return Entity(kind, name, f"the {name}")
        case Kind.film | Kind.book:
            return Entity(kind, f"The {name}", name)
        case Kind.firm:
            return Entity(kind, name, f"{name} Ltd")


def random_entity(kind: Kind, rng: Random) -> Entity:
    """Return any entity of a kind, whether or not it is in a particular world."""
    return make_entity(kind, *(rng.choice(words) for words in WORDS[kind]))


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


def _relation(name: str, subject: Kind, value: Kind, question: str) -> Relation:
    pronoun = "Who" if value is Kind.person else "What"
    return Relation(name, subject, value, (question, f"{pronoun} is the {name} of {{x}}?"))


RELATIONS: tuple[Relation, ...] = (
    _relation("birthplace", Kind.person, Kind.town, "Where was {x} born?"),
    _relation("residence", Kind.person, Kind.town, "Where did {x} live?"),
    _relation("university", Kind.person, Kind.university, "Where did {x} study?"),
    _relation("award", Kind.person, Kind.award, "Which award did {x} win?"),
    _relation("instrument", Kind.person, Kind.instrument, "Which instrument did {x} play?"),
    _relation("spouse", Kind.person, Kind.person, "Who married {x}?"),
    _relation("director", Kind.film, Kind.person, "Who directed {x}?"),
    _relation("composer", Kind.film, Kind.person, "Who wrote the music of {x}?"),
    _relation("studio", Kind.film, Kind.firm, "Which company filmed {x}?"),
    _relation("author", Kind.book, Kind.person, "Who wrote {x}?"),
    _relation("translator", Kind.book, Kind.person, "Who translated {x}?"),
    _relation("publisher", Kind.book, Kind.firm, "Which company published {x}?"),
    _relation("founder", Kind.firm, Kind.person, "Who founded {x}?"),
    _relation("chair", Kind.firm, Kind.person, "Who leads {x}?"),
    _relation("headquarters", Kind.firm, Kind.town, "Where is {x} based?"),
)

BRIDGES = tuple(r for r in RELATIONS if r.value is Kind.person and r.subject is not Kind.person)
"""First hops of a two-hop question: from a work or a firm to a person."""


def relations_of(kind: Kind) -> tuple[Relation, ...]:
    return tuple(r for r in RELATIONS if r.subject is kind)


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


def draw_world(size: WorldSize, *, seed: int) -> World:
    """Draw names, then values; subjects of the test split are only linked to persons of the test split.

    Raises ValueError when there are not enough names.
    """
    rng = Random(seed)
    persons = draw_names(Kind.person, size.persons, rng)
    titles = draw_names(Kind.film, size.films + size.books, rng)
    subjects = {
        Kind.person: [make_entity(Kind.person, *words) for words in persons],
        Kind.film: [make_entity(Kind.film, *words) for words in titles[: size.films]],
        Kind.book: [make_entity(Kind.book, *words) for words in titles[size.films :]],
        Kind.firm: [make_entity(Kind.firm, *words) for words in draw_names(Kind.firm, size.firms, rng)],
    }
    num_test = {kind: max(2, round(size.test_share * len(found))) for kind, found in subjects.items()}
    train = {kind: found[num_test[kind] :] for kind, found in subjects.items()}
    test = {kind: found[: num_test[kind]] for kind, found in subjects.items()}
    facts = [
        Fact(subject, relation, _draw_value(subject, relation, split, rng))
        for split in (train, test)
        for subject in (entity for found in split.values() for entity in found)
        for relation in relations_of(subject.kind)
    ]
    return World(tuple(facts), frozenset(entity.name for found in test.values() for entity in found))


def draw_names(kind: Kind, count: int, rng: Random) -> list[tuple[str, str]]:
    """Return distinct names of a kind that has two words. Raises ValueError when there are not enough."""
    first, second = WORDS[kind]
    pairs = [(a, b) for a in first for b in second]
    if count > len(pairs):
        raise ValueError(
            f"{count} names are wanted, but there are only {len(pairs)} like {' '.join(pairs[0])!r}"
        )
    return rng.sample(pairs, count)


def _draw_value(subject: Entity, relation: Relation, split: dict[Kind, list[Entity]], rng: Random) -> Entity:
    if relation.value not in split:
        return random_entity(relation.value, rng)
    return rng.choice([entity for entity in split[relation.value] if entity != subject])
