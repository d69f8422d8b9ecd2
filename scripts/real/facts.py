"""What passages and questions are made from: relations, facts, and records of countries and elements."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

MAX_WORDS = 60
"""Longest text of a passage."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Relation:
    """Something that is asked about a subject; `{x}` stands for it."""

    name: str
    phrase: str
    """Of the line of a passage: `capital of {x}`."""
    question: str
    query: str = ""
    """What to search for, as in `The capital of Kenya is Nairobi`; empty if it is `phrase`."""
    bridge: str = ""
    """The subject by its value, `the country whose capital is {x}`; empty if no question begins with it."""
    leads: str = ""
    """The value, a country, by its subject; empty if no question begins with it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fact:
    """A value of a subject, and the passage that states it."""

    subject: str
    relation: Relation
    golds: tuple[str, ...]
    """Accepted spellings; the first one stands in the passage."""
    contents: str

    @property
    def value(self) -> str:
        """Return the spelling of the passage."""
        return self.golds[0]

    @property
    def phrase(self) -> str:
        """Return the words before the value in the passage, such as `capital of Kenya`."""
        return self.relation.phrase.format(x=self.subject)


@dataclass(slots=True)
class Record:
    """A subject with its passages and facts."""

    subject: str
    kind: str
    passages: list[str] = field(default_factory=list)
    facts: dict[str, Fact] = field(default_factory=dict)

    def add_passages(self, topic: str, parts: Sequence[str], *, most: int | None = None) -> None:
        """Add at most so many passages with these parts in order, as many in one as fit."""
        packed: list[str] = []
        for part in (piece for whole in parts for piece in split(whole)):
            if packed and len(f"{packed[-1]} {part}".split()) <= MAX_WORDS:
                packed[-1] = f"{packed[-1]} {part}"
            else:
                packed.append(part)
        name = self.subject.removeprefix("the ")
        title = f"{name[0].upper()}{name[1:]}: {topic}"
        self.passages += [f'"{title}"\n{text}' for text in packed[:most]]

    def add_fact(self, relation: Relation, golds: tuple[str, ...]) -> None:
        """Add a fact if a passage states its first gold behind the words of the relation."""
        if not golds or len(golds[0].split()) > 8:
            return
        stated = f"{relation.phrase.format(x=self.subject)}: "
        for contents in self.passages:
            _, found, rest = contents.partition(stated[0].upper() + stated[1:])
            if found and golds[0] in rest:
                self.facts[relation.name] = Fact(
                    subject=self.subject, relation=relation, golds=golds, contents=contents
                )
                return


def clean(text: str) -> str:
    """Return text without markup, in one line."""
    plain = re.sub(r"<br\s*/?>|</p>", " ", text)
    plain = html.unescape(html.unescape(re.sub(r"<[^>]+>", "", plain)))
    return re.sub(r"\s+", " ", plain).strip()


def state(phrase: str, text: str) -> str:
    """Return a labelled line, which ends with a full stop."""
    line = f"{phrase}: {text}"
    return line if line.endswith((".", "!", "?")) else f"{line}."


def split(text: str) -> list[str]:
    """Return pieces of at most MAX_WORDS words, cut at the end of a sentence or clause where there is one."""
    pieces: list[str] = []
    for clause in re.split(r"(?<=[.;:]) ", text):
        words = clause.split()
        while words:
            room = MAX_WORDS - len(pieces[-1].split()) if pieces else 0
            if room >= len(words):
                pieces[-1] = " ".join([pieces[-1], *words])
                break
            pieces.append(" ".join(words[:MAX_WORDS]))
            words = words[MAX_WORDS:]
    return pieces
