"""Pairs of answers that mean the same or not, drawn from the golds of training questions and made by rule."""

from __future__ import annotations

import calendar
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from random import Random
from typing import Protocol

from IG.prompts import entailment_text
from real.names import MONTHS, of_place
from real.questions import Problem

Pair = tuple[str, str, bool]
"""Two texts, and whether they mean the same."""


class Make(Protocol):
    """Draws a pair of one kind."""

    def __call__(self, rng: Random, *, same: bool) -> tuple[str, str, str]:
        """Return a question and two answers."""
        ...


_SAME_SHARE = 0.45
_MADE_SHARE = 0.35
"""Of the pairs: those whose answers are made up by rule, dates, numbers and persons."""
_COUNTRY_SHARE = 0.1
"""Of the pairs: those that compare subjects of facts, such as `the country whose capital is Nairobi`."""
_PREFIX = 4
"""So many first letters in common make two names look alike."""
_WORDINGS = (
    "{x}.", "It is {x}.", "The answer is {x}.", "The answer is {x}", "That is {x}", "{x} is the answer",
    "in {x}", "called {x}", "the {x}",
)  # fmt: skip
_DETAILS = (
    "from the United Kingdom", "2023 est.", "official", "singular and plural", "approx.", "in all",
)  # fmt: skip
"""What passages write in brackets behind an answer, and models copy."""
_NO_ANSWERS = (
    "", "I do not know", "unknown", "none", "It is not known.", "The context does not say.", "yes", "no",
)  # fmt: skip
_UNITS = (
    ("km", "kilometers", "kilometres"),
    ("m", "meters", "metres"),
    ("sq km", "square kilometers", "km2"),
)
_GIVEN = (
    "John", "Marie", "Peter", "Anna", "Otto", "Ida", "Carl", "Rosa", "Hans", "Lise", "James", "Irene", "Paul",
    "Emma", "Henri", "Clara", "Ahmed", "Fatima", "Li", "Yuki", "Juan", "Elena", "Igor", "Olga",
)  # fmt: skip
_FAMILY = (
    "Smith", "Curie", "Berg", "Klein", "Novak", "Rossi", "Silva", "Tanaka", "Meyer", "Hansen", "Khan",
    "Okoye", "Lopez", "Petrov", "Dubois", "Cohen", "Larsen", "Moretti", "Weber", "Costa", "Singh", "Chen",
)  # fmt: skip
_ONES = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
)  # fmt: skip
_TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")


class PairSource:
    """Draws pairs for the questions of a split."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        self._problems = list(problems)
        self._by_kind: dict[str, list[Problem]] = defaultdict(list)
        for problem in problems:
            self._by_kind[problem.hops[-1].relation.name].append(problem)
        self._alike = {
            kind: names_alike({problem.golds for problem in found}) for kind, found in self._by_kind.items()
        }
        self._bridges = [
            (f"Which is {fact.relation.bridge.format(x=fact.value)}?", _spell_subject(fact.subject))
            for problem in problems
            if (fact := problem.hops[0]).relation.bridge
        ]
        self._subjects_alike = names_alike({_spell_subject(p.hops[0].subject) for p in problems})

    def draw(self, rng: Random) -> Pair:
        """Return a pair behind its question, as the IG service compares answers; a tenth without one."""
        same = rng.random() < _SAME_SHARE
        chance = rng.random()
        phrase = ""
        if chance < _MADE_SHARE:
            question, left, right = rng.choice(MAKERS)(rng, same=same)
        elif chance < _MADE_SHARE + _COUNTRY_SHARE and self._bridges:
            question, left, right = self._choose_subject(rng, same=same)
        else:
            problem = rng.choice(self._problems)
            question, phrase = problem.text, problem.hops[-1].phrase
            left, right = self._choose(problem, rng, same=same)
        left, right = (_reword(text, rng, phrase=phrase) for text in rng.sample([left, right], 2))
        if rng.random() < 0.1:
            return left, right, same
        return entailment_text(question, left), entailment_text(question, right), same

    def _choose(self, problem: Problem, rng: Random, *, same: bool) -> tuple[str, str]:
        left = rng.choice(problem.golds)
        if same:
            return left, rng.choice([g for g in problem.golds if g != left] or [left])
        chance = rng.random()
        if chance < 0.12:
            return left, rng.choice(_NO_ANSWERS)
        if chance < 0.2:
            return left, problem.hops[0].subject
        alike = self._alike[problem.hops[-1].relation.name].get(left, ())
        if chance < 0.5 and (names := [name for name in alike if name not in problem.golds]):
            return left, rng.choice(names)
        others = self._by_kind[problem.hops[-1].relation.name] if chance < 0.9 else self._problems
        for other in rng.sample(others, min(20, len(others))):
            if not set(other.golds) & set(problem.golds):
                return left, _similar(left, other.golds, rng)
        return left, rng.choice(_NO_ANSWERS)

    def _choose_subject(self, rng: Random, *, same: bool) -> tuple[str, str, str]:
        question, spellings = rng.choice(self._bridges)
        left = rng.choice(spellings)
        if same:
            return question, left, rng.choice(spellings)
        if (alike := self._subjects_alike[left]) and rng.random() < 0.8:
            return question, left, rng.choice(alike)
        others = [names for _, names in rng.sample(self._bridges, min(20, len(self._bridges)))]
        other = next((names for names in others if not set(names) & set(spellings)), _NO_ANSWERS)
        return question, left, rng.choice(other)


def names_alike(groups: Iterable[tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
    """Return for each name those that look like it and mean something else, sorted.

    The names of a group mean the same. Two names look alike if they share a word or their first letters, as
    North and South Korea do; a name that holds all words of the other may mean the same, and numbers never
    look alike.
    """
    known = sorted(groups)
    of_key: dict[str, set[str]] = defaultdict(set)
    same: dict[str, set[str]] = defaultdict(set)
    for group in known:
        for name in group:
            same[name].update(group)
            for key in _look(name):
                of_key[key].add(name)

    def is_other(name: str, other: str) -> bool:
        words, others = _words_of(name), _words_of(other)
        return not (same[name] & same[other] or words <= others or others <= words)

    return {
        name: tuple(
            sorted(
                other for other in set().union(*(of_key[key] for key in _look(name))) if is_other(name, other)
            )
        )
        for name in same
    }


def _look(name: str) -> set[str]:
    """Return what names that look alike have in common; nothing for a number."""
    if any(char.isdigit() for char in name):
        return set()
    words = {word for word in _words_of(name) if len(word) >= _PREFIX}
    bare = name.lower().removeprefix("the ")
    return words | ({f"{bare[:_PREFIX]}..."} if len(bare) > _PREFIX else set())


def _words_of(name: str) -> set[str]:
    return set(re.findall(r"\w+", name.lower()))


def _spell_subject(subject: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys((*of_place(subject.removeprefix("the ")), subject)))


def _similar(left: str, golds: Sequence[str], rng: Random) -> str:
    """Return the gold that looks most like `left`, or any."""
    words = set(left.lower().split())
    alike = max(golds, key=lambda gold: len(words & set(gold.lower().split())))
    return alike if rng.random() < 0.7 else rng.choice(golds)


def _reword(text: str, rng: Random, *, phrase: str) -> str:
    """Return an answer as a model may write it; `phrase` says of what it is, as in `capital of Kenya`."""
    chance = rng.random()
    if not text or chance < 0.45:
        return text
    if chance < 0.55:
        return text.lower()
    if chance < 0.7:
        return f"{text} ({rng.choice(_DETAILS)})"
    if chance < 0.85 and phrase:
        return rng.choice((f"The {phrase} is {text}.", f"{phrase[0].upper()}{phrase[1:]}: {text}"))
    return rng.choice(_WORDINGS).format(x=text)


def _write_date(day: int, month: int, year: int, rng: Random) -> str:
    name = MONTHS[month - 1]
    return rng.choice(
        (
            f"{day} {name} {year}", f"{name} {day}, {year}", f"{day} {name[:3]} {year}",
            f"{name} {day} {year}",
            f"{year}-{month:02}-{day:02}", f"on {name} {day}, {year}", f"the {day} of {name} {year}",
        )
    )  # fmt: skip


def _dates(rng: Random, *, same: bool) -> tuple[str, str, str]:
    year, month = rng.randrange(1700, 2026), rng.randrange(1, 13)
    day = rng.randrange(1, calendar.monthrange(year, month)[1] + 1)
    other = (day, month, year)
    if not same:
        other = rng.choice(
            ((day % 28 + 1, month, year), (day, (month + 1) % 12 + 1, year), (day, month, year - 10))
        )
    question = rng.choice(
        ("When was it founded?", "When did this happen?", "On which day was the person born?")
    )
    return question, _write_date(day, month, year, rng), _write_date(*other, rng)


def _years(rng: Random, *, same: bool) -> tuple[str, str, str]:
    year = rng.randrange(1700, 2026)
    date = _write_date(rng.randrange(1, 29), rng.randrange(1, 13), year, rng)
    other = year if same else year + rng.choice((-100, -10, -3, -1, 1, 2, 9, 10, 100))
    asked = rng.choice(("become independent", "begin", "open", "end"))
    return f"In which year did it {asked}?", rng.choice((date, str(year), f"in {year}")), str(other)


def _write_length(value: int, units: Sequence[str], rng: Random) -> str:
    return f"{rng.choice((f'{value:,}', str(value)))} {rng.choice(units)}"


def _lengths(rng: Random, *, same: bool) -> tuple[str, str, str]:
    value, units = rng.randrange(10, 10 ** rng.randrange(2, 7)), rng.choice(_UNITS)
    other = value if same else _other_number(value, rng)
    question = rng.choice(("How long is it?", "How high is it?", "How large is it?", "What is its area?"))
    return question, _write_length(value, units, rng), _write_length(other, units, rng)


def _other_number(value: int, rng: Random) -> int:
    digits = list(str(value))
    at = rng.randrange(len(digits))
    digits[at] = str((int(digits[at]) + rng.randrange(1, 9)) % 10)
    changed = int("".join(digits))
    return value * 10 if changed == value or rng.random() < 0.2 else changed


def _counts(rng: Random, *, same: bool) -> tuple[str, str, str]:
    value = rng.randrange(10**6, 10 ** rng.randrange(7, 10))
    other = value if same else int(value * rng.choice((0.1, 0.5, 0.8, 1.25, 1.5, 2, 10)))
    question = rng.choice(("How many people live there?", "What is the population?", "How many were sold?"))
    rounded = rng.choice(
        (f"{other / 1e6:.1f} million", f"{other / 1e6:.2f} million", f"about {other / 1e6:.1f} million")
    )
    return question, rng.choice((f"{value:,}", str(value), f"{value / 1e6:.1f} million")), rounded


def write_number(value: int) -> str:
    """Return a number below 100 in words."""
    if value < len(_ONES):
        return _ONES[value]
    tens, ones = divmod(value, 10)
    return _TENS[tens - 2] + (f"-{_ONES[ones]}" if ones else "")


def _words(rng: Random, *, same: bool) -> tuple[str, str, str]:
    value = rng.randrange(100)
    other = value if same else rng.choice([n for n in range(100) if n != value])
    question = rng.choice(("What is the atomic number?", "How many are there?", "How old was the person?"))
    return (
        question,
        rng.choice((str(value), write_number(value))),
        rng.choice((str(other), write_number(other))),
    )


def _persons(rng: Random, *, same: bool) -> tuple[str, str, str]:
    given, family = rng.choice(_GIVEN), rng.choice(_FAMILY)
    right = rng.choice(
        (
            f"{given[0]}. {family}",
            family,
            f"{given} {rng.choice(_FAMILY)[0]}. {family}",
            f"Dr. {given} {family}",
        )
    )
    if not same:
        other = rng.choice([name for name in _FAMILY if name != family])
        first = rng.choice([name for name in _GIVEN if name[0] != given[0]])
        right = rng.choice((f"{given} {other}", other, f"{first} {family}", f"{first} {other}"))
    question = rng.choice(
        ("Who discovered it?", "Who wrote it?", "Who was the first president?", "Who directed it?")
    )
    return question, f"{given} {family}", right


def _places(rng: Random, *, same: bool) -> tuple[str, str, str]:
    names = [
        f"{rng.choice(('North', 'South', 'New', 'Port', 'Saint', 'Mount'))} {name}"
        for name in rng.sample(_FAMILY, 2)
    ]
    country = rng.choice(("Kenya", "France", "Peru", "Japan", "Canada", "Texas"))
    left = names[0]
    right = rng.choice(
        (f"{left}, {country}", left.replace("Saint", "St.").replace("Mount", "Mt."), f"the city of {left}")
    )
    if not same:
        right = rng.choice((names[1], f"{names[1]}, {country}", country, left.split()[1] + " River"))
    return (
        rng.choice(("Where was it found?", "What is the capital?", "In which place did it begin?")),
        left,
        right,
    )


MAKERS: tuple[Make, ...] = (_dates, _years, _lengths, _counts, _words, _persons, _places)
"""Return a question and two answers about made-up things, which mean the same or not."""
