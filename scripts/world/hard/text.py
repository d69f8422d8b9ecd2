"""Every text of the hard world that the easy one does not have; both share prompt, tags and observations."""

from __future__ import annotations

from collections.abc import Sequence

from world import text
from world.hard.facts import Entity, Fact

RECORDS = "records"
"""What the passage that states several facts of a subject is searched by."""


def statement(fact: Fact, value: str) -> str:
    """Return the sentence that states a fact with this form of its value, without the full stop."""
    return f"The {query(fact.relation.name, fact.subject)} is {value}"


def query(topic: str, subject: Entity) -> str:
    """Return the query that finds a passage; the topic is a relation's name, or `RECORDS`."""
    return f"{topic} of {subject.name}"


def write_fact(fact: Fact) -> str:
    """Return the corpus line that states one fact."""
    return f'"{fact.subject.name}"\n{statement(fact, fact.value.printed)}.'


def write_records(subject: Entity, facts: Sequence[Fact]) -> str:
    """Return the corpus line that states several facts of a subject."""
    stated = " ".join(f"{statement(fact, fact.value.printed)}." for fact in facts)
    return f'"{subject.name}"\nThe {query(RECORDS, subject)}. {stated}'


def need(topic: str, subject: Entity) -> str:
    """Return the thought before a search."""
    return f"I need the {query(topic, subject)}."


chat, prompt, observation = text.chat, text.prompt, text.observation
documents, short_answer_prompt = text.documents, text.short_answer_prompt
