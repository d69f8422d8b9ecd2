"""Entities and facts of the hard world: facts follow rules, so that one document narrows what another says.

People of a country are born in its towns and mostly study, live, win and marry there; a company's kind has
its cities, and a company's name its country. The rules are fixed, whatever the seed: language models learn
them from other facts than those of the corpus.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from random import Random

from world import facts, names
from world.facts import RELATIONS, Kind, Relation, relations_of

LOYALTY = 0.85
"""How often a person's university, residence, award, instrument or spouse is of the person's country."""
RARE = frozenset(names.SURNAMES[::5])
"""Surnames that language models see at a tenth of the rate of the others, while the corpus has them all."""
RARE_WEIGHT = 0.1
RECORDS_SIZE = 2
"""Facts that the records of a subject state."""

BY_NAME = {relation.name: relation for relation in RELATIONS}
BRIDGES = {
    "director": "the one who directed {x}",
    "composer": "the one who wrote the music of {x}",
    "studio": "the company that filmed {x}",
    "author": "the one who wrote {x}",
    "translator": "the one who translated {x}",
    "publisher": "the company that published {x}",
    "founder": "the one who founded {x}",
    "chair": "the one who leads {x}",
    "spouse": "the one who married {x}",
}
"""How a question names what is found on the way; the relation itself is never named."""


@dataclass(frozen=True, slots=True)
class Entity:
    """Something with a name that no other entity has, and all accepted forms of it."""

    kind: Kind
    name: str
    golds: tuple[str, ...]
    home: str = ""
    """Country of a person or a town; kind of a company."""

    @property
    def printed(self) -> str:
        """The form that passages use."""
        return f"{self.name}, {self.home}" if self.kind is Kind.town else self.name

    @property
    def short(self) -> str:
        """The name without the country, which persons of other countries may share."""
        return self.golds[1] if self.kind is Kind.person else self.name


@dataclass(frozen=True, slots=True)
class Fact:
    subject: Entity
    relation: Relation
    value: Entity


def make_person(first: str, last: str, country: str) -> Entity:
    """Return the person of this name and country."""
    title = "Dame" if first in names.WOMEN else "Sir"
    name = f"{first} {last}"
    forms = (f"{name} of {country}", name, f"{title} {name}", f"{first[0]}. {last}")
    return Entity(Kind.person, forms[0], forms, country)


def make_entity(kind: Kind, *words: str) -> Entity:
    """Return the entity of a kind, other than a person, that is named with these words of `facts.WORDS`."""
    plain = facts.make_entity(kind, *words)
    name, home = plain.name, ""
    golds: tuple[str, ...]
    match kind:
        case Kind.town:
            home = plain.alias.removeprefix(f"{name}, ")
            golds = (name, plain.alias, f"{name} in {home}", f"the town of {name}")
        case Kind.university:
            golds = (name, plain.alias, words[0])
        case Kind.award:
            golds = (name, f"{words[1]} of the {words[0]}", f"{name} for early work")
        case Kind.instrument:
            golds = (name, f"the old {name}", f"{name} concerts")
        case Kind.firm:
            home, golds = words[1], (name, plain.alias, f"the company {name}")
        case _:
            golds = (name, plain.alias, f"{kind.value} {name}")
    return Entity(kind, name, golds, home)


COUNTRY_OF_FIRM = {name: names.COUNTRIES[k % len(names.COUNTRIES)] for k, name in enumerate(names.FIRMS)}
_TOWNS = tuple(make_entity(Kind.town, name) for name in names.TOWNS)
_CITIES = {
    kind: tuple(_TOWNS[n] for n in range(k, len(_TOWNS), 9)) for k, kind in enumerate(names.FIRM_KINDS)
}


def _share(
    kind: Kind, pool: Sequence[tuple[str, ...]], offsets: Sequence[int], country: int
) -> tuple[Entity, ...]:
    step = len(pool) // len(names.COUNTRIES)
    return tuple(make_entity(kind, *pool[(country * step + offset) % len(pool)]) for offset in offsets)


def _all_words(kind: Kind) -> list[tuple[str, ...]]:
    words = facts.WORDS[kind]
    return (
        [(first,) for first in words[0]] if len(words) == 1 else [(a, b) for b in words[1] for a in words[0]]
    )


def _rules() -> dict[tuple[Kind, str], tuple[Entity, ...]]:
    """Return what a country has of each kind; countries share universities, awards and instruments."""
    offsets = {
        Kind.university: (0, 1, 7, 12),
        Kind.award: (0, 1, 6, 13, 19, 26, 31, 34),
        Kind.instrument: (0, 1, 5, 8, 14),
    }
    rules = {
        (kind, country): _share(kind, _all_words(kind), chosen, number)
        for kind, chosen in offsets.items()
        for number, country in enumerate(names.COUNTRIES)
    }
    for country in names.COUNTRIES:
        rules[Kind.town, country] = tuple(town for town in _TOWNS if town.home == country)
    return rules


RULES = _rules()
ALL_OF = {
    kind: tuple(make_entity(kind, *words) for words in _all_words(kind))
    for kind in (Kind.town, Kind.university, Kind.award, Kind.instrument)
}


def random_country(rng: Random, *, near: str | None = None) -> str:
    """Return a country: mostly `near`, if given."""
    return near if near and rng.random() < LOYALTY else rng.choice(names.COUNTRIES)


def random_name(rng: Random) -> tuple[str, str]:
    """Return first name and surname, rare surnames seldom."""
    while True:
        last = rng.choice(names.SURNAMES)
        if last not in RARE or rng.random() < RARE_WEIGHT:
            return rng.choice(names.WOMEN + names.MEN), last


def random_entity(kind: Kind, rng: Random, *, country: str | None = None) -> Entity:
    """Return any entity of a kind; a person, mostly, of this country."""
    if kind is Kind.person:
        return make_person(*random_name(rng), random_country(rng, near=country))
    return make_entity(kind, *(rng.choice(words) for words in facts.WORDS[kind]))


def draw_value(subject: Entity, relation: Relation, rng: Random) -> Entity:
    """Draw the value of a fact by the rules, whether or not it is in a particular world."""
    if relation.name == "headquarters":
        return rng.choice(_CITIES[subject.home])
    if relation.value is Kind.person:
        return random_entity(Kind.person, rng, country=country_of(subject))
    if relation.value in ALL_OF:
        if relation.name == "birthplace" or rng.random() < LOYALTY:
            return rng.choice(RULES[relation.value, subject.home])
        return rng.choice(ALL_OF[relation.value])
    return random_entity(relation.value, rng)


def country_of(subject: Entity) -> str | None:
    """Return the country that the name of a person or a company implies."""
    if subject.kind is Kind.firm:
        return COUNTRY_OF_FIRM[subject.name.split()[0]]
    return subject.home if subject.kind is Kind.person else None


def chains(start: Kind, hops: int) -> Iterable[tuple[Relation, ...]]:
    """Yield every sequence of so many relations from a kind that a question can follow."""
    for relation in relations_of(start):
        if hops == 1:
            if relation.name not in BRIDGES or relation.name == "spouse":
                yield (relation,)
        elif relation.name in BRIDGES:
            for rest in chains(relation.value, hops - 1):
                if not (relation.name == "spouse" == rest[0].name):
                    yield (relation, *rest)


STARTS = (Kind.film, Kind.book, Kind.firm)
CHAINS: dict[int, tuple[tuple[Relation, ...], ...]] = {
    hops: tuple(chain for kind in STARTS for chain in chains(kind, hops)) for hops in (2, 3, 4)
}
"""By the number of hops, every sequence of relations that a question asks for."""


def ask(relations: Sequence[Relation], subject: Entity) -> str:
    """Return the question that follows relations, in this order, from a subject."""
    asked = subject.name
    for relation in relations[:-1]:
        asked = BRIDGES[relation.name].format(x=asked)
    return relations[-1].wordings[0].format(x=asked)


@dataclass(frozen=True, slots=True)
class Problem:
    """A question and the facts that lead to its answer."""

    hops: tuple[Fact, ...]

    @property
    def question(self) -> str:
        return ask([fact.relation for fact in self.hops], self.hops[0].subject)

    @property
    def source(self) -> str:
        return f"hard_{len(self.hops)}hop"

    @property
    def answer(self) -> Entity:
        return self.hops[-1].value


@dataclass(frozen=True, slots=True)
class WorldSize:
    persons: int = 280
    films: int = 80
    books: int = 80
    firms: int = 60
    train_questions: int = 2000
    test_questions: int = 300
    examined_questions: int = 120
    """Test questions that come with their passages, for `python -m IG doctor`."""
    test_share: float = 0.25
    """Share of each kind's entities that only test questions ask about."""
    namesake_share: float = 0.3
    """Share of the persons that share their name with a person of another country."""
    shared_title_share: float = 0.3
    """Share of the books that have the title of a film."""
    records_share: float = 0.5
    """Share of the subjects with a second passage that states several of their facts."""
    records_only_share: float = 0.2
    """Of the facts that such a passage states, the share that no other passage states."""


@dataclass(frozen=True, slots=True)
class World:
    facts: tuple[Fact, ...]
    test_subjects: frozenset[Entity]
    """What only test questions ask about."""
    records: dict[Entity, tuple[Fact, ...]]
    """A subject to the facts that its passage of several facts states."""
    only_in_records: frozenset[Fact]

    @property
    def by_key(self) -> dict[tuple[Entity, Relation], Fact]:
        return {(fact.subject, fact.relation): fact for fact in self.facts}


def draw_world(size: WorldSize, *, seed: int) -> World:
    """Draw names, then facts; subjects of the test split are only linked to persons and firms of that split.

    Raises ValueError when there are not enough names.
    """
    rng = Random(f"hard {seed}")
    subjects = _draw_subjects(size, rng)
    num_test = {kind: max(4, round(size.test_share * len(found))) for kind, found in subjects.items()}
    splits = [
        {kind: found[num_test[kind] :] for kind, found in subjects.items()},
        {kind: found[: num_test[kind]] for kind, found in subjects.items()},
    ]
    drawn = [
        Fact(subject, relation, _draw_member(subject, relation, split, rng))
        for split in splits
        for found in split.values()
        for subject in found
        for relation in relations_of(subject.kind)
    ]
    records: dict[Entity, tuple[Fact, ...]] = {}
    hidden: set[Fact] = set()
    for subject in (entity for found in subjects.values() for entity in found):
        if rng.random() >= size.records_share:
            continue
        own = [fact for fact in drawn if fact.subject == subject]
        stated = tuple(rng.sample(own, RECORDS_SIZE))
        records[subject] = stated
        hidden.update(fact for fact in stated if rng.random() < size.records_only_share)
    test = frozenset(entity for found in splits[1].values() for entity in found)
    return World(tuple(drawn), test, records, frozenset(hidden))


def _draw_subjects(size: WorldSize, rng: Random) -> dict[Kind, list[Entity]]:
    num_namesakes = round(size.namesake_share * size.persons / 2)
    persons = []
    for number, words in enumerate(facts.draw_names(Kind.person, size.persons - num_namesakes, rng)):
        for country in rng.sample(names.COUNTRIES, 2 if number < num_namesakes else 1):
            persons.append(make_person(*words, country))
    rng.shuffle(persons)
    num_shared = round(size.shared_title_share * size.books)
    titles = facts.draw_names(Kind.film, size.films + size.books - num_shared, rng)
    films, books = titles[: size.films], titles[size.films - num_shared :]
    rng.shuffle(books)
    return {
        Kind.person: persons,
        Kind.film: [make_entity(Kind.film, *words) for words in films],
        Kind.book: [make_entity(Kind.book, *words) for words in books],
        Kind.firm: [make_entity(Kind.firm, *words) for words in facts.draw_names(Kind.firm, size.firms, rng)],
    }


def _draw_member(subject: Entity, relation: Relation, split: dict[Kind, list[Entity]], rng: Random) -> Entity:
    """Draw a value by the rules; a person or a company from those of the split."""
    if relation.value not in split:
        return draw_value(subject, relation, rng)
    members = [entity for entity in split[relation.value] if entity != subject]
    country = country_of(subject)
    if country and rng.random() < LOYALTY:
        members = [entity for entity in members if entity.home == country] or members
    return rng.choice(members)


def draw_problems(world: World, size: WorldSize, *, split: str, seed: int) -> list[Problem]:
    """Draw questions about the subjects of a split: of 20, 9 take two hops, 7 three and 4 four.

    Raises ValueError when the world is too small.
    """
    rng = Random(f"hard {split} {seed}")
    number = size.train_questions if split == "train" else size.test_questions
    by_key = world.by_key
    starts = [
        fact.subject
        for fact in world.facts
        if (fact.subject in world.test_subjects) == (split == "test") and fact.subject.kind in STARTS
    ]
    drawn: list[Problem] = []
    for hops, share in ((2, 9), (3, 7), (4, 4)):
        found = set()
        for subject in dict.fromkeys(starts):
            for chain in CHAINS[hops]:
                if chain[0].subject is subject.kind:
                    found.add(_follow(by_key, subject, chain))
        possible = sorted(found, key=lambda problem: (problem.question, problem.answer.name))
        wanted = number * share // 20
        if len(possible) < wanted:
            raise ValueError(f"{len(possible)} questions of {hops} hops are too few for {wanted}")
        drawn += rng.sample(possible, wanted)
    rng.shuffle(drawn)
    return drawn


def _follow(
    by_key: dict[tuple[Entity, Relation], Fact], subject: Entity, chain: Sequence[Relation]
) -> Problem:
    hops: list[Fact] = []
    for relation in chain:
        hops.append(by_key[hops[-1].value if hops else subject, relation])
    return Problem(tuple(hops))


def count_namesakes(world: World) -> int:
    """Return the number of persons whose name another person shares."""
    persons = {
        fact.subject.name: fact.subject.short for fact in world.facts if fact.subject.kind is Kind.person
    }
    counts = Counter(persons.values())
    return sum(count for count in counts.values() if count > 1)
